//! Steps that were run on a machine, and the calibration of its rates to them.

use super::{Collective, Link, MOST_ERROR, Machine, OP, Rate};
use crate::{
    error::Result,
    plan::{
        Goal,
        bounds::{at_least_0, positive},
    },
};
use serde::{Deserialize, Serialize};

/// The predicted seconds of a step, by what takes them. Their sum is the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Parts {
    /// Operations of matrix products and of attention.
    pub operations: f64,
    /// Reading and writing memory, and starting kernels.
    pub memory: f64,
    /// Collectives and messages.
    pub transfers: f64,
}

/// A step that was run: its predicted parts by the rates of the machine, without calibration, and
/// its measured seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Run {
    /// The job and the strategy.
    pub what: String,
    /// Whether the step generates tokens. Other steps train.
    #[serde(default)]
    pub serving: bool,
    /// What was predicted.
    pub predicted: Parts,
    /// The measured seconds: the median of the steps.
    pub seconds: f64,
}

/// Runs before which `error` stays what the machine says.
const ENOUGH: usize = 4;
/// The assumed uncertainty of a run, as a logarithm.
const NOISE: f64 = 0.1;
/// The assumed uncertainty of a factor without runs, as a logarithm.
const PRIOR: f64 = 0.5;
/// The largest factor by which a rate is changed, and 1 over the smallest.
const MOST: f64 = 4.0;

impl Parts {
    /// The seconds of the step.
    pub fn total(&self) -> f64 {
        self.scaled([1.0; 3])
    }

    fn scaled(&self, factors: [f64; 3]) -> f64 {
        let Self { operations, memory, transfers } = *self;
        operations * factors[0] + memory * factors[1] + transfers * factors[2]
    }
}

impl Run {
    /// A run of a step, from its parts ([`parts`](crate::plan::parts)) and its measured seconds.
    pub fn new(what: impl Into<String>, goal: &Goal, predicted: Parts, seconds: f64) -> Self {
        Self { what: what.into(), serving: matches!(goal, Goal::Serve { .. }), predicted, seconds }
    }

    pub(super) fn check(&self) -> Result<()> {
        let Self { what, predicted, seconds, .. } = self;
        positive(OP, &format!("runs: {what}: seconds"), *seconds)?;
        at_least_0(OP, &format!("runs: {what}: predicted.operations"), predicted.operations)?;
        at_least_0(OP, &format!("runs: {what}: predicted.memory"), predicted.memory)?;
        at_least_0(OP, &format!("runs: {what}: predicted.transfers"), predicted.transfers)?;
        positive(OP, &format!("runs: {what}: predicted"), predicted.total())
    }
}

impl Machine {
    /// The machine with rates that are calibrated to its runs of the same goal (training or
    /// serving), and without runs.
    ///
    /// Three factors, of operations, memory and transfers, minimize Σ ln²(predicted / measured) /
    /// 0.1² + Σ ln²(factor) / 0.5², and are between 1/4 and 4. `error` becomes twice the mean of
    /// |predicted / measured − 1|, but at least 0.03 and at most 10. With fewer than four runs, it
    /// does not become less.
    pub fn calibrated(&self, goal: &Goal) -> Self {
        let serving = matches!(goal, Goal::Serve { .. });
        let runs: Vec<_> = self.runs.iter().filter(|run| run.serving == serving).collect();
        let factors = factors(&runs);
        let mut machine = self.scaled(factors);
        machine.runs.clear();
        let error = |run: &&Run| (run.predicted.scaled(factors) / run.seconds - 1.0).abs();
        let mean = runs.iter().map(error).sum::<f64>() / runs.len().max(1) as f64;
        let least = if runs.len() < ENOUGH { self.error } else { 0.03 };
        machine.error = (2.0 * mean).max(least).min(MOST_ERROR);
        machine
    }

    /// The machine on which operations, memory and transfers take these multiples of their seconds.
    pub(in crate::plan) fn scaled(&self, [operations, memory, transfers]: [f64; 3]) -> Self {
        let mut machine = self.clone();
        let slower = |rate: &mut Rate, factor: f64| rate.peak /= factor;
        for rates in &mut machine.rates {
            rates.launch *= memory;
            for rates in rates.types.values_mut() {
                slower(&mut rates.products, operations);
                slower(&mut rates.attention, operations);
                slower(&mut rates.copies, memory);
                rates.kernels.values_mut().for_each(|rate| slower(rate, memory));
            }
        }
        let links = [Some(&mut machine.node), machine.network.as_mut()].into_iter().flatten();
        let links = links.map(|Link { latency, bandwidth }| (latency, bandwidth));
        let collectives = machine.collectives.iter_mut();
        let collectives = collectives.map(|Collective { latency, bandwidth, .. }| (latency, bandwidth));
        for (latency, bandwidth) in links.chain(collectives) {
            *latency *= transfers;
            *bandwidth /= transfers;
        }
        machine
    }
}

