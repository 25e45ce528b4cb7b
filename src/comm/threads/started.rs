//! One rank's handle of a started collective. See `README.md`, R6.

use super::{combine, each_pair, flight::Flight, shared::Shared};
use crate::{
    comm::{Call, Collective, InFlight},
    device::{AnyBuffer, AnyRef, Cpu, Element},
    error::Result,
};
use std::sync::Arc;

/// One rank's handle of a flight, which all ranks of the group share.
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

/// Computes this rank's result from all ranks' inputs. `first` is rank 0's input, and gives the
/// element type.
fn finish<'a, T: Element>(
    collective: &Collective,
    rank: usize,
    inputs: &[AnyRef<'a, Cpu>],
    first: &'a [T],
    recv: &mut [T],
) -> Result<()> {
    // The calls agree, so all inputs have the same element type.
    let input = |rank: usize| inputs[rank].of::<T>().unwrap_or(first);
    match collective {
        Collective::AllReduce(op) => combine::reduce(*op, inputs.len(), input, recv),
        Collective::AllGather(shards) => combine::gather(shards, input, recv),
        Collective::ReduceScatter(op, shards) => combine::reduce_shard(*op, shards, rank, input, recv),
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
            let (cpu, partition) = (group.device(), Partition::even(50 * SIZE, SIZE));
            let x = |rows: usize| Tensor::<f32>::full(cpu, [rows, 20], 1.0);
            let step = || {
                drop(group.start_all_reduce(ReduceOp::Sum, x(50)?)?.wait()?);
                group.barrier()?;
                drop(group.start_all_gather(x(50)?, 0, &partition)?.wait()?);
                group.barrier()?;
                drop(group.start_reduce_scatter(ReduceOp::Sum, x(50 * SIZE)?, 0, &partition)?.wait()?);
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
