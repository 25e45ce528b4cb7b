//! Tests of the accountant.

use super::{
    rdp::{orders, renyi},
    *,
};
use crate::privacy::RunKey;

fn off(got: f64, want: f64) -> f64 {
    if got == want { 0.0 } else { ((got - want) / want).abs() }
}

#[test]
fn divergences_are_those_of_the_integral() {
    let orders: Vec<f64> = orders().collect();
    let text = include_str!("../../../tests/data/privacy/rdp.txt");
    let numbers = |line: &str| -> Vec<f64> {
        line.split_whitespace().map(|number| number.trim_start_matches('#').parse().unwrap()).collect()
    };
    let header = text.lines().rfind(|line| line.starts_with("# ")).unwrap();
    let wanted_orders = numbers(&header[2..]);
    assert_eq!(wanted_orders.len(), 9);
    let mut seen = 0;
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let row = numbers(line);
        let [rate, sigma] = [row[0], row[1]];
        let got = renyi(sigma, rate);
        assert_eq!((got.len(), row.len()), (orders.len(), 11));
        for (want, alpha) in row[2..].iter().zip(&wanted_orders) {
            let at = orders.iter().position(|order| order == alpha).unwrap();
            let off = off(got[at], *want);
            assert!(
                off <= 1e-11,
                "σ {sigma}, rate {rate}, order {alpha}: {} instead of {want}: {off}",
                got[at]
            );
            seen += 1;
        }
    }
    assert_eq!(seen, 324);
}

/// The integral of fractional orders is checked between the golden values: ln E[(1 + u)^α] is
/// convex in α, and is that of a sum at integers.
#[test]
fn fractional_orders_lie_between_integers() {
    for sigma in [0.1, 0.15, 0.4, 1.0, 3.4, 3.5, 30.0, 1000.0] {
        for rate in [1e-12, 1e-6, 0.02, 0.5, 0.999, 1.0 - f64::EPSILON] {
            let all = renyi(sigma, rate);
            let log: Vec<f64> = orders().zip(&all).map(|(alpha, one)| (alpha - 1.0) * one).collect();
            let orders: Vec<f64> = orders().collect();
            assert!(all.iter().all(|one| one.is_finite() && *one > 0.0), "σ {sigma}, rate {rate}");
            for at in 1..log.len() - 1 {
                let part = (orders[at] - orders[at - 1]) / (orders[at + 1] - orders[at - 1]);
                let line = log[at - 1] + part * (log[at + 1] - log[at - 1]);
                let order = orders[at];
                assert!(log[at] <= line * (1.0 + 1e-12), "σ {sigma}, rate {rate}, order {order}: not convex");
                assert!(
                    all[at] >= all[at - 1] * (1.0 - 1e-12),
                    "σ {sigma}, rate {rate}, order {order}: falls"
                );
            }
        }
    }
}

/// Opacus 1.5.4: `get_privacy_spent` of `compute_rdp` at its default orders.
#[test]
fn epsilon_is_that_of_opacus() {
    for (rate, sigma, steps, delta, want, order) in [
        (0.04, 1.5, 2250, 1e-5, 7.3291111714386545, 3.9),
        (256.0 / 60000.0, 0.7, 10575, 1e-5, 6.326318562211983, 3.8),
        (256.0 / 60000.0, 1.1, 14100, 1e-5, 2.6003429386103023, 8.1),
        (256.0 / 60000.0, 1.3, 3525, 1e-5, 0.9557739528921629, 17.0),
        (0.01, 1.0, 10000, 1e-6, 7.414025254409949, 4.4),
        (0.001, 0.8, 1000, 1e-7, 1.76484758031926, 8.6),
        (1.0, 10.0, 50, 1e-5, 3.1889915626335883, 7.2),
        (0.5, 2.0, 30, 1e-5, 7.738968014187919, 3.7),
        (0.1, 0.5, 10, 1e-5, 14.418327009829337, 2.0),
    ] {
        let got = epsilon(&[Event { sigma, rate, steps }], delta).unwrap();
        assert!(off(got.epsilon, want) <= 1e-10, "σ {sigma}, rate {rate}: {} instead of {want}", got.epsilon);
        assert_eq!((got.order, got.delta), (order, delta));
        assert!(!got.is_at_end_of_orders() && !got.to_string().contains("end"));
    }
}

