//! Runs programs of two to eight ranks in random schedules with shuttle. In every schedule, the
//! program has to end with the right results.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --release --lib --target-dir target/shuttle model`

use super::{faults::call, *};
use crate::{
    comm::{InFlight, Op},
    device::Device,
    error::LostReason,
    shard::Shape,
};
use shuttle::{
    Config, Runner,
    scheduler::{PctScheduler, RandomScheduler},
    thread,
};

const RANKS: usize = 8;

/// Runs `rank` on each of `size` ranks. Half of the schedules have few preemptions, at random
/// points (PCT). The other half may preempt at every step.
fn explore(size: usize, schedules: usize, rank: impl Fn(ThreadComm) + Send + Sync + 'static) {
    let rank = Arc::new(rank);
    let ranks = move || {
        let endpoints = ThreadComm::group(size, Duration::from_secs(60), Roles::UNRESTRICTED).into_iter();
        let started = endpoints.map(|endpoint| {
            let rank = Arc::clone(&rank);
            thread::spawn(move || rank(ThreadComm::join(endpoint, Rc::default())))
        });
        let started: Vec<_> = started.collect();
        started.into_iter().for_each(|thread| thread.join().unwrap());
    };
    let config = || {
        let mut config = Config::new();
        config.stack_size = 1 << 18;
        config
    };
    Runner::new(PctScheduler::new(3, schedules / 2), config()).run(ranks.clone());
    Runner::new(RandomScheduler::new(schedules / 2), config()).run(ranks);
}

/// All-reduces the rank numbers, and checks the sum.
fn sum(comm: &ThreadComm, seq: u64, len: usize) -> Result<()> {
    let mut x = vec![comm.rank() as f32; len];
    comm.all_reduce(&call(Op::AllReduce, seq, len), ReduceOp::Sum, AnyMut::F32(x.as_mut_slice()))?;
    let size = comm.size();
    assert!(x.iter().all(|x| *x == (size * (size - 1) / 2) as f32), "{x:?}");
    Ok(())
}

fn start(comm: &ThreadComm, seq: u64) -> Result<Box<dyn InFlight<Cpu>>> {
    let call = Call { started: true, ..call(Op::AllReduce, seq, 2) };
    let mut numbers = AnyBuffer::<Cpu>::F32(Cpu::new().empty(2)?);
    if let AnyMut::F32(numbers) = numbers.as_mut() {
        numbers.fill(comm.rank() as f32);
    }
    comm.start(&call, Collective::AllReduce(ReduceOp::Max), numbers, AnyBuffer::F32(Cpu::new().empty(2)?))
}

fn send(comm: &ThreadComm, to: usize) -> Result<()> {
    let x = [comm.rank() as f32];
    let send = Outgoing { to, shape: Shape::new(&[1]), data: AnyRef::F32(x.as_slice()) };
    comm.exchange(&call(Op::Exchange, 0, 1), Some(send), None)
}

fn receive(comm: &ThreadComm, from: usize) -> Result<()> {
    let mut x = [-1_f32];
    let recv = Incoming { from, shape: Shape::new(&[1]), data: AnyMut::F32(x.as_mut_slice()) };
    comm.exchange(&call(Op::Exchange, 0, 1), None, Some(recv))?;
    assert_eq!(x, [from as f32]);
    Ok(())
}

#[test]
fn collectives_messages_flights_and_splits_are_right() {
    explore(RANKS, 5000, |comm| {
        let (rank, size) = (comm.rank(), comm.size());
        sum(&comm, 0, 3).unwrap();
        send(&comm, (rank + 1) % size).unwrap();
        // Too long for a slot, so the ranks write one another's memory.
        sum(&comm, 1, 4200).unwrap();
        let flight = start(&comm, 2).unwrap();
        receive(&comm, (rank + size - 1) % size).unwrap();
        let half = comm.split(&call(Op::Split, 3, 0), Some(rank as u64 % 2), 0, "half").unwrap().unwrap();
        let mut x = [rank as f32];
        half.all_reduce(&call(Op::AllReduce, 0, 1), ReduceOp::Sum, AnyMut::F32(x.as_mut_slice())).unwrap();
        assert_eq!(x[0], if rank % 2 == 0 { 12.0 } else { 16.0 });
        assert_eq!(flight.wait().unwrap().as_ref().of::<f32>(), Some(&[size as f32 - 1.0; 2][..]));
    });
}

#[test]
fn a_lost_rank_is_named_on_every_other() {
    for size in [2, 3, RANKS] {
        explore(size, 5000, move |comm| {
            sum(&comm, 0, 2).unwrap();
            if comm.rank() == size - 1 {
                // The other ranks need the input that this rank has posted.
                drop(start(&comm, 1).unwrap());
                return;
            }
            let flight = start(&comm, 1).unwrap();
            for outcome in [sum(&comm, 2, 2), comm.barrier(&call(Op::Barrier, 3, 0))] {
                let is_peer_lost = |error| matches!(error, Error::PeerLost { rank, reason: LostReason::Left, .. } if rank == size - 1);
                assert!(outcome.clone().is_err_and(is_peer_lost), "{outcome:?}");
            }
            flight.wait().unwrap();
        });
    }
}

#[test]
fn a_disagreement_is_the_same_error_on_every_rank() {
    explore(RANKS, 5000, |comm| {
        sum(&comm, 0, 2).unwrap();
        let len = if comm.rank() == 5 { 4200 } else { 3 };
        let error = sum(&comm, 1, len).unwrap_err();
        let Error::Mismatch(mismatch) = &error else { panic!("{error}") };
        assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, 5));
        assert_eq!(comm.barrier(&call(Op::Barrier, 2, 0)).unwrap_err(), error);
    });
}

/// R9: rank 0 waits for a message from rank 1. Rank 1 and all other ranks wait for rank 0 in an
/// all-reduce.
#[test]
fn a_wait_cycle_is_a_disagreement() {
    for size in [2, 3, RANKS] {
        explore(size, 5000, move |comm| {
            sum(&comm, 0, 2).unwrap();
            let outcome = if comm.rank() == 0 { receive(&comm, 1) } else { sum(&comm, 1, 2) };
            assert!(matches!(outcome, Err(Error::Mismatch(_))), "{outcome:?}");
        });
    }
}
