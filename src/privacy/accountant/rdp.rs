//! Rényi differential privacy of the subsampled Gaussian mechanism.
//!
//! The mechanism adds N(0, (σ C)²) to a sum of vectors of norm at most C, each of which is in the
//! sum with probability q (Poisson sampling). One step has, for an order α > 1,
//!
//! ```text
//! ε(α) = ln(1 + M) / (α − 1),   M = E[(1 + u)^α − 1 − α u]
//! u = q (e^((2x − 1) / (2 σ²)) − 1),   x ~ N(0, σ²)
//! q = 1:          ε(α) = α / (2 σ²)
//! α an integer:   M = Σ C(α, i) qⁱ (1 − q)^(α − i) (e^((i² − i) / (2 σ²)) − 1), i = 2, …, α
//! ```
//!
//! E[u] = 0, so M + 1 is the usual moment E[(1 + u)^α]. M has only positive terms, so that a small
//! ε(α) has as many correct digits as a large one. The usual moment loses those below 10⁻¹⁶, and
//! its series for a fractional order converges slowly if q is near ½.
//!
//! Sources: Mironov, Talwar and Zhang, 2019: Rényi Differential Privacy of the Sampled Gaussian
//! Mechanism, section 3.3; the conversion to (ε, δ): Balle et al., 2020: Hypothesis Testing
//! Interpretations and Rényi Differential Privacy, theorem 21.

use std::f64::consts::{LN_2, TAU};

/// The orders: 1.1, 1.2, …, 10.9 and 12, 13, …, 63 as in Opacus; then larger ones for small ε.
pub(super) fn orders() -> impl Iterator<Item = f64> {
    let fractions = (1..100).map(|tenths| 1.0 + f64::from(tenths) / 10.0);
    let integers = (12..64).chain([72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 768, 1024]);
    fractions.chain(integers.map(f64::from))
}

/// The smallest and the largest order.
pub(super) const ENDS: [f64; 2] = [1.1, 1024.0];

/// Fractional orders of less noise than this are left out: their ε(α) is infinite. That is an upper
/// bound, and the number of nodes of the integral grows as 1/σ².
const LEAST_SIGMA: f64 = 0.1;

/// More noise than this counts as this. ε(α) falls with σ, so that is an upper bound, and σ² does
/// not overflow.
const LARGEST_SIGMA: f64 = 1e100;

/// Returns ε(α) of one step at each order. `rate` is q.
pub(super) fn renyi(sigma: f64, rate: f64) -> Vec<f64> {
    if rate == 0.0 {
        return vec![0.0; orders().count()];
    }
    let sigma = sigma.min(LARGEST_SIGMA);
    if rate == 1.0 {
        return orders().map(|alpha| alpha / (2.0 * sigma * sigma)).collect();
    }
    let nodes = if sigma < LEAST_SIGMA { Vec::new() } else { nodes(sigma, rate) };
    let of = |alpha: f64| {
        let log = if alpha.fract() == 0.0 {
            sum(sigma, rate, alpha)
        } else if nodes.is_empty() {
            f64::INFINITY
        } else {
            integral(&nodes, alpha)
        };
        let one = ln_1p_exp(log) / (alpha - 1.0);
        // What is too small for f64 is still a loss.
        if one == 0.0 { f64::MIN_POSITIVE } else { one }
    };
    orders().map(of).collect()
}

/// Returns ln M for an integer order.
fn sum(sigma: f64, rate: f64, alpha: f64) -> f64 {
    let (log_rate, log_rest) = (rate.ln(), (-rate).ln_1p());
    let (mut sum, mut binomial, mut i) = (f64::NEG_INFINITY, alpha.ln(), 1.0);
    while i < alpha {
        binomial += ((alpha - i) / (i + 1.0)).ln();
        i += 1.0;
        let moment = ln_exp_m1((i * i - i) / (2.0 * sigma * sigma));
        sum = ln_add(sum, binomial + i * log_rate + (alpha - i) * log_rest + moment);
    }
    sum
}

/// A node x of the integral.
struct Node {
    /// ln of the weight of the node: the density of N(0, σ²) at x, times the distance of nodes.
    weight: f64,
    u: f64,
    /// ln(1 + u)
    log: f64,
}

