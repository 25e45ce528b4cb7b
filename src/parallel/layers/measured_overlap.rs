//! Measures the number of tokens from which chunked collectives are faster than single ones, on a
//! group's transport and machine.

use super::{Layer, MlpNames, ParallelMlp};
use crate::{
    comm::{Group, Overlap, ReduceOp},
    device::Element,
    error::{Result, Site},
    kernels::{Activation, Backend},
    parallel::ResidualStream,
    rng::Philox,
    tensor::{Param, Random, Tensor, Weights},
};
use std::time::{Duration, Instant};

/// The measured times of a feed-forward layer with single collectives and with chunked ones. Each
/// time covers forward and backward, on the slowest rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeasuredOverlap {
    /// The setting to use, the same on every rank: [`Overlap::From`] with the number of bytes per
    /// chunk from which chunks are faster, or [`Overlap::Off`].
    pub overlap: Overlap,
    /// For each number of tokens: the median times with single collectives and with two chunks.
    pub times: Vec<(usize, Duration, Duration)>,
}

/// The fraction of the time that chunks must save to count as faster. A smaller gain may be noise.
const MIN_GAIN: f64 = 0.02;

/// The number of timed steps with each setting. The settings alternate.
const ROUNDS: usize = 7;

impl MeasuredOverlap {
    /// Measures an MLP with element type T and sizes `hidden` and `ffn`, on a residual stream S.
    /// The number of tokens, counted over all ranks, starts at 64 per rank and doubles up to
    /// `tokens`. Collective: every rank calls this function with the same sizes.
    ///
    /// ```
    /// use shardwise::prelude::*;
    ///
    /// launch::threads(2, |world| {
    ///     let measured = MeasuredOverlap::of::<Shard<0>, f32, _>(&world, (32, 64), 256)?;
    ///     let world = world.with_overlap(measured.overlap);
    ///     // Layers that are loaded on this group use the setting.
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// Source of the scheme: Wang et al., 2023: Overlap communication with dependent computation
    /// via decomposition.
    ///
    /// # Errors
    /// When an invariant reduction has fewer canonical blocks than ranks, or a collective fails.
    #[track_caller]
    pub fn of<S: ResidualStream, T: Element, B: Backend>(
        group: &Group<B>,
        (hidden, ffn): (usize, usize),
        tokens: usize,
    ) -> Result<Self> {
        let _site = Site::here().enter();
        let source = Random::normal(1, 0.02);
        let load = |overlap| {
            let (group, weights) = (group.with_overlap(overlap), Weights::new(&source).at("MeasuredOverlap"));
            let (names, f) = (MlpNames::default(), Activation::Relu);
            ParallelMlp::<S, T, B>::load(&group, &weights, &names, (hidden, ffn), f, false)
        };
        let layers = [load(Overlap::Off)?, load(Overlap::Chunks(2))?];
        let sizes = std::iter::successors(Some(64 * group.size()), |count| count.checked_mul(2));
        let (mut times, mut least) = (Vec::new(), None);
        for count in sizes.take_while(|&count| count <= tokens) {
            let [at_once, chunked] = step_times::<S, T, B>(group, &layers, count, hidden)?;
            times.push((count, at_once, chunked));
            let pays = chunked.as_secs_f64() < (1.0 - MIN_GAIN) * at_once.as_secs_f64();
            least = if pays { least.or(Some(count)) } else { None };
        }
        let bytes = |count: usize| Overlap::From(count * hidden * T::DTYPE.size() / 2);
        Ok(Self { overlap: least.map_or(Overlap::Off, bytes), times })
    }
}

/// Returns each layer's median time of one forward and backward. The two layers alternate.
fn step_times<S: ResidualStream, T: Element, B: Backend>(
    group: &Group<B>,
    layers: &[ParallelMlp<S, T, B>; 2],
    tokens: usize,
    hidden: usize,
) -> Result<[Duration; 2]> {
    let rows = S::local_rows(group, tokens)?.len();
    let stream = Philox::named(1, "x");
    let x: Vec<T> = (0..(rows * hidden) as u64).map(|at| T::from_f64(stream.normal(at))).collect();
    let x = S::of_local(group, tokens, Tensor::from_slice(group.device(), [rows, hidden], &x)?)?;
    let mut seconds = [[0.0; ROUNDS + 1]; 2];
    for round in 0..=ROUNDS {
        for (layer, seconds) in layers.iter().zip(&mut seconds) {
            layer.params().iter().for_each(Param::zero_grad);
            group.device().synchronize()?;
            group.barrier()?;
            let start = Instant::now();
            let (y, saved) = layer.forward(x.clone())?;
            layer.backward(saved, y)?;
            group.device().synchronize()?;
            seconds[round] = start.elapsed().as_secs_f64();
        }
    }
    let flat = seconds.as_flattened();
    let slowest = group.all_reduce_host(ReduceOp::Max, flat)?;
    // Skips the first round, which allocates memory that later rounds reuse.
    let median = |kind: usize| {
        let mut times = slowest[kind * (ROUNDS + 1) + 1..][..ROUNDS].to_vec();
        times.sort_by(f64::total_cmp);
        Duration::from_secs_f64(times[ROUNDS / 2])
    };
    Ok([median(0), median(1)])
}
