//! Tests the communicator over MPI, and operators on it. `scripts/mpi_tests.sh` runs them.
//!
//! The program starts itself under `mpirun` as 1 to 4 processes. Each process runs the same tests
//! in the same order. 5 to 8 processes run the collectives only.

// Other test binaries share these modules and use all their items.
#[allow(dead_code)]
#[path = "../suite/dev.rs"]
mod dev;
#[allow(dead_code, unused_imports)]
#[path = "../suite/disagree.rs"]
mod disagree;
mod driver;
#[allow(dead_code, unused_imports)]
#[path = "../suite/exact.rs"]
mod exact;
mod failure;
mod layers;
mod training;

use exact::{DTYPES, all_exact, all_in_flight, nan_wins, sums_in_rank_order, with_element};
use shardwise::{
    Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    kernels::Pointwise,
    launch::Mpi,
    shard::{Partition, Shape},
};
use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

/// Ranks stop waiting for a missing rank after this time.
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs the checks that every communicator must pass.
fn everything<B: Pointwise>(group: &Group<B>) -> Result<()> {
    all_exact(group, true)?;
    all_in_flight(group)?;
    for dtype in DTYPES {
        with_element!(dtype, sums_in_rank_order(group))?;
        with_element!(dtype, nan_wins(group))?;
    }
    group.barrier()
}

fn collectives(world: &Group<Cpu>) -> Result<()> {
    everything(world)
}

fn staged_collectives(world: &Group<Cpu>) -> Result<()> {
    let group = world.split_all(0)?;
    everything(&group.staged(&Cpu::poisoned()))
}

/// Collectives of GPU tensors through the host. Prints a line if there is no GPU.
#[cfg(feature = "cuda")]
fn cuda_collectives(world: &Group<Cpu>) -> Result<()> {
    use shardwise::device::Cuda;
    let Ok(gpus @ 1..) = Cuda::count() else {
        println!("NOT RUN: there is no GPU; scripts/cuda_standin.sh runs this without one");
        return Ok(());
    };
    let group = world.split_all(0)?.staged(&Cuda::poisoned(world.rank() % gpus)?);
    all_exact(&group, false)?;
    all_in_flight(&group)
}

fn parts_of_parts(world: &Group<Cpu>) -> Result<()> {
    let half = world.split_all(world.rank() as u64 % 2)?;
    let row = world.split_all(world.rank() as u64 / 2)?;
    // The groups overlap and are used in turn while started collectives are pending.
    let mut open = Vec::new();
    for group in [world, &half, &row] {
        let x = Tensor::<f64>::full(group.device(), [5000], group.rank() as f64 + 1.0)?;
        open.push((group.size(), group.start_all_reduce(ReduceOp::Sum, x)?));
    }
    all_exact(&half, false)?;
    all_exact(&row, false)?;
    for (size, pending) in open.into_iter().rev() {
        let want = (1..=size).sum::<usize>() as f64;
        assert_eq!(pending.wait()?.to_vec()?, vec![want; 5000]);
    }
    Ok(())
}

/// A started collective proceeds while this rank makes other calls. The rank may wait for it later.
fn started_ones_go_on(world: &Group<Cpu>) -> Result<()> {
    let x = Tensor::<f32>::full(world.device(), [100_000], 1.0)?;
    let first = world.start_all_reduce(ReduceOp::Sum, x.clone())?;
    let second = world.start_all_reduce(ReduceOp::Max, x)?;
    let size = world.size() as f32;
    // Even and odd ranks wait in different orders.
    let (first, second) = if world.rank().is_multiple_of(2) {
        let first = first.wait()?;
        (first, second.wait()?)
    } else {
        let second = second.wait()?;
        (first.wait()?, second)
    };
    assert_eq!((first.to_vec()?[99_999], second.to_vec()?[0]), (size, 1.0));
    // A dropped collective is still completed, because the other ranks need it.
    let x = Tensor::<f32>::full(world.device(), [100_000], 1.0)?;
    let pending = world.start_all_reduce(ReduceOp::Sum, x)?;
    if world.rank() == 0 {
        drop(pending)
    } else {
        assert_eq!(pending.wait()?.to_vec()?[1], size)
    }
    Ok(())
}

