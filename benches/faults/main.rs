//! Campaigns of faults: one rank is lost at a random point of a random program, and every other rank has to be told which,
//! quickly; and what ranks disagree on has to be an error on all of them.
//!
//! `cargo bench --bench faults [-- --trials 10000] [--seed 1]`: thread ranks. A trial has 2, 3, 4 or 8 ranks, which make some random
//! collectives. One of them panics, returns early, or returns an error: before a collective, between the start of one and
//! its end, or after it. Every other rank must get `Error::PeerLost` with its number; the time from the fault to the
//! error is taken. PipelineEnds with an error if a name is wrong, and by the deadline of ten seconds if a rank hangs.
//!
//! After these come disagreements (each field of a call, in each collective that has it: the same error on every rank, and no buffer
//! changed) and groups that are made, broken and dropped (descriptors, threads and memory stay flat). `--limits` holds times to their
//! limits (an error within ten milliseconds at p99), and measures what the checks cost.
//!
//! `--processes 100` (feature `cli`), `--nccl 100` (features `cli` and `nccl`; up to eight GPUs) and `--mpi 100` (feature `mpi`): ranks that are processes, of which one panics, returns, fails,
//! exits, is killed or stopped: the last three at any moment, in mid-transfer too. The job has to be over within a second, and the right rank named.

mod costs;
mod cycles;
mod mismatch;
mod processes;
mod table;
mod threads;
mod trial;

use clap::Parser;
use processes::Launcher;
use std::{path::PathBuf, time::Duration};

/// The 99th percentile of the time until a rank is told, of a disagreement or of a lost rank.
const LIMIT: Duration = Duration::from_millis(10);

/// Injects faults.
#[derive(Parser)]
struct Args {
    /// The number of faults on thread ranks.
    #[arg(long, default_value_t = 10_000)]
    trials: u64,
    /// How often each disagreement is tried on thread ranks.
    #[arg(long, default_value_t = 3)]
    mismatches: u64,
    /// The number of groups that are made, broken and dropped.
    #[arg(long, default_value_t = 1000)]
    cycles: u64,
    /// Also holds times to their limits, that of a comparison of calls and of a record too: on a machine that does nothing else.
    #[arg(long)]
    limits: bool,
    /// The number of faults on processes started by `shardwise launch`.
    #[arg(long, default_value_t = 0)]
    processes: u64,
    /// The number of faults on processes started by `mpirun`.
    #[arg(long, default_value_t = 0)]
    mpi: u64,
    /// The number of faults on processes started by `shardwise launch` that each have a GPU, over NCCL.
    #[arg(long, default_value_t = 0)]
    nccl: u64,
    /// Only prints what rank 0 of two is told in each of the cases of `scripts/peers/gloo_faults.py`.
    #[arg(long)]
    table: bool,
    /// The seed of all that is random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// This process is a rank of this trial.
    #[arg(long, hide = true)]
    rank_of: Option<u64>,
    /// Where the rank that is lost writes when.
    #[arg(long, hide = true, default_value = "struck")]
    struck: PathBuf,
    /// The ranks have a GPU each.
    #[arg(long, hide = true)]
    over_nccl: bool,
    /// Given by `cargo bench`; means nothing here.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // The injected panics need no report each.
    std::panic::set_hook(Box::new(|_| ()));
    if let Some(number) = args.rank_of {
        return Ok(processes::rank(args.seed, number, &args.struck, args.over_nccl)?);
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
    if args.nccl > 0 {
        processes::campaign(Launcher::Nccl, args.nccl, args.seed)?;
    }
    if args.mpi > 0 {
        processes::campaign(Launcher::Mpirun, args.mpi, args.seed)?;
    }
    Ok(())
}
