//! Sums and maxima of a row on the CPU, in an order that maps to SIMD lanes.

use crate::device::{Accumulator, Element};

/// The number of independent partial results. 16 keep two vectors of eight f32 in flight.
const LANES: usize = 16;

/// f(0) ⊕ f(1) ⊕ … ⊕ f(len − 1), where f(i) is `f` of the `i`-th elements of `rows` and ⊕ is
/// `combine`. Element `i` is combined into lane `i mod 16`. The lanes are then combined pairwise.
/// The order depends only on the length of the rows.
#[inline(always)]
fn lane_fold<T: Element, A: Accumulator, const N: usize>(
    rows: [&[T]; N],
    start: A,
    f: impl Fn([T; N]) -> A,
    combine: impl Fn(A, A) -> A,
) -> A {
    let mut lanes = [start; LANES];
    let len = rows[0].len();
    let whole = len / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        // `first_chunk` checks the lengths once for all lanes, because a check per lane would
        // prevent vectorization.
        let rows = rows.map(|row| row[at..].first_chunk::<LANES>().expect("the rows are equally long"));
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = combine(*value, f(rows.map(|row| row[lane])));
        }
    }
    for (lane, value) in lanes.iter_mut().enumerate().take(len - whole) {
        *value = combine(*value, f(rows.map(|row| row[whole + lane])));
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

/// Σ of `f` over the elements of the rows.
#[inline(always)]
pub(super) fn lane_sum<T: Element, A: Accumulator, const N: usize>(
    rows: [&[T]; N],
    f: impl Fn([T; N]) -> A,
) -> A {
    lane_fold(rows, A::ZERO, f, |a, b| a + b)
}

/// The maximum of a row: −∞ if the row is empty, NaN if an element is NaN.
#[inline(always)]
pub(super) fn lane_max<T: Element>(row: &[T]) -> T::Acc {
    lane_fold([row], T::Acc::NEG_INFINITY, |[x]| x.widen(), T::Acc::max_nan)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_counts_once() {
        for len in 0..70_usize {
            let row: Vec<f64> = (0..len).map(|at| at as f64).collect();
            let square = |n: usize| (n * n.saturating_sub(1) * (2 * n).saturating_sub(1) / 6) as f64;
            assert_eq!(lane_sum([&row], |[x]| x), (len * len.saturating_sub(1) / 2) as f64);
            assert_eq!(lane_sum([&row, &row], |[x, y]| x * y), square(len));
            assert_eq!(lane_max(&row), if len == 0 { f64::NEG_INFINITY } else { (len - 1) as f64 });
        }
        let with_nan =
            |nan: usize| std::array::from_fn::<f32, 20, _>(|at| if at == nan { f32::NAN } else { 1.0 });
        assert!((0..20).all(|nan| lane_max(&with_nan(nan)).is_nan()));
    }
}
