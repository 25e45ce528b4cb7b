//! From how many tokens on collectives in chunks pay, on a group's transport and machine.

use super::{Layer, MlpNames, ParallelMlp, ResidualStream};
use crate::{
    comm::{Group, Overlap, ReduceOp},
    device::Element,
    error::{Result, Site},
    kernels::{Activation, Backend},
    rng::Philox,
    tensor::{Param, Random, Tensor, Weights},
};
use std::time::{Duration, Instant};

/// How long a feed-forward layer takes with its collectives at once and in chunks: forward and backward, of the slowest rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeasuredOverlap {
    /// What pays: [`Overlap::From`] so many bytes a chunk, or [`Overlap::Off`]. The same on every rank.
    pub overlap: Overlap,
    /// The numbers of tokens that were tried, with the median times at once and in two chunks.
    pub times: Vec<(usize, Duration, Duration)>,
}

/// The part of the time that chunks have to save: less is noise.
const WORTH: f64 = 0.02;

/// Steps of each kind that are timed, in turn.
const ROUNDS: usize = 7;

impl MeasuredOverlap {
    /// Measures layers of T between `hidden` and `ffn` features on a stream S, for numbers of tokens that double from 64 a rank up
    /// to `tokens`. Collective: every rank calls it with the same sizes.
    ///
    /// ```
    /// # use shardwise::{launch, parallel::MeasuredOverlap, shard::Shard};
    /// launch::threads(2, |world| {
    ///     let measured = MeasuredOverlap::of::<Shard<0>, f32, _>(&world, (32, 64), 256)?;
    ///     let world = world.with_overlap(measured.overlap);
    ///     // What is loaded on this group goes about it so.
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// Source of the scheme that is measured: Wang et al., 2023: Overlap communication with dependent computation via
    /// decomposition.
    ///
    /// # Errors
    /// When there are fewer features than ranks, or a collective fails.
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
            let pays = chunked.as_secs_f64() < (1.0 - WORTH) * at_once.as_secs_f64();
            least = if pays { least.or(Some(count)) } else { None };
        }
        let bytes = |count: usize| Overlap::From(count * hidden * T::DTYPE.size() / 2);
        Ok(Self { overlap: least.map_or(Overlap::Off, bytes), times })
    }
}

/// The median times of some layers' steps, one after the other in every round.
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
    // The first round takes memory that the others find.
    let median = |kind: usize| {
        let mut times = slowest[kind * (ROUNDS + 1) + 1..][..ROUNDS].to_vec();
        times.sort_by(f64::total_cmp);
        Duration::from_secs_f64(times[ROUNDS / 2])
    };
    Ok([median(0), median(1)])
}