/// The values are those of the bisection of Opacus 1.5.4's `get_noise_multiplier` with its
/// `compute_rdp` and `epsilon_tolerance` 1e-9. With the default 0.01, it gives 1.416 for the first.
#[test]
fn noise_is_that_of_opacus() {
    for (epsilon, delta, rate, steps, want) in [
        (8.0, 1e-5, 0.04, 2250, 1.4157871431962121),
        (8.0, 1e-5, 0.04, 2000, 1.356134217203362),
        (3.0, 1e-5, 256.0 / 60000.0, 14100, 1.014800140983425),
        (1.0, 1e-6, 0.01, 1000, 1.6595111787319183),
        (2.0, 1e-5, 1.0, 10, 6.796083573717624),
        (0.5, 1e-6, 0.001, 10000, 1.361745956237428),
    ] {
        let budget = Budget { epsilon, delta };
        let sigma = noise_for(&budget, rate, steps).unwrap();
        assert!(off(sigma, want) <= 1e-8, "ε {epsilon}, rate {rate}: {sigma} instead of {want}");
        let of = |sigma: f64| super::epsilon(&[Event { sigma, rate, steps }], delta).unwrap().epsilon;
        assert!(of(sigma) <= epsilon && of(sigma * (1.0 - 2e-10)) > epsilon);
        let most = steps_within(&budget, sigma, rate).unwrap();
        assert!(most >= steps && most < steps + steps / 1000 + 1, "{most} steps instead of {steps}");
    }
}

/// The values are those of a bisection with Opacus' `compute_rdp` and `get_privacy_spent`.
#[test]
fn steps_within_a_budget_are_those_of_opacus() {
    for (epsilon, sigma, rate, want) in [(8.0, 1.5, 0.04, 2622), (1.0, 1.0, 0.01, 4), (2.0, 1.0, 0.01, 881)] {
        assert_eq!(steps_within(&Budget { epsilon, delta: 1e-5 }, sigma, rate), Ok(want));
    }
}

/// n steps of q = 1 are one of σ / √n, whatever the events are.
#[test]
fn events_compose() {
    let whole = |sigma, steps| Event { sigma, rate: 1.0, steps };
    let one = epsilon(&[whole(3.0 / 6.0_f64.sqrt(), 1)], 1e-6).unwrap();
    let parts = epsilon(&[whole(3.0, 1), whole(3.0, 3), whole(3.0 / 2.0_f64.sqrt(), 1)], 1e-6).unwrap();
    assert!(off(parts.epsilon, one.epsilon) < 1e-13 && parts.order == one.order);
    let (a, b) = (Event { sigma: 1.0, rate: 0.01, steps: 100 }, Event { sigma: 2.0, rate: 0.1, steps: 7 });
    let of = |events: &[Event]| epsilon(events, 1e-5).unwrap().epsilon;
    assert!(off(of(&[a, b]), of(&[b, a])) < 1e-14);
    assert!(of(&[a, b]) > of(&[a]).max(of(&[b])) && of(&[a, b]) < of(&[a]) + of(&[b]));
    assert_eq!(of(&[a, Event { rate: 0.0, ..b }, Event { sigma: 0.0, steps: 0, ..b }]), of(&[a]));
    assert_eq!(of(&[a, Event { sigma: 0.0, ..b }]), f64::INFINITY);
    assert_eq!((of(&[]), of(&[Event { sigma: 0.0, rate: 0.0, steps: 9 }])), (0.0, 0.0));
}

#[test]
fn losses_grow_with_steps_and_rate_and_fall_with_noise() {
    let mut numbers = Vec::new();
    RunKey::known_without_privacy(1).stream("test", "").words(0, 0..60, |_, words: [u64; 4]| {
        numbers.push(words.map(|word| word as f64 / 2.0_f64.powi(64)));
    });
    let of = |sigma, rate, steps| epsilon(&[Event { sigma, rate, steps }], 1e-6).unwrap().epsilon;
    for [sigma, rate, steps, change] in numbers {
        let (sigma, rate) = (0.05 * 400.0_f64.powf(sigma), 1e-6_f64.powf(rate));
        let (steps, up) = (1e5_f64.powf(steps) as u64, 1.001 + change);
        let here = of(sigma, rate, steps);
        let case = format!("σ {sigma}, rate {rate}, {steps} steps: {here}");
        assert!(here > 0.0 && here.is_finite(), "{case}");
        assert!(of(sigma, rate, steps + 1 + (up * steps as f64) as u64) > here, "{case}");
        assert!(rate * up > 1.0 || of(sigma, rate * up, steps) > here, "{case}");
        assert!(of(sigma * up, rate, steps) < here, "{case}");
    }
}

