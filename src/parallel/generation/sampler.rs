//! Sampling of tokens from logits that are sharded over the ranks.

use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result, Site, same_size},
    kernels::Backend,
    parallel::{DTensor, VocabParallelCrossEntropy},
    rng::Philox,
    shard::{Partition, Reduction, Shard},
    tensor::Tensor,
};

/// For `top_p` without `top_k`: the number of candidates per row that a rank sends at first.
const CANDIDATES: usize = 32;

/// Samples the token argmaxₖ (xₖ / t + gₖ) for each row x of logits, where t is the temperature and
/// gₖ is Gumbel noise. Every rank gets the same token. Logits with the same bits give the same
/// token at every number of ranks. Only `top_p` without `top_k` is an exception: it adds
/// probabilities in an all-reduce, whose rounding depends on the number of ranks.
///
/// The sampler draws candidate k with probability ∝ e^(xₖ / t) (Gumbel, 1954). The candidates are
/// the tokens with the `top_k` largest logits. `top_p` keeps only the most probable candidates: as
/// few as possible, as long as their probabilities sum to at least `top_p` (Holtzman et al., 2020).
/// With temperature 0, the sampler takes the token with the largest logit. The noise is a function
/// of the seed, the row's counter and the *global* index k, so that ranks neither share a generator
/// nor gather the logits. Of two equal logits, the one with the smaller index counts as larger.
///
/// Collectives:
/// * Temperature 0, or neither `top_k` nor `top_p`: one all-gather of one candidate per row and
///   rank.
/// * `top_k`: one all-gather of at most k candidates per row and rank.
/// * `top_p` without `top_k`: two all-reduces of one number per row, then an all-gather of at most
///   32 candidates per row and rank. While the candidates do not reach the share `top_p`, the ranks
///   repeat the all-gather with eight times as many candidates.
///
/// ```
/// use shardwise::prelude::*;
///
/// launch::threads(2, |world| {
///     let x = Tensor::<f32, _>::from_slice(world.device(), [1, 3], &[1.0, 3.0, 2.0])?;
///     let logits = DTensor::replicated(&world, x)?.scatter(&world.even_partition(3)?)?;
///     assert_eq!(Sampler::greedy().sample(&logits, &[0])?, [1]);
///     let sampler = Sampler { temperature: 1.0, top_k: Some(2), ..Sampler::greedy() };
///     let tokens = (0..99).map(|draw| Ok(sampler.sample(&logits, &[draw])?[0]));
///     let tokens = tokens.collect::<Result<Vec<_>>>()?;
///     assert!(tokens.contains(&1) && tokens.contains(&2) && !tokens.contains(&0));
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    /// The temperature. With 0, the sampler takes the largest logit.
    pub temperature: f64,
    /// The largest number of candidates; `None` for all.
    pub top_k: Option<usize>,
    /// The share of the probability that the candidates must reach; `None` for all candidates.
    pub top_p: Option<f64>,
    /// The seed of the noise.
    pub seed: u64,
}

/// A logit and its token.
type Candidate = (f64, u32);

/// Stands for a missing candidate, where a rank has fewer candidates than it must send.
const NONE: Candidate = (f64::NEG_INFINITY, u32::MAX);

