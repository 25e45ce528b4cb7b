//! e^x, tanh and erf for f32, and conversions between element types. None of these functions
//! branches, so that the compiler vectorizes them.
//!
//! The coefficients of the polynomials are least-squares fits in f64, rounded to f32. The weights
//! of the fits were chosen so that the largest error is close to the smallest possible. A function
//! with several ranges evaluates the formulas of all ranges and selects one result. No function
//! uses a fused multiply-add, so that the bits are the same on every machine.

use half::f16;

/// c0 + c1 x + c2 x² + … by Horner's rule.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, c: [f32; N]) -> f32 {
    let mut sum = c[N - 1];
    let mut at = N - 1;
    while at > 0 {
        at -= 1;
        sum = sum * x + c[at];
    }
    sum
}

/// 2^n for −126 ≤ n ≤ 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// e^x = 2^n e^r with n = round(x / ln 2) and |r| ≤ ln 2 / 2; the fit's relative error is 2e-9.
#[inline(always)]
pub(in super::super) fn exp(x: f32) -> f32 {
    // ln 2 = HIGH + LOW, where n · HIGH is exact for all n that occur.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // Adding 1.5 · 2^23 leaves the nearest integer in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -104.0 { -104.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * HIGH - n * LOW;
    let p = polynomial(r, [1.0, 1.0, 0.5, 0.166_664_15, 0.041_666_083, 0.008_375_135, 0.001_395_606_2]);
    // Multiplies by two factors whose product is 2^n, because 2^n itself overflows for the largest
    // n and is subnormal for the smallest.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    p * power_of_two(half.clamp(-126, 127)) * power_of_two((n - half).clamp(-126, 127))
}

/// tanh x = x q(x²) near 0, and 1 − 2 / (e^{2|x|} + 1) with the sign of x elsewhere.
#[inline(always)]
pub(in super::super) fn tanh(x: f32) -> f32 {
    let s = x * x;
    let near =
        x * polynomial(s, [1.0, -0.333_332_57, 0.133_309_98, -0.053_709_835, 0.020_552_816, -0.005_615_599]);
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 { near } else { far.copysign(x) }
}

/// erf x = x q(x²) near 0, and 1 − e^{p(|x|)} with the sign of x elsewhere; p fits ln erfc on
/// [0.9, 4].
#[inline(always)]
pub(in super::super) fn erf(x: f32) -> f32 {
    let s = x * x;
    let near = x * polynomial(
        s,
        [
            std::f32::consts::FRAC_2_SQRT_PI,
            -0.376_126_32,
            0.112_836_86,
            -0.026_858_818,
            0.005_199_518,
            -8.124_893_6e-4,
            8.292_827e-5,
        ],
    );
    // erfc(4) is below half a unit in the last place of 1.
    let t = if x.abs() > 4.0 { 4.0 } else { x.abs() };
    let p = polynomial(
        t,
        [
            -1.774_872_4e-4,
            -1.127_749_6,
            -0.637_059_7,
            -0.104_037_42,
            0.022_277_117,
            -0.003_055_615_8,
            1.971_826_3e-4,
        ],
    );
    let far = 1.0 - exp(p);
    let value = if x.abs() < 0.93 { near } else { far.copysign(x) };
    // Returns a NaN unchanged, whatever the selections above give for it.
    #[allow(clippy::eq_op)]
    if x != x { x } else { value }
}

/// Converts an f64 to f32 so that rounding the result again, to bf16 or f16, gives the element
/// nearest to the f64.
///
/// Rounds to odd: if the f64 lies between two f32, returns the f32 whose last bit is 1. This f32 is
/// never halfway between two bf16 or f16, so the second rounding gives what rounding the f64
/// directly gives (Boldo and Melquiond, 2008). The conversions of `half` drop the low 32 bits of
/// the f64 or round twice, first to f32.
#[inline(always)]
pub(in super::super) fn round_to_odd(value: f64) -> f32 {
    let near = value as f32;
    let back = f64::from(near);
    let toward_zero = near.to_bits() - u32::from(back.abs() > value.abs());
    f32::from_bits(toward_zero | u32::from(back != value))
}

/// The f32 equal to an f16. A signalling NaN becomes a quiet one.
#[inline(always)]
pub(in super::super) fn f32_from_f16(value: f16) -> f32 {
    const REBIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(value.to_bits());
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // The bits of the f16, moved to their positions in an f32, give a number that is 2^112 times
    // too small. The multiplication by 2^112 is exact, for subnormals too.
    let finite = (f32::from_bits(magnitude << 13) * REBIAS).to_bits();
    let quiet = u32::from(magnitude > 0x7c00) << 22;
    let infinite = 0x7f80_0000 | magnitude << 13 | quiet;
    f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { infinite })
}