#[test]
fn the_ends_of_the_orders_are_named() {
    let large = epsilon(&[Event { sigma: 0.11, rate: 0.9, steps: 1000 }], 1e-5).unwrap();
    let small = epsilon(&[Event { sigma: 1e4, rate: 1e-3, steps: 1 }], 1e-9).unwrap();
    for (loss, order) in [(large, 1.1), (small, 1024.0)] {
        assert_eq!(loss.order, order);
        assert!(loss.is_at_end_of_orders() && loss.to_string().contains("the end of the orders"), "{loss}");
    }
    let none = epsilon(&[], 1e-5).unwrap();
    assert!(!none.is_at_end_of_orders());
    let text = none.to_string();
    assert!(text.starts_with("ε ≤ 0 at δ = 1e-5, per sample (one sequence), added or removed"), "{text}");
    // Rounded up: never less than the bound.
    let loss = Epsilon { epsilon: 1.00001, delta: 1e-5, order: 4.0 };
    assert!(loss.to_string().starts_with("ε ≤ 1.0001 "), "{loss}");
    assert!(Epsilon { epsilon: f64::MAX, ..loss }.to_string().starts_with("ε ≤ 1797"));
}

#[test]
fn invalid_arguments_are_named() {
    let event = Event { sigma: 1.0, rate: 0.1, steps: 1 };
    let budget = Budget { epsilon: 1.0, delta: 1e-5 };
    let says = |error: Error, value: &str| {
        assert!(matches!(error, Error::Invalid { op: OP, .. }));
        assert!(error.to_string().contains(&format!("is {value}, but it has to be")), "{error}");
    };
    for sigma in [-1.0, f64::NAN, f64::INFINITY] {
        says(epsilon(&[Event { sigma, ..event }], 1e-5).unwrap_err(), &sigma.to_string());
        says(steps_within(&budget, sigma, 0.1).unwrap_err(), &sigma.to_string());
    }
    for rate in [-0.1, 1.1, f64::NAN] {
        says(epsilon(&[Event { rate, ..event }], 1e-5).unwrap_err(), &rate.to_string());
        says(steps_within(&budget, 1.0, rate).unwrap_err(), &rate.to_string());
        says(noise_for(&budget, rate, 10).unwrap_err(), &rate.to_string());
    }
    for delta in [0.0, 1.0, -1.0, f64::NAN] {
        says(epsilon(&[event], delta).unwrap_err(), &delta.to_string());
        says(noise_for(&Budget { delta, ..budget }, 0.1, 10).unwrap_err(), &delta.to_string());
    }
    for epsilon in [0.0, -1.0, f64::NAN] {
        says(noise_for(&Budget { epsilon, ..budget }, 0.1, 10).unwrap_err(), &epsilon.to_string());
        says(steps_within(&Budget { epsilon, ..budget }, 1.0, 0.1).unwrap_err(), &epsilon.to_string());
    }
    let error = epsilon(&[Event { steps: MAX_STEPS + 1, ..event }], 1e-5).unwrap_err();
    assert!(error.to_string().contains("9007199254740993 steps"), "{error}");
}

/// e^loss is beyond f64 where u = q (e^loss − 1) is small. The wanted number is by mpmath.
#[test]
fn a_tiny_rate_has_a_loss() {
    let of = |sigma, rate, steps, delta| epsilon(&[Event { sigma, rate, steps }], delta).unwrap();
    let got = of(0.15, 1e-30, 10_000, 1e-5);
    assert_eq!(got.order, 3.9);
    assert!((got.epsilon / 3.204_455_232_091_104 - 1.0).abs() < 1e-9, "{got:?}");
    // Less than f64 can hold, and still no free step: δ is smaller yet.
    for (sigma, rate) in
        [(0.1, 1e-20), (0.11, 1e-100), (1.0, 1e-200), (1e8, 1e-200), (1e200, 0.5), (1e200, 1.0)]
    {
        for steps in [1, 1 << 40] {
            let got = of(sigma, rate, steps, 1e-300);
            assert!(got.epsilon > 0.0, "σ = {sigma}, q = {rate}: {got:?}");
        }
    }
    let nan = rdp::epsilon(&[f64::NAN; 2], &[1.0; 2]);
    assert_eq!(nan.0, f64::INFINITY);
}

#[test]
fn budgets_at_the_limits() {
    let budget = |epsilon| Budget { epsilon, delta: 1e-5 };
    // The conversion alone costs more at the largest order.
    let error = noise_for(&budget(0.003), 0.1, 10).unwrap_err();
    assert!(error.to_string().contains("gives ε ≤ 0.003 at δ = 1e-5 with 10 steps"), "{error}");
    assert_eq!(steps_within(&budget(0.003), 100.0, 0.1), Ok(0));
    assert_eq!(steps_within(&budget(1.0), 0.0, 0.1), Ok(0));
    assert_eq!(steps_within(&budget(1.0), 0.0, 0.0), Ok(MAX_STEPS));
    assert_eq!((noise_for(&budget(1.0), 0.0, 10), noise_for(&budget(1.0), 0.1, 0)), (Ok(0.0), Ok(0.0)));
    let sigma = noise_for(&budget(1e6), 0.5, 1000).unwrap();
    assert!(sigma > 0.0 && sigma < 0.1, "{sigma}");
}
