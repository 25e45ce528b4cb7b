//! Counter-based random numbers. The number at a global index does not depend on the rank that
//! computes it, nor on earlier draws.
//!
//! Initial weights and dropout masks use these numbers, so they do not depend on the sharding. The
//! generator is Philox4x32-10 (Salmon et al., SC 2011), from the crate `rand_philox`.

use rand_philox::{philox4x32_10, splitmix64, u32_to_unit_f64};

/// A stream of random numbers, addressed by index.
///
/// ```
/// use shardwise::rng::Philox;
/// let stream = Philox::named(1, "layers.0.weight");
/// // A rank with the elements 500..1000 draws the numbers that a single device draws for them.
/// let whole: Vec<f64> = (0..1000).map(|index| stream.uniform(index)).collect();
/// let shard: Vec<f64> = (500..1000).map(|index| stream.uniform(index)).collect();
/// assert_eq!(whole[500..], shard);
/// let mean = whole.iter().sum::<f64>() / 1000.0;
/// assert!((mean - 0.5).abs() < 0.05 && whole.iter().all(|&x| 0.0 < x && x < 1.0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Philox {
    key: [u32; 2],
}

impl Philox {
    /// Stream number `stream` of a seed.
    pub fn stream(seed: u64, stream: u64) -> Self {
        let key = splitmix64(splitmix64(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ stream);
        Self { key: [key as u32, (key >> 32) as u32] }
    }

    /// The stream of a seed that is named `name`.
    pub fn named(seed: u64, name: &str) -> Self {
        // FNV-1a, because the standard library's hashers may change between versions.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Self::stream(seed, hash)
    }

    /// Substream number `number` of this stream. The substream and the stream are as independent as
    /// streams of different seeds.
    pub fn substream(&self, number: u64) -> Self {
        Self::stream(u64::from(self.key[0]) | u64::from(self.key[1]) << 32, number)
    }

    /// The key of the stream.
    #[cfg(feature = "cuda")]
    pub(crate) fn key(&self) -> [u32; 2] {
        self.key
    }

    /// Four random u32 at a counter. `uniform` uses them for the indices 4 · `counter` to 4 ·
    /// `counter` + 3.
    pub(crate) fn block(&self, counter: u64) -> [u32; 4] {
        philox4x32_10([counter as u32, (counter >> 32) as u32, 0, 0], self.key)
    }

    /// The number at `index`, uniformly distributed on (0, 1).
    pub fn uniform(&self, index: u64) -> f64 {
        u32_to_unit_f64(self.block(index / 4)[(index % 4) as usize])
    }

    /// The number at `index`, normally distributed with mean 0 and variance 1. It is the Box–Muller
    /// transform of the first two u32 of block `index`.
    pub fn normal(&self, index: u64) -> f64 {
        let bits = self.block(index);
        let (radius, angle) = (u32_to_unit_f64(bits[0]), u32_to_unit_f64(bits[1]));
        (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_those_of_the_distributions() {
        let (stream, count) = (Philox::named(1, "weights"), 100_000);
        let mean = |f: &dyn Fn(u64) -> f64| (0..count).map(f).sum::<f64>() / count as f64;
        assert!(mean(&|at| stream.normal(at)).abs() < 0.01);
        assert!((mean(&|at| stream.normal(at).powi(2)) - 1.0).abs() < 0.02);
        assert!((mean(&|at| stream.uniform(at)) - 0.5).abs() < 0.005);
        assert!((mean(&|at| stream.normal(at) * stream.normal(at + 1))).abs() < 0.01);
    }

    #[test]
    fn streams_differ_and_repeat() {
        let stream = Philox::stream(1, 2);
        assert_eq!(stream.uniform(9), Philox::stream(1, 2).uniform(9));
        for other in [Philox::stream(1, 3), Philox::stream(2, 2), Philox::named(1, "2")] {
            assert_ne!(stream.uniform(9), other.uniform(9));
        }
    }
}
