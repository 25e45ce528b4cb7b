//! The description of a collective call that ranks compare before data moves.

use crate::{
    device::DType,
    error::{Error, Mismatch, Site},
    shard::Shape,
    trace::Operation,
};
use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
};

/// An operation of a group. Later versions may add collectives, such as all-to-all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Op {
    /// Every rank gets the reduction over all ranks.
    AllReduce,
    /// Every rank gets the shards of all ranks.
    AllGather,
    /// Every rank gets its shard of the reduction.
    ReduceScatter,
    /// Every rank gets the root's values.
    Broadcast,
    /// A rank sends a tensor to one rank and receives a tensor from another.
    Exchange,
    /// Every rank waits until all ranks have called `barrier`.
    Barrier,
    /// The group is split into sub-groups.
    Split,
}

impl Op {
    /// The operation's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Exchange => "exchange",
            Self::Barrier => "barrier",
            Self::Split => "split",
        }
    }
}

/// The reduction of one value per rank to one value. Later versions may add reductions, such as a
/// product.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReduceOp {
    /// The sum. The terms are added in rank order, as values of the accumulator type.
    #[default]
    Sum,
    /// The maximum; NaN if any value is NaN.
    Max,
    /// The minimum; NaN if any value is NaN.
    Min,
}

impl ReduceOp {
    /// The reduction's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sum => "sum",
            Self::Max => "max",
            Self::Min => "min",
        }
    }
}

/// One call on a group. All ranks have to make the same call; otherwise every rank gets
/// [`Error::Mismatch`].
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The sequence number in the group, from 0.
    pub seq: u64,
    /// The operation.
    pub op: Op,
    /// Whether the call only starts the collective, and the rank waits for its result later.
    pub started: bool,
    /// The reduction, if there is one.
    pub reduce: Option<ReduceOp>,
    /// The root of a broadcast.
    pub root: Option<usize>,
    /// The element type, if the call has a tensor.
    pub dtype: Option<DType>,
    /// The shape of the whole tensor.
    pub shape: Shape,
    /// A hash of the tensor's partition; 0 if it is not sharded.
    pub partition: u64,
    /// A hash of the calls since the last comparison; 0 if the ranks compare every call.
    pub history: u64,
    /// The group's id: all ranks of the group have this id, and no other group has it.
    pub group: u64,
    /// The numbers of messages that this rank has sent and received in the group.
    pub messages: [u64; 2],
    /// The code location of the call. It is not compared, because ranks may make the same call on
    /// different code paths.
    pub site: Site,
}

impl Call {
    /// Whether two ranks make the same call.
    pub fn agrees(&self, other: &Self) -> bool {
        (self.seq, self.history, self.group) == (other.seq, other.history, other.group)
            && self.signature() == other.signature()
    }

    /// The operation and its arguments, without the sequence number.
    fn signature(&self) -> impl Hash + PartialEq {
        (self.op, self.started, self.reduce, self.root, self.dtype, self.shape, self.partition)
    }

    /// A hash of the operation and its arguments, without the sequence number.
    #[cfg(feature = "nccl")]
    pub(crate) fn kind(&self) -> u64 {
        hash(self.signature())
    }

    /// A 64-bit hash of all that [`Call::agrees`] compares.
    pub(crate) fn fingerprint(&self) -> u64 {
        hash((self.signature(), self.seq, self.history, self.group))
    }

    /// The entry of this call in the flight record.
    pub(super) fn operation(&self) -> Operation {
        let (op, started, root, dtype, shape, partition) =
            (self.op.name(), self.started, self.root, self.dtype, self.shape, self.partition);
        let reduce = self.reduce.map(ReduceOp::name);
        let (call, site) = (Some((self.group, self.seq)), Some(self.site));
        Operation { op, started, reduce, root, dtype, shape, partition, call, site }
    }

    /// Returns a mismatch if `calls`, the calls of all ranks in rank order, differ. Also if a
    /// message was sent and not received.
    pub fn disagreement<'a>(calls: impl Iterator<Item = &'a Self> + Clone) -> Option<Mismatch> {
        let left = calls.clone().next()?;
        match calls.clone().enumerate().find(|(_, call)| !left.agrees(call)) {
            Some((right_rank, right)) => {
                Some(Mismatch { left_rank: 0, left: left.to_string(), right_rank, right: right.to_string() })
            }
            None => left.unreceived(calls.map(|call| call.messages)),
        }
    }

    /// Returns a mismatch if some message was sent and not received. For each rank, in rank order,
    /// `messages` has the numbers of messages that the rank had sent and received before this call.
    /// The mismatch names the ranks with the largest and the smallest excess of sent over received
    /// messages. A started call is not checked, because messages may be pending while it runs.
    pub(crate) fn unreceived(&self, messages: impl Iterator<Item = [u64; 2]> + Clone) -> Option<Mismatch> {
        let excess = |[sent, received]: [u64; 2]| i128::from(sent) - i128::from(received);
        if self.started || messages.clone().map(excess).sum::<i128>() == 0 {
            return None;
        }
        let describe = |[sent, received]: [u64; 2]| {
            let call = WithoutSite(self);
            format!("{call} with {sent} messages sent and {received} received before")
        };
        let (right_rank, right) = messages.clone().enumerate().min_by_key(|(_, counts)| excess(*counts))?;
        let (left_rank, left) = messages.enumerate().max_by_key(|(_, counts)| excess(*counts))?;
        Some(Mismatch { left_rank, left: describe(left), right_rank, right: describe(right) })
    }
}

/// The error of world rank `to`, which left all groups without receiving a message from world rank
/// `from`.
pub(crate) fn never_received(from: usize, to: usize, what: &str) -> Error {
    Error::invalid("exchange", format!("rank {to} never received a message of rank {from}: {what}"))
}

/// Hashes with the standard hasher's fixed keys, so that every process of one program gets the same
/// hash.
pub(crate) fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", WithoutSite(self), self.site)
    }
}

/// Displays a call without its site.
struct WithoutSite<'a>(&'a Call);

impl fmt::Display for WithoutSite<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let call = self.0;
        if call.started {
            f.write_str("start_")?;
        }
        f.write_str(call.op.name())?;
        let mut separator = "(";
        let mut argument = |name: &str, value: &dyn fmt::Display| {
            write!(f, "{separator}{name}{value}")?;
            separator = ", ";
            fmt::Result::Ok(())
        };
        if let Some(reduce) = call.reduce {
            argument("", &reduce.name())?;
        }
        if let Some(root) = call.root {
            argument("root ", &root)?;
        }
        if let Some(dtype) = call.dtype {
            argument("", &format!("{dtype} {}", call.shape))?;
        }
        if call.partition != 0 {
            argument("partition ", &format!("{:08x}", call.partition as u32))?;
        }
        argument("call ", &call.seq)?;
        if call.history != 0 {
            argument("after calls ", &format!("{:08x}", call.history as u32))?;
        }
        f.write_str(")")
    }
}
