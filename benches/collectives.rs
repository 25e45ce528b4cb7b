//! Collectives of thread ranks: time, bandwidth, and the number of wrong elements.
//!
//! `cargo bench --bench collectives [-- --quick] [--json FILE]`. All ranks repeat a collective in
//! one group, and rank 0 times a batch of repetitions between two barriers. `algbw` is the size of
//! the whole tensor divided by the median time. `busbw` is algbw times the factor of nccl-tests:
//! 2 (n − 1) / n for an all-reduce, (n − 1) / n for the other collectives.

use clap::Parser;
use half::bf16;
use shardwise::{
    Result, Tensor,
    comm::{Group, Op, ReduceOp},
    device::{Cpu, Element},
    launch,
    shard::Partition,
};
use std::{path::PathBuf, time::Instant};

/// Measures the collectives of thread ranks.
#[derive(Parser)]
struct Options {
    /// Also writes the rows to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Makes few repetitions, to check the results and not the speed.
    #[arg(long)]
    quick: bool,
    /// Passed by `cargo bench`; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One measured case.
struct Row {
    ranks: usize,
    op: Op,
    dtype: String,
    bytes: usize,
    median: f64,
    least: f64,
    wrong: usize,
}

impl Row {
    fn algbw(&self) -> f64 {
        self.bytes as f64 / self.median
    }

    fn busbw(&self) -> f64 {
        let once = (self.ranks - 1) as f64 / self.ranks as f64;
        self.algbw() * if self.op == Op::AllReduce { 2.0 * once } else { once }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "ranks": self.ranks, "op": self.op.name(), "dtype": self.dtype, "bytes": self.bytes,
            "median_s": self.median, "min_s": self.least, "algbw_bytes_per_s": self.algbw(),
            "busbw_bytes_per_s": self.busbw(), "wrong": self.wrong,
        })
    }
}

/// Returns the element of rank `rank` at index `at`. Sums of a few such elements are exact in every
/// element type and order.
fn value(rank: usize, at: usize) -> f64 {
    ((at * 7 + rank * 3) % 8) as f64
}

/// Times one collective on a whole tensor of `len` elements.
fn measure<T: Element>(world: &Group<Cpu>, op: Op, len: usize, quick: bool) -> Result<Row> {
    let (ranks, rank, device) = (world.size(), world.rank(), world.device());
    let partition = Partition::even(len, ranks);
    let own = partition.range(rank);
    let filled = |range: std::ops::Range<usize>| {
        let values: Vec<T> = range.map(|at| T::from_f64(value(rank, at))).collect();
        Tensor::from_slice(device, [values.len()], &values)
    };
    let sum = |at: usize| (0..ranks).map(|rank| value(rank, at)).sum::<f64>();
    let owner = |at: usize| (0..ranks).find(|&rank| partition.range(rank).contains(&at)).unwrap_or(0);
    let wrong = |got: Tensor<T>, start: usize, want: &dyn Fn(usize) -> f64| -> Result<usize> {
        let values = got.to_vec()?;
        Ok(values.iter().enumerate().filter(|(at, got)| got.to_f64() != want(start + at)).count())
    };

    let mut x = if op == Op::AllGather { filled(own.clone())? } else { filled(0..len)? };
    let once = |x: &mut Tensor<T>| -> Result<Option<Tensor<T>>> {
        match op {
            Op::AllReduce => world.all_reduce(ReduceOp::Sum, x).map(|()| None),
            Op::AllGather => world.all_gather(x, 0, &partition).map(Some),
            _ => world.reduce_scatter(ReduceOp::Sum, x, 0, &partition).map(Some),
        }
    };
    let wrong = match (once(&mut x)?, op) {
        (None, _) => wrong(std::mem::replace(&mut x, filled(0..len)?), 0, &sum)?,
        (Some(whole), Op::AllGather) => wrong(whole, 0, &|at| value(owner(at), at))?,
        (Some(part), _) => wrong(part, own.start, &sum)?,
    };
    // All-reduces repeat in place, so start from zeros. The time does not depend on the values.
    if op == Op::AllReduce {
        x = Tensor::zeros(device, [len])?;
    }
    let bytes = len * size_of::<T>();
    let (batches, repeats) = if quick { (1, 2) } else { (21, ((64 << 20) / bytes).clamp(4, 2000)) };
    let mut times = Vec::new();
    for batch in 0..=batches {
        world.barrier()?;
        let start = Instant::now();
        for _ in 0..repeats {
            drop(once(&mut x)?);
        }
        world.barrier()?;
        // The first batch warms up.
        if batch > 0 {
            times.push(start.elapsed().as_secs_f64() / repeats as f64);
        }
    }
    times.sort_by(f64::total_cmp);
    let (least, median) = (times[0], times[times.len() / 2]);
    let mut all = Tensor::from_slice(device, [1], &[wrong as f64])?;
    world.all_reduce(ReduceOp::Sum, &mut all)?;
    let wrong = all.to_vec()?[0] as usize;
    Ok(Row { ranks, op, dtype: T::DTYPE.to_string(), bytes, median, least, wrong })
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let options = Options::parse();
    println!(
        "{:>5} {:<14} {:<5} {:>9} {:>11} {:>11} {:>11} {:>11} {:>6}",
        "ranks", "operation", "dtype", "bytes", "median us", "min us", "algbw GB/s", "busbw GB/s", "wrong"
    );
    let mut rows = Vec::new();
    for ranks in [2, 4] {
        let measured = launch::threads(ranks, |world| {
            let mut rows = Vec::new();
            for op in [Op::AllReduce, Op::AllGather, Op::ReduceScatter] {
                for bytes in [4 << 10, 64 << 10, 1 << 20, 16 << 20] {
                    rows.push(measure::<f32>(&world, op, bytes / 4, options.quick)?);
                }
            }
            rows.push(measure::<bf16>(&world, Op::AllReduce, (1 << 20) / 2, options.quick)?);
            Ok(rows)
        })?;
        for row in measured.into_iter().next().unwrap_or_default() {
            let (us, gb) = (|time: f64| time * 1e6, |rate: f64| rate / 1e9);
            println!(
                "{:>5} {:<14} {:<5} {:>9} {:>11.2} {:>11.2} {:>11.2} {:>11.2} {:>6}",
                row.ranks,
                row.op.name(),
                row.dtype,
                row.bytes,
                us(row.median),
                us(row.least),
                gb(row.algbw()),
                gb(row.busbw()),
                row.wrong
            );
            rows.push(row);
        }
    }
    if let Some(path) = options.json {
        let rows: Vec<_> = rows.iter().map(Row::json).collect();
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    let wrong: usize = rows.iter().map(|row| row.wrong).sum();
    if wrong > 0 {
        return Err(format!("{wrong} wrong elements").into());
    }
    Ok(())
}
