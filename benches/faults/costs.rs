//! The cost of detecting faults: comparing calls, and recording calls (flight recorder).

use shardwise::{
    Result, Site,
    comm::{Call, Group, Op, ReduceOp},
    device::{Cpu, DType},
    launch,
    shard::Shape,
};
use std::{hint::black_box, panic::Location, time::Instant};

const ROUNDS: u32 = 200_000;
/// The number of measurements. The bench reports the median.
const REPEATS: usize = 9;

/// Returns the nanoseconds per call of `act`.
fn nanoseconds(mut act: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let begin = Instant::now();
        for _ in 0..ROUNDS {
            act()?;
        }
        times.push(begin.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPEATS / 2])
}

#[track_caller]
fn call(seq: u64) -> Call {
    Call {
        seq,
        op: Op::ReduceScatter,
        started: false,
        reduce: Some(ReduceOp::Sum),
        root: None,
        dtype: Some(DType::F32),
        shape: Shape::new(&[4, 32, 128]),
        partition: 0x1234_5678,
        history: 0,
        group: 7,
        messages: [0; 2],
        site: Site::AtLine(Location::caller()),
    }
}

/// Prints the costs. Returns `Err` if a cost is above its limit.
pub(crate) fn campaign() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut over = false;
    for ranks in [2, 4, 8] {
        let calls: Vec<_> = (0..ranks).map(|_| call(3)).collect();
        // Do what a rank does in a collective: describe its own call, and compare the calls of all
        // ranks with it.
        let mut own = calls[0];
        let time = nanoseconds(|| {
            own = black_box(call(3));
            let differs = black_box(&calls).iter().any(|other| !own.agrees(other));
            assert!(!black_box(differs));
            Ok(())
        })?;
        println!("the comparison of {ranks} ranks' calls: {time:.0} ns a collective (limit 1000)");
        over |= time > 1000.0;
    }
    // A barrier of a group of one rank only records its call.
    let alone = Group::solo(&Cpu::new());
    let time = nanoseconds(|| alone.barrier())?;
    println!("the record of a call: {time:.0} ns (limit 200)");
    over |= time > 200.0;
    let whole = launch::threads(2, |world| nanoseconds(|| world.barrier()))?;
    println!("for comparison, a barrier of two thread ranks with comparison and record: {:.0} ns", whole[0]);
    if over { Err("a cost is above its limit".into()) } else { Ok(()) }
}
