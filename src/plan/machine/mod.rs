//! The rates of a machine: what turns operations and bytes into seconds.

mod file;
mod presets;

use crate::{
    comm::{Op, Transfer},
    device::{Work, WorkKind},
    error::{Error, Result},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A machine: devices that compute, their memory, and the links between them. All ranks are equal.
///
/// Units: bytes, seconds, floating-point operations a second, bytes a second. A machine is a
/// preset ([`Machine::preset`]) or is read from JSON with the same fields ([`Machine::read`]).
///
/// ```
/// use shardwise::plan::Machine;
/// let machine = Machine::preset("h200")?.with_ranks(4);
/// let text = machine.to_json()?;
/// assert_eq!(Machine::parse(&text)?, machine);
/// let error = Machine::parse(&text.replace("4.6e-6", "-1")).unwrap_err();
/// assert_eq!(error.to_string(), "machine: `launch` is -1, but has to be at least 0");
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Machine {
    /// What it is.
    pub name: String,
    /// The number of ranks, one for each device.
    pub ranks: usize,
    /// The number of ranks that are connected by `node`. All others are connected by `network`.
    pub ranks_per_node: usize,
    /// The memory of a rank.
    pub memory: u64,
    /// A plan fits if its peak is at most this share of the memory.
    pub fits: f64,
    /// A plan is tight if its peak is at most this share of the memory.
    pub tight: f64,
    /// Matrix products by element type (`f32`, `bf16`, `f16`), by their FLOPs.
    pub products: BTreeMap<String, Rate>,
    /// Attention by element type, by its FLOPs.
    pub attention: BTreeMap<String, Rate>,
    /// Reading and writing memory, by the bytes of a kernel.
    pub copies: Rate,
    /// The seconds that starting a kernel takes.
    pub launch: f64,
    /// The link between ranks of a node.
    pub node: Link,
    /// The link between nodes.
    pub network: Link,
    /// The factor by which computation is slower while a collective runs.
    pub overlap: f64,
    /// The relative uncertainty of predicted times.
    pub error: f64,
}

/// A rate that depends on the size of an operation: `peak · efficiency`.
///
/// The efficiency is that of the largest entry whose size is at most the operation's, or that of
/// the first entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Rate {
    /// The rate at efficiency 1, a second.
    pub peak: f64,
    /// `(size, efficiency)`, by ascending size.
    pub efficiency: Vec<(f64, f64)>,
}

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

const OP: &str = "machine";

