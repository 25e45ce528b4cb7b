//! Poisson sampling by a secret key.

use super::key::{RunKey, Stream};
use crate::{
    error::{Error, Result},
    shard::Partition,
};
use std::fmt;

const OP: &str = "Poisson sampler";

/// Poisson sampling: each of N samples is in the batch of a step with probability q, independently
/// of the others and of the other steps.
///
/// Whether sample i is in the batch of step k is a function of a secret key, k and i. So all ranks
/// of a model have the same batch, the batch does not depend on the number of ranks, and a sampler
/// needs no state to continue at a later step. Batches differ in size, and may be empty. The mean
/// of their sizes is q N, which is public; the sizes themselves are not.
///
/// The privacy loss that [`epsilon`](super::epsilon) computes assumes that nobody knows which
/// samples were drawn. That is why the key is secret. It does not hold for batches of a shuffled
/// data set.
///
/// ```
/// use shardwise::privacy::{PoissonSampler, RunKey};
/// let key = RunKey::known_without_privacy(1);
/// let sampler = PoissonSampler::new(&key, 50_000, 0.01)?;
/// let batch = sampler.batch(12);
/// assert!((400..600).contains(&batch.len()));
/// // The parts of three data-parallel ranks.
/// let parts = [0, 1, 2].map(|rank| sampler.part(12, rank, 3).unwrap());
/// assert_eq!(parts.concat(), batch);
/// # Ok::<(), shardwise::Error>(())
/// ```
pub struct PoissonSampler {
    stream: Stream,
    samples: usize,
    rate: f64,
}

impl fmt::Debug for PoissonSampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PoissonSampler({} samples, rate {})", self.samples, self.rate)
    }
}

