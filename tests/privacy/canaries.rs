//! An audit by canaries: from what a step releases, guesses which samples were in the batch. The
//! guesses give a lower bound of ε, which must not exceed the ε that the accountant states. The
//! audit has to find planted mistakes.
//!
//! Sources: Jagielski et al., 2020: Auditing Differentially Private Machine Learning; Nasr et al.,
//! 2021: Adversary Instantiation.

use shardwise::{prelude::*, privacy::*, rng::Philox, train::DataParallel};

/// The number of canaries. Each is one word, so the gradient of canary i is at row i of the table.
const CANARIES: usize = 40_000;
/// A large δ: few canaries decide at which rates the audit is sharp.
const DELTA: f64 = 1e-2;
/// σ, as stated.
const NOISE: f64 = 1.0;
const CLIP: f64 = 1.0;

/// Whether a canary is in the data.
fn is_in(canary: usize) -> bool {
    Philox::stream(12, 0).uniform(canary as u64) < 0.5
}

/// Trains an embedding of one feature for a step. Samples that are not in the data have the
/// gradient 0, and those in the data a gradient of norm `size`. Returns the released gradient of
/// each canary, times q N.
fn released([dp, tp]: [usize; 2], mechanism: DpSgd, size: f64, seed: u64, all_out: bool) -> Result<Vec<f64>> {
    let ranks = launch::threads(dp * tp, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, tp)?)?;
        let (data, tensor) = (mesh.group(Axis::Data), mesh.group(Axis::Tensor));
        let source = Random::normal(1, 1.0);
        let weights = Weights::new(&source);
        let table = VocabParallelEmbedding::<Replicated, f64, _>::load(tensor, &weights, CANARIES, 1)?;
        let params = table.params();
        let replicas = DataParallel::new(data, &params)?;
        let key = RunKey::known_without_privacy(seed);
        let ledger = Ledger::new(Budget { epsilon: f64::INFINITY, delta: DELTA })?;
        let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger)?;
        let mut step = private.begin()?;
        for samples in step.samples().to_vec().chunks(10_000) {
            let ids: Vec<u32> = samples.iter().map(|&at| at as u32).collect();
            let sequences = Sequences::packed(vec![1; ids.len()]);
            let (y, saved) = table.forward(&ids, sequences)?;
            let grad = samples.iter().map(|&at| if is_in(at) && !all_out { size } else { 0.0 });
            let dy = Tensor::from_vec(world.device(), [ids.len(), 1], grad.collect())?;
            table.backward(&saved, y.with_local(dy)?)?;
            step.clip(ids.len())?;
        }
        step.release(Some(&replicas))?;
        let grad = params[0].grad().expect("a gradient");
        let whole = tensor.all_gather(&grad, 0, &tensor.even_partition(CANARIES)?)?;
        Ok(whole.to_vec()?.into_iter().map(|g| g * mechanism.rate * CANARIES as f64).collect::<Vec<_>>())
    })?;
    assert!(ranks.iter().all(|rank| rank == &ranks[0]), "ranks differ");
    Ok(ranks.into_iter().next().unwrap_or_default())
}

/// ln P[X ≥ k] (or ≤ k) of a binomial distribution.
fn log_tail(trials: usize, p: f64, counts: impl Iterator<Item = usize>) -> f64 {
    let log_factorial = |n: usize| ln_gamma(n as f64 + 1.0);
    let terms = counts.map(|k| {
        let binomial = log_factorial(trials) - log_factorial(k) - log_factorial(trials - k);
        binomial + k as f64 * p.ln() + (trials - k) as f64 * (-p).ln_1p()
    });
    let terms: Vec<f64> = terms.collect();
    let most = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + terms.iter().map(|term| (term - most).exp()).sum::<f64>().ln()
}

/// ln Γ(x) by Stirling's series, for x ≥ 1.
fn ln_gamma(x: f64) -> f64 {
    // Γ(x) = Γ(x + 8) / (x (x + 1) … (x + 7))
    let shift: f64 = (0..8).map(|i| (x + f64::from(i)).ln()).sum();
    let y = x + 8.0;
    (y - 0.5) * y.ln() - y + 0.5 * std::f64::consts::TAU.ln() + 1.0 / (12.0 * y)
        - 1.0 / (360.0 * y.powi(3))
        - shift
}