/// Tensors with more elements than an `int` counts. The test is run by hand: `SHARDWISE_HUGE` is
/// `broadcast`, `exchange` or `sum`, and each rank takes 16 GiB. With
/// `SHARDWISE_HUGE_ELEMENTS=1073741834` only the number of bytes exceeds the limit, and each rank
/// takes half as much.
fn huge(world: &Group<Cpu>) -> Result<()> {
    let Some(which) = std::env::var_os("SHARDWISE_HUGE") else { return Ok(()) };
    let elements = std::env::var("SHARDWISE_HUGE_ELEMENTS").ok().and_then(|elements| elements.parse().ok());
    let (len, rank) = (elements.unwrap_or(i32::MAX as usize + 10), world.rank());
    let all = |x: &Tensor<half::bf16>, want: f32| x.slice().iter().all(|value| value.to_f32() == want);
    let mut x = Tensor::<half::bf16>::full(world.device(), [len], rank as f64)?;
    world.broadcast(1, &mut x)?;
    assert!(all(&x, 1.0), "broadcast");
    if which == "sum" {
        let partition = Partition::from_sizes((0..world.size()).map(|rank| if rank == 0 { len } else { 0 }));
        let part = world.reduce_scatter(ReduceOp::Sum, &x, 0, &partition)?;
        assert!(all(&part, world.size() as f32), "reduce_scatter");
        return Ok(());
    }
    match rank {
        _ if which != "exchange" => Ok(()),
        0 => world.exchange(Some((1, &x)), None).map(drop),
        1 => {
            drop(x);
            let x = world.exchange::<half::bf16>(None, Some((0, Shape::new(&[len]))))?;
            assert!(x.is_some_and(|x| all(&x, 1.0)), "exchange");
            Ok(())
        }
        _ => Ok(()),
    }
}

type Test = fn(&Group<Cpu>) -> Result<()>;

const TESTS: &[(&str, Test)] = &[
    ("collectives are exact", collectives),
    ("staged collectives are exact", staged_collectives),
    #[cfg(feature = "cuda")]
    ("collectives of CUDA tensors are exact", cuda_collectives),
    ("groups overlap", parts_of_parts),
    ("started collectives go on", started_ones_go_on),
    ("blocks have the bits of thread ranks", layers::blocks),
    ("models have the bits of thread ranks", layers::models),
    ("chunks have the bits of thread ranks' whole collectives", layers::chunks),
    ("invariant sums have the bits of one rank", layers::invariant),
    ("training has the bits of one rank", training::invariant),
    ("disagreement is the same error on every rank", failure::disagreement),
    ("an unexpected message is a disagreement", failure::unexpected_message),
    ("a rank that leaves a group is named", failure::lost_rank),
    ("cycles leave nothing", failure::cycles),
];

/// The test with huge tensors, run by hand on a machine with enough memory.
const HUGE: &[(&str, Test)] = &[("huge tensors", huge)];

/// The tests for more than four processes.
const COLLECTIVES: &[(&str, Test)] = &[("collectives are exact", |world| all_exact(world, false))];

fn main() -> ExitCode {
    if std::env::var_os(driver::STARTED).is_none() {
        driver::drive();
        return ExitCode::SUCCESS;
    }
    if let Some(code) = failure::scenario() {
        return code;
    }
    // Thread ranks, which run for comparison, may print panics. Of the processes only rank 0 prints
    // lines.
    let mut mpi = Mpi::new().deadline(DEADLINE);
    if std::env::var_os("SHARDWISE_PIECES").is_some() {
        // Splits every message of more than 4 KiB. Without this limit only messages of more than
        // 2³¹ `u64` values are split.
        mpi = mpi.message_limit(4096);
    }
    let done = mpi.run(|world| {
        let collectives_only = std::env::var_os("SHARDWISE_EXACT").is_some();
        let huge = std::env::var_os("SHARDWISE_HUGE").is_some();
        let tests = if huge { HUGE } else { TESTS };
        for (name, test) in if collectives_only { COLLECTIVES } else { tests } {
            let begin = Instant::now();
            test(&world)?;
            world.barrier()?;
            if world.rank() == 0 {
                println!("ok: {name}, on {} processes ({:.1?})", world.size(), begin.elapsed());
            }
        }
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
