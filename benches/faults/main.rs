//! Fault injection: one rank is lost at a random point of a random program. Every other rank must
//! quickly receive an error that names the lost rank. If ranks make different calls, every rank
//! must receive an error.
//!
//! `cargo bench --bench faults [-- --trials 10000] [--seed 1]`: thread ranks. A trial has 2, 3, 4
//! or 8 ranks, which make some random collectives. One rank panics, returns early or returns an
//! error: before a collective, between its start and its end, or after it. Every other rank must
//! receive `Error::PeerLost` with that rank's number. The bench measures the time from the fault to
//! the error. It fails if an error names a wrong rank, or if a rank hangs past the deadline of ten
//! seconds.
//!
//! The bench then tests disagreements: one rank changes one field of a call, for each field of each
//! collective. Every rank must receive the same error, and no buffer may change. The bench then
//! makes, breaks and drops groups: descriptors, threads and memory must not grow. `--limits` also
//! checks time limits (errors within ten milliseconds at p99), and measures the cost of the checks.
//!
//! `--processes 100` and `--tls 100` (feature `cli`), `--nccl 100` (features `cli` and `nccl`; up
//! to eight GPUs) and `--mpi 100` (feature `mpi`): ranks are processes. One rank panics, returns,
//! fails, exits, is killed or is stopped. The last three faults may occur at any moment, also
//! during a transfer. The job must name the right rank and end within a second. If the rank was
//! stopped, the job may take 1.1 deadlines longer than that.

mod costs;
mod cycles;
#[cfg(feature = "tls")]
#[path = "../keys/mod.rs"]
mod keys;
mod mismatch;
mod processes;
mod table;
mod threads;
mod trial;

use clap::Parser;
use processes::Launcher;
use std::{path::PathBuf, time::Duration};

/// The limit of the 99th percentile of the time until a rank receives the error.
const LIMIT: Duration = Duration::from_millis(10);

/// Injects faults.
#[derive(Parser)]
struct Args {
    /// The number of faults on thread ranks.
    #[arg(long, default_value_t = 10_000)]
    trials: u64,
    /// How often each disagreement is repeated on thread ranks.
    #[arg(long, default_value_t = 3)]
    mismatches: u64,
    /// The number of groups that are made, broken and dropped.
    #[arg(long, default_value_t = 1000)]
    cycles: u64,
    /// Also checks three times against their limits: the time until a rank receives an error, the
    /// time to compare calls, and the time to record a call. Needs an idle machine.
    #[arg(long)]
    limits: bool,
    /// The number of faults on processes started by `shardwise launch`.
    #[arg(long, default_value_t = 0)]
    processes: u64,
    /// The number of faults on processes started by `shardwise launch --tls`.
    #[arg(long, default_value_t = 0)]
    tls: u64,
    /// The number of faults on processes started by `mpirun`.
    #[arg(long, default_value_t = 0)]
    mpi: u64,
    /// The number of faults on processes of `shardwise launch` with one GPU each, over NCCL.
    #[arg(long, default_value_t = 0)]
    nccl: u64,
    /// Only runs the cases of `scripts/peers/gloo_faults.py` on two ranks, and prints the error
    /// that rank 0 receives in each case.
    #[arg(long)]
    table: bool,
    /// The seed of all random choices.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Runs this process as a rank of this trial.
    #[arg(long, hide = true)]
    rank_of: Option<u64>,
    /// The file to which the lost rank writes the time of its fault.
    #[arg(long, hide = true, default_value = "time_of_fault")]
    time_file: PathBuf,
    /// Gives each rank one GPU.
    #[arg(long, hide = true)]
    over_nccl: bool,
    /// Passed by `cargo bench`; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // Do not print injected panics.
    std::panic::set_hook(Box::new(|_| ()));
    if let Some(number) = args.rank_of {
        return Ok(processes::rank(args.seed, number, &args.time_file, args.over_nccl)?);
    }
    if args.table {
        return table::print();
    }
    threads::campaign(args.trials, args.seed, args.limits)?;
    mismatch::campaign(args.mismatches, args.limits)?;
    cycles::campaign(args.cycles)?;
    if args.limits {
        costs::campaign()?;
    }
    if args.processes > 0 {
        processes::campaign(Launcher::Shardwise, args.processes, args.seed)?;
    }
    if args.tls > 0 {
        processes::campaign(Launcher::Tls, args.tls, args.seed)?;
    }
    if args.nccl > 0 {
        processes::campaign(Launcher::Nccl, args.nccl, args.seed)?;
    }
    if args.mpi > 0 {
        processes::campaign(Launcher::Mpirun, args.mpi, args.seed)?;
    }
    Ok(())
}