/// Clopper–Pearson bounds: the smallest and the largest probability of which `hits` of `trials` is
/// not an event of probability below 10⁻⁶.
fn bounds(hits: usize, trials: usize) -> [f64; 2] {
    let limit = 1e-6_f64.ln();
    let search = |is_low: &dyn Fn(f64) -> bool| {
        let (mut low, mut high) = (1e-12, 1.0 - 1e-12);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if is_low(middle) { low = middle } else { high = middle }
        }
        0.5 * (low + high)
    };
    let lower = if hits == 0 { 0.0 } else { search(&|p| log_tail(trials, p, hits..=trials) < limit) };
    let upper = if hits == trials { 1.0 } else { search(&|p| log_tail(trials, p, 0..=hits) > limit) };
    [lower, upper]
}

/// The largest lower bound of ε over some thresholds: ε ≥ ln((TPR − δ) / FPR).
fn lower_bound(scores: &[f64]) -> f64 {
    assert!(scores.iter().all(|score| score.is_finite()));
    let count = |inside: bool, threshold: f64| {
        let of = (0..CANARIES).filter(|&at| is_in(at) == inside);
        let hits = of.clone().filter(|&at| scores[at] > threshold).count();
        (hits, of.count())
    };
    let at = |threshold: f64| {
        let [(found, inside), (wrong, outside)] = [count(true, threshold), count(false, threshold)];
        let [true_rate, _] = bounds(found, inside);
        let [_, false_rate] = bounds(wrong, outside);
        ((true_rate - DELTA) / false_rate).ln()
    };
    (4..=12).map(|quarter| at(NOISE * CLIP * f64::from(quarter) / 4.0)).fold(f64::NEG_INFINITY, f64::max)
}

#[test]
fn the_audit_finds_no_more_than_stated_and_finds_planted_mistakes() -> Result<()> {
    let stated = epsilon(&[Event { sigma: NOISE, rate: 1.0, steps: 1 }], DELTA)?.epsilon;
    assert!((2.5..3.0).contains(&stated), "{stated}");
    let honest = DpSgd::new(CANARIES, 1.0, CLIP, NOISE);

    for (mesh, size) in [([1, 1], 1.0), ([2, 2], 1.0), ([1, 2], 50.0)] {
        let found = lower_bound(&released(mesh, honest, size, 3, false)?);
        assert!(found <= stated, "{mesh:?}: the audit finds ε ≥ {found}, but {stated} is stated");
        // The audit is not blind.
        assert!(found > 1.4, "{mesh:?}: the audit finds only {found}");
    }

    // No clipping: the norm of the gradients is 3 C. The noise stays what it is.
    let unclipped = DpSgd { clip: 100.0, noise: NOISE / 100.0, ..honest };
    // The noise is divided by the number of replicas, as by an average after it was added.
    let divided = DpSgd { noise: NOISE / 2.0, ..honest };
    // Each of three ranks adds noise of σ / √3 to a copy of the sum: one copy has too little.
    let per_rank = DpSgd { noise: NOISE / 3.0_f64.sqrt(), ..honest };
    for (what, mechanism, size) in
        [("no clipping", unclipped, 3.0), ("noise divided", divided, 1.0), ("noise per rank", per_rank, 1.0)]
    {
        let found = lower_bound(&released([1, 1], mechanism, size, 4, false)?);
        assert!(found > stated, "{what}: the audit finds only ε ≥ {found} of {stated}");
    }

    // The noise of one key and step in two releases: it cancels.
    let (with, without) = (released([1, 1], honest, 1.0, 5, false)?, released([1, 1], honest, 1.0, 5, true)?);
    let difference: Vec<f64> = with.iter().zip(&without).map(|(a, b)| a - b).collect();
    let found = lower_bound(&difference.iter().map(|score| 3.5 * score).collect::<Vec<_>>());
    assert!(found > stated, "noise used twice: the audit finds only {found}");
    Ok(())
}

#[test]
fn bounds_of_probabilities_contain_the_truth() {
    // P[X = 0] of 1000 trials is 10⁻⁶ for p = 1 − 10^(−6/1000).
    let [low, high] = bounds(0, 1000);
    assert_eq!(low, 0.0);
    assert!((high - (1.0 - 10.0_f64.powf(-0.006))).abs() < 1e-9, "{high}");
    let [low, high] = bounds(1000, 1000);
    assert!((low - 10.0_f64.powf(-0.006)).abs() < 1e-9 && high == 1.0, "{low}");
    let [low, high] = bounds(500, 1000);
    assert!(low < 0.45 && low > 0.4 && (low + high - 1.0).abs() < 1e-9, "{low} {high}");
}
