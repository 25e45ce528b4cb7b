//! Tests with ranks that panic between the barrier rounds of a collective.

use super::*;
use crate::{comm::Op, device::DType, error::Site, shard::Shape};
use std::panic::{Location, resume_unwind};

thread_local! {
    static INJECT_PANIC: Cell<bool> = const { Cell::new(false) };
}

/// Panics if the test has injected a panic on this thread.
pub(super) fn panic_if_injected() {
    if INJECT_PANIC.take() {
        resume_unwind(Box::new("injected"));
    }
}

/// A call on `len` elements of f32, without a reduction or a root.
#[track_caller]
pub(super) fn call(op: Op, seq: u64, len: usize) -> Call {
    Call {
        seq,
        op,
        started: false,
        reduce: None,
        root: None,
        dtype: Some(DType::F32),
        shape: Shape::new(&[len]),
        partition: 0,
        history: 0,
        group: 0,
        messages: [0; 2],
        site: Site::AtLine(Location::caller()),
    }
}

#[cfg(not(any(loom, shuttle)))]
mod tests {
    use super::*;
    use crate::error::LostReason;
    use std::{
        panic::{AssertUnwindSafe, catch_unwind},
        thread,
    };

    const OPS: [Op; 4] = [Op::AllReduce, Op::AllGather, Op::ReduceScatter, Op::Broadcast];

    fn act(comm: &ThreadComm, op: Op, len: usize) -> Result<()> {
        let call = call(op, 0, len);
        let shards = Shards { rows: 1, partition: Partition::even(len, comm.size()) };
        let (mut whole, mut shard) = (vec![1_f32; len], vec![1_f32; shards.len(comm.rank())]);
        let (whole_mut, shard_mut) = (AnyMut::F32(whole.as_mut_slice()), AnyMut::F32(shard.as_mut_slice()));
        match op {
            Op::AllReduce => comm.all_reduce(&call, ReduceOp::Sum, whole_mut),
            Op::AllGather => comm.all_gather(&call, &shards, shard_mut.shared(), whole_mut),
            Op::ReduceScatter => {
                comm.reduce_scatter(&call, ReduceOp::Sum, &shards, whole_mut.shared(), shard_mut)
            }
            _ => comm.broadcast(&call, 0, whole_mut),
        }
    }

    /// Runs one rank. Rank `lost` panics within the collective. The other ranks return from it.
    fn rank(endpoint: Endpoint, lost: usize, op: Op, len: usize) {
        let (here, groups) = (endpoint.rank, Rc::new(JoinedGroups::default()));
        let comm = ThreadComm::join(endpoint, Rc::clone(&groups));
        INJECT_PANIC.set(here == lost);
        let outcome = catch_unwind(AssertUnwindSafe(|| act(&comm, op, len)));
        if here == lost {
            assert!(outcome.is_err(), "the injected panic did not happen");
            return groups.leave_all(LostReason::Panicked);
        }
        let is_peer_lost = |outcome: Result<()>| {
            let peer_lost = matches!(outcome, Err(Error::PeerLost { rank, reason: LostReason::Panicked, .. }) if rank == lost);
            assert!(peer_lost, "rank {here}, {lost} lost in {op:?} of {len}: {outcome:?}");
        };
        let outcome = outcome.unwrap_or_else(|panic| resume_unwind(panic));
        let longest = if op == Op::AllGather { len.div_ceil(comm.size()) } else { len };
        if longest * size_of::<f32>() <= EAGER {
            // The lost rank copied its data to its slot before it panicked. All ranks can read it.
            assert_eq!(outcome, Ok(()));
        } else {
            is_peer_lost(outcome);
        }
        is_peer_lost(comm.barrier(&call(Op::Barrier, 1, 0)));
        is_peer_lost(act(&comm, op, len));
    }

    /// The declared shards decide whether there is a second round. Without a second round, an owner
    /// whose data is longer than declared could return while other ranks still read that data.
    #[test]
    fn data_longer_than_the_parts_say_are_refused_on_every_rank() {
        static DATA: [f32; 70_000] = [1.0; 70_000];
        let rank = |endpoint: Endpoint| {
            let comm = ThreadComm::join(endpoint, Rc::new(JoinedGroups::default()));
            let shards = Shards { rows: 1, partition: Partition::even(8, 2) };
            let (mut whole, mut shard) = ([0_f32; 8], [0_f32; 4]);
            let gather = call(Op::AllGather, 0, 8);
            let gathered =
                comm.all_gather(&gather, &shards, AnyRef::F32(&DATA[..]), AnyMut::F32(&mut whole[..]));
            let scatter = call(Op::ReduceScatter, 1, 8);
            let recv = AnyMut::F32(&mut shard[..]);
            let scattered =
                comm.reduce_scatter(&scatter, ReduceOp::Sum, &shards, AnyRef::F32(&DATA[..]), recv);
            let messages = [gathered, scattered].map(|result| result.unwrap_err().to_string());
            assert_eq!(
                messages,
                [
                    "all_gather: bytes of the data is 280000, but the most of any rank is 16",
                    "reduce_scatter: bytes of the data is 280000, but the most of any rank is 32",
                ]
            );
            // The failed calls published nothing, so the group still works.
            comm.barrier(&call(Op::Barrier, 2, 0)).unwrap();
        };
        thread::scope(|scope| {
            for endpoint in ThreadComm::group(2, Duration::from_secs(60), Roles::UNRESTRICTED) {
                scope.spawn(move || rank(endpoint));
            }
        });
    }

    #[test]
    fn a_rank_that_panics_between_the_rounds_is_named_by_the_same_call() {
        for (size, op, len) in [2, 3, 4, 8]
            .iter()
            .flat_map(|size| OPS.iter().flat_map(move |op| [40, 5000, 70_000].map(|l| (*size, *op, l))))
        {
            for lost in 0..size {
                thread::scope(|scope| {
                    for endpoint in ThreadComm::group(size, Duration::from_secs(60), Roles::UNRESTRICTED) {
                        scope.spawn(move || rank(endpoint, lost, op, len));
                    }
                });
            }
        }
    }
}
