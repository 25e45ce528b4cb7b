//! Machines with published rates.

use super::{Link, Machine, OP, Rate};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// 1 GiB in bytes.
const GIB: u64 = 1 << 30;

impl Machine {
    /// The names of the machines that [`Machine::preset`] knows.
    pub const PRESETS: [&str; 1] = ["a100-80g"];

    /// A machine with published rates and a node's number of ranks. Change its fields to describe
    /// a machine that was measured.
    ///
    /// # Errors
    /// When the name is not one of [`Machine::PRESETS`].
    pub fn preset(name: &str) -> Result<Self> {
        match name {
            "a100-80g" => Ok(a100_80g()),
            _ => {
                let known = Self::PRESETS.join(", ");
                Err(Error::invalid(OP, format!("there is no preset `{name}`, only {known}")))
            }
        }
    }
}

/// A node of eight A100-SXM4-80GB with NVLink, and one HDR InfiniBand port for each GPU.
///
/// Sources: NVIDIA's data sheet (312 TFLOP/s in bf16 and f16, 19.5 in f32, 2039 GB/s, 300 GB/s of
/// NVLink and 25 GB/s of InfiniBand in each direction); the efficiencies of memory and links of
/// Calculon's system files (Isaev et al., SC 2023). Calculon's .95, .9 and .6 for products are of
/// a time to which it adds that of their bytes. A kernel here takes the longer of the two, so its
/// efficiencies are lower: .8 is the mean of the fits to vTrain's measured steps in
/// `tests/suite/published.rs`, and the others have Calculon's ratios to it. `fits` and `tight` are
/// calibrated to runs of Llama models of 13B to 65B (Hagemann et al., 2023, arXiv 2311.05610).
fn a100_80g() -> Machine {
    let half = Rate { peak: 312e12, efficiency: vec![(0.0, 0.1), (1e9, 0.4), (16e9, 0.7), (128e9, 0.8)] };
    let single = Rate { peak: 19.5e12, efficiency: half.efficiency.clone() };
    let rates = |half: Rate, single: Rate| {
        BTreeMap::from([("bf16".into(), half.clone()), ("f16".into(), half), ("f32".into(), single)])
    };
    // FlashAttention-2 reaches 0.55 to 0.7 of the peak of products (Dao, 2023, arXiv 2307.08691).
    let flash = vec![(0.0, 0.1), (1e9, 0.4), (16e9, 0.6)];
    Machine {
        name: "a100-80g".into(),
        ranks: 8,
        ranks_per_node: 8,
        memory: 80 * GIB,
        fits: 0.82,
        tight: 0.92,
        attention: rates(
            Rate { efficiency: flash.clone(), ..half.clone() },
            Rate { efficiency: flash, ..single.clone() },
        ),
        products: rates(half, single),
        copies: Rate { peak: 2039e9, efficiency: vec![(0.0, 0.3), (1e6, 0.6), (10e6, 0.75), (100e6, 0.9)] },
        launch: 4e-6,
        node: Link { latency: 10e-6, bandwidth: 0.65 * 300e9 },
        network: Link { latency: 20e-6, bandwidth: 0.9 * 25e9 },
        overlap: 1.2,
        error: 0.1,
    }
}
