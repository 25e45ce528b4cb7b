//! The cases of `scripts/peers/gloo_faults.py` on two thread ranks: the error that rank 0 receives
//! for rank 1's fault, and the time until the error. (`--processes` has processes that exit, are
//! killed or stopped.)

use shardwise::{
    Error, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::Threads,
    shard::Partition,
};
use std::time::{Duration, Instant};

type Act = fn(&Group<Cpu>) -> Result<()>;

/// The number of repeats. The table has the median time.
const REPEATS: usize = 201;

fn reduce(group: &Group<Cpu>, op: ReduceOp, shape: &[usize]) -> Result<()> {
    group.all_reduce(op, &mut Tensor::<f32>::full(group.device(), shape, 1.0)?)
}

/// The name of a case, the call of rank 0, and the call of rank 1.
const CASES: [(&str, Act, Act); 8] = [
    (
        "all_reduce of 100 and of 50 elements",
        |group| reduce(group, ReduceOp::Sum, &[100]),
        |group| reduce(group, ReduceOp::Sum, &[50]),
    ),
    (
        "all_reduce of [2, 3] and of [3, 2]",
        |group| reduce(group, ReduceOp::Sum, &[2, 3]),
        |group| reduce(group, ReduceOp::Sum, &[3, 2]),
    ),
    (
        "all_reduce of f32 and of f64",
        |group| reduce(group, ReduceOp::Sum, &[64]),
        |group| group.all_reduce(ReduceOp::Sum, &mut Tensor::<f64>::full(group.device(), [64], 1.0)?),
    ),
    (
        "all_reduce by sum and by max",
        |group| reduce(group, ReduceOp::Sum, &[4]),
        |group| reduce(group, ReduceOp::Max, &[4]),
    ),
    (
        "broadcast from rank 0 and from rank 1",
        |group| group.broadcast(0, &mut Tensor::<f32>::full(group.device(), [4], 1.0)?),
        |group| group.broadcast(1, &mut Tensor::<f32>::full(group.device(), [4], 1.0)?),
    ),
    (
        "all_reduce and all_gather",
        |group| reduce(group, ReduceOp::Sum, &[4]),
        |group| {
            let part = Tensor::<f32>::full(group.device(), [4], 1.0)?;
            group.all_gather(&part, 0, &Partition::even(8, 2)).map(drop)
        },
    ),
    ("a rank returns", |group| reduce(group, ReduceOp::Sum, &[64]), |_| Ok(())),
    ("a rank panics", |group| reduce(group, ReduceOp::Sum, &[64]), |_| panic!("injected")),
];

/// Prints a Markdown table. Returns an error if rank 0 did not receive the right error.
pub(crate) fn print() -> std::result::Result<(), Box<dyn std::error::Error>> {
    println!("| fault of rank 1 | rank 0 | after | names rank 1 |\n|---|---|---:|---|");
    for (name, act, fault) in CASES {
        let (mut times, mut message) = (Vec::new(), String::new());
        for _ in 0..REPEATS {
            let outcomes = Threads::new(2).deadline(Duration::from_secs(10)).run_each(|group| {
                // Synchronizes the ranks.
                reduce(&group, ReduceOp::Sum, &[1])?;
                let begin = Instant::now();
                if group.rank() == 1 {
                    let _ = fault(&group);
                    return Ok(None);
                }
                let error = act(&group).err();
                Ok(error.map(|error| (error, begin.elapsed())))
            })?;
            let Some(Ok(Some((error, time)))) = outcomes.into_iter().next() else {
                return Err(format!("{name}: rank 0 received no error").into());
            };
            if !matches!(error, Error::Mismatch(_) | Error::PeerLost { rank: 1, .. }) {
                return Err(format!("{name}: {error}").into());
            }
            times.push(time);
            message = error.to_string();
        }
        times.sort_unstable();
        println!("| {name} | {message} | {:.0?} | yes |", times[REPEATS / 2]);
    }
    Ok(())
}
