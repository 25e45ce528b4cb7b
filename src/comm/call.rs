//! What a rank asks of its group, in a form that ranks can compare.

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

/// A collective operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Every rank gets the reduction over all ranks.
    AllReduce,
    /// Every rank gets all ranks' parts.
    AllGather,
    /// Every rank gets its part of the reduction.
    ReduceScatter,
    /// Every rank gets the root's values.
    Broadcast,
    /// A rank sends to one and receives from another.
    Exchange,
    /// No rank goes on before all have come.
    Barrier,
    /// The group is divided.
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

/// How values of several ranks become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// The sum, in rank order, in the element's accumulator.
    #[default]
    Sum,
    /// The largest; NaN if any is NaN.
    Max,
    /// The smallest; NaN if any is NaN.
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

/// One call of a group: the same on every rank, or the group is in disagreement.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// How many calls of this group came before.
    pub seq: u64,
    /// The operation.
    pub op: Op,
    /// Whether it was started, to be waited for later.
    pub started: bool,
    /// How values are reduced, if they are.
    pub reduce: Option<ReduceOp>,
    /// The rank whose values count, if one does.
    pub root: Option<usize>,
    /// The element, if there is data.
    pub dtype: Option<DType>,
    /// The shape of the whole tensor.
    pub shape: Shape,
    /// A hash of how it is cut.
    pub parts: u64,
    /// A hash of the calls since the ranks last compared theirs; 0 where they compare every call.
    pub history: u64,
    /// The group's number: the same on all its ranks, and different from other groups'.
    pub group: u64,
    /// How many messages of the group this rank has sent to others, and received from them.
    pub messages: [u64; 2],
    /// Where the call was made. Not compared: ranks may reach the same call on different paths.
    pub site: Site,
}

impl Call {
    /// Whether two ranks ask the same.
    pub fn agrees(&self, other: &Self) -> bool {
        (self.seq, self.history, self.group) == (other.seq, other.history, other.group)
            && self.signature() == other.signature()
    }

    /// What is asked, whichever call of the group it is.
    fn signature(&self) -> impl Hash + PartialEq {
        (self.op, self.started, self.reduce, self.root, self.dtype, self.shape, self.parts)
    }

    /// A number that calls have in common which ask the same, whichever call of the group they are.
    #[cfg(feature = "nccl")]
    pub(crate) fn kind(&self) -> u64 {
        hash(self.signature())
    }

    /// A number that differs where calls do not agree.
    pub(crate) fn fingerprint(&self) -> u64 {
        hash((self.signature(), self.seq, self.history, self.group))
    }

    /// What is noted of it.
    pub(super) fn operation(&self) -> Operation {
        let (op, started, root, dtype, shape, parts) =
            (self.op.name(), self.started, self.root, self.dtype, self.shape, self.parts);
        let reduce = self.reduce.map(ReduceOp::name);
        let (call, site) = (Some((self.group, self.seq)), Some(self.site));
        Operation { op, started, reduce, root, dtype, shape, parts, call, site }
    }

    /// The disagreement between the calls of all ranks, in rank order, if there is one: of calls
    /// that do not agree, or of messages that were sent and not received.
    pub fn disagreement<'a>(calls: impl Iterator<Item = &'a Self> + Clone) -> Option<Mismatch> {
        let left = calls.clone().next()?;
        match calls.clone().enumerate().find(|(_, call)| !left.agrees(call)) {
            Some((right_rank, right)) => {
                Some(Mismatch { left_rank: 0, left: left.to_string(), right_rank, right: right.to_string() })
            }
            None => left.unreceived(calls.map(|call| call.messages)),
        }
    }

    /// The disagreement of ranks that have come to this call with so many messages sent and
    /// received, in rank order, if not every message was received. A call that is started is no
    /// meeting: messages may go by until it is waited for. It names the rank that has sent the most
    /// beyond what it received, and the one with the fewest.
    pub(crate) fn unreceived(&self, messages: impl Iterator<Item = [u64; 2]> + Clone) -> Option<Mismatch> {
        let excess = |[sent, received]: [u64; 2]| i128::from(sent) - i128::from(received);
        if self.started || messages.clone().map(excess).sum::<i128>() == 0 {
            return None;
        }
        let words = |[sent, received]: [u64; 2]| {
            let call = Asked(self);
            format!("{call} with {sent} messages sent and {received} received before")
        };
        let (right_rank, right) = messages.clone().enumerate().min_by_key(|(_, counts)| excess(*counts))?;
        let (left_rank, left) = messages.enumerate().max_by_key(|(_, counts)| excess(*counts))?;
        Some(Mismatch { left_rank, left: words(left), right_rank, right: words(right) })
    }
}

/// The error of a rank of the world that has left all groups without receiving a message that
/// another one had sent.
pub(crate) fn never_received(from: usize, to: usize, what: &str) -> Error {
    Error::invalid("exchange", format!("rank {to} never received a message of rank {from}: {what}"))
}

/// The standard hasher with its fixed keys: the same in every process of one program.
pub(crate) fn hash(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", Asked(self), self.site)
    }
}

/// A call without its site, in words.
struct Asked<'a>(&'a Call);

impl fmt::Display for Asked<'_> {
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
        if call.parts != 0 {
            argument("cut ", &format!("{:08x}", call.parts as u32))?;
        }
        argument("call ", &call.seq)?;
        if call.history != 0 {
            argument("after calls ", &format!("{:08x}", call.history as u32))?;
        }
        f.write_str(")")
    }
}