/// The f16 nearest to an f32; ties to even.
#[inline(always)]
pub(in super::super) fn f16_from_f32(value: f32) -> f16 {
    let bits = value.to_bits();
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7fff_ffff);
    // Adds half a unit of the last kept bit, or one less (0xfff) if the last kept bit is 0. The
    // carry then rounds to the nearest, ties to even. From 65520 on, the carry gives the exponent
    // of infinity.
    let normal = magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13;
    // In f32, the unit in the last place of 0.5 is 2^-24, the unit of subnormal f16. So adding 0.5
    // rounds to a multiple of this unit.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    let finite = if magnitude < 143 << 23 { finite } else { 0x7c00 };
    let rounded = if magnitude > 0x7f80_0000 { 0x7e00 | magnitude >> 13 & 0x1ff } else { finite };
    f16::from_bits((sign | rounded) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_read_exactly_and_comes_back() {
        for bits in 0..=u16::MAX {
            let (value, quiet) = (f16::from_bits(bits), if bits & 0x7fff > 0x7c00 { 0x200 } else { 0 });
            assert_eq!(f32_from_f16(value).to_bits(), value.to_f32_const().to_bits(), "{bits:#x}");
            assert_eq!(f16_from_f32(f32_from_f16(value)).to_bits(), bits | quiet, "{bits:#x}");
        }
    }

    #[test]
    fn f16_rounds_to_the_nearest_and_ties_to_even() {
        // For every finite f16 but the largest: the midpoint between it and the next f16, and the
        // two f32 next to the midpoint.
        for bits in 0..0x7bff_u16 {
            let [low, high] = [bits, bits + 1].map(f16::from_bits);
            let halfway = (f32_from_f16(low) + f32_from_f16(high)) / 2.0;
            let even = if bits.is_multiple_of(2) { low } else { high };
            for (value, want) in [(halfway.next_down(), low), (halfway, even), (halfway.next_up(), high)] {
                assert_eq!(f16_from_f32(value), want, "{value}");
                assert_eq!(f16_from_f32(-value), -want, "-{value}");
            }
        }
        assert_eq!(f16_from_f32(65520.0_f32.next_down()), f16::MAX);
        for large in [65520.0, 65536.0, 1e30, f32::INFINITY] {
            assert_eq!((f16_from_f32(large), f16_from_f32(-large)), (f16::INFINITY, f16::NEG_INFINITY));
        }
        assert!(f16_from_f32(f32::NAN).is_nan() && f16_from_f32(f32::from_bits(0x7f80_0001)).is_nan());
    }

    /// The largest error of `f` on [low, high], in units of `f32::EPSILON` · |`exact`|, or of
    /// `f32::EPSILON` if `absolute`.
    fn error(f: fn(f32) -> f32, exact: fn(f64) -> f64, low: f32, high: f32, absolute: bool) -> f64 {
        (0..=200_000).fold(0.0, |worst, at| {
            let x = low + (high - low) * (at as f32 / 200_000.0);
            let want = exact(f64::from(x));
            let unit = if absolute { 1.0 } else { want.abs().max(f64::from(f32::MIN_POSITIVE)) };
            let error = (f64::from(f(x)) - want).abs() / (unit * f64::from(f32::EPSILON));
            f64::max(worst, error)
        })
    }

    #[test]
    fn accurate_to_a_few_units_in_the_last_place() {
        assert!(error(exp, f64::exp, -87.0, 88.7, false) < 2.0);
        assert!(error(tanh, f64::tanh, -10.0, 10.0, false) < 3.0);
        assert!(error(tanh, f64::tanh, -1e-3, 1e-3, false) < 1.5);
        assert!(error(erf, libm::erf, -5.0, 5.0, true) < 2.0);
        assert!(error(erf, libm::erf, -0.93, 0.93, false) < 3.0);
    }

    #[test]
    fn limits_and_nan() {
        assert_eq!((exp(f32::INFINITY), exp(f32::NEG_INFINITY), exp(0.0)), (f32::INFINITY, 0.0, 1.0));
        assert_eq!((exp(89.0), exp(-104.0), exp(3e38), exp(-3e38)), (f32::INFINITY, 0.0, f32::INFINITY, 0.0));
        assert!(exp(-100.0) > 0.0, "subnormal results are kept");
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(0.0)), (1.0, -1.0, 0.0));
        assert_eq!((erf(f32::INFINITY), erf(f32::NEG_INFINITY), erf(0.0)), (1.0, -1.0, 0.0));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan() && erf(f32::NAN).is_nan());
    }
}
