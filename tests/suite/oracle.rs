//! Ranks run random programs of collectives, which may differ between ranks. An oracle predicts
//! every rank's outcome.

use half::{bf16, f16};
use proptest::{collection::vec, prelude::*};
use shardwise::{
    Error, LostReason, Result, Tensor,
    comm::{Group, ReduceOp},
    device::{Cpu, DType, Element},
    launch::Threads,
    shard::Partition,
};
use std::{panic::resume_unwind, time::Duration};

const OPS: [ReduceOp; 3] = [ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min];
const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];
/// Shapes below and above the size from which ranks read each other's memory.
const SHAPES: [[usize; 2]; 4] = [[2, 3], [3, 2], [9, 8], [120, 150]];

/// A call of a group.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Call {
    AllReduce(ReduceOp, DType, [usize; 2]),
    AllGather(DType, [usize; 2], usize),
    ReduceScatter(ReduceOp, DType, [usize; 2], usize),
    Broadcast(usize, DType, [usize; 2]),
    Barrier,
    Split,
}

fn call() -> impl Strategy<Value = Call> {
    (0..6, 0..3_usize, 0..4_usize, 0..4_usize, 0..2_usize).prop_map(|(kind, op, dtype, shape, dim)| {
        let (op, dtype, shape) = (OPS[op], DTYPES[dtype], SHAPES[shape]);
        match kind {
            0 => Call::AllReduce(op, dtype, shape),
            1 => Call::AllGather(dtype, shape, dim),
            2 => Call::ReduceScatter(op, dtype, shape, dim),
            3 => Call::Broadcast(dim, dtype, shape),
            4 => Call::Barrier,
            _ => Call::Split,
        }
    })
}

impl Call {
    fn make(self, group: &Group<Cpu>) -> Result<()> {
        match self {
            Self::Barrier => group.barrier(),
            Self::Split => group.split(Some(group.rank() as u64 % 2), 0).map(drop),
            Self::AllReduce(_, dtype, _)
            | Self::AllGather(dtype, ..)
            | Self::ReduceScatter(_, dtype, ..)
            | Self::Broadcast(_, dtype, _) => match dtype {
                DType::F64 => self.make_of::<f64>(group),
                DType::F32 => self.make_of::<f32>(group),
                DType::BF16 => self.make_of::<bf16>(group),
                DType::F16 => self.make_of::<f16>(group),
                other => panic!("{other} has no test"),
            },
        }
    }

    fn make_of<T: Element>(self, group: &Group<Cpu>) -> Result<()> {
        let partition = |len| Partition::even(len, group.size());
        let own = group.rank() as f64 + 1.0;
        let full = |shape: [usize; 2]| Tensor::<T>::full(group.device(), shape, own);
        let mut x = match self {
            Self::AllGather(_, mut shape, dim) => {
                shape[dim] = partition(shape[dim]).size(group.rank());
                full(shape)?
            }
            Self::AllReduce(.., shape) | Self::ReduceScatter(_, _, shape, _) | Self::Broadcast(.., shape) => {
                full(shape)?
            }
            Self::Barrier | Self::Split => return self.make(group),
        };
        let outcome = match self {
            Self::AllReduce(op, ..) => group.all_reduce(op, &mut x),
            Self::AllGather(_, shape, dim) => group.all_gather(&x, dim, &partition(shape[dim])).map(drop),
            Self::ReduceScatter(op, _, shape, dim) => {
                group.reduce_scatter(op, &x, dim, &partition(shape[dim])).map(drop)
            }
            Self::Broadcast(root, ..) => group.broadcast(root, &mut x),
            Self::Barrier | Self::Split => Ok(()),
        };
        if outcome.is_err() {
            assert!(x.to_vec()?.iter().all(|value| value.to_f64() == own), "the buffer has changed");
        }
        outcome
    }
}

/// How a rank's program ends.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Returns,
    Fails,
    Panics,
}

#[derive(Clone, Debug)]
struct Program {
    calls: Vec<Call>,
    end: End,
}

/// One rank's deviation from the common program.
#[derive(Clone, Debug)]
enum Edit {
    /// Leaves out a call.
    Skip(usize),
    /// Makes an additional call.
    Add(usize, Call),
    /// Replaces a call by a different one.
    Change(usize, Call),
    /// Ends after this many calls.
    End(usize, End),
}

