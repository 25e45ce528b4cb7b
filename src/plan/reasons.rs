//! Why one plan is better than another.

use super::{
    Plan, Verdict,
    text::{bytes, rate, time},
};

/// A part of a step's time.
struct Cause {
    /// The seconds by which the part is shorter than that of the other plan.
    saved: f64,
    /// A sentence with the numbers of both plans.
    sentence: String,
}

impl Plan {
    /// Compares this plan with another plan of the same job, in sentences: the time of a step, the
    /// part of it that differs most, and whether the difference is larger than the uncertainty.
    ///
    /// The parts are the bubble, the exposed communication of each axis, and computation. The
    /// difference in computation is divided into the number of ranks, recomputation, and the rate
    /// at which the ranks compute.
    pub fn why_over(&self, other: &Self) -> String {
        let what = if self.prefill.is_some() { "token of every sequence" } else { "step" };
        let (own, others) = (time(self.seconds), time(other.seconds));
        let mut sentences = vec![if own == others {
            format!("Both plans take {own} for a {what}.")
        } else {
            format!("It takes {own} for a {what} instead of {others}.")
        }];
        let main = self.causes(other).into_iter().max_by(|a, b| a.saved.total_cmp(&b.saved));
        // Differences of less than a thousandth are not worth a sentence.
        let main = main.filter(|cause| self.seconds < other.seconds && cause.saved > 1e-3 * self.seconds);
        let is_slower = main.is_none();
        sentences.extend(main.map(|cause| format!("The main difference: {}.", cause.sentence)));
        sentences.extend(self.memory_over(other, is_slower));
        let (difference, error) = (
            (self.seconds - other.seconds).abs() / self.seconds.min(other.seconds),
            self.error.max(other.error),
        );
        if difference <= error {
            sentences.push(format!(
                "The times differ by {:.1}%, which is within the uncertainty of {:.0}%: measure both.",
                100.0 * difference,
                100.0 * error
            ));
        }
        sentences.join(" ")
    }

    fn causes(&self, other: &Self) -> Vec<Cause> {
        let cause = |what: &str, of: &dyn Fn(&Self) -> f64| Cause {
            saved: of(other) - of(self),
            sentence: format!("{what} {} instead of {}", time(of(self)), time(of(other))),
        };
        let mut causes = vec![
            cause("pipeline ranks wait (bubble)", &Self::waiting),
            cause("collectives of tensor-parallel ranks take", &|plan| plan.exposed.tensor),
            cause("the reduction of gradients over replicas takes", &|plan| plan.exposed.data),
            cause("exchanges between pipeline ranks take", &|plan| plan.exposed.pipeline),
        ];
        // The other plan's computation with this plan's number of ranks, and then with its
        // operations.
        let (ranks, others) = (self.strategy.ranks(), other.strategy.ranks());
        let on_ranks = other.computing() * others as f64 / ranks as f64;
        causes.push(Cause {
            saved: other.computing() - on_ranks,
            sentence: format!("{ranks} ranks compute instead of {others}"),
        });
        let (recomputed, others) = (self.strategy.recomputed, other.strategy.recomputed);
        let with_operations = match recomputed == others {
            true => on_ranks,
            false => on_ranks * self.flops as f64 / other.flops as f64,
        };
        causes.push(Cause {
            saved: on_ranks - with_operations,
            sentence: format!("{recomputed} blocks recompute their forward instead of {others}"),
        });
        let of = |plan: &Self| rate(plan.flops as f64 / (plan.strategy.ranks() as f64 * plan.computing()));
        causes.push(Cause {
            saved: with_operations - self.computing(),
            sentence: format!("a rank computes {} instead of {}", of(self), of(other)),
        });
        causes
    }

    /// The seconds of a step in which the busiest pipeline rank waits.
    fn waiting(&self) -> f64 {
        self.bubble * self.seconds
    }

    /// The seconds of a step that are neither bubble nor exposed communication.
    fn computing(&self) -> f64 {
        let exposed = self.exposed.tensor + self.exposed.data + self.exposed.pipeline;
        (self.seconds - self.waiting() - exposed).max(0.0)
    }

