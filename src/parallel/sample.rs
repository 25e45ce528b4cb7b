//! The next tokens, from logits that are cut over the ranks.

use super::{DTensor, VocabParallelCrossEntropy};
use crate::{
    comm::{Group, ReduceOp},
    device::{Device, Element},
    error::{Error, Result, Site, same_size},
    kernels::Backend,
    rng::Philox,
    shard::{Partition, Reduction, Shard},
    tensor::Tensor,
};

/// How many candidates a rank offers at first, for a share of the probability.
const OFFER: usize = 32;

/// Draws a token from each row of logits: the same one on every rank, and at every number of ranks whenever the logits have
/// the same bits.
///
/// With temperature t, token k is drawn with probability ∝ e^(xₖ / t) among the `top_k` largest logits, and of those among
/// the fewest largest whose probabilities sum to `top_p` (Holtzman et al., 2020); temperature 0 takes the largest. The draw
/// is the largest of xₖ / t + gₖ, with Gumbel noise gₖ (Gumbel, 1954) that is a function of the seed, the row's counter and
/// the *global* index k. So ranks need not share a generator, nor one gather the logits. Of equal logits the first counts
/// as larger.
///
/// Collectives: one all-gather of two numbers a row and rank; with `top_k` of at most k candidates a row and rank; with
/// `top_p` also two all-reduces of a number a row, and more candidates where a few do not have the share.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampler {
    /// 0: the largest logit.
    pub temperature: f64,
    /// How many candidates there are at most; all if not given.
    pub top_k: Option<usize>,
    /// The share of the probability that the candidates have at least; all if not given.
    pub top_p: Option<f64>,
    /// What the noise is a function of.
    pub seed: u64,
}

/// A logit and its token; none has −∞ and no token.
type Candidate = (f64, u32);

const NONE: Candidate = (f64::NEG_INFINITY, u32::MAX);

