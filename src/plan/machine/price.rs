//! The seconds of kernels and transfers.

use super::{Machine, OP, Rates};
use crate::{
    comm::{Op, Transfer},
    device::{DType, Work},
    error::{Error, Result},
    plan::bounds::{at_least_0, positive},
};
use serde::{Deserialize, Serialize};

/// A link between ranks: an operation takes `latency + bytes / bandwidth`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Link {
    /// The seconds that a message takes apart from its bytes.
    pub latency: f64,
    /// The bytes a second of one rank in one direction.
    pub bandwidth: f64,
}

impl Machine {
    /// The rates of a rank if `ranks` ranks of the machine compute.
    ///
    /// # Errors
    /// When the machine has no rates.
    pub fn rates(&self, ranks: usize) -> Result<&Rates> {
        let of_node = ranks.min(self.ranks_per_node);
        let next = self.rates.iter().find(|rates| rates.ranks >= of_node);
        next.or(self.rates.last()).ok_or_else(|| Error::invalid(OP, "`rates` is empty"))
    }

    /// The factor by which computation is slower because `ranks` ranks take turns: the number of
    /// them in a node divided by that of the last entry of `rates`, if there are more.
    pub fn turns(&self, ranks: usize) -> f64 {
        let parallel = self.rates.last().map_or(1, |rates| rates.ranks.max(1));
        (ranks.min(self.ranks_per_node) as f64 / parallel as f64).max(1.0)
    }

    /// The seconds of a kernel if `ranks` ranks of the machine compute: those of its operations or
    /// of its bytes, whichever are more, and the launch. If ranks take turns, these are the seconds
    /// in which the rank computes.
    ///
    /// # Errors
    /// When the machine has no rates for the element type. A kernel on f64 has the rates of f32.
    pub fn kernel(&self, work: &Work, ranks: usize) -> Result<f64> {
        let rates = self.rates(ranks)?;
        let dtype = if work.dtype == DType::F64 { DType::F32 } else { work.dtype };
        let of_type = rates.types.get(&dtype.to_string()).ok_or_else(|| {
            let known = rates.types.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".into() } else { format!("only {known}") };
            Error::invalid(OP, format!("`rates` has no type {dtype}: {known}"))
        })?;
        Ok(rates.launch + of_type.seconds(work.kind, work.flops as f64, work.bytes as f64))
    }

    /// The seconds of a transfer in a group of `ranks` ranks. Neighbours in the group are `stride`
    /// ranks of the world apart.
    ///
    /// A reduction or a gather of a group on several nodes is hierarchical. Over the network it
    /// runs between the ranks of the same place in their nodes, each with its share of the
    /// elements; then it runs within the nodes. A broadcast or an exchange of such a group takes
    /// the network.
    pub fn seconds(&self, transfer: &Transfer, ranks: usize, stride: usize) -> f64 {
        let inside = (self.ranks_per_node / stride.max(1)).clamp(1, ranks.max(1));
        let between = |transfer: &Transfer, ranks| match &self.network {
            Some(network) => network.seconds(transfer, ranks),
            None => self.node.seconds(transfer, ranks),
        };
        match transfer.op {
            _ if inside == ranks => self.in_node(transfer, ranks),
            Op::Broadcast | Op::Exchange => between(transfer, ranks),
            _ => {
                let share = Transfer { elements: transfer.elements.div_ceil(inside), ..*transfer };
                between(&share, ranks.div_ceil(inside)) + self.in_node(transfer, inside)
            }
        }
    }

    /// The seconds of a transfer in a group of `ranks` ranks of one node: of the measured
    /// collective of the fewest ranks that are at least as many.
    fn in_node(&self, transfer: &Transfer, ranks: usize) -> f64 {
        if ranks <= 1 {
            return 0.0;
        }
        let op = transfer.op.name();
        let measured = self.collectives.iter().filter(|own| own.op == op && own.ranks >= ranks);
        match measured.min_by_key(|own| own.ranks) {
            Some(own) => own.latency + transfer.bytes() as f64 / own.bandwidth,
            None => self.node.seconds(transfer, ranks),
        }
    }
}

impl Link {
    pub(super) fn check(&self, what: &str) -> Result<()> {
        at_least_0(OP, &format!("{what}.latency"), self.latency)?;
        positive(OP, &format!("{what}.bandwidth"), self.bandwidth)
    }