/// Orders larger logits first. Of two equal logits, orders the smaller token first.
fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Sampler {
    /// Makes the sampler that takes the largest logit.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }

    /// Samples a token for each row of `logits`, `[rows, vocabulary]`. `draws[row]` is the counter
    /// of the row's noise, usually the position that the sampled token gets in its text.
    ///
    /// # Errors
    /// On every rank, when a field of the sampler is out of range, when a logit is NaN or +∞, when
    /// all logits of a row are −∞, or when a collective fails. Also for `top_p` without `top_k`
    /// under an invariant reduction.
    #[track_caller]
    pub fn sample<T: Element, B: Backend>(
        &self,
        logits: &DTensor<Shard<1>, T, B>,
        draws: &[u64],
    ) -> Result<Vec<u32>> {
        const OP: &str = "sample";
        let _site = Site::here().enter();
        let (group, rows, cols) = (logits.group(), logits.shape().rows(), logits.local().shape().cols());
        logits.check_rows(OP)?;
        let partition = logits.shard_partition()?;
        same_size(OP, "the number of draws", draws.len(), "that of rows", rows)?;
        let sound = self.temperature >= 0.0
            && self.temperature.is_finite()
            && self.top_k != Some(0)
            && self.top_p.is_none_or(|share| share > 0.0 && share <= 1.0);
        if !sound {
            return Err(Error::invalid(OP, format!("a field of {self:?} is out of range")));
        }
        let (local, first) = (logits.local().to_vec()?, logits.local_range(1).start);
        // Adding 0 turns −0 into +0. NaN becomes +∞, which is ordered first, so that every rank
        // receives it and returns an error.
        let of = |row: usize, col: usize| {
            let x = local[row * cols + col].to_f64() + 0.0;
            (if x.is_nan() { f64::INFINITY } else { x }, (first + col) as u32)
        };
        let greedy = self.temperature == 0.0;
        let noisy = |row: usize, (x, token): Candidate| {
            if greedy || token == u32::MAX {
                return (x, token);
            }
            let uniform = Philox::stream(self.seed, draws[row]).uniform(u64::from(token));
            (x / self.temperature - (-uniform.ln()).ln(), token)
        };
        let best = |candidates: &mut dyn Iterator<Item = Candidate>| candidates.min_by(order).unwrap_or(NONE);
        let share = self.top_p.filter(|share| *share < 1.0);
        let chosen: Vec<Candidate> = match (greedy, self.top_k, share) {
            (true, ..) | (false, None, None) => {
                let own: Vec<_> =
                    (0..rows).map(|row| best(&mut (0..cols).map(|col| noisy(row, of(row, col))))).collect();
                let all = gather(group, &own, rows, 1)?;
                (0..rows).map(|row| best(&mut all[row].iter().copied())).collect()
            }
            (false, Some(most), None) => {
                let all = candidates(group, rows, partition, most, &of)?;
                let choose = |(row, candidates): (usize, &Vec<Candidate>)| {
                    best(&mut candidates.iter().take(most).map(|&candidate| noisy(row, candidate)))
                };
                all.iter().enumerate().map(choose).collect()
            }
            (false, most, Some(share)) => {
                let nuclei = self.nuclei(group, (rows, partition), most, share, &of)?;
                let choose = |(row, candidates): (usize, Vec<Candidate>)| {
                    best(&mut candidates.into_iter().map(|candidate| noisy(row, candidate)))
                };
                nuclei.into_iter().enumerate().map(choose).collect()
            }
        };
        if let Some(row) = chosen.iter().position(|(x, _)| !x.is_finite()) {
            return Err(Error::invalid(OP, format!("the logits of row {row} are NaN or +∞, or all are −∞")));
        }
        Ok(chosen.into_iter().map(|(_, token)| token).collect())
    }

    /// For each row, returns the most probable candidates: the fewest that together reach `share`
    /// of the total probability. The total is that of the `most` largest candidates, or of all
    /// tokens if `most` is `None`.
    fn nuclei<B: Backend>(
        &self,
        group: &Group<B>,
        (rows, partition): (usize, &Partition),
        most: Option<usize>,
        share: f64,
        of: &dyn Fn(usize, usize) -> Candidate,
    ) -> Result<Vec<Vec<Candidate>>> {
        let (vocabulary, cols) = (partition.total(), partition.size(group.rank()));
        let weight = |x: f64, max: f64| ((x - max) / self.temperature).exp();
        if let Some(most) = most {
            // One all-gather gives all candidates.
            let all = candidates(group, rows, partition, most, of)?;
            return Ok(all
                .into_iter()
                .map(|mut candidates| {
                    candidates.truncate(most);
                    let max = candidates.first().map_or(0.0, |first| first.0);
                    let total: f64 = candidates.iter().map(|candidate| weight(candidate.0, max)).sum();
                    let count = prefix(&candidates, share * total, |x| weight(x, max));
                    candidates.truncate(count.unwrap_or(candidates.len()));
                    candidates
                })
                .collect());
        }
        if group.reduction() != Reduction::Fast {
            let reason = "`top_p` without `top_k` under an invariant reduction: set `top_k` too";
            return Err(Error::Unsupported { op: "sample", reason: reason.into() });
        }
        let reduce = |op, values: Vec<f64>| {
            let mut values = Tensor::<f64, B>::from_slice(group.device(), [rows], &values)?;
            group.all_reduce(op, &mut values)?;
            values.to_vec()
        };
        let max = |row: usize| (0..cols).map(|col| of(row, col).0).fold(f64::NEG_INFINITY, f64::max);
        let max = reduce(ReduceOp::Max, (0..rows).map(max).collect())?;
        if let Some(row) = max.iter().position(|max| !max.is_finite()) {
            return Err(Error::invalid(
                "sample",
                format!("the logits of row {row} are NaN or +∞, or all are −∞"),
            ));
        }
        let total = |row: usize| (0..cols).map(|col| weight(of(row, col).0, max[row])).sum();
        let total = reduce(ReduceOp::Sum, (0..rows).map(total).collect())?;
        let mut count = CANDIDATES;
        loop {
            // Each rank sends its `count` largest logits, so that no logit that it keeps back is
            // larger than one that it sends.
            let all = candidates(group, rows, partition, count, of)?;
            let complete = count >= vocabulary;
            let mut enough = true;
            let mut nuclei = Vec::with_capacity(rows);
            for (row, mut candidates) in all.into_iter().enumerate() {
                if !complete {
                    // The `count` largest candidates of all ranks are the `count` largest logits of
                    // the row.
                    candidates.truncate(count);
                }
                match prefix(&candidates, share * total[row], |x| weight(x, max[row])) {
                    Some(count) => candidates.truncate(count),
                    // Because of rounding, the weights of all candidates may sum to less than the
                    // share.
                    None => enough &= complete,
                }
                nuclei.push(candidates);
            }
            if enough {
                return Ok(nuclei);
            }
            count = count.saturating_mul(8);
        }
    }

    /// Computes xₖ − log Σ e^x for a given token k of each row x of `logits`. This is the token's
    /// log-probability over the whole vocabulary at temperature 1, and is equal on every rank.
    ///
    /// # Errors
    /// When there is not one token per row, a token is beyond the vocabulary, or a collective
    /// fails.
    #[track_caller]
    pub fn log_probabilities<T: Element, B: Backend>(
        logits: &DTensor<Shard<1>, T, B>,
        tokens: &[u32],
    ) -> Result<Vec<f64>> {
        let (losses, _) = VocabParallelCrossEntropy::default().forward(logits.clone(), tokens)?;
        Ok(losses.rows().to_vec()?.into_iter().map(|loss| -loss.to_f64()).collect())
    }
}

