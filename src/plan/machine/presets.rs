//! Machines with published rates.

use super::{Link, Machine, OP, Rate, Rates, TypeRates};
use crate::error::{Error, Result};

/// 1 GiB in bytes.
const GIB: u64 = 1 << 30;

impl Machine {
    /// The names of the machines that [`Machine::preset`] knows.
    pub const PRESETS: [&str; 5] = ["a100-80g", "h100-80g", "h200", "l40s-pcie", "cpu-1gbe"];

    /// A machine with published rates and a node's number of ranks. Change its fields to describe
    /// a machine that was measured.
    ///
    /// # Errors
    /// When the name is not one of [`Machine::PRESETS`].
    pub fn preset(name: &str) -> Result<Self> {
        match name {
            "a100-80g" => Ok(a100_80g()),
            "h100-80g" => Ok(h100_80g()),
            "h200" => Ok(h200()),
            "l40s-pcie" => Ok(l40s_pcie()),
            "cpu-1gbe" => Ok(cpu_1gbe()),
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
/// `tests/plan/published.rs`, and the others have Calculon's ratios to it. `fits` and `tight` are
/// calibrated to runs of Llama models of 13B to 65B (Hagemann et al., 2023, arXiv 2311.05610).
fn a100_80g() -> Machine {
    let products = [(0.0, 0.1), (1e9, 0.4), (16e9, 0.7), (128e9, 0.8)];
    // FlashAttention-2 reaches 0.55 to 0.7 of the peak of products (Dao, 2023, arXiv 2307.08691).
    let attention = [(0.0, 0.1), (1e9, 0.4), (16e9, 0.6)];
    let copies = Rate { peak: 2039e9, efficiency: vec![(0.0, 0.3), (1e6, 0.6), (10e6, 0.75), (100e6, 0.9)] };
    Machine {
        name: "a100-80g".into(),
        ranks: 8,
        ranks_per_node: 8,
        memory: 80 * GIB,
        fits: 0.82,
        tight: 0.92,
        rates: rates(8, 4e-6, [312e12, 19.5e12], [&products, &attention], copies),
        node: Link { latency: 10e-6, bandwidth: 0.65 * 300e9 },
        network: Some(Link { latency: 20e-6, bandwidth: 0.9 * 25e9 }),
        overlap: 1.2,
        error: 0.1,
        ..published()
    }
}

/// What machines with published rates have in common.
fn published() -> Machine {
    Machine {
        name: String::new(),
        ranks: 1,
        ranks_per_node: 1,
        memory: GIB,
        shares_memory: false,
        fits: 1.0,
        tight: 1.0,
        rates: Vec::new(),
        node: Link { latency: 0.0, bandwidth: 1.0 },
        collectives: Vec::new(),
        network: None,
        buffered: false,
        overlap: 1.0,
        error: 0.0,
        transport: None,
        runs: Vec::new(),
    }
}

/// The rates of a node's ranks by their number, the launch of a kernel, the peaks of bf16 and f16,
/// and of f32, and the efficiencies of products and of attention.
fn rates(
    ranks: usize,
    launch: f64,
    [half, single]: [f64; 2],
    [products, attention]: [&[(f64, f64)]; 2],
    copies: Rate,
) -> Vec<Rates> {
    let of = |peak: f64| {
        let rate = |efficiency: &[(f64, f64)]| Rate { peak, efficiency: efficiency.to_vec() };
        TypeRates::new(rate(products), rate(attention), copies.clone())
    };
    let types = [("bf16", of(half)), ("f16", of(half)), ("f32", of(single))];
    let types = types.into_iter().map(|(dtype, rates)| (dtype.into(), rates)).collect();
    vec![Rates { ranks, threads: 1, launch, types }]
}

/// A node of eight H200 SXM with NVLink, and one NDR InfiniBand port for each GPU.
///
/// Sources:
/// * Peaks: NVIDIA's data sheet: 989.4 TFLOP/s in bf16 and f16 without sparsity, 67 in f32 without
///   TF32, 4.8 TB/s, 450 GB/s of NVLink in each direction.
/// * Memory: what the driver reports, 143771 MiB.
/// * Efficiencies from 100 GFLOP and 100 MB on, and the launch: measured with this crate
///   (`benches/results/2026-11-28-nvidia-h200-first.md`). Products of 0.24 and 1.9 TFLOP ran at
///   661 and 740 TFLOP/s; a copy, AdamW and RMSNorm at 4.2, 3.6 and 2.9 TB/s. Smaller sizes have
///   the ratios of Calculon's system files (Isaev et al., SC 2023).
/// * Attention: FlashAttention-2 in the same file, 0.32 of the peak forward and 0.26 backward.
/// * Links: Vidur's profiles of an H100 DGX (Agrawal et al., MLSys 2024). All-reduces of eight
///   ranks move 336 GB/s. A message takes 2.1 µs in an all-reduce of eight ranks, and 8.5 µs in one
///   of two. Between nodes a message takes 19 µs, and moves 36 GB/s of the port's 50.
/// * `overlap`: Galvatron measures 1.1 to 1.3 (Miao et al., VLDB 2023).
/// * `fits`, `tight`: calibrated on A100s to runs of Llama models (Hagemann et al., 2023, arXiv
///   2311.05610).
fn h200() -> Machine {
    Machine {
        name: "h200".into(),
        ranks: 8,
        ranks_per_node: 8,
        memory: 143_771 << 20,
        fits: 0.82,
        tight: 0.92,
        rates: hopper([989.4e12, 67e12], 4.8e12),
        node: Link { latency: 4e-6, bandwidth: 336e9 },
        network: Some(Link { latency: 19e-6, bandwidth: 36e9 }),
        overlap: 1.2,
        error: 0.15,
        ..published()
    }
}

/// Rates with the efficiencies and the launch of the H200, by the peaks of operations and of
/// memory.
fn hopper(peaks: [f64; 2], memory: f64) -> Vec<Rates> {
    let products = [(0.0, 0.1), (1e9, 0.4), (16e9, 0.6), (100e9, 0.67), (1e12, 0.75)];
    let attention = [(0.0, 0.1), (1e9, 0.2), (16e9, 0.3)];
    let copies = vec![(0.0, 0.3), (1e6, 0.45), (10e6, 0.6), (100e6, 0.75), (1e9, 0.8)];
    rates(8, 4.6e-6, peaks, [&products, &attention], Rate { peak: memory, efficiency: copies })
}

/// A node of eight H100 SXM of 80 GB. NVIDIA's data sheet has the peaks of the H200, but 3.35 TB/s.
/// The efficiencies are those of the H200.
fn h100_80g() -> Machine {
    let rates = hopper([989.4e12, 67e12], 3.35e12);
    Machine { name: "h100-80g".into(), memory: 80 * GIB, rates, ..h200() }
}

/// A node of eight L40S, which are connected by PCIe 4.0 x16 and have no NVLink.
///
/// Sources:
/// * Peaks: NVIDIA's data sheet: 362 TFLOP/s in bf16 and f16 without sparsity, 91.6 in f32 without
///   TF32, 864 GB/s. The memory is 48 GB, of which the driver reports 45 GiB, because its error
///   correction takes a part.
/// * Links: Calculon's system files: 25 GB/s for PCIe 4.0 x16 and for HDR InfiniBand, of which 0.9
///   is reached; 10 µs in a node and 20 µs between nodes.
/// * Efficiencies and launch: no published measurement. They are those of the H200, so the error is
///   larger.
fn l40s_pcie() -> Machine {
    let pcie = Link { latency: 10e-6, bandwidth: 0.9 * 25e9 };
    Machine {
        name: "l40s-pcie".into(),
        memory: 45 * GIB,
        rates: hopper([362e12, 91.6e12], 864e9),
        node: pcie,
        network: Some(Link { latency: 20e-6, ..pcie }),
        error: 0.25,
        ..h200()
    }
}

/// Four computers of eight cores, which are connected by Gigabit Ethernet. Each is one rank whose
/// products run on eight threads ([`Cpu::with_threads`](crate::device::Cpu::with_threads)).
///
/// Sources:
/// * Products: a core with AVX2 does 32 operations a cycle (two fused multiply-adds of eight f32),
///   at 3 GHz. This crate's products reach 0.85 of a core
///   (`benches/results/2026-11-27-amd-epyc.md`), and use one thread below 2²² multiplications.
///   bf16 and f16 are widened to f32.
/// * Attention: its softmax runs on one thread, so it reaches less.
/// * Memory bandwidth: one thread reads 32 GB/s on that machine. Other kernels use one thread.
/// * Network: 1448 of the 1538 bytes that a frame takes are TCP's payload: 117 MB/s of 125. 50 µs
///   is a usual latency of TCP over one switch.
fn cpu_1gbe() -> Machine {
    let peak = 8.0 * 32.0 * 3e9;
    let ethernet = Link { latency: 50e-6, bandwidth: 117e6 };
    let (products, attention) = ([(0.0, 0.1), (8.4e6, 0.5), (1e9, 0.8)], [(0.0, 0.05), (1e9, 0.3)]);
    Machine {
        name: "cpu-1gbe".into(),
        ranks: 4,
        ranks_per_node: 1,
        memory: 32 * GIB,
        // The operating system and other programs use the rest.
        fits: 0.8,
        tight: 0.9,
        rates: rates(1, 0.5e-6, [peak, peak], [&products, &attention], Rate::constant(32e9)),
        node: ethernet,
        network: Some(ethernet),
        // Messages are copied by cores that also compute.
        overlap: 1.2,
        error: 0.3,
        ..published()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        comm::{Op, Transfer},
        device::{DType, Work, WorkKind},
    };

    #[test]
    fn every_preset_passes_its_check_and_has_its_name() {
        for name in Machine::PRESETS {
            let machine = Machine::preset(name).unwrap();
            machine.check().unwrap();
            assert_eq!(machine.name, name);
            let types: Vec<_> = machine.rates[0].types.keys().collect();
            assert_eq!(types, ["bf16", "f16", "f32"], "{name}");
        }
        let error = Machine::preset("tpu").unwrap_err().to_string();
        assert!(error.contains("`tpu`") && error.contains("cpu-1gbe"), "{error}");
    }

    #[test]
    fn the_h200_has_the_times_that_were_measured() {
        let machine = Machine::preset("h200").unwrap();
        let near = |what: &str, seconds: f64, measured: f64| {
            let error = seconds / measured - 1.0;
            assert!(error.abs() < machine.error, "{what}: {seconds} s, measured {measured} s");
        };
        let kernel =
            |kind, dtype, flops, bytes| machine.kernel(&Work { kind, dtype, flops, bytes }, 1).unwrap();
        let product = |m: u64, k: u64, n: u64| {
            kernel(WorkKind::Product, DType::BF16, 2 * m * k * n, 2 * (m * k + k * n + m * n))
        };
        near("a product", product(4096, 8192, 28672), 2601.3e-6);
        near("a product", product(4096, 8192, 3584), 364.0e-6);
        let elements = |count: u64, bytes| kernel(WorkKind::Other, DType::BF16, 0, count * bytes);
        near("a copy of 1 GiB", elements(1 << 30, 2), 516.6e-6);
        near("a copy", elements(8192 * 8192, 4), 71.2e-6);
        near("a gate", elements(8192 * 8192, 6), 110.6e-6);
        // The gradient is read, weight and moments are read and written.
        near("AdamW", elements(104_857_600, 28), 807.5e-6);
        // Vidur's all-reduce on an H100 DGX.
        let transfer = Transfer { op: Op::AllReduce, dtype: DType::BF16, elements: 1 << 25 };
        let measured = 0.322e-3;
        let seconds = machine.node.seconds(&transfer, 8);
        assert!((seconds / measured - 1.0).abs() < 0.3, "{seconds} s, measured {measured} s");
    }
}
