//! Tests `shardwise privacy`.

use crate::security::{fails, works};

/// σ 1.5, q 0.04, 2250 steps, δ 1e-5: ε 7.32911117143 in the tests of Opacus.
const CASE: [&str; 5] = ["privacy", "--rate", "0.04", "--delta", "1e-5"];

#[test]
fn the_third_of_epsilon_noise_and_steps_is_computed() {
    let spent = works(&[&CASE[..], &["--noise", "1.5", "--steps", "2250"]].concat());
    assert!(spent.contains("ε ≤ 7.3292 at δ = 1e-5"), "{spent}");
    let steps = works(&[&CASE[..], &["--noise", "1.5", "--epsilon", "7.32912"]].concat());
    assert!(steps.starts_with("steps: 2250\n"), "{steps}");
    let noise = works(&[&CASE[..], &["--steps", "2250", "--epsilon", "7.3291111714386545"]].concat());
    assert!(noise.starts_with("noise: 1.5000"), "{noise}");
    // With the noise that is printed, all steps fit into the budget.
    let printed = noise.lines().next().and_then(|line| line.strip_prefix("noise: ")).expect("the noise");
    let steps = works(&[&CASE[..], &["--noise", printed, "--epsilon", "7.3291111714386545"]].concat());
    assert!(steps.starts_with("steps: 2250\n"), "{steps}");
}

#[test]
fn two_of_the_three_are_needed() {
    for arguments in [&["--noise", "1"][..], &["--noise", "1", "--steps", "9", "--epsilon", "1"]] {
        fails(&[&CASE[..], arguments].concat(), "give two of --epsilon, --noise and --steps");
    }
    fails(&["privacy", "--rate", "1.5", "--delta", "1e-5", "--noise", "1", "--steps", "9"], "1.5");
}