/// Returns the smallest n for which the weights of the first n candidates sum to at least `bound`;
/// `None` if the weights of all candidates sum to less.
fn prefix(candidates: &[Candidate], bound: f64, weight: impl Fn(f64) -> f64) -> Option<usize> {
    let mut sum = 0.0;
    let reaches = |candidate: &Candidate| {
        sum += weight(candidate.0);
        sum >= bound
    };
    candidates.iter().position(reaches).map(|last| last + 1)
}

/// For each row, gathers at most `most` candidates from each rank, and orders them by decreasing
/// logit.
fn candidates<B: Backend>(
    group: &Group<B>,
    rows: usize,
    partition: &Partition,
    most: usize,
    of: &dyn Fn(usize, usize) -> Candidate,
) -> Result<Vec<Vec<Candidate>>> {
    // Every rank sends the same number of candidates, although shards may have different sizes.
    let most = most.min(partition.sizes().max().unwrap_or(0));
    let cols = partition.size(group.rank());
    let mut own = Vec::with_capacity(rows * most);
    for row in 0..rows {
        let mut candidates: Vec<Candidate> = (0..cols).map(|col| of(row, col)).collect();
        if most < candidates.len() {
            candidates.select_nth_unstable_by(most, order);
            candidates.truncate(most);
        }
        candidates.resize(most, NONE);
        own.extend(candidates);
    }
    let mut all = gather(group, &own, rows, most)?;
    for candidates in &mut all {
        candidates.retain(|candidate| candidate.1 != u32::MAX);
        candidates.sort_unstable_by(order);
    }
    Ok(all)
}

/// Gathers `each` candidates per row from every rank, and groups them by row.
fn gather<B: Device + Backend>(
    group: &Group<B>,
    own: &[Candidate],
    rows: usize,
    each: usize,
) -> Result<Vec<Vec<Candidate>>> {
    let flat: Vec<f64> = own.iter().flat_map(|&(x, token)| [x, f64::from(token)]).collect();
    let shard = Tensor::<f64, B>::from_slice(group.device(), [rows, 2 * each], &flat)?;
    let partition = Partition::from_sizes(vec![2 * each; group.size()]);
    let all = group.all_gather(&shard, 1, &partition)?.to_vec()?;
    let of_row = |row: &[f64]| row.chunks_exact(2).map(|pair| (pair[0], pair[1] as u32)).collect();
    Ok(all.chunks_exact((2 * each * group.size()).max(1)).map(of_row).collect())
}