/// The factors of operations, memory and transfers that fit the runs best.
fn factors(runs: &[&Run]) -> [f64; 3] {
    let cost = |logs: [f64; 3]| {
        let factors = logs.map(f64::exp);
        let misfit = |run: &&Run| ((run.predicted.scaled(factors) / run.seconds).ln() / NOISE).powi(2);
        runs.iter().map(misfit).sum::<f64>() + logs.iter().map(|log| (log / PRIOR).powi(2)).sum::<f64>()
    };
    // Coordinate descent with steps that shrink: the cost is smooth, and has three arguments.
    let (mut logs, mut step) = ([0.0; 3], 0.5);
    let mut least = cost(logs);
    while step > 1e-5 {
        let mut better = false;
        for at in 0..3 {
            for change in [step, -step] {
                let mut next = logs;
                next[at] = (next[at] + change).clamp(-MOST.ln(), MOST.ln());
                let cost = cost(next);
                if cost < least {
                    (logs, least, better) = (next, cost, true);
                }
            }
        }
        if !better {
            step /= 2.0;
        }
    }
    logs.map(f64::exp)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(operations: f64, memory: f64, transfers: f64, seconds: f64) -> Run {
        let goal = Goal::Train { batch: 1, tokens: 1 };
        Run::new("a step", &goal, Parts { operations, memory, transfers }, seconds)
    }

    /// Runs of a machine on which operations, memory and transfers take these multiples.
    fn runs(factors: [f64; 3], count: usize) -> Vec<Run> {
        let of = |at: usize| {
            let parts = [1.0, 0.125 + (at % 5) as f64 * 0.5, 0.0625 + (at % 3) as f64 * 0.5];
            let seconds = parts.iter().zip(factors).map(|(part, factor)| part * factor).sum();
            run(parts[0], parts[1], parts[2], seconds)
        };
        (0..count).map(of).collect()
    }

    #[test]
    fn factors_are_those_of_the_runs() {
        let want = [1.3, 0.8, 1.9];
        for (got, want) in factors(&runs(want, 30).iter().collect::<Vec<_>>()).into_iter().zip(want) {
            assert!((got / want - 1.0).abs() < 0.03, "{got} and {want}");
        }
        assert_eq!(factors(&[]), [1.0; 3]);
        // One run does not determine three factors: that of the largest part changes most.
        let [operations, memory, transfers] = factors(&[&run(1.0, 0.01, 0.01, 2.0)]);
        assert!((1.8..2.0).contains(&operations), "{operations}");
        assert!((0.99..1.1).contains(&memory) && (0.99..1.1).contains(&transfers), "{memory}, {transfers}");
        // A run that took a hundred times as long does not change a rate without limit.
        assert_eq!(factors(&[&run(1.0, 1.0, 1.0, 100.0)]), [MOST; 3].map(|most| most.ln().exp()));
    }

    #[test]
    fn a_calibrated_machine_has_other_rates_and_its_own_error() {
        let mut machine = Machine::preset("h200").unwrap();
        let train = Goal::Train { batch: 1, tokens: 1 };
        assert_eq!(machine.calibrated(&train), machine);
        machine.runs = runs([2.0, 0.5, 3.0], 3);
        assert_eq!(machine.calibrated(&train).error, machine.error);
        // The binary fractions of these runs are read as they were written.
        machine.runs = runs([2.0, 0.5, 3.0], 40);
        let text = machine.to_json().unwrap();
        assert_eq!(Machine::parse(&text).unwrap(), machine, "runs are kept");
        let calibrated = machine.calibrated(&train);
        assert_eq!(calibrated.error, 0.03);
        assert!(calibrated.runs.is_empty());
        let serve = machine.calibrated(&Goal::Serve { batch: 1, context: 1 });
        assert_eq!(serve, Machine { runs: Vec::new(), ..machine.clone() }, "runs of training only");
        let mut other = Machine { runs: vec![run(1.0, 1.0, 1.0, 100.0)], ..machine.clone() };
        assert!((other.calibrated(&train).error / 1.76 - 1.0).abs() < 1e-9, "the factors are at most 4");
        other.runs[0].seconds = 1e-9;
        assert_eq!(other.calibrated(&train).error, MOST_ERROR);
        let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.1, "{got} and {want}");
        let types = |machine: &Machine| machine.rates[0].types["bf16"].clone();
        near(types(&calibrated).products.peak, types(&machine).products.peak / 2.0);
        near(types(&calibrated).copies.peak, types(&machine).copies.peak * 2.0);
        near(calibrated.rates[0].launch, machine.rates[0].launch / 2.0);
        near(calibrated.node.latency, machine.node.latency * 3.0);
        near(calibrated.network.unwrap().bandwidth, machine.network.unwrap().bandwidth / 3.0);
    }

    #[test]
    fn runs_that_cannot_be_are_refused() {
        let mut machine = Machine::preset("h200").unwrap();
        machine.runs = vec![run(1.0, f64::NAN, 1.0, 1.0)];
        let error = machine.check().unwrap_err().to_string();
        assert_eq!(error, "machine: `runs: a step: predicted.memory` is NaN, but has to be at least 0");
        machine.runs = vec![run(1.0, 1.0, 1.0, 0.0)];
        assert!(machine.check().unwrap_err().to_string().contains("`runs: a step: seconds` is 0"));
        machine.runs = vec![run(0.0, 0.0, 0.0, 1.0)];
        assert!(machine.check().unwrap_err().to_string().contains("`runs: a step: predicted` is 0"));
    }
}
