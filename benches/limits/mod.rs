//! The limits of this machine's cores and memory. Benches compare their results with these limits.

#![allow(dead_code, reason = "not every bench uses every function")]

use std::{hint::black_box, time::Instant};

/// Measures the f32 fused multiply-adds of one core, in GFLOP/s, with independent chains in the
/// widest vectors.
pub(crate) fn fused() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::{is_x86_feature_detected, x86_64::*};

        if is_x86_feature_detected!("avx512f") {
            #[target_feature(enable = "avx512f")]
            fn with_avx512(times: usize) -> f32 {
                let (x, y) = (_mm512_set1_ps(black_box(0.9999)), _mm512_set1_ps(black_box(0.0001)));
                let mut sums = [_mm512_setzero_ps(); CHAINS];
                for _ in 0..times {
                    sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(*sum, x, y));
                }
                sums.into_iter().map(|sum| _mm512_reduce_add_ps(sum)).sum()
            }
            // SAFETY: the processor has AVX-512, which was just detected.
            #[allow(unsafe_code)]
            return rate(16, |times| unsafe { with_avx512(times) });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            #[target_feature(enable = "avx2,fma")]
            fn with_avx2(times: usize) -> f32 {
                let (x, y) = (_mm256_set1_ps(black_box(0.9999)), _mm256_set1_ps(black_box(0.0001)));
                let mut sums = [_mm256_setzero_ps(); CHAINS];
                for _ in 0..times {
                    sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(*sum, x, y));
                }
                sums.into_iter().map(|sum| _mm256_cvtss_f32(sum)).sum()
            }
            // SAFETY: the processor has AVX2 and FMA: both were just detected.
            #[allow(unsafe_code)]
            return rate(8, |times| unsafe { with_avx2(times) });
        }
    }
    rate(1, |times| {
        let (x, y) = (black_box(0.9999_f32), black_box(0.0001_f32));
        let mut sums = [0.0_f32; CHAINS];
        for _ in 0..times {
            sums.iter_mut().for_each(|sum| *sum = sum.mul_add(x, y));
        }
        sums.into_iter().sum()
    })
}

/// The number of independent chains, more than a processor executes at a time.
const CHAINS: usize = 12;

/// Returns the highest rate of some rounds, because other load disturbs the fastest round least.
fn rate(lanes: usize, run: impl Fn(usize) -> f32) -> f64 {
    const TIMES: usize = 2_000_000;
    let once = || {
        let start = Instant::now();
        black_box(run(black_box(TIMES)));
        (2 * CHAINS * lanes * TIMES) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..7).map(|_| once()).fold(0.0, f64::max)
}

/// Measures the rate at which some threads together read memory that is in no cache, in GB/s.
pub(crate) fn read(threads: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    let memory: Vec<u64> = vec![1; BYTES / 8];
    let once = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in memory.chunks(memory.len().div_ceil(threads)) {
                scope.spawn(|| black_box(part.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x))));
            }
        });
        BYTES as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..5).map(|_| once()).fold(0.0, f64::max)
}
