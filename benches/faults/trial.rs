//! A random program of collectives, in which one rank is lost.

use shardwise::{
    Error, Result, Tensor,
    comm::{Group, ReduceOp},
    kernels::Pointwise,
    rng::Philox,
    shard::Partition,
};
use std::{
    thread,
    time::{Duration, Instant},
};

pub(crate) const OPS: [&str; 10] = [
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
pub(crate) const WHENS: [&str; 3] = ["before", "within", "after"];

/// What is to happen.
#[derive(Clone, Copy)]
pub(crate) struct Trial {
    pub(crate) ranks: usize,
    pub(crate) culprit: usize,
    /// The collective at which the fault happens; the ones before it are random.
    pub(crate) op: usize,
    pub(crate) when: usize,
    /// A number that chooses how the rank is lost.
    pub(crate) how: usize,
    /// The number of collectives before it, and the elements of each.
    before: usize,
    len: usize,
    /// Whether all have made the collective before: over NCCL it is then not compared first, and who is inside is inside of NCCL.
    known: bool,
    draws: Philox,
}

impl Trial {
    pub(crate) fn draw(seed: u64, number: u64, most: usize) -> Self {
        let draws = Philox::stream(seed, number);
        let below = |at: u64, end: usize| (draws.uniform(at) * end as f64) as usize;
        let ranks = [2, 3, 4, 8][below(0, 4)].min(most);
        // On both sides of the size from which ranks read one another's memory.
        let len = [1, 17, 1000, 20_000][below(6, 4)];
        Self {
            ranks,
            culprit: below(1, ranks),
            op: below(2, OPS.len()),
            when: below(3, WHENS.len()),
            how: below(4, 840),
            before: below(5, 6),
            len,
            known: below(8, 2) == 1,
            draws,
        }
    }

    /// The program of one rank; the culprit is lost by `strike`. `Ok` if it was the culprit and returned.
    pub(crate) fn run<B: Pointwise>(
        &self,
        world: &Group<B>,
        strike: impl Fn() -> Result<bool>,
    ) -> Result<()> {
        if self.known {
            self.call(world, self.op, || Ok(false))?;
        }
        for at in 0..self.before {
            self.call(world, (self.draws.uniform(100 + at as u64) * OPS.len() as f64) as usize, || {
                Ok(false)
            })?;
        }
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

    /// The program of one rank that is lost in mid-transfer: all make one collective after another, and `strike` comes from another
    /// thread of the culprit, wherever that is then.
    pub(crate) fn storm<B: Pointwise>(
        &self,
        world: &Group<B>,
        strike: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        // All have come.
        world.barrier()?;
        let begin = Instant::now();
        if world.rank() == self.culprit {
            let delay = Duration::from_micros((self.draws.uniform(7) * 5000.0) as u64);
            thread::spawn(move || {
                thread::sleep(delay);
                strike();
            });
        }
        while begin.elapsed() < Duration::from_secs(20) {
            self.call(world, self.op, || Ok(false))?;
        }
        Err(Error::Invalid { op: "campaign", reason: "collectives went on without the lost rank".into() })
    }

    /// Makes a collective, and calls `within` where the rank is inside of it: between start and end, before the second half
    /// of an exchange, before the first use of a group that was split. True if that returned early. What arrives is looked at.
    fn call<B: Pointwise>(
        &self,
        world: &Group<B>,
        op: usize,
        within: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        let (rank, size, device) = (world.rank(), world.size(), world.device());
        let cut = Partition::even(self.len, size);
        let whole = || Tensor::<f32, B>::full(device, [1, self.len], 1.0);
        let part = || Tensor::<f32, B>::full(device, [1, cut.size(rank)], 1.0);
        let look = |x: &Tensor<f32, B>, len: usize, value: usize| {
            let x = x.to_vec()?;
            if x.len() == len && x.iter().all(|element| *element == value as f32) {
                return Ok(());
            }
            Err(Error::Invalid { op: "campaign", reason: "a collective has brought something else".into() })
        };
        match op {
            0 => {
                let mut x = whole()?;
                world.all_reduce(ReduceOp::Sum, &mut x)?;
                look(&x, self.len, size)?;
            }
            1 => look(&world.all_gather(&part()?, 1, &cut)?, self.len, 1)?,
            2 => look(&world.reduce_scatter(ReduceOp::Max, &whole()?, 1, &cut)?, cut.size(rank), 1)?,
            3 => {
                let mut x = whole()?;
                world.broadcast(size - 1, &mut x)?;
                look(&x, self.len, 1)?;
            }
            4 => {
                let (x, next, last) = (whole()?, (rank + 1) % size, (rank + size - 1) % size);
                // Not all send first: a message may wait for its receiver.
                let half = |sends: bool| {
                    let recv = (!sends).then_some((last, x.shape()));
                    let arrived = world.exchange(sends.then_some((next, &x)), recv)?;
                    arrived.map_or(Ok(()), |x| look(&x, self.len, 1))
                };
                half(rank % 2 == 0)?;
                if within()? {
                    return Ok(true);
                }
                half(rank % 2 == 1)?;
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
                let (pending, len, value) = match op {
                    7 => (world.start_all_reduce(ReduceOp::Sum, whole()?)?, self.len, size),
                    8 => (world.start_all_gather(part()?, 1, &cut)?, self.len, 1),
                    _ => {
                        (world.start_reduce_scatter(ReduceOp::Sum, whole()?, 1, &cut)?, cut.size(rank), size)
                    }
                };
                if within()? {
                    return Ok(true);
                }
                look(&pending.wait()?, len, value)?;
                return Ok(false);
            }
        }
        // These have no inside that a rank could be lost in: it is lost behind them.
        within()
    }
}
