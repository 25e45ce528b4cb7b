//! Normally distributed numbers from uniformly distributed ones.
//!
//! Logarithm and sine are polynomials without branches, so that the compiler computes several
//! elements at once. They use only operations that IEEE 754 rounds correctly: every machine gives
//! the same bits, as replicas need.

use std::f64::consts::{FRAC_1_SQRT_2, LN_2, TAU};

/// The number of elements that are computed at once.
pub(super) const COUNT: usize = 256;

/// Four uniformly distributed numbers for each element: those of element i are `words[..][i]`.
pub(super) type Words = [[u64; COUNT]; 4];

/// Writes samples of N(0, 1): each is half the sum of four independent normal numbers, which are
/// two Box–Muller pairs.
///
/// ```text
/// z = (r₁ sin θ₁ + r₁ cos θ₁ + r₂ sin θ₂ + r₂ cos θ₂) / 2
///   = (r₁ sin(θ₁ + π/4) + r₂ sin(θ₂ + π/4)) / √2,   rᵢ = √(−2 ln uᵢ)
/// ```
///
/// Both angles are uniformly distributed with and without the shift by π/4, which is left out.
///
/// An attacker who knows how one normal number was rounded learns more about the sum that it was
/// added to than the mechanism allows; of a sum of four, recovering the terms is infeasible.
/// Source: Holohan and Braghin, 2021: Secure Random Sampling in Differential Privacy.
pub(super) fn normal(words: &Words, z: &mut [f64; COUNT]) {
    let [radii, angles, other_radii, other_angles] = words;
    for at in 0..COUNT {
        let term = |radius: u64, angle: u64| {
            // 1 − u is in (0, 1], so that its logarithm is finite.
            (-2.0 * ln(1.0 - unit(radius))).sqrt() * sin_of_turns(unit(angle))
        };
        let sum = term(radii[at], angles[at]) + term(other_radii[at], other_angles[at]);
        z[at] = FRAC_1_SQRT_2 * sum;
    }
}

/// A number in [0, 1) with 52 bits.
#[inline(always)]
fn unit(word: u64) -> f64 {
    f64::from_bits(word >> 12 | 0x3ff << 52) - 1.0
}

/// ln x for x in [2⁻⁵², 1], to 3 · 10⁻¹⁶ of its value. Source: the polynomial of fdlibm's `log`.
#[inline(always)]
fn ln(x: f64) -> f64 {
    /// The bits of about √½. x = 2ᵏ m with m in about [√½, √2).
    const ROOT: u64 = 0x3fe6_a09e << 32;
    /// 2⁵² + 2¹¹: adding k + 2¹¹ to the bits of 2⁵² gives k + this number.
    const SHIFT: f64 = 4_503_599_627_370_496.0 + 2048.0;
    const POLYNOMIAL: [f64; 7] = [
        0.6666666666666735,
        0.3999999999940942,
        0.2857142874366239,
        0.22222198432149784,
        0.1818357216161805,
        0.15313837699209373,
        0.14798198605116586,
    ];
    let bits = x.to_bits();
    // k modulo 2¹².
    let k = bits.wrapping_sub(ROOT) >> 52;
    let m = f64::from_bits(bits.wrapping_sub(k << 52));
    let k = f64::from_bits((k ^ 0x800) & 0xfff | 0x433 << 52) - SHIFT;
    // ln m = 2 artanh s = f − (f²/2 − s (f²/2 + r)), with f = m − 1 and s = f / (2 + f).
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let square = s * s;
    let r = square * POLYNOMIAL.iter().rev().fold(0.0, |sum, factor| sum * square + factor);
    let half = 0.5 * f * f;
    k * LN_2 + (f - (half - s * (half + r)))
}

/// sin 2πu for u in [0, 1), to 10⁻¹⁵.
#[inline(always)]
fn sin_of_turns(u: f64) -> f64 {
    /// (−1)ⁱ / (2i + 1)! for i from 1: Taylor's series, whose next term is below 3 · 10⁻¹⁶ at π/2.
    const SERIES: [f64; 10] = {
        let (mut series, mut term, mut i) = ([0.0; 10], 1.0, 0);
        while i < 10 {
            term /= -((2 * i + 2) as f64) * (2 * i + 3) as f64;
            series[i] = term;
            i += 1;
        }
        series
    };
    // sin 2πu = −sin 2πt with t = u − ½, and of t only the distance from the nearest half counts.
    let t = u - 0.5;
    let turns = t.abs().min(0.5 - t.abs());
    let x = TAU * turns;
    let square = x * x;
    let rest = SERIES.iter().rev().fold(0.0, |sum, factor| sum * square + factor);
    -(x + x * square * rest).copysign(t)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some words of each part of the range, and its ends.
    fn words() -> impl Iterator<Item = u64> {
        let ends = [0, 1, (1 << 12) - 1, 1 << 12, 1 << 62, 1 << 63, u64::MAX >> 1, u64::MAX - 1, u64::MAX];
        ends.into_iter().chain((1..200_000_u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    #[test]
    fn polynomials_are_the_functions() {
        let mut quarters = [0; 4];
        for word in words() {
            let u = unit(word);
            assert!((0.0..1.0).contains(&u));
            let (got, want) = (ln(1.0 - u), libm::log(1.0 - u));
            assert!((got - want).abs() <= 5e-16 * want.abs(), "ln {}: {got} for {want}", 1.0 - u);
            let (got, want) = (sin_of_turns(u), libm::sin(TAU * u));
            assert!((got - want).abs() <= 1e-15, "sin of {u} turns: {got} for {want}");
            quarters[(4.0 * u) as usize] += 1;
        }
        assert!(quarters.iter().all(|&count| count > 10_000), "{quarters:?}");
        for power in 0..53 {
            let x = 2.0_f64.powi(-power);
            assert!((ln(x) + f64::from(power) * LN_2).abs() <= 1e-14, "ln 2^-{power}");
        }
    }

    #[test]
    fn the_extreme_words_give_numbers() {
        let mut z = [f64::NAN; COUNT];
        // √2 r for u = 2⁻⁵², 12.007…
        let most = 12.01;
        for radius in words().take(9) {
            for angle in words().take(9) {
                normal(&[[radius; COUNT], [angle; COUNT], [radius; COUNT], [angle; COUNT]], &mut z);
                assert!(z.iter().all(|z| z.abs() <= most), "{}", z[0]);
            }
        }
        normal(&[[0; COUNT]; 4], &mut z);
        assert_eq!(z, [0.0; COUNT]);
    }
}