    /// Compares the memory of the fullest ranks: whenever the verdicts differ, or on demand.
    fn memory_over(&self, other: &Self, asked: bool) -> Option<String> {
        let (own, others) = (self.peak(), other.peak());
        let numbers = format!("{} instead of {} on the fullest rank", bytes(own), bytes(others));
        match (self.verdict, other.verdict) {
            (own, others) if own != others => {
                let word = |verdict| match verdict {
                    Verdict::Fits => "fits",
                    Verdict::Tight => "is tight",
                    Verdict::OutOfMemory => "runs out of memory",
                };
                Some(format!("It {}, and the other {}: {numbers}.", word(own), word(others)))
            }
            _ if asked && own != others => Some(format!("It needs {numbers}.")),
            _ => None,
        }
    }

    /// The peak of the fullest rank's memory.
    fn peak(&self) -> u64 {
        self.ranks.iter().map(|rank| rank.memory.total()).max().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans() -> (Plan, Plan) {
        let two: Vec<Plan> = serde_json::from_str(include_str!("../../tests/data/plan/two.json")).unwrap();
        let [first, second] = two.try_into().unwrap();
        (first, second)
    }

    /// Returns the sentences for two plans that differ only by a change, which makes the second
    /// slower by `seconds`.
    fn slower(seconds: f64, change: &dyn Fn(&mut Plan)) -> String {
        let (first, _) = plans();
        let mut second = first.clone();
        second.seconds += seconds;
        // The bubble's seconds stay the same unless the change sets them.
        second.bubble *= first.seconds / second.seconds;
        change(&mut second);
        first.why_over(&second)
    }

    #[test]
    fn the_main_difference_is_named() {
        let (first, _) = plans();
        let cases: [(&dyn Fn(&mut Plan), &str); 7] = [
            (
                &|plan| plan.bubble = (0.2 + 1.0) / 3.0,
                "pipeline ranks wait (bubble) 200.00ms instead of 1.20s",
            ),
            (&|plan| plan.exposed.tensor += 1.0, "tensor-parallel ranks take 100.00ms instead of 1.10s"),
            (&|plan| plan.exposed.data += 1.0, "over replicas takes 50.00ms instead of 1.05s"),
            (&|plan| plan.exposed.pipeline += 1.0, "between pipeline ranks take 10.00ms instead of 1.01s"),
            (&|plan| plan.strategy.data = 1, "16 ranks compute instead of 8"),
            (
                &|plan| {
                    plan.strategy.recomputed = 4;
                    plan.flops = (plan.flops as f64 * 2.64 / 1.64) as u64;
                },
                "0 blocks recompute their forward instead of 4",
            ),
            (&|_| (), "a rank computes 100.0 TFLOP/s instead of 62.1 TFLOP/s"),
        ];
        assert!((first.computing() - 1.64).abs() < 1e-9);
        for (change, words) in cases {
            let why = slower(1.0, change);
            assert!(why.starts_with("It takes 2.00s for a step instead of 3.00s. The main"), "{why}");
            assert!(why.contains(words), "{why}");
            assert!(!why.contains("measure both"), "{why}");
        }
    }

    #[test]
    fn times_within_the_uncertainty_are_to_be_measured() {
        let why = slower(0.1, &|plan| plan.exposed.data += 0.1);
        assert!(
            why.ends_with("The times differ by 5.0%, which is within the uncertainty of 12%: measure both."),
            "{why}"
        );
        let why = slower(0.0, &|_| ());
        assert!(why.starts_with("Both plans take 2.00s for a step. The times differ by 0.0%"), "{why}");
        assert!(!slower(0.3, &|_| ()).contains("measure both"));
    }

    #[test]
    fn memory_is_compared_where_verdicts_differ_or_times_do_not() {
        let why = slower(1.0, &|plan| {
            plan.verdict = Verdict::Tight;
            plan.ranks[0].memory.cache = 10 << 30;
        });
        assert!(
            why.contains("It fits, and the other is tight: 53.5 GiB instead of 63.5 GiB on the"),
            "{why}"
        );
        let why = slower(0.0, &|plan| plan.ranks[0].memory.cache = 10 << 30);
        assert!(why.contains("It needs 53.5 GiB instead of 63.5 GiB on the fullest rank."), "{why}");
        assert!(!slower(1.0, &|plan| plan.ranks[0].memory.cache = 1).contains("GiB"));
    }
}