impl PoissonSampler {
    /// Returns the sampler of a data set of `samples` samples with q = `rate`.
    ///
    /// # Errors
    /// When the rate is not in [0, 1].
    pub fn new(key: &RunKey, samples: usize, rate: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&rate) {
            return Err(Error::invalid(OP, format!("the rate is {rate}, but it has to be in [0, 1]")));
        }
        Ok(Self { stream: key.stream("sample", ""), samples, rate })
    }

    /// The number of samples, N.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// The probability that a sample is in a batch, q.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// Returns the samples of a step, in order.
    pub fn batch(&self, step: u64) -> Vec<usize> {
        // rate · 2⁶⁴, exactly for every rate of at least 2⁻¹². Below, it is rounded down, so that
        // no sample is drawn more often than the accountant assumes.
        let limit = (self.rate * 2.0_f64.powi(64)) as u128;
        let mut batch = Vec::new();
        self.stream.numbers(step, 0..self.samples as u64, |at, number| {
            if u128::from(number) < limit {
                batch.push(at as usize);
            }
        });
        batch
    }

    /// Returns the part of a step's samples that data-parallel rank `rank` of `ranks` trains on.
    /// The parts are consecutive, and as even as possible. Some are empty if there are fewer
    /// samples than ranks.
    ///
    /// # Errors
    /// When there is no such rank.
    pub fn part(&self, step: u64, rank: usize, ranks: usize) -> Result<Vec<usize>> {
        if rank >= ranks {
            return Err(Error::invalid(OP, format!("there is no rank {rank} of {ranks} ranks")));
        }
        let batch = self.batch(step);
        Ok(batch[Partition::even(batch.len(), ranks).range(rank)].to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(samples: usize, rate: f64) -> PoissonSampler {
        PoissonSampler::new(&RunKey::known_without_privacy(3), samples, rate).unwrap()
    }

    /// The key is fixed, so the test gives the same counts each time. A count is within 5 standard
    /// deviations of its mean but for one in 1.7 million.
    #[test]
    fn samples_are_drawn_with_the_rate() {
        for rate in [0.001, 0.01, 0.3, 0.5, 0.999] {
            let (samples, steps) = (500, 4000);
            let sampler = sampler(samples, rate);
            let (mut by_sample, mut by_step) = (vec![0_u32; samples], Vec::new());
            let mut pairs = 0;
            for step in 0..steps {
                let batch = sampler.batch(step);
                assert!(batch.is_sorted_by(|one, next| one < next));
                batch.iter().for_each(|&at| by_sample[at] += 1);
                pairs += batch.windows(2).filter(|two| two[0] + 1 == two[1]).count();
                by_step.push(batch.len() as u32);
            }
            let near = |count: f64, draws: f64, rate: f64| {
                let deviation = (draws * rate * (1.0 - rate)).sqrt();
                // A rare event has a skewed distribution: one more is not unlikely.
                assert!((count - draws * rate).abs() < 5.0 * deviation + 3.0, "{count} of {draws} at {rate}");
            };
            by_sample.iter().for_each(|&count| near(count.into(), steps as f64, rate));
            by_step.iter().for_each(|&count| near(count.into(), samples as f64, rate));
            near(by_step.iter().sum::<u32>().into(), (samples as u64 * steps) as f64, rate);
            // Chi-square: the sizes have the variance of the binomial distribution.
            let variance = samples as f64 * rate * (1.0 - rate);
            let mean = samples as f64 * rate;
            let chi: f64 = by_step.iter().map(|&size| (f64::from(size) - mean).powi(2) / variance).sum();
            // The variance of the square of a standardized binomial is 2 + (1 − 6 q (1 − q)) / (N q
            // (1 − q)).
            let kurtosis = 2.0 + (1.0 - 6.0 * rate * (1.0 - rate)) / variance;
            let wanted = steps as f64;
            assert!((chi - wanted).abs() < 5.0 * (wanted * kurtosis).sqrt(), "{chi} at {rate}");
            // Neighbours are drawn independently, up to the correlation of pairs that share a
            // sample.
            let (all, both) = ((samples as f64 - 1.0) * wanted, rate * rate);
            let deviation = (all * both * (1.0 - both) + 2.0 * all * (rate.powi(3) - both * both)).sqrt();
            assert!((pairs as f64 - all * both).abs() < 5.0 * deviation + 3.0, "{pairs} pairs at {rate}");
        }
    }

    #[test]
    fn all_or_nothing() {
        assert_eq!(sampler(10_000, 1.0).batch(7), (0..10_000).collect::<Vec<_>>());
        assert!((0..50).all(|step| sampler(10_000, 0.0).batch(step).is_empty()));
        assert!(sampler(0, 0.5).batch(0).is_empty());
        // A rate below 2⁻⁶⁴ is rounded down to 0.
        assert!((0..50).all(|step| sampler(10_000, 2.0_f64.powi(-65)).batch(step).is_empty()));
        for rate in [-0.1, 1.1, f64::NAN] {
            let error =
                PoissonSampler::new(&RunKey::known_without_privacy(3), 1, rate).unwrap_err().to_string();
            assert!(error.contains(&format!("the rate is {rate}, but it has to be in [0, 1]")), "{error}");
        }
    }

    #[test]
    fn parts_are_the_batch_at_every_number_of_ranks() {
        let sampler = sampler(40, 0.1);
        let (mut empty, mut fewer) = (0, 0);
        for step in 0..300 {
            let batch = sampler.batch(step);
            empty += usize::from(batch.is_empty());
            fewer += usize::from(!batch.is_empty() && batch.len() < 5);
            for ranks in 1..=5 {
                let parts: Vec<_> = (0..ranks).map(|rank| sampler.part(step, rank, ranks).unwrap()).collect();
                assert_eq!(parts.concat(), batch);
                let sizes = parts.iter().map(Vec::len);
                assert!(sizes.clone().max().unwrap() - sizes.min().unwrap() <= 1);
            }
        }
        assert!(empty > 0 && fewer > 0, "{empty} empty batches, and {fewer} with fewer samples than ranks");
        let error = sampler.part(0, 2, 2).unwrap_err().to_string();
        assert!(error.contains("no rank 2 of 2 ranks"), "{error}");
        assert!(sampler.part(0, 0, 0).is_err());
    }

    #[test]
    fn steps_and_keys_have_other_batches() {
        let (one, again) = (sampler(1000, 0.5), sampler(1000, 0.5));
        let other = PoissonSampler::new(&RunKey::known_without_privacy(4), 1000, 0.5).unwrap();
        assert_eq!(one.batch(9), again.batch(9));
        for (left, right) in [(one.batch(0), one.batch(1)), (one.batch(0), other.batch(0))] {
            let common = left.iter().filter(|at| right.contains(at)).count();
            // A quarter of 1000, ± 5 standard deviations of 13.7.
            assert!((181..319).contains(&common), "{common}");
        }
    }
}
