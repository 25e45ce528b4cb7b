//! Plans that are read from files.

use super::{Plan, RankUse, bounds::at_least_0};
use crate::{
    error::{Error, Result, same_size},
    models,
};
use std::path::Path;

const OP: &str = "plan";

impl Plan {
    /// Reads and checks a plan from JSON, as `shardwise plan --save` and `serde_json` write it.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read. [`Error::Config`] when it is longer than 1 MiB
    /// or is not a plan, or when [`Plan::check`] fails.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bad = |reason: String| Error::Config { path: path.into(), reason };
        let text = models::config_text(path, "a plan")?;
        let plan: Self = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
        plan.check().map_err(|error| bad(error.to_string()))?;
        Ok(plan)
    }

    /// Checks that the plan can be run and shown.
    ///
    /// # Errors
    /// As [`Strategy::check`](super::Strategy::check). Also when the entries of `ranks` are not
    /// those of the schedule, a time or a share is not finite or less than 0, or a rank's memory
    /// overflows.
    pub fn check(&self) -> Result<()> {
        let strategy = &self.strategy;
        strategy.check()?;
        same_size(OP, "the number of `ranks`", self.ranks.len(), "`pipeline`", strategy.pipeline)?;
        if self.threads == 0 {
            return Err(Error::invalid(OP, "`threads` is 0, but has to be at least 1"));
        }
        for (at, rank) in self.ranks.iter().enumerate() {
            check_rank(rank, at, strategy.chunks)?;
        }
        for (what, value) in [
            ("seconds", self.seconds),
            ("error", self.error),
            ("tokens_per_second", self.tokens_per_second),
            ("prefill", self.prefill.unwrap_or_default()),
            ("bubble", self.bubble),
            ("exposed.tensor", self.exposed.tensor),
            ("exposed.data", self.exposed.data),
            ("exposed.pipeline", self.exposed.pipeline),
            ("exchange", self.exchange),
        ] {
            at_least_0(OP, what, value)?;
        }
        Ok(())
    }
}

fn check_rank(rank: &RankUse, at: usize, chunks: usize) -> Result<()> {
    same_size(OP, "`pipeline` of a rank", rank.pipeline, "its place in `ranks`", at)?;
    same_size(OP, "the number of `passes` of a rank", rank.passes.len(), "`chunks`", chunks)?;
    for passes in &rank.passes {
        at_least_0(OP, "forward", passes.forward)?;
        at_least_0(OP, "backward", passes.backward)?;
    }
    let memory = &rank.memory;
    let parts = [
        memory.weights,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.transients,
        memory.cache,
    ];
    match parts.into_iter().try_fold(0_u64, u64::checked_add) {
        Some(_) => Ok(()),
        None => Err(Error::invalid(OP, format!("the memory of pipeline rank {at} overflows: {parts:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Memory;

    fn plan() -> Plan {
        let two: Vec<Plan> = serde_json::from_str(include_str!("../../tests/data/plan/two.json")).unwrap();
        two.into_iter().next().unwrap()
    }

    #[test]
    fn a_written_plan_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.json");
        std::fs::write(&path, serde_json::to_string(&plan()).unwrap()).unwrap();
        assert_eq!(Plan::read(&path).unwrap(), plan());
        assert!(matches!(Plan::read(folder.path()), Err(Error::Io { .. })));
        for (text, words) in [("{}", "missing field"), ("[", "EOF"), ("", "EOF")] {
            std::fs::write(&path, text).unwrap();
            let Err(Error::Config { path: named, reason }) = Plan::read(&path) else { panic!("{text}") };
            assert!(named == path && reason.contains(words), "{reason}");
        }
        std::fs::write(&path, vec![b' '; (1 << 20) + 1]).unwrap();
        assert!(Plan::read(&path).unwrap_err().to_string().contains("more than 1048576 bytes"));
    }

    #[test]
    fn plans_that_cannot_be_run_are_refused() {
        let refused = |change: &dyn Fn(&mut Plan), words: &str| {
            let mut plan = plan();
            plan.check().unwrap();
            change(&mut plan);
            let error = plan.check().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        refused(&|plan| plan.strategy.tensor = 0, "has no ranks");
        refused(&|plan| plan.strategy.chunks = 0, "`chunks` is 0");
        refused(&|plan| plan.strategy.microbatches = 0, "`microbatches` is 0");
        refused(&|plan| plan.strategy.microbatches = usize::MAX, "more than 4194304 passes");
        refused(&|plan| plan.strategy.microbatches += 1, "multiple of the number of ranks");
        refused(&|plan| plan.ranks.truncate(1), "the number of `ranks` is 1, but `pipeline` is");
        refused(&|plan| plan.ranks.swap(0, 1), "its place in `ranks` is");
        refused(&|plan| plan.ranks[1].passes.truncate(1), "`passes` of a rank is 1, but `chunks` is 2");
        refused(&|plan| plan.ranks[0].passes[0].backward = f64::NAN, "`backward` is NaN");
        refused(&|plan| plan.threads = 0, "`threads` is 0");
        refused(&|plan| plan.seconds = f64::INFINITY, "`seconds` is inf");
        refused(&|plan| plan.prefill = Some(-1.0), "`prefill` is -1");
        refused(
            &|plan| plan.ranks[0].memory = Memory { weights: u64::MAX, cache: 1, ..Memory::default() },
            "memory of pipeline rank 0 overflows",
        );
    }
}
