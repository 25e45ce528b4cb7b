//! The measurement of a machine: the rates of its kernels and of its collectives.
//!
//! Kernels are those that layers call, on operands of several sizes. Their operations and bytes are
//! those that the same calls record on [`Meta`](crate::device::Meta), so a rate means the same here
//! and in a plan.

mod collectives;
mod samples;
mod timer;

use self::{
    samples::{Sample, families},
    timer::Timer,
};
use super::{Machine, Rate, Rates, Transport, TypeRates};
use crate::{
    comm::{Group, ReduceOp},
    device::Element,
    error::{Error, Result},
    kernels::Backend,
};
use half::{bf16, f16};
use std::{collections::BTreeMap, num::NonZeroUsize, thread};

const OP: &str = "measure";

/// Measures the machine on which the ranks of a group run.
///
/// For 1, 2, 3, 4, 8, ... and all ranks of the group, all of these ranks measure at the same time.
/// Kernels are measured for at most as many ranks as a CPU has cores:
///
/// * the launch of a kernel;
/// * for f32, bf16 and f16: products of a linear layer and of one row, attention forward and
///   backward at four lengths and on a cache, norms, activations, losses, dropout, AdamW and sums
///   of squares, and copies, each at several sizes;
/// * each collective from 1 KiB to 64 MiB: its latency and bandwidth minimize the relative squares
///   Σ ((latency + bytes / bandwidth) / seconds − 1)²;
///
/// and for all ranks the factor by which a running all-reduce makes products slower. On a CPU, each
/// of n ranks computes products with cores / n threads.
///
/// All ranks have to be on one node. Add [`Machine::network`] for a machine of several.
///
/// ```
/// use shardwise::{plan::{Measure, Transport}, prelude::*};
/// let measure = Measure::new(Transport::Threads, 8 << 30).with_seconds(0.2).with_cores(2);
/// let cpu = |threads| Cpu::new().with_threads(threads);
/// let machines = launch::threads(2, |world| measure.run(&world, cpu))?;
/// assert_eq!(machines[0], machines[1]);
/// let rates = &machines[0].rates;
/// assert_eq!((rates[0].ranks, rates[0].threads, rates[1].ranks, rates[1].threads), (1, 2, 2, 1));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Measure {
    /// The transport of the group.
    pub transport: Transport,
    /// The memory of a GPU, or that all ranks on a CPU share.
    pub memory: u64,
    /// About how long to measure. Fewer seconds make the rates less certain.
    pub seconds: f64,
    /// The cores that the ranks on a CPU share.
    pub cores: usize,
    /// The name of the machine.
    pub name: String,
}

impl Measure {
    /// Measures for 20 seconds. The ranks on a CPU share all cores that this process may use.
    pub fn new(transport: Transport, memory: u64) -> Self {
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { transport, memory, seconds: 20.0, cores, name: "measured".into() }
    }

    /// Sets the number of seconds.
    pub fn with_seconds(self, seconds: f64) -> Self {
        Self { seconds, ..self }
    }

    /// Sets the number of cores.
    pub fn with_cores(self, cores: usize) -> Self {
        Self { cores, ..self }
    }

    /// Sets the name of the machine.
    pub fn with_name(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// Measures. Every rank calls this function, and all get the same machine. `device` makes the
    /// handle with which a rank computes, from a number of threads that only CPUs have.
    ///
    /// # Errors
    /// When the number of seconds or of cores is not positive, a kernel or a collective fails, or a
    /// rank is lost.
    pub fn run<B: Backend>(&self, world: &Group<B>, device: impl Fn(NonZeroUsize) -> B) -> Result<Machine> {
        let Self { transport, memory, seconds, cores, .. } = *self;
        if !(seconds > 0.0 && seconds.is_finite()) || cores == 0 {
            let reason = format!("{seconds} seconds on {cores} cores, but both have to be positive");
            return Err(Error::invalid(OP, reason));
        }
        let on_cpu = transport != Transport::Nccl;
        let sizes = group_sizes(world.size());
        let parallel = sizes.iter().filter(|&&ranks| self.has_cores(ranks)).count();
        let count = parallel * samples::COUNT + sizes.len() * collectives::COUNT;
        let budget = 0.6 * seconds / count as f64;
        let (mut rates, mut collectives) = (Vec::new(), Vec::new());
        for &ranks in &sizes {
            let threads = if on_cpu { cores / ranks } else { 1 };
            let threads = NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN);
            let color = (world.rank() < ranks).then_some(0);
            if let Some(group) = world.split(color, 0)? {
                let device = || device(threads);
                let timer = Timer::new(&group, &device, budget);
                // More ranks than cores take turns, which needs no measurement.
                if self.has_cores(ranks) {
                    rates.push(measured_rates(&timer, threads.get())?);
                }
                collectives.extend(collectives::measured(&timer)?);
            }
            world.barrier()?;
        }
        let device = || device(NonZeroUsize::MIN);
        let timer = Timer::new(world, &device, budget);
        let overlap = if world.size() > 1 { collectives::overlap(&timer)? } else { 1.0 };
        let machine = Machine {
            name: self.name.clone(),
            ranks: world.size(),
            ranks_per_node: world.size(),
            memory,
            shares_memory: on_cpu,
            fits: if on_cpu { 0.8 } else { 0.82 },
            tight: if on_cpu { 0.9 } else { 0.92 },
            node: collectives::link(&collectives),
            rates,
            collectives,
            network: None,
            buffered: on_cpu,
            overlap,
            // benches/results/2026-11-30-planner.md: a mean of 19.7 % before any run calibrates it.
            error: 0.25,
            transport: Some(transport),
            runs: Vec::new(),
        };
        of_rank_0(world, &machine)
    }

