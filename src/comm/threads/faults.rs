//! Ranks that panic between the meetings of a collective.

use super::*;
use crate::{comm::Op, device::DType, error::Site, shard::Shape};
use std::panic::{Location, resume_unwind};

thread_local! {
    static STRIKE: Cell<bool> = const { Cell::new(false) };
}

/// Panics, if this thread's rank is to be lost here.
pub(super) fn strike() {
    if STRIKE.take() {
        resume_unwind(Box::new("injected"));
    }
}

/// A call of f32 with no other arguments.
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
        let parts = Shards { rows: 1, partition: Partition::even(len, comm.size()) };
        let (mut whole, mut part) = (vec![1_f32; len], vec![1_f32; parts.len(comm.rank())]);
        let (whole_mut, part_mut) = (AnyMut::F32(whole.as_mut_slice()), AnyMut::F32(part.as_mut_slice()));
        match op {
            Op::AllReduce => comm.all_reduce(&call, ReduceOp::Sum, whole_mut),
            Op::AllGather => comm.all_gather(&call, &parts, part_mut.shared(), whole_mut),
            Op::ReduceScatter => {
                comm.reduce_scatter(&call, ReduceOp::Sum, &parts, whole_mut.shared(), part_mut)
            }
            _ => comm.broadcast(&call, 0, whole_mut),
        }
    }

    /// The rank of that seat. The `lost` one panics within the collective; the others come out of it.
    fn rank(seat: Seat, lost: usize, op: Op, len: usize) {
        let (here, presence) = (seat.rank, Rc::new(Presence::default()));
        let comm = ThreadComm::join(seat, Rc::clone(&presence));
        STRIKE.set(here == lost);
        let outcome = catch_unwind(AssertUnwindSafe(|| act(&comm, op, len)));
        if here == lost {
            assert!(outcome.is_err(), "nobody struck");
            return presence.end(LostReason::Panicked);
        }
        let is_told = |outcome: Result<()>| {
            let told = matches!(outcome, Err(Error::PeerLost { rank, reason: LostReason::Panicked, .. }) if rank == lost);
            assert!(told, "rank {here}, {lost} lost in {op:?} of {len}: {outcome:?}");
        };
        let outcome = outcome.unwrap_or_else(|panic| resume_unwind(panic));
        let longest = if op == Op::AllGather { len.div_ceil(comm.size()) } else { len };
        if longest * size_of::<f32>() <= EAGER {
            // Every rank had a copy of the others' data before that one was lost.
            assert_eq!(outcome, Ok(()));
        } else {
            is_told(outcome);
        }
        is_told(comm.barrier(&call(Op::Barrier, 1, 0)));
        is_told(act(&comm, op, len));
    }

    /// Whether data are published by reference depends on the parts: data that are longer would be
    /// read after their owner has gone on.
    #[test]
    fn data_longer_than_the_parts_say_are_refused_on_every_rank() {
        static DATA: [f32; 70_000] = [1.0; 70_000];
        let rank = |seat: Seat| {
            let comm = ThreadComm::join(seat, Rc::new(Presence::default()));
            let parts = Shards { rows: 1, partition: Partition::even(8, 2) };
            let (mut whole, mut part) = ([0_f32; 8], [0_f32; 4]);
            let gather = call(Op::AllGather, 0, 8);
            let gathered =
                comm.all_gather(&gather, &parts, AnyRef::F32(&DATA[..]), AnyMut::F32(&mut whole[..]));
            let scatter = call(Op::ReduceScatter, 1, 8);
            let recv = AnyMut::F32(&mut part[..]);
            let scattered =
                comm.reduce_scatter(&scatter, ReduceOp::Sum, &parts, AnyRef::F32(&DATA[..]), recv);
            let messages = [gathered, scattered].map(|result| result.unwrap_err().to_string());
            assert_eq!(
                messages,
                [
                    "all_gather: bytes of the data is 280000, but the most of any rank is 16",
                    "reduce_scatter: bytes of the data is 280000, but the most of any rank is 32",
                ]
            );
            // No rank has met another: the group is as before.
            comm.barrier(&call(Op::Barrier, 2, 0)).unwrap();
        };
        thread::scope(|scope| {
            for seat in ThreadComm::group(2, Duration::from_secs(60)) {
                scope.spawn(move || rank(seat));
            }
        });
    }

    #[test]
    fn who_panics_between_the_meetings_is_named_by_the_same_call() {
        for (size, op, len) in [2, 3, 4, 8]
            .iter()
            .flat_map(|size| OPS.iter().flat_map(move |op| [40, 5000, 70_000].map(|l| (*size, *op, l))))
        {
            for lost in 0..size {
                thread::scope(|scope| {
                    for seat in ThreadComm::group(size, Duration::from_secs(60)) {
                        scope.spawn(move || rank(seat, lost, op, len));
                    }
                });
            }
        }
    }
}