fn edit() -> impl Strategy<Value = Edit> {
    prop_oneof![
        (0..12_usize).prop_map(Edit::Skip),
        (0..12_usize, call()).prop_map(|(at, call)| Edit::Add(at, call)),
        (0..12_usize, call()).prop_map(|(at, call)| Edit::Change(at, call)),
        (0..12_usize, 0..3_usize)
            .prop_map(|(at, end)| Edit::End(at, [End::Returns, End::Fails, End::Panics][end])),
    ]
}

fn apply(program: &mut Program, edit: &Edit) {
    let len = program.calls.len();
    match edit {
        Edit::Skip(at) => drop(program.calls.remove(at % len.max(1))),
        Edit::Add(at, call) => program.calls.insert(at % (len + 1), *call),
        Edit::Change(at, call) => program.calls[at % len] = *call,
        Edit::End(at, end) => {
            program.calls.truncate(at % (len + 1));
            program.end = *end;
        }
    }
}

/// The outcome that the oracle predicts.
#[derive(Debug)]
enum Verdict {
    AllEnd,
    /// These ranks have ended. The errors of the other ranks name one of them.
    Lost(Vec<usize>),
    /// The calls of rank 0 and of this rank differ.
    Differ(usize),
}

fn oracle(programs: &[Program]) -> Verdict {
    for at in 0.. {
        let calls: Vec<_> = programs.iter().map(|program| program.calls.get(at)).collect();
        let gone: Vec<_> = (0..calls.len()).filter(|&rank| calls[rank].is_none()).collect();
        if gone.len() == calls.len() {
            break;
        }
        if !gone.is_empty() {
            return Verdict::Lost(gone);
        }
        if let Some(rank) = calls.iter().position(|call| *call != calls[0]) {
            return Verdict::Differ(rank);
        }
    }
    Verdict::AllEnd
}

fn fails() -> Error {
    Error::invalid("program", "fails")
}

fn check(rank: usize, outcome: &Result<(), Error>, programs: &[Program], verdict: &Verdict) {
    let ends = match programs[rank].end {
        End::Returns => Ok(()),
        End::Fails => Err(fails()),
        End::Panics => Err(Error::RankPanicked { rank, message: "panics".into() }),
    };
    match verdict {
        Verdict::Lost(gone) if !gone.contains(&rank) => {
            let Err(Error::PeerLost { rank: named, reason, .. }) = outcome else {
                panic!("{rank}: {outcome:?}")
            };
            assert!(gone.contains(named), "{rank}: {outcome:?}");
            let right = match programs[*named].end {
                End::Returns => *reason == LostReason::Left,
                End::Fails => *reason == LostReason::Failed,
                End::Panics => *reason == LostReason::Panicked,
            };
            assert!(right, "{rank}: {outcome:?}");
        }
        Verdict::Differ(other) => {
            let Err(Error::Mismatch(mismatch)) = outcome else { panic!("{rank}: {outcome:?}") };
            assert_eq!((mismatch.left_rank, mismatch.right_rank), (0, *other), "{mismatch:?}");
        }
        _ => assert_eq!(*outcome, ends, "{rank}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_rank_gets_what_its_program_and_the_others_deserve(
        world in 2..=8_usize,
        calls in vec(call(), 1..12),
        edits in vec((0..8_usize, edit()), 0..3),
    ) {
        let mut programs = vec![Program { calls, end: End::Returns }; world];
        for (rank, edit) in &edits {
            let program = &mut programs[rank % world];
            // An earlier edit may have removed all calls.
            if !program.calls.is_empty() {
                apply(program, edit);
            }
        }
        let verdict = oracle(&programs);
        let ranks = Threads::new(world).device(Cpu::poisoned).deadline(Duration::from_secs(60));
        let outcomes = ranks
            .run_each(|group| {
                let Program { calls, end } = &programs[group.rank()];
                calls.iter().try_for_each(|call| call.make(&group))?;
                match end {
                    End::Returns => Ok(()),
                    End::Fails => Err(fails()),
                    End::Panics => resume_unwind(Box::new("panics")),
                }
            })
            .unwrap();
        for (rank, outcome) in outcomes.iter().enumerate() {
            check(rank, outcome, &programs, &verdict);
        }
        // All ranks that report a lost rank or a mismatch report the same one.
        let reported = |outcome: &Result<()>| match outcome {
            Err(Error::PeerLost { rank, .. }) => Some(format!("{rank}")),
            Err(Error::Mismatch(mismatch)) => Some(format!("{mismatch:?}")),
            _ => None,
        };
        let reported: Vec<_> = outcomes.iter().filter_map(reported).collect();
        prop_assert!(reported.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", reported);
    }
}