    /// Whether each of so many ranks has a core.
    fn has_cores(&self, ranks: usize) -> bool {
        self.transport == Transport::Nccl || ranks <= self.cores
    }
}

/// The sizes of groups that are measured: 1 to 4, powers of 2, and all ranks.
fn group_sizes(ranks: usize) -> Vec<usize> {
    (1..=ranks).filter(|size| *size <= 4 || size.is_power_of_two() || *size == ranks).collect()
}

/// The rates of this rank's kernels, while all ranks of the timer's group run the same.
fn measured_rates<B: Backend>(timer: &Timer<'_, B>, threads: usize) -> Result<Rates> {
    let launch = timer.sample::<f32>(&Sample::Launch)?;
    let types = [
        ("f32", type_rates::<f32, B>(timer, launch)?),
        ("bf16", type_rates::<bf16, B>(timer, launch)?),
        ("f16", type_rates::<f16, B>(timer, launch)?),
    ];
    let types = types.into_iter().map(|(dtype, rates)| (dtype.into(), rates)).collect();
    Ok(Rates { ranks: timer.group.size(), threads, launch, types })
}

fn type_rates<T: Element, B: Backend>(timer: &Timer<'_, B>, launch: f64) -> Result<TypeRates> {
    let rate = |samples: &[Sample], by_flops: bool| rate::<T, B>(timer, launch, samples, by_flops);
    let mut kernels = BTreeMap::new();
    for (family, samples) in families() {
        kernels.insert(family.name().to_string(), rate(&samples, false)?);
    }
    Ok(TypeRates {
        products: rate(&samples::PRODUCTS, true)?,
        attention: rate(&samples::ATTENTION, true)?,
        copies: rate(&samples::COPIES, false)?,
        kernels,
    })
}

/// The rate of samples by their FLOPs or by their bytes. Samples beyond one that takes much longer
/// than planned are skipped.
fn rate<T: Element, B: Backend>(
    timer: &Timer<'_, B>,
    launch: f64,
    samples: &[Sample],
    by_flops: bool,
) -> Result<Rate> {
    let mut operations = Vec::new();
    for sample in samples {
        let work = sample.work::<T>()?;
        let seconds = timer.sample::<T>(sample)?;
        let kernels = work.kernels as f64;
        // A kernel that takes little more than its launch has a rate of little meaning.
        let running = (seconds - kernels * launch).max(seconds / 4.0);
        let size = if by_flops { work.flops } else { work.bytes };
        operations.push((size as f64 / kernels, running / kernels));
        if timer.is_long(seconds) {
            break;
        }
    }
    Ok(Rate::measured(&operations))
}

/// Rank 0's machine, on every rank.
fn of_rank_0<B: Backend>(world: &Group<B>, machine: &Machine) -> Result<Machine> {
    // Bytes are sent as numbers, because the collectives of a group are over floating-point
    // elements.
    let text = if world.rank() == 0 { machine.to_json()? } else { String::new() };
    let len = world.all_reduce_host(ReduceOp::Max, &[text.len() as f64])?[0] as usize;
    let mut bytes = vec![0.0_f32; len];
    bytes.iter_mut().zip(text.bytes()).for_each(|(to, byte)| *to = f32::from(byte));
    let bytes = world.all_reduce_host(ReduceOp::Sum, &bytes)?;
    let text = String::from_utf8(bytes.into_iter().map(|byte| byte as u8).collect());
    Machine::parse(&text.map_err(|error| Error::internal(OP, error.to_string()))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_few_ranks_are_measured_and_of_powers_of_2() {
        assert_eq!(group_sizes(1), [1]);
        assert_eq!(group_sizes(3), [1, 2, 3]);
        assert_eq!(group_sizes(12), [1, 2, 3, 4, 8, 12]);
    }
}