/// Returns the nodes of the trapezoidal rule, which converges exponentially for an integrand that
/// is analytic in a strip |Im x| < d and vanishes at both ends.
///
/// With a distance h, the error is that of e^(y²/(2σ²) − 2πy/h) for the best y ≤ d, where d = π σ²
/// is where 1 + u vanishes. It is e⁻⁶⁰ for y = d if h ≤ 2, and for y = 2πσ²/h otherwise.
fn nodes(sigma: f64, rate: f64) -> Vec<Node> {
    const DIGITS: f64 = 60.0;
    /// The integrand is N(0, σ²) times a power on the left, and at most N(α, σ²) on the right.
    const WIDTH: f64 = 10.0;
    const LARGEST: f64 = 11.0;
    let variance = sigma * sigma;
    let square = TAU * TAU * variance / 2.0;
    let wide = (square / DIGITS).sqrt();
    let step = if wide > 2.0 { wide } else { 1.0 / (0.25 + DIGITS / square) };
    let count = ((2.0 * WIDTH * sigma + LARGEST) / step).ceil();
    let norm = (step / (sigma * TAU.sqrt())).ln();
    let node = |at: u32| {
        let x = f64::from(at) * step - WIDTH * sigma;
        let loss = (2.0 * x - 1.0) / (2.0 * variance);
        // e^loss overflows from 709 on, also where u is small.
        let large = loss + rate.ln();
        let u = if loss < 500.0 { rate * loss.exp_m1() } else { large.exp() - rate };
        let log = if u.is_finite() { u.ln_1p() } else { large };
        Node { weight: norm - x * x / (2.0 * variance), u, log }
    };
    (0..=count as u32).map(node).collect()
}

/// Returns ln M for a fractional order.
fn integral(nodes: &[Node], alpha: f64) -> f64 {
    let terms: Vec<_> = nodes.iter().map(|node| node.weight + ln_rest(node, alpha)).collect();
    let most = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if most.is_finite() {
        most + terms.iter().map(|term| (term - most).exp()).sum::<f64>().ln()
    } else {
        most
    }
}

/// ln((1 + u)^α − 1 − α u)
fn ln_rest(&Node { u, log, .. }: &Node, alpha: f64) -> f64 {
    let power = alpha * log;
    // α u is then less than e⁻⁴⁰ of the power.
    if power > 500.0 {
        return power;
    }
    if (alpha * u).abs() > 0.1 {
        return (power.exp_m1() - alpha * u).ln();
    }
    // Σ C(α, k) uᵏ, k = 2, 3, …
    let (mut term, mut sum, mut k) = (alpha * (alpha - 1.0) / 2.0 * u * u, 0.0, 2.0);
    while sum + term != sum && !term.is_nan() {
        sum += term;
        term *= (alpha - k) / (k + 1.0) * u;
        k += 1.0;
    }
    sum.ln()
}

/// ln(eᵃ + eᵇ)
fn ln_add(a: f64, b: f64) -> f64 {
    let (low, high) = (a.min(b), a.max(b));
    if low == high { high + LN_2 } else { high + (low - high).exp().ln_1p() }
}

/// ln(1 + eˣ)
fn ln_1p_exp(x: f64) -> f64 {
    if x > 0.0 { x + (-x).exp().ln_1p() } else { x.exp().ln_1p() }
}

/// ln(eˣ − 1) for x ≥ 0
fn ln_exp_m1(x: f64) -> f64 {
    if x > 1.0 { x + (-(-x).exp()).ln_1p() } else { x.exp_m1().ln() }
}

/// What the conversion adds to the sum of ε(α) at each order:
/// ln((α − 1) / α) − (ln δ + ln α) / (α − 1).
pub(super) fn conversion(delta: f64) -> Vec<f64> {
    let of = |alpha: f64| (-1.0 / alpha).ln_1p() - (delta.ln() + alpha.ln()) / (alpha - 1.0);
    orders().map(of).collect()
}

/// Returns ε and the best order. `sums` has the sum of ε(α) over all steps at each order.
pub(super) fn epsilon(sums: &[f64], conversion: &[f64]) -> (f64, f64) {
    // Without any loss, the conversion's bound is not the best one.
    if sums.iter().all(|&sum| sum == 0.0) {
        return (0.0, ENDS[1]);
    }
    // `f64::max` would take NaN for no loss at all.
    let bound = |bound: f64| if bound.is_nan() { f64::INFINITY } else { bound.max(0.0) };
    let of = |((sum, conversion), alpha): ((&f64, &f64), f64)| (bound(sum + conversion), alpha);
    let all = sums.iter().zip(conversion).zip(orders()).map(of);
    all.min_by(|(one, _), (other, _)| one.total_cmp(other)).unwrap_or((f64::INFINITY, ENDS[0]))
}
