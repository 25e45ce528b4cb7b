//! Collectives that were started. See `README.md`, R6.
//!
//! Posting is all that happens before `wait`: a rank's thread is its processor, and there is no other to do the work
//! beside it. What is gained is that no rank waits for another before it needs the result.

use super::{
    combine, each_pair,
    host::HostVec,
    shared::Shared,
    sync::{AtomicUsize, Ordering},
};
use crate::{
    comm::{Call, Collective, InFlight},
    device::{AnyBuffer, AnyRef, Cpu, Element},
    error::{Error, Result},
};
use std::sync::{Arc, OnceLock};

/// A collective in which some ranks have posted their input.
#[derive(Debug)]
pub(super) struct Flight {
    posted: Box<[OnceLock<(Call, HostVec)>]>,
    count: AtomicUsize,
}

impl Flight {
    fn new(size: usize) -> Self {
        Self { posted: (0..size).map(|_| OnceLock::new()).collect(), count: AtomicUsize::new(0) }
    }

    fn is_complete(&self) -> bool {
        self.count.load(Ordering::Acquire) == self.posted.len()
    }

    fn missing(&self) -> Vec<usize> {
        (0..self.posted.len()).filter(|&rank| self.posted[rank].get().is_none()).collect()
    }

    fn posts(&self) -> impl Iterator<Item = &(Call, HostVec)> + Clone {
        self.posted.iter().filter_map(OnceLock::get)
    }
}

impl Shared {
    /// Posts a rank's input for the flight of that number.
    pub(super) fn post(&self, call: &Call, number: u64, rank: usize, input: HostVec) -> Result<Arc<Flight>> {
        // A rank that has left may have posted before: `wait` sees.
        if let Some(error) = self.obstacle(call, Vec::new) {
            return Err(error);
        }
        let mut flights = self.lock(&self.flights);
        let flight = flights.entry(number).or_insert_with(|| Arc::new(Flight::new(self.size())));
        let flight = Arc::clone(flight);
        if flight.posted[rank].set((*call, input)).is_err() {
            return Err(Error::internal(call.op.name(), "a rank started one collective twice"));
        }
        if flight.count.fetch_add(1, Ordering::AcqRel) + 1 == self.size() {
            flights.remove(&number);
        }
        drop(flights);
        self.news.notify();
        Ok(flight)
    }
}

/// One rank's side of a flight.
pub(super) struct Started {
    pub(super) shared: Arc<Shared>,
    pub(super) flight: Arc<Flight>,
    pub(super) call: Call,
    pub(super) collective: Collective,
    pub(super) rank: usize,
    pub(super) recv: AnyBuffer<Cpu>,
}

impl InFlight<Cpu> for Started {
    fn wait(mut self: Box<Self>) -> Result<AnyBuffer<Cpu>> {
        let flight = &self.flight;
        let complete = || flight.is_complete().then_some(());
        self.shared.wait_for(&self.call, self.rank, complete, || flight.missing())?;
        self.shared.agree(flight.posts().map(|(call, _)| call))?;
        let inputs: Vec<_> = flight.posts().map(|(_, input)| input.as_ref()).collect();
        let first = inputs[0];
        each_pair!(first, self.recv.as_mut(), (first, recv) => {
            finish(&self.collective, self.rank, &inputs, first, recv)
        })?;
        Ok(self.recv)
    }
}

/// Makes this rank's result from all ranks' inputs; `first` is the first of them and gives the element.
fn finish<'a, T: Element>(
    collective: &Collective,
    rank: usize,
    inputs: &[AnyRef<'a, Cpu>],
    first: &'a [T],
    recv: &mut [T],
) -> Result<()> {
    // The calls agree, and so do the elements.
    let input = |rank: usize| inputs[rank].of::<T>().unwrap_or(first);
    match collective {
        Collective::AllReduce(op) => combine::reduce(*op, inputs.len(), input, recv),
        Collective::AllGather(parts) => combine::gather(parts, input, recv),
        Collective::ReduceScatter(op, parts) => combine::reduce_part(*op, parts, rank, input, recv),
    }
    Ok(())
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use crate::{
        comm::{Group, ReduceOp},
        device::{Cpu, Device},
        launch::Threads,
        shard::Partition,
        tensor::Tensor,
    };

    #[test]
    fn a_warm_started_collective_asks_the_system_for_no_memory() {
        const SIZE: usize = 3;
        let rank = |group: Group<Cpu>| {
            let (cpu, cut) = (group.device(), Partition::even(50 * SIZE, SIZE));
            let x = |rows: usize| Tensor::<f32>::full(cpu, [rows, 20], 1.0);
            let step = || {
                drop(group.start_all_reduce(ReduceOp::Sum, x(50)?)?.wait()?);
                group.barrier()?;
                drop(group.start_all_gather(x(50)?, 0, &cut)?.wait()?);
                group.barrier()?;
                drop(group.start_reduce_scatter(ReduceOp::Sum, x(50 * SIZE)?, 0, &cut)?.wait()?);
                group.barrier()
            };
            step()?;
            let warm = (cpu.made(), cpu.memory());
            assert_eq!(warm.1.live, 0);
            for _ in 0..5 {
                step()?;
                assert_eq!((cpu.made(), cpu.memory()), warm);
            }
            Ok(())
        };
        Threads::new(SIZE).run(rank).unwrap();
    }

    #[test]
    fn what_a_started_collective_reads_counts_as_memory_in_use() {
        let rank = |group: Group<Cpu>| {
            let pending =
                group.start_all_reduce(ReduceOp::Sum, Tensor::<f64>::zeros(group.device(), [100])?)?;
            assert_eq!(group.device().memory().live, 1600);
            pending.wait().map(drop)
        };
        Threads::new(1).run(rank).unwrap();
        Threads::new(2).run(rank).unwrap();
    }
}