/// Larger logits first, of equal ones the first token.
fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Sampler {
    /// Always the largest logit.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: None, seed: 0 }
    }

    /// A token for each row of `logits`, `[rows, vocabulary]`. `draws[row]` makes the row's noise differ from that of other
    /// draws: usually the position of the token in its text.
    ///
    /// # Errors
    /// When the sampler's numbers make no sense, a logit is NaN or all are −∞, or a collective fails. Every rank gets the
    /// error.
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
        let missing = || Error::internal(OP, "logits without their cut");
        let cut = logits.partition().ok_or_else(missing)?;
        same_size(OP, "the number of draws", draws.len(), "that of rows", rows)?;
        let sound = self.temperature >= 0.0
            && self.temperature.is_finite()
            && self.top_k != Some(0)
            && self.top_p.is_none_or(|share| share > 0.0 && share <= 1.0);
        if !sound {
            return Err(Error::invalid(OP, format!("{self:?} describes no distribution")));
        }
        let (local, first) = (logits.local().to_vec()?, logits.local_range(1).start);
        // −0 is 0; NaN stands before all others, so that every rank hears of it.
        let of = |row: usize, col: usize| {
            let x = local[row * cols + col].to_f64() + 0.0;
            (if x.is_nan() { f64::INFINITY } else { x }, (first + col) as u32)
        };
        let greedy = self.temperature == 0.0;
        let noisy = |row: usize, (x, token): Candidate| match greedy || token == u32::MAX {
            true => (x, token),
            false => {
                let uniform = Philox::stream(self.seed, draws[row]).uniform(u64::from(token));
                (x / self.temperature - (-uniform.ln()).ln(), token)
            }
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
                let all = offers(group, rows, cut, most, &of)?;
                let choose = |(row, candidates): (usize, &Vec<Candidate>)| {
                    best(&mut candidates.iter().take(most).map(|&candidate| noisy(row, candidate)))
                };
                all.iter().enumerate().map(choose).collect()
            }
            (false, most, Some(share)) => {
                let nuclei = self.nuclei(group, (rows, cut), most, share, &of)?;
                let choose = |(row, candidates): (usize, Vec<Candidate>)| {
                    best(&mut candidates.into_iter().map(|candidate| noisy(row, candidate)))
                };
                nuclei.into_iter().enumerate().map(choose).collect()
            }
        };
        if let Some(row) = chosen.iter().position(|(x, _)| !x.is_finite()) {
            return Err(Error::invalid(OP, format!("the logits of row {row} are NaN, or none is finite")));
        }
        Ok(chosen.into_iter().map(|(_, token)| token).collect())
    }

    /// For each row, of its `most` largest the fewest that have a share of their probability.
    fn nuclei<B: Backend>(
        &self,
        group: &Group<B>,
        (rows, cut): (usize, &Partition),
        most: Option<usize>,
        share: f64,
        of: &dyn Fn(usize, usize) -> Candidate,
    ) -> Result<Vec<Vec<Candidate>>> {
        let (words, cols) = (cut.total(), cut.size(group.rank()));
        let weight = |x: f64, max: f64| ((x - max) / self.temperature).exp();
        if let Some(most) = most {
            // All that take part are at hand.
            let all = offers(group, rows, cut, most, of)?;
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
            let reason = "a share of the whole vocabulary's probability under an invariant reduction: give `top_k`, too";
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
                format!("the logits of row {row} are NaN, or none is finite"),
            ));
        }
        let total = |row: usize| (0..cols).map(|col| weight(of(row, col).0, max[row])).sum();
        let total = reduce(ReduceOp::Sum, (0..rows).map(total).collect())?;
        let mut offer = OFFER;
        loop {
            // What is not offered is no larger than the least that its rank offers. So those before that are certain.
            let all = offers(group, rows, cut, offer, of)?;
            let complete = offer >= words;
            let mut enough = true;
            let mut nuclei = Vec::with_capacity(rows);
            for (row, mut candidates) in all.into_iter().enumerate() {
                if !complete {
                    // Of all that was offered, as many as one rank offers are among the largest of all for certain.
                    candidates.truncate(offer);
                }
                match prefix(&candidates, share * total[row], |x| weight(x, max[row])) {
                    Some(count) => candidates.truncate(count),
                    // Rounding may leave all candidates together below the share.
                    None => enough &= complete,
                }
                nuclei.push(candidates);
            }
            if enough {
                return Ok(nuclei);
            }
            offer = offer.saturating_mul(8);
        }
    }

    /// The log-probability of a given token in each row of `logits`, over the whole vocabulary and at temperature 1, the
    /// same on every rank.
    ///
    /// # Errors
    /// When there is not one token a row, one is beyond the vocabulary, or a collective fails.
    #[track_caller]
    pub fn log_probabilities<T: Element, B: Backend>(
        logits: &DTensor<Shard<1>, T, B>,
        tokens: &[u32],
    ) -> Result<Vec<f64>> {
        let (losses, _) = VocabParallelCrossEntropy::default().forward(logits.clone(), tokens)?;
        Ok(losses.rows().to_vec()?.into_iter().map(|loss| -loss.to_f64()).collect())
    }
}

/// The number of first candidates whose weights sum to at least a bound; none if all together do not.
fn prefix(candidates: &[Candidate], bound: f64, weight: impl Fn(f64) -> f64) -> Option<usize> {
    let mut sum = 0.0;
    let reaches = |candidate: &Candidate| {
        sum += weight(candidate.0);
        sum >= bound
    };
    candidates.iter().position(reaches).map(|last| last + 1)
}

/// For each row the candidates of all ranks, at most `most` of each, the largest first.
fn offers<B: Backend>(
    group: &Group<B>,
    rows: usize,
    cut: &Partition,
    most: usize,
    of: &dyn Fn(usize, usize) -> Candidate,
) -> Result<Vec<Vec<Candidate>>> {
    // The same number on every rank, though some have a word less.
    let most = most.min(cut.sizes().max().unwrap_or(0));
    let cols = cut.size(group.rank());
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

/// Every rank's `[rows, each]` candidates, by row.
fn gather<B: Device + Backend>(
    group: &Group<B>,
    own: &[Candidate],
    rows: usize,
    each: usize,
) -> Result<Vec<Vec<Candidate>>> {
    let flat: Vec<f64> = own.iter().flat_map(|&(x, token)| [x, f64::from(token)]).collect();
    let part = Tensor::<f64, B>::from_slice(group.device(), [rows, 2 * each], &flat)?;
    let cut = Partition::from_sizes(vec![2 * each; group.size()]);
    let all = group.all_gather(&part, 1, &cut)?.to_vec()?;
    let of_row = |row: &[f64]| row.chunks_exact(2).map(|pair| (pair[0], pair[1] as u32)).collect();
    Ok(all.chunks_exact((2 * each * group.size()).max(1)).map(of_row).collect())
}
