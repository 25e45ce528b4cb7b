//! Counts of refused strategies.

use crate::plan::{Machine, Refusal, Strategy, text};
use std::collections::BTreeMap;

/// Why strategies were refused.
#[derive(Default)]
pub(super) struct Refusals {
    counts: BTreeMap<String, usize>,
    out_of_memory: usize,
    /// The strategy that needs the fewest bytes of those that need too many.
    nearest: Option<(u64, Strategy)>,
}

impl Refusals {
    /// Refuses the sizes of an axis beyond `most`, of those that the machine has ranks for.
    pub(super) fn beyond(&mut self, axis: &str, ranks: usize, most: usize, why: &str) {
        if ranks > most {
            let reason = format!("{axis} parallelism over more than {most} ranks: the {why} {most}");
            self.counts.insert(reason, ranks - most);
        }
    }

    /// Refuses a strategy that needs at least `bytes` bytes.
    pub(super) fn out_of_memory(&mut self, bytes: u64, strategy: &Strategy) {
        self.out_of_memory += 1;
        if self.nearest.is_none_or(|(least, _)| bytes < least) {
            self.nearest = Some((bytes, *strategy));
        }
    }

    /// Lists the reasons.
    pub(super) fn list(self, machine: &Machine) -> Vec<Refusal> {
        let mut all: Vec<_> =
            self.counts.into_iter().map(|(reason, count)| Refusal { count, reason }).collect();
        if let Some((bytes, strategy)) = self.nearest {
            let limit = machine.rank_memory(strategy.ranks()) as f64 * machine.tight;
            let (needed, limit) = (text::bytes(bytes), text::bytes(limit as u64));
            let reason = format!(
                "out of memory: {strategy}, which needs the least, holds at least {needed}, but a plan may hold {limit}"
            );
            all.push(Refusal { count: self.out_of_memory, reason });
        }
        all.sort_by_key(|refusal| std::cmp::Reverse(refusal.count));
        all
    }
}
