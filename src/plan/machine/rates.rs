//! The rates of a rank's kernels.

use super::{OP, TYPES};
use crate::{
    device::WorkKind,
    error::{Error, Result},
    plan::bounds::{at_least_0, positive},
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The rates of a rank while at most `ranks` ranks of its node compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Rates {
    /// The number of ranks of the node that compute.
    pub ranks: usize,
    /// The threads with which each of them computes matrix products. 1 on GPUs.
    pub threads: usize,
    /// The seconds that starting a kernel takes.
    pub launch: f64,
    /// The rates by element type: `f32`, `bf16`, `f16`. A plan needs f32 and the type of its
    /// weights.
    pub types: BTreeMap<String, TypeRates>,
}

/// The rates of kernels whose operands have one element type.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TypeRates {
    /// Matrix products, by their FLOPs.
    pub products: Rate,
    /// Attention, by its FLOPs.
    pub attention: Rate,
    /// Reading and writing memory, by the bytes of a kernel.
    pub copies: Rate,
    /// Reading and writing memory by kernels of a family ([`WorkKind::name`]), if that differs from
    /// `copies`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub kernels: BTreeMap<String, Rate>,
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

/// The families of kernels with a rate of their own.
const FAMILIES: [WorkKind; 7] = [
    WorkKind::Product,
    WorkKind::Attention,
    WorkKind::Norm,
    WorkKind::Activation,
    WorkKind::Loss,
    WorkKind::Dropout,
    WorkKind::Update,
];

impl Rates {
    pub(super) fn check(&self) -> Result<()> {
        positive(OP, "rates.ranks", self.ranks as f64)?;
        positive(OP, "rates.threads", self.threads as f64)?;
        at_least_0(OP, "rates.launch", self.launch)?;
        for (dtype, rates) in &self.types {
            if !TYPES.contains(&&**dtype) {
                let known = TYPES.join(", ");
                return Err(Error::invalid(OP, format!("`rates` has a type `{dtype}`; known are {known}")));
            }
            rates.products.check(&format!("{dtype}.products"))?;
            rates.attention.check(&format!("{dtype}.attention"))?;
            rates.copies.check(&format!("{dtype}.copies"))?;
            for (family, rate) in &rates.kernels {
                if !FAMILIES.iter().any(|known| known.name() == family) {
                    let known = FAMILIES.map(WorkKind::name).join(", ");
                    let reason = format!("`{dtype}.kernels` has a family `{family}`; known are {known}");
                    return Err(Error::invalid(OP, reason));
                }
                rate.check(&format!("{dtype}.kernels.{family}"))?;
            }
        }
        Ok(())
    }
}

impl TypeRates {
    /// The rates of matrix products and attention by their FLOPs, and of all kernels by their
    /// bytes.
    pub fn new(products: Rate, attention: Rate, copies: Rate) -> Self {
        Self { products, attention, copies, kernels: BTreeMap::new() }
    }

    /// The seconds of the operations or of the bytes of a kernel, whichever are more.
    pub(super) fn seconds(&self, kind: WorkKind, flops: f64, bytes: f64) -> f64 {
        let computing = match kind {
            WorkKind::Product => self.products.seconds(flops),
            WorkKind::Attention => self.attention.seconds(flops),
            _ => 0.0,
        };
        computing.max(self.kernels.get(kind.name()).unwrap_or(&self.copies).seconds(bytes))
    }
}

impl Rate {
    /// A rate that does not depend on the size.
    pub fn constant(peak: f64) -> Self {
        Self { peak, efficiency: vec![(0.0, 1.0)] }
    }

    /// The rate that is nearest to measured operations, as `(size, seconds)` by ascending size. An
    /// operation has the rate of the measured one whose size is nearest, as a ratio.
    pub(in crate::plan) fn measured(operations: &[(f64, f64)]) -> Self {
        let rates: Vec<_> = operations.iter().map(|(size, seconds)| size / seconds).collect();
        let peak = rates.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let from = |at: usize| if at == 0 { 0.0 } else { (operations[at - 1].0 * operations[at].0).sqrt() };
        let efficiency = rates.iter().enumerate().map(|(at, rate)| (from(at), rate / peak));
        Self { peak, efficiency: efficiency.collect() }
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
