//! Disagreements of thread ranks: each field of a call that may differ, in every collective that
//! has it.

use half::bf16;
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, ReduceOp},
    device::{Cpu, Element},
    launch::Threads,
    shard::Partition,
};
use std::time::{Duration, Instant};

/// A call on a `[12, 12]` or `[144, 60]` tensor. A test changes one of the fields.
#[derive(Clone, Copy, Debug, PartialEq)]
struct TestCall {
    op: &'static str,
    started: bool,
    reduce: ReduceOp,
    root: usize,
    narrow: bool,
    shape: [usize; 2],
    dim: usize,
    slanted: bool,
    /// Whether the rank makes another call first.
    extra: bool,
}

const OPS: [&str; 6] = ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "split"];
const FIELDS: [&str; 9] = [
    "sequence number",
    "operation",
    "start",
    "reduction",
    "root",
    "element",
    "shape",
    "partition dimension",
    "partition sizes",
];

impl TestCall {
    /// Returns the call with one field changed, in one of several variants. Returns `None` if the
    /// operation does not have that field.
    fn change(self, field: &str, variant: usize) -> Option<Self> {
        let has_data = !["barrier", "split"].contains(&self.op);
        let startable = ["all_reduce", "all_gather", "reduce_scatter"].contains(&self.op);
        let is_sharded = ["all_gather", "reduce_scatter"].contains(&self.op);
        let other = OPS[(OPS.iter().position(|op| *op == self.op)? + 1 + variant % 5) % 6];
        match field {
            "sequence number" => Some(Self { extra: true, ..self }),
            "operation" if self.started => None,
            "operation" => Some(Self { op: other, ..self }),
            "start" if startable => Some(Self { started: !self.started, ..self }),
            "reduction" if ["all_reduce", "reduce_scatter"].contains(&self.op) => {
                Some(Self { reduce: [ReduceOp::Max, ReduceOp::Min][variant % 2], ..self })
            }
            "root" if self.op == "broadcast" => Some(Self { root: 1, ..self }),
            "element" if has_data => Some(Self { narrow: true, ..self }),
            "shape" if has_data => {
                let [rows, cols] = self.shape;
                Some(Self { shape: [[cols * 2, rows], [rows * 4, cols]][variant % 2], ..self })
            }
            "partition dimension" if is_sharded => Some(Self { dim: 1, ..self }),
            "partition sizes" if is_sharded => Some(Self { slanted: true, ..self }),
            _ => None,
        }
    }

    fn run(self, group: &Group<Cpu>) -> Result<()> {
        if self.extra {
            // Do not wait for this all-reduce, so that only the sequence number of the next call
            // differs.
            drop(group.start_all_reduce(ReduceOp::Sum, Tensor::<f32>::zeros(group.device(), [3])?)?);
        }
        if self.narrow { self.call::<bf16>(group) } else { self.call::<f32>(group) }
    }

    /// Makes the call. Panics if the call fails and has changed its tensor.
    fn call<T: Element>(self, group: &Group<Cpu>) -> Result<()> {
        let size = group.size();
        let len = self.shape[self.dim];
        let partition = if self.slanted {
            Partition::from_sizes((0..size).map(|rank| if rank == 0 { len + 1 - size } else { 1 }))
        } else {
            Partition::even(len, size)
        };
        let mut shape = self.shape;
        if self.op == "all_gather" {
            shape[self.dim] = partition.size(group.rank());
        }
        let own = group.rank() as f64 + 1.0;
        let mut x = Tensor::<T>::full(group.device(), shape, own)?;
        let result = match (self.op, self.started) {
            ("all_reduce", false) => group.all_reduce(self.reduce, &mut x),
            ("all_reduce", true) => group.start_all_reduce(self.reduce, x.clone())?.wait().map(drop),
            ("all_gather", false) => group.all_gather(&x, self.dim, &partition).map(drop),
            ("all_gather", true) => group.start_all_gather(x.clone(), self.dim, &partition)?.wait().map(drop),
            ("reduce_scatter", false) => {
                group.reduce_scatter(self.reduce, &x, self.dim, &partition).map(drop)
            }
            ("reduce_scatter", true) => {
                group.start_reduce_scatter(self.reduce, x.clone(), self.dim, &partition)?.wait().map(drop)
            }
            ("broadcast", _) => group.broadcast(self.root, &mut x),
            ("split", _) => group.split(Some(0), 0).map(drop),
            _ => group.barrier(),
        };
        if result.is_err() {
            assert!(x.to_vec()?.iter().all(|value| value.to_f64() == own), "a buffer has changed");
        }
        result
    }
}

/// Tries every disagreement `repeats` times. Returns an error if a rank did not receive the same
/// error as the others, or if a buffer has changed.
pub(crate) fn campaign(repeats: u64, limits: bool) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut times = Vec::new();
    let mut wrong = Vec::new();
    let mut cases = 0;
    for (op, field, variant) in
        OPS.iter().flat_map(|op| FIELDS.iter().flat_map(move |f| (0..10).map(move |v| (*op, *f, v))))
    {
        // Use payloads below and above the size from which ranks read each other's memory.
        let shape = [[12, 12], [144, 60]][variant / 5];
        let usual = TestCall {
            op,
            started: false,
            reduce: ReduceOp::Sum,
            root: 0,
            narrow: false,
            shape,
            dim: 0,
            slanted: false,
            extra: false,
        };
        let Some(odd_one) = usual.change(field, variant) else { continue };
        for world in [2, 3, 4] {
            for odd in 0..world {
                for _ in 0..repeats {
                    cases += 1;
                    // The errors of all ranks must be equal. They name the same rank numbers and
                    // call sites, because all ranks are in one process.
                    let outcomes =
                        Threads::new(world).deadline(Duration::from_secs(10)).run_each(|group| {
                            group.barrier()?;
                            let begin = Instant::now();
                            let outcome =
                                if group.rank() == odd { odd_one.run(&group) } else { usual.run(&group) };
                            let error = outcome.and_then(|()| group.barrier());
                            Ok((error, begin.elapsed()))
                        })?;
                    let mut first = None;
                    for outcome in outcomes {
                        match outcome {
                            Ok((Err(Error::Mismatch(mismatch)), time))
                                if *first.get_or_insert(mismatch.clone()) == mismatch =>
                            {
                                times.push(time);
                            }
                            other => wrong
                                .push(format!("{op}, {field} ({variant}), rank {odd} of {world}: {other:?}")),
                        }
                    }
                }
            }
        }
    }
    times.sort_unstable();
    let quantile = |part: f64| {
        times.get((part * times.len() as f64) as usize).or(times.last()).copied().unwrap_or_default()
    };
    println!("disagreements: {cases} of {} fields, {} errors received", FIELDS.len(), times.len());
    println!(
        "from the call to the error: median {:.0?}, p99 {:.0?}, largest {:.0?}",
        quantile(0.5),
        quantile(0.99),
        quantile(1.0)
    );
    println!("missing or different errors: {}", wrong.len());
    wrong.iter().take(10).for_each(|line| println!("{line}"));
    if limits && quantile(0.99) > crate::LIMIT {
        return Err("ranks received the error late".into());
    }
    if wrong.is_empty() { Ok(()) } else { Err("a rank did not receive the error of a disagreement".into()) }
}
