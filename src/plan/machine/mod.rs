//! The rates of a machine: what turns operations and bytes into seconds.

mod file;
mod presets;
mod price;
mod rates;
mod runs;

pub use price::Link;
pub use rates::{Rate, Rates, TypeRates};
pub use runs::{Parts, Run};

use crate::{
    comm::Op,
    error::{Error, Result},
    plan::bounds::{at_least_0, positive},
};
use serde::{Deserialize, Serialize};

/// A machine: devices that compute, their memory, and the links between them. All ranks are equal.
///
/// Units: bytes, seconds, floating-point operations a second, bytes a second. A machine is a
/// preset ([`Machine::preset`]), is measured (by [`Measure`](super::Measure)), or is read from JSON
/// with the same fields ([`Machine::read`]).
///
/// ```
/// use shardwise::plan::Machine;
/// let machine = Machine::preset("h200")?.with_ranks(4);
/// let text = machine.to_json()?;
/// assert_eq!(Machine::parse(&text)?, machine);
/// let error = Machine::parse(&text.replace("4.6e-6", "-1")).unwrap_err();
/// assert_eq!(error.to_string(), "machine: `rates.launch` is -1, but has to be at least 0");
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
    /// The memory of a rank, or of a node if `shares_memory` is set.
    pub memory: u64,
    /// Whether the ranks of a node divide its memory among them, as ranks on CPUs do.
    #[serde(default)]
    pub shares_memory: bool,
    /// A plan fits if its peak is at most this share of the memory.
    pub fits: f64,
    /// A plan is tight if its peak is at most this share of the memory.
    pub tight: f64,
    /// The rates of a rank, by ascending number of ranks of its node that compute. A plan uses the
    /// first entry whose `ranks` is at least its number of ranks in a node. If there is none, it
    /// uses the last entry, and its ranks take turns.
    pub rates: Vec<Rates>,
    /// The link between ranks of a node.
    pub node: Link,
    /// Measured collectives between ranks of a node. `node` prices those that are not listed.
    #[serde(default)]
    pub collectives: Vec<Collective>,
    /// The link between nodes. Not needed if there is one node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Link>,
    /// Whether a rank that sends a message to another continues before that rank receives it.
    #[serde(default)]
    pub buffered: bool,
    /// The factor by which computation is slower while a collective runs. With 2, collectives hide
    /// nothing.
    pub overlap: f64,
    /// The relative uncertainty of predicted times.
    pub error: f64,
    /// The transport over which the machine was measured. None if its rates are published ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transport: Option<Transport>,
    /// Steps that were run on the machine: see [`Machine::calibrated`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<Run>,
}

/// A collective of a group in a node: `latency + bytes / bandwidth`, with the bytes of the whole
/// tensor ([`Transfer::bytes`](crate::comm::Transfer::bytes)).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Collective {
    /// The name of the operation ([`Op::name`]).
    pub op: String,
    /// The number of ranks of the group.
    pub ranks: usize,
    /// The seconds of a tensor without elements.
    pub latency: f64,
    /// The bytes of the whole tensor, a second.
    pub bandwidth: f64,
}

/// The transport of a measured machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Transport {
    /// Ranks that are threads of a process, on the CPU.
    Threads,
    /// Processes on CPUs that an MPI library connects.
    Mpi,
    /// GPUs that NCCL connects.
    Nccl,
}

const OP: &str = "machine";

/// The largest uncertainty.
const MOST_ERROR: f64 = 10.0;

/// The element types of plans.
const TYPES: [&str; 3] = ["f32", "bf16", "f16"];

/// The operations of [`Collective`]s.
const OPS: [Op; 5] = [Op::AllReduce, Op::AllGather, Op::ReduceScatter, Op::Broadcast, Op::Exchange];

impl Machine {
    /// Checks every number of the machine.
    ///
    /// # Errors
    /// When a rate, a bandwidth, the memory or a number of ranks is not positive, when a share is
    /// not between 0 and 1, when a list is empty or not ascending, when a number is not finite, or
    /// when the rates or a link are missing. The error names the field and the number.
    pub fn check(&self) -> Result<()> {
        positive(OP, "ranks", self.ranks as f64)?;
        positive(OP, "ranks_per_node", self.ranks_per_node as f64)?;
        positive(OP, "memory", self.memory as f64)?;
        positive(OP, "fits", self.fits)?;
        if !(self.fits <= self.tight && self.tight <= 1.0) {
            let reason = format!(
                "`fits` is {} and `tight` is {}, but fits ≤ tight ≤ 1 has to hold",
                self.fits, self.tight
            );
            return Err(Error::invalid(OP, reason));
        }
        self.rates.iter().try_for_each(Rates::check)?;
        if let Some(pair) = self.rates.windows(2).find(|pair| pair[0].ranks >= pair[1].ranks) {
            let [first, second] = [&pair[0], &pair[1]].map(|rates| rates.ranks);
            return Err(Error::invalid(
                OP,
                format!("`rates` has {first} ranks before {second}, but has to ascend"),
            ));
        }
        self.rates(1)?;
        self.node.check("node")?;
        match self.network {
            Some(network) => network.check("network")?,
            None if self.ranks > self.ranks_per_node => {
                let reason = format!(
                    "`ranks` is {}, but a node has {} and there is no `network`: measure more ranks, or add the link between nodes",
                    self.ranks, self.ranks_per_node
                );
                return Err(Error::invalid(OP, reason));
            }
            None => {}
        }
        for (at, own) in self.collectives.iter().enumerate() {
            own.check()?;
            let same = |other: &Collective| (&other.op, other.ranks) == (&own.op, own.ranks);
            if self.collectives[..at].iter().any(same) {
                let reason = format!("`collectives` has {} of {} ranks twice", own.op, own.ranks);
                return Err(Error::invalid(OP, reason));
            }
        }
        if !(self.overlap.is_finite() && (1.0..=2.0).contains(&self.overlap)) {
            let reason = format!("`overlap` is {:?}, but has to be between 1 and 2", self.overlap);
            return Err(Error::invalid(OP, reason));
        }
        at_least_0(OP, "error", self.error)?;
        if self.error > MOST_ERROR {
            let reason = format!("`error` is {:e}, but has to be at most {MOST_ERROR}", self.error);
            return Err(Error::invalid(OP, reason));
        }
        self.runs.iter().try_for_each(Run::check)
    }

    /// Sets the number of ranks.
    pub fn with_ranks(self, ranks: usize) -> Self {
        Self { ranks, ..self }
    }

    /// The memory of each of `ranks` ranks.
    pub fn rank_memory(&self, ranks: usize) -> u64 {
        let sharing = if self.shares_memory { ranks.clamp(1, self.ranks_per_node.max(1)) } else { 1 };
        self.memory / sharing as u64
    }
}

impl Collective {
    fn check(&self) -> Result<()> {
        let Self { op, ranks, latency, bandwidth } = self;
        if !OPS.iter().any(|known| known.name() == op) {
            let known = OPS.map(Op::name).join(", ");
            return Err(Error::invalid(
                OP,
                format!("`collectives` has an operation `{op}`; known are {known}"),
            ));
        }
        let of = |field: &str| format!("collectives: {op} of {ranks} ranks: {field}");
        positive(OP, &of("ranks"), *ranks as f64)?;
        at_least_0(OP, &of("latency"), *latency)?;
        positive(OP, &of("bandwidth"), *bandwidth)
    }
}