impl Machine {
    /// Checks every number of the machine.
    ///
    /// # Errors
    /// When a rate, a bandwidth, the memory or the number of ranks is not positive, when a share is
    /// not between 0 and 1, when a list of efficiencies is empty or not ascending, or when a number
    /// is not finite. The error names the field and the number.
    pub fn check(&self) -> Result<()> {
        let positive = |what: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                return Ok(());
            }
            Err(Error::invalid(OP, format!("`{what}` is {value}, but has to be positive")))
        };
        let at_least_0 = |what: &str, value: f64| {
            if value.is_finite() && value >= 0.0 {
                return Ok(());
            }
            Err(Error::invalid(OP, format!("`{what}` is {value}, but has to be at least 0")))
        };
        positive("ranks", self.ranks as f64)?;
        positive("ranks_per_node", self.ranks_per_node as f64)?;
        positive("memory", self.memory as f64)?;
        positive("fits", self.fits)?;
        if !(self.fits <= self.tight && self.tight <= 1.0) {
            let reason = format!(
                "`fits` is {} and `tight` is {}, but fits ≤ tight ≤ 1 has to hold",
                self.fits, self.tight
            );
            return Err(Error::invalid(OP, reason));
        }
        for (what, rates) in [("products", &self.products), ("attention", &self.attention)] {
            for (dtype, rate) in rates {
                if !["f32", "bf16", "f16"].contains(&&**dtype) {
                    let reason = format!("`{what}` has a rate for `{dtype}`; known are f32, bf16 and f16");
                    return Err(Error::invalid(OP, reason));
                }
                rate.check(&format!("{what}.{dtype}"))?;
            }
        }
        self.copies.check("copies")?;
        at_least_0("launch", self.launch)?;
        for (what, link) in [("node", self.node), ("network", self.network)] {
            at_least_0(&format!("{what}.latency"), link.latency)?;
            positive(&format!("{what}.bandwidth"), link.bandwidth)?;
        }
        if !(self.overlap.is_finite() && self.overlap >= 1.0) {
            return Err(Error::invalid(
                OP,
                format!("`overlap` is {}, but has to be at least 1", self.overlap),
            ));
        }
        at_least_0("error", self.error)
    }

    /// Sets the number of ranks.
    pub fn with_ranks(self, ranks: usize) -> Self {
        Self { ranks, ..self }
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
        match transfer.op {
            Op::Broadcast | Op::Exchange if inside == ranks => self.node.seconds(transfer, ranks),
            Op::Broadcast | Op::Exchange => self.network.seconds(transfer, ranks),
            _ => {
                let share = Transfer { elements: transfer.elements.div_ceil(inside), ..*transfer };
                self.network.seconds(&share, ranks.div_ceil(inside)) + self.node.seconds(transfer, inside)
            }
        }
    }

    /// The seconds of a kernel: those of its operations or of its bytes, whichever are more, and
    /// the launch.
    ///
    /// # Errors
    /// When the machine has no rate for the element type.
    pub fn kernel(&self, work: &Work) -> Result<f64> {
        let rates = match work.kind {
            WorkKind::Product => Some(("products", &self.products)),
            WorkKind::Attention => Some(("attention", &self.attention)),
            WorkKind::Other => None,
        };
        let computing = match rates {
            None => 0.0,
            Some((what, rates)) => {
                let rate = rates.get(&work.dtype.to_string()).ok_or_else(|| {
                    let known = rates.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
                    let reason = format!("`{what}` has no rate for {}, only for {known}", work.dtype);
                    Error::invalid(OP, reason)
                })?;
                rate.seconds(work.flops as f64)
            }
        };
        Ok(self.launch + computing.max(self.copies.seconds(work.bytes as f64)))
    }
}

impl Rate {
    /// A rate that does not depend on the size.
    pub fn constant(peak: f64) -> Self {
        Self { peak, efficiency: vec![(0.0, 1.0)] }
    }

    fn check(&self, what: &str) -> Result<()> {
        let reason = if !(self.peak.is_finite() && self.peak > 0.0) {
            format!("`{what}.peak` is {}, but has to be positive", self.peak)
        } else if self.efficiency.is_empty() {
            format!("`{what}.efficiency` is empty")
        } else if let Some((size, share)) =
            self.efficiency.iter().find(|(size, share)| !(*size >= 0.0 && *share > 0.0 && *share <= 1.0))
        {
            format!(
                "`{what}.efficiency` has ({size}, {share}), but sizes are at least 0 and efficiencies in (0, 1]"
            )
        } else if let Some(pair) = self.efficiency.windows(2).find(|pair| pair[0].0 >= pair[1].0) {
            format!("`{what}.efficiency` has size {} before {}, but has to ascend", pair[0].0, pair[1].0)
        } else {
            return Ok(());
        };
        Err(Error::invalid(OP, reason))
    }

    /// The seconds of an operation of this size. 0 for an operation of size 0.
    pub fn seconds(&self, size: f64) -> f64 {
        let next = self.efficiency.partition_point(|(from, _)| *from <= size);
        let share = self.efficiency.get(next.saturating_sub(1)).map_or(1.0, |(_, share)| *share);
        size / (self.peak * share)
    }
}

impl Link {
    /// The seconds of a transfer in a group of n = `ranks` ranks: messages · latency +
    /// [`Transfer::wire_bytes`] / bandwidth. A ring all-reduce has 2 (n − 1) messages, an
    /// all-gather and a reduce-scatter n − 1, a broadcast and an exchange 1.
    pub fn seconds(&self, transfer: &Transfer, ranks: usize) -> f64 {
        let steps = ranks.saturating_sub(1);
        let messages = match transfer.op {
            Op::AllReduce => 2 * steps,
            Op::AllGather | Op::ReduceScatter => steps,
            Op::Broadcast | Op::Exchange => 1,
            Op::Barrier | Op::Split => 0,
        };
        messages as f64 * self.latency + transfer.wire_bytes(ranks) as f64 / self.bandwidth
    }
}
