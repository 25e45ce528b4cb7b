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
pub(crate) const MOMENTS: [&str; 3] = ["before", "within", "after"];

/// The parameters of a trial.
#[derive(Clone, Copy)]
pub(crate) struct Trial {
    pub(crate) ranks: usize,
    pub(crate) culprit: usize,
    /// The collective at which the fault happens. The collectives before it are random.
    pub(crate) op: usize,
    pub(crate) moment: usize,
    /// A number that selects the fault.
    pub(crate) fault: usize,
    /// The number of collectives before `op`. Each has `len` elements.
    before: usize,
    len: usize,
    /// Whether all ranks have made the collective `op` before the fault. If so, ranks over NCCL do
    /// not compare this call first, and wait for the lost rank inside NCCL.
    known: bool,
    random: Philox,
}

impl Trial {
    pub(crate) fn random(seed: u64, number: u64, most: usize) -> Self {
        let random = Philox::stream(seed, number);
        let below = |at: u64, end: usize| (random.uniform(at) * end as f64) as usize;
        let ranks = [2, 3, 4, 8][below(0, 4)].min(most);
        // Use lengths below and above the size from which ranks read each other's memory.
        let len = [1, 17, 1000, 20_000][below(6, 4)];
        Self {
            ranks,
            culprit: below(1, ranks),
            op: below(2, OPS.len()),
            moment: below(3, MOMENTS.len()),
            fault: below(4, 840),
            before: below(5, 6),
            len,
            known: below(8, 2) == 1,
            random,
        }
    }

    /// Runs the program of one rank. `inject` causes the fault of rank `culprit`. Returns `Ok` only
    /// on rank `culprit`, and only if the fault is an early return.
    pub(crate) fn run<B: Pointwise>(
        &self,
        world: &Group<B>,
        inject: impl Fn() -> Result<bool>,
    ) -> Result<()> {
        if self.known {
            self.call(world, self.op, || Ok(false))?;
        }
        for at in 0..self.before {
            self.call(world, (self.random.uniform(100 + at as u64) * OPS.len() as f64) as usize, || {
                Ok(false)
            })?;
        }
        let culprit = world.rank() == self.culprit;
        if culprit && self.moment == 0 && inject()? {
            return Ok(());
        }
        if self.call(world, self.op, || if culprit && self.moment == 1 { inject() } else { Ok(false) })? {
            return Ok(());
        }
        if culprit && inject()? {
            return Ok(());
        }
        // The other ranks then make a collective of all ranks, so that each of them receives an
        // error.
        world.barrier()?;
        Err(Error::Invalid { op: "campaign", reason: "a barrier completed without the lost rank".into() })
    }

    /// Runs the program of one rank in a trial with a fault during transfers. All ranks repeat a
    /// collective, and another thread of the lost rank calls `inject` at a random time.
    pub(crate) fn run_until_fault<B: Pointwise>(
        &self,
        world: &Group<B>,
        inject: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        // Waits until all ranks have started.
        world.barrier()?;
        let begin = Instant::now();
        if world.rank() == self.culprit {
            let delay = Duration::from_micros((self.random.uniform(7) * 5000.0) as u64);
            thread::spawn(move || {
                thread::sleep(delay);
                inject();
            });
        }
        while begin.elapsed() < Duration::from_secs(20) {
            self.call(world, self.op, || Ok(false))?;
        }
        Err(Error::Invalid { op: "campaign", reason: "collectives completed without the lost rank".into() })
    }

    /// Makes a collective and checks its result. Calls `within` between the start and the end of
    /// the collective, before the second half of an exchange, or before the first use of a split
    /// group. Returns true if `within` asked to return early.
    fn call<B: Pointwise>(
        &self,
        world: &Group<B>,
        op: usize,
        within: impl FnOnce() -> Result<bool>,
    ) -> Result<bool> {
        let (rank, size, device) = (world.rank(), world.size(), world.device());
        let partition = Partition::even(self.len, size);
        let whole = || Tensor::<f32, B>::full(device, [1, self.len], 1.0);
        let part = || Tensor::<f32, B>::full(device, [1, partition.size(rank)], 1.0);
        let check = |x: &Tensor<f32, B>, len: usize, value: usize| {
            let x = x.to_vec()?;
            if x.len() == len && x.iter().all(|element| *element == value as f32) {
                return Ok(());
            }
            Err(Error::Invalid { op: "campaign", reason: "a collective has returned a wrong result".into() })
        };
        match op {
            0 => {
                let mut x = whole()?;
                world.all_reduce(ReduceOp::Sum, &mut x)?;
                check(&x, self.len, size)?;
            }
            1 => check(&world.all_gather(&part()?, 1, &partition)?, self.len, 1)?,
            2 => check(
                &world.reduce_scatter(ReduceOp::Max, &whole()?, 1, &partition)?,
                partition.size(rank),
                1,
            )?,
            3 => {
                let mut x = whole()?;
                world.broadcast(size - 1, &mut x)?;
                check(&x, self.len, 1)?;
            }
            4 => {
                let (x, next, last) = (whole()?, (rank + 1) % size, (rank + size - 1) % size);
                // Even ranks send first and odd ranks receive first, because a send may wait for
                // its receiver.
                let half = |sends: bool| {
                    let recv = (!sends).then_some((last, x.shape()));
                    let arrived = world.exchange(sends.then_some((next, &x)), recv)?;
                    arrived.map_or(Ok(()), |x| check(&x, self.len, 1))
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
                    8 => (world.start_all_gather(part()?, 1, &partition)?, self.len, 1),
                    _ => (
                        world.start_reduce_scatter(ReduceOp::Sum, whole()?, 1, &partition)?,
                        partition.size(rank),
                        size,
                    ),
                };
                if within()? {
                    return Ok(true);
                }
                check(&pending.wait()?, len, value)?;
                return Ok(false);
            }
        }
        // `within` cannot run during a blocking collective, so the rank is lost after it.
        within()
    }
}