    /// The seconds of a transfer in a group of n = `ranks` ranks: messages · latency +
    /// [`Transfer::wire_bytes`] / bandwidth.
    ///
    /// An all-gather and a reduce-scatter have n − 1 messages, a broadcast and an exchange 1. An
    /// all-reduce is a ring of 2 (n − 1) messages, or a tree of 2 ⌈log₂ n⌉ messages of the whole
    /// tensor, whichever takes less time.
    pub fn seconds(&self, transfer: &Transfer, ranks: usize) -> f64 {
        let steps = ranks.saturating_sub(1);
        let seconds =
            |messages: usize, bytes: usize| messages as f64 * self.latency + bytes as f64 / self.bandwidth;
        let wire = transfer.wire_bytes(ranks);
        match transfer.op {
            Op::AllReduce if ranks > 1 => {
                let depth = ranks.next_power_of_two().ilog2() as usize;
                let tree = seconds(2 * depth, 2 * transfer.bytes());
                seconds(2 * steps, wire).min(tree)
            }
            Op::AllReduce | Op::Barrier | Op::Split => 0.0,
            Op::AllGather | Op::ReduceScatter => seconds(steps, wire),
            Op::Broadcast | Op::Exchange => seconds(1, wire),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(op: Op, elements: usize) -> Transfer {
        Transfer { op, dtype: DType::F32, elements }
    }

    #[test]
    fn small_all_reduces_are_trees_and_large_ones_rings() {
        let link = Link { latency: 1e-5, bandwidth: 1e9 };
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 1e-12, "{got} and {want}");
        near(link.seconds(&transfer(Op::AllReduce, 1), 8), 6e-5 + 8e-9);
        near(link.seconds(&transfer(Op::AllReduce, 1 << 30), 8), 14e-5 + 2.0 * 7.0 / 8.0 * 4.294967296);
        near(link.seconds(&transfer(Op::AllGather, 1 << 30), 8), 7e-5 + 7.0 / 8.0 * 4.294967296);
        assert_eq!(link.seconds(&transfer(Op::AllReduce, 1 << 30), 1), 0.0);
    }

    #[test]
    fn measured_collectives_replace_those_of_the_link() {
        let mut machine = Machine::preset("h200").unwrap();
        let all_reduce = transfer(Op::AllReduce, 1000);
        let of_link = machine.seconds(&all_reduce, 5, 1);
        let of = |ranks, latency| super::super::Collective {
            op: "all_reduce".into(),
            ranks,
            latency,
            bandwidth: 1e6,
        };
        machine.collectives = vec![of(8, 1.0), of(4, 2.0), of(2, 3.0)];
        machine.check().unwrap();
        let seconds: Vec<_> = (1..=8).map(|ranks| machine.seconds(&all_reduce, ranks, 1)).collect();
        assert_eq!(seconds, [0.0, 3.004, 2.004, 2.004, 1.004, 1.004, 1.004, 1.004]);
        machine.collectives.remove(0);
        assert_eq!(machine.seconds(&all_reduce, 5, 1), of_link);
        // 16 ranks on two nodes: the network has no measured collective.
        let share = transfer(Op::AllReduce, 125);
        let between = machine.network.unwrap().seconds(&share, 2);
        assert_eq!(machine.seconds(&all_reduce, 16, 1), between + machine.node.seconds(&all_reduce, 8));
    }

    #[test]
    fn rates_are_those_of_the_ranks_of_a_node() {
        let mut machine = Machine::preset("h200").unwrap().with_ranks(64);
        let mut alone = machine.rates[0].clone();
        (alone.ranks, alone.launch) = (1, 1.0);
        machine.rates.insert(0, alone);
        machine.check().unwrap();
        let launch = |ranks| machine.rates(ranks).unwrap().launch;
        assert_eq!((launch(1), launch(2), launch(8), launch(64)), (1.0, 4.6e-6, 4.6e-6, 4.6e-6));
        assert_eq!((machine.turns(1), machine.turns(64)), (1.0, 1.0));
        machine.rates.truncate(1);
        machine.check().unwrap();
        assert_eq!([1, 3, 8, 64].map(|ranks| machine.turns(ranks)), [1.0, 3.0, 8.0, 8.0]);
        machine.rates.clear();
        assert!(machine.rates(1).is_err() && machine.check().is_err());
    }
}
