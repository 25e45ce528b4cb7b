//! Sums and maxima of a row on the CPU, in an order that vector units can follow.

use crate::device::Accumulator;

/// Independent partial results: enough for two vectors of eight f32 to be under way at a time.
const LANES: usize = 16;

/// f(0) ⊕ f(1) ⊕ … ⊕ f(len − 1): element `i` goes to lane `i mod 16`, then the lanes are combined pairwise. The order
/// depends on `len` alone.
#[inline(always)]
fn lane_fold<A: Accumulator>(len: usize, start: A, f: impl Fn(usize) -> A, combine: impl Fn(A, A) -> A) -> A {
    let mut lanes = [start; LANES];
    let whole = len / LANES * LANES;
    let mut at = 0;
    while at < whole {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = combine(*value, f(at + lane));
        }
        at += LANES;
    }
    for (lane, value) in lanes.iter_mut().enumerate().take(len - whole) {
        *value = combine(*value, f(whole + lane));
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// f(0) + f(1) + … + f(len − 1).
#[inline(always)]
pub(super) fn lane_sum<A: Accumulator>(len: usize, f: impl Fn(usize) -> A) -> A {
    lane_fold(len, A::ZERO, f, |a, b| a + b)
}

/// The largest of f(0), …, f(len − 1): −∞ for none, NaN if one is NaN.
#[inline(always)]
pub(super) fn lane_max<A: Accumulator>(len: usize, f: impl Fn(usize) -> A) -> A {
    lane_fold(len, A::NEG_INFINITY, f, A::max_nan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_counts_once() {
        for len in 0..70 {
            assert_eq!(lane_sum(len, |at| at as f64), (len * len.saturating_sub(1) / 2) as f64);
            let want = if len == 0 { f32::NEG_INFINITY } else { (len - 1) as f32 };
            assert_eq!(lane_max(len, |at| at as f32), want);
        }
        assert!((0..20).all(|nan| lane_max(20, |at| if at == nan { f32::NAN } else { 1.0 }).is_nan()));
    }
}
