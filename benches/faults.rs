//! A campaign of faults on thread ranks: one rank is lost at a random point of a random program, and every other rank has
//! to be told which, quickly.
//!
//! `cargo bench --bench faults [-- --trials 10000] [--seed 1]`. A trial has 2, 3, 4 or 8 ranks, which make some random
//! collectives. One of them panics, returns early, or returns an error: before a collective, between the start of one and
//! its end, or after it. Every other rank must get [`Error::PeerLost`] with its number; the time from the fault to the
//! error is taken. Ends with an error if a name is wrong, and by the deadline of ten seconds if a rank hangs.

use clap::Parser;
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::Threads,
    rng::Philox,
    shard::Partition,
};
use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

/// Injects faults.
#[derive(Parser)]
struct Args {
    /// The number of faults.
    #[arg(long, default_value_t = 10_000)]
    trials: u64,
    /// The seed of all that is random.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Given by `cargo bench`; means nothing here.
    #[arg(long, hide = true)]
    bench: bool,
}

const OPS: [&str; 10] = [
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "exchange",
    "barrier",
    "split",
    "start_all_reduce",
    "start_all_gather",
    "start_reduce_scatter",
];
const WHENS: [&str; 3] = ["before", "within", "after"];
const HOWS: [&str; 3] = ["panic", "return", "error"];

/// What is to happen.
#[derive(Clone, Copy)]
struct Trial {
    ranks: usize,
    culprit: usize,
    /// The collective at which the fault happens; the ones before it are random.
    op: usize,
    when: usize,
    how: usize,
    /// The number of collectives before it, and the elements of each.
    before: usize,
    len: usize,
    draws: Philox,
}

impl Trial {
    fn draw(seed: u64, number: u64) -> Self {
        let draws = Philox::stream(seed, number);
        let below = |at: u64, end: usize| (draws.uniform(at) * end as f64) as usize;
        let ranks = [2, 3, 4, 8][below(0, 4)];
        // On both sides of the size from which ranks read one another's memory.
        let len = [1, 17, 1000, 20_000][below(6, 4)];
        Self {
            ranks,
            culprit: below(1, ranks),
            op: below(2, OPS.len()),
            when: below(3, WHENS.len()),
            how: below(4, HOWS.len()),
            before: below(5, 6),
            len,
            draws,
        }
    }

    /// The program of one rank, which notes the time of its fault. `Ok` if it was the culprit and returned.
    fn run(&self, world: &Group<Cpu>, fault: &Mutex<Option<Instant>>) -> Result<()> {
        for at in 0..self.before {
            self.call(world, (self.draws.uniform(100 + at as u64) * OPS.len() as f64) as usize, || {
                Ok(false)
            })?;
        }
        let strike = || {
            *fault.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(Instant::now());
            match self.how {
                0 => panic!("injected"),
                1 => Ok(true),
                _ => Err(Error::Invalid { op: "campaign", reason: "injected".into() }),
            }
        };
        let culprit = world.rank() == self.culprit;
        if culprit && self.when == 0 && strike()? {
            return Ok(());
        }
        if self.call(world, self.op, || if culprit && self.when == 1 { strike() } else { Ok(false) })? {
            return Ok(());
        }
        if culprit && strike()? {
            return Ok(());
        }
        // What the others do next needs all ranks.
        world.barrier()?;
        Err(Error::Invalid { op: "campaign", reason: "a barrier was complete without the lost rank".into() })
    }

    /// Makes a collective, and calls `within` where the rank is inside of it: between start and end, before the second half
    /// of an exchange, before the first use of a group that was split. True if that returned early.
    fn call(&self, world: &Group<Cpu>, op: usize, within: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let (rank, size, device) = (world.rank(), world.size(), world.device());
        let cut = Partition::even(self.len, size);
        let whole = || Tensor::<f32>::full(device, [1, self.len], 1.0);
        let part = || Tensor::<f32>::full(device, [1, cut.size(rank)], 1.0);
        match op {
            0 => world.all_reduce(ReduceOp::Sum, &mut whole()?)?,
            1 => drop(world.all_gather(&part()?, 1, &cut)?),
            2 => drop(world.reduce_scatter(ReduceOp::Max, &whole()?, 1, &cut)?),
            3 => world.broadcast(size - 1, &mut whole()?)?,
            4 => {
                let (x, next, last) = (whole()?, (rank + 1) % size, (rank + size - 1) % size);
                world.exchange(Some((next, &x)), None)?;
                if within()? {
                    return Ok(true);
                }
                world.exchange::<f32>(None, Some((last, x.shape())))?;
                return Ok(false);
            }
            5 => world.barrier()?,
            6 => {
                let half = world.split_all((rank % 2) as u64)?;
                if within()? {
                    return Ok(true);
                }
                half.barrier()?;
                return Ok(false);
            }
            _ => {
                let pending = match op {
                    7 => world.start_all_reduce(ReduceOp::Sum, whole()?)?,
                    8 => world.start_all_gather(part()?, 1, &cut)?,
                    _ => world.start_reduce_scatter(ReduceOp::Sum, whole()?, 1, &cut)?,
                };
                if within()? {
                    return Ok(true);
                }
                pending.wait()?;
                return Ok(false);
            }
        }
        // These have no inside that a rank could be lost in: it is lost behind them.
        within()
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // The injected panics need no report each.
    std::panic::set_hook(Box::new(|_| ()));
    let mut times = Vec::new();
    let mut wrong = Vec::new();
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    let start = Instant::now();
    for number in 0..args.trials {
        let trial = Trial::draw(args.seed, number);
        let fault = Mutex::new(None);
        let outcomes = Threads::new(trial.ranks).deadline(Duration::from_secs(10)).run_each(|world| {
            let outcome = trial.run(&world, &fault);
            // The culprit's own outcome is checked below.
            Ok((outcome, Instant::now()))
        })?;
        let struck =
            fault.into_inner().unwrap_or_else(|poison| poison.into_inner()).ok_or("nobody struck")?;
        for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != trial.culprit) {
            match outcome {
                Ok((Err(Error::PeerLost { rank: named, .. }), at)) if named == trial.culprit => {
                    times.push(at.saturating_duration_since(struck));
                }
                // In a half, ranks are counted anew: that of rank r of the world is r / 2.
                Ok((Err(Error::PeerLost { rank: named, group, .. }), at))
                    if group != "world" && named == trial.culprit / 2 && rank % 2 == trial.culprit % 2 =>
                {
                    times.push(at.saturating_duration_since(struck));
                }
                other => wrong.push(format!(
                    "trial {number}: rank {rank} of {}: rank {} was lost {} {} by {}, and it was told {other:?}",
                    trial.ranks, trial.culprit, WHENS[trial.when], OPS[trial.op], HOWS[trial.how]
                )),
            }
        }
        *kinds.entry(OPS[trial.op]).or_default() += 1;
    }
    times.sort_unstable();
    let quantile = |part: f64| {
        times.get((part * times.len() as f64) as usize).or(times.last()).copied().unwrap_or_default()
    };
    println!("{} faults in {:.1?}, {} survivors", args.trials, start.elapsed(), times.len());
    println!("faults by collective: {kinds:?}");
    println!(
        "from the fault to the error: median {:.0?}, p99 {:.0?}, largest {:.0?}",
        quantile(0.5),
        quantile(0.99),
        quantile(1.0)
    );
    println!("wrong or missing names: {}", wrong.len());
    wrong.iter().take(10).for_each(|line| println!("{line}"));
    if wrong.is_empty() { Ok(()) } else { Err("a survivor was not told who was lost".into()) }
}
