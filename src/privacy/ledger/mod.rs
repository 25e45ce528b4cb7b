//! The ledger of a run: what its steps have spent of the privacy budget.

mod file;
#[cfg(test)]
mod tests;

use super::accountant::{Budget, Conversion, Epsilon, Event};
use crate::{
    error::{Error, Result},
    security::Secret,
    weights::attached,
};
use std::{fmt, path::Path};

const OP: &str = "privacy ledger";
/// The name of the ledger's file in the folder of a checkpoint.
const FILE: &str = "privacy.json";

/// The steps of a run, and the budget that they must not exceed.
///
/// [`Ledger::charge`] is called before each step, and refuses the step that would exceed the
/// budget. A checkpoint without its ledger would let a run spend the budget again. So save both,
/// and load both.
///
/// ```
/// use shardwise::{Error, privacy::{Budget, Ledger}};
/// let mut ledger = Ledger::new(Budget { epsilon: 2.0, delta: 1e-5 })?;
/// let refused = loop {
///     // A step of training follows each charge.
///     if let Err(error) = ledger.charge(1.0, 0.01) {
///         break error;
///     }
/// };
/// let Error::PrivacyBudget { spent, next, .. } = refused else { panic!("{refused}") };
/// assert!(spent <= 2.0 && next > 2.0);
/// assert_eq!(ledger.steps(), 881);
/// # Ok::<(), shardwise::Error>(())
/// ```
pub struct Ledger {
    budget: Budget,
    conversion: Conversion,
    /// No two have the same σ and rate.
    charges: Vec<Charge>,
    spent: Epsilon,
}

struct Charge {
    event: Event,
    /// ε(α) of one step at each order.
    renyi: Vec<f64>,
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ledger({} steps, {}; {:?})", self.steps(), self.spent, self.budget)
    }
}

impl Ledger {
    /// Returns a ledger without steps.
    ///
    /// # Errors
    /// When the budget's ε is not positive, or its δ is not in (0, 1).
    pub fn new(budget: Budget) -> Result<Self> {
        budget.check()?;
        let conversion = Conversion::new(budget.delta)?;
        let spent = conversion.epsilon([]);
        Ok(Self { budget, conversion, charges: Vec::new(), spent })
    }

    /// Charges one step. Call it before the step.
    ///
    /// # Errors
    /// [`Error::PrivacyBudget`] when ε would exceed the budget; then nothing is charged. When σ is
    /// negative or not finite, or the rate is not in [0, 1].
    pub fn charge(&mut self, sigma: f64, rate: f64) -> Result<()> {
        let at = self.find(&Event { sigma, rate, steps: 1 })?;
        let next = self.with(at, 1)?;
        if next.epsilon > self.budget.epsilon {
            return Err(Error::PrivacyBudget {
                spent: self.spent.epsilon,
                next: next.epsilon,
                budget: self.budget.epsilon,
                delta: self.budget.delta,
            });
        }
        self.add(at, 1, next);
        Ok(())
    }

    /// Charges the steps that a run made after its last checkpoint before it crashed. What they
    /// released may have been seen, so they are charged even if they exceed the budget: then the
    /// next [`Ledger::charge`] is refused.
    ///
    /// # Errors
    /// When σ is negative or not finite, the rate is not in [0, 1], or there are more than 2⁵³
    /// steps.
    pub fn charge_lost(&mut self, sigma: f64, rate: f64, steps: u64) -> Result<()> {
        let at = self.find(&Event { sigma, rate, steps })?;
        if steps > 0 {
            let next = self.with(at, steps)?;
            self.add(at, steps, next);
        }
        Ok(())
    }

    /// Returns the index of the charge with the event's σ and rate. If there is none, adds one
    /// without steps, which changes nothing.
    fn find(&mut self, event: &Event) -> Result<usize> {
        event.check()?;
        let is_same = |other: &Event| (other.sigma, other.rate) == (event.sigma, event.rate);
        if let Some(at) = self.charges.iter().position(|charge| is_same(&charge.event)) {
            return Ok(at);
        }
        // A refused event must not stay for ever.
        self.charges.retain(|charge| charge.event.steps > 0);
        self.charges.push(Charge { event: Event { steps: 0, ..*event }, renyi: event.renyi() });
        Ok(self.charges.len() - 1)
    }

    /// Returns the privacy loss with `more` steps of charge `at`.
    fn with(&self, at: usize, more: u64) -> Result<Epsilon> {
        Event { steps: self.steps().saturating_add(more), ..self.charges[at].event }.check()?;
        let charges = self.charges.iter().enumerate().map(|(index, charge)| {
            let added = if index == at { more } else { 0 };
            (charge.event.steps + added, charge.renyi.as_slice())
        });
        Ok(self.conversion.epsilon(charges))
    }

    fn add(&mut self, at: usize, steps: u64, spent: Epsilon) {
        self.charges[at].event.steps += steps;
        self.spent = spent;
    }

    /// Returns the privacy loss of all steps.
    pub fn spent(&self) -> Epsilon {
        self.spent
    }

    /// Returns the number of all steps.
    pub fn steps(&self) -> u64 {
        self.charges.iter().map(|charge| charge.event.steps).sum()
    }

    /// Returns the budget.
    pub fn budget(&self) -> Budget {
        self.budget
    }

    /// Returns the steps by σ and rate, in the order of their first charge.
    pub fn events(&self) -> impl Iterator<Item = Event> {
        self.charges.iter().map(|charge| charge.event).filter(|event| event.steps > 0)
    }

    /// Writes the ledger to `privacy.json` in the folder of a checkpoint. Call it on one rank,
    /// after the checkpoint was saved. An older ledger is replaced at once.
    ///
    /// The file names the save that wrote the checkpoint, and ends with an HMAC-SHA256 by `key`. So
    /// nobody without the key can change the ledger, or use that of another save. Anybody who can
    /// write the folder can still replace all of it by an older copy. If the process is killed
    /// between the two saves, the folder has no ledger that fits: continue from an older
    /// checkpoint, with [`Ledger::charge_lost`].
    ///
    /// ```
    /// use shardwise::{launch, privacy::{Budget, Ledger}, security::Secret};
    /// use shardwise::{prelude::*, weights::Save};
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let folder = folder.path();
    /// let (key, budget) = (Secret::from("f3a9…"), Budget { epsilon: 8.0, delta: 1e-5 });
    /// launch::threads(1, |world| {
    ///     Save::new(folder).config("{}").write::<f32, _>(&world, &[])
    /// })?;
    /// let mut ledger = Ledger::new(budget)?;
    /// ledger.charge(1.5, 0.04)?;
    /// ledger.save(folder, &key)?;
    /// let mut ledger = Ledger::load(folder, &key, budget)?;
    /// ledger.charge_lost(1.5, 0.04, 10)?;
    /// assert_eq!(ledger.steps(), 11);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the key is empty; when the folder has no checkpoint of this crate, or one without the
    /// id of a save, as a single file without a configuration; when the file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>, key: &Secret) -> Result<()> {
        let folder = folder.as_ref();
        check_key(key)?;
        let save = attached::save_of(folder)?;
        attached::replace(folder, FILE, file::content(&save, self.events(), key).as_bytes())
    }

    /// Reads the ledger of a checkpoint, which [`Ledger::save`] wrote with the same key. The budget
    /// may be another one than before.
    ///
    /// # Errors
    /// When the key is empty or the budget is none ([`Ledger::new`]). [`Error::Checkpoint`] when
    /// there is no ledger, it was changed or has another key, it is that of another save, or its
    /// version is unknown. When the folder has no checkpoint.
    pub fn load(folder: impl AsRef<Path>, key: &Secret, budget: Budget) -> Result<Self> {
        let folder = folder.as_ref();
        check_key(key)?;
        let mut ledger = Self::new(budget)?;
        let bad = |reason: String| Error::Checkpoint { path: folder.join(FILE), reason };
        let content = attached::read(folder, FILE, file::MOST)?;
        let content = content.ok_or_else(|| {
            bad("there is no privacy ledger, so what the checkpoint has spent is not known".into())
        })?;
        let events = file::parse(&content, &attached::save_of(folder)?, key).map_err(bad)?;
        for event in events {
            ledger
                .charge_lost(event.sigma, event.rate, event.steps)
                .map_err(|error| bad(error.to_string()))?;
        }
        Ok(ledger)
    }
}

fn check_key(key: &Secret) -> Result<()> {
    if key.is_empty() {
        Err(Error::invalid(OP, "the key is empty, so anybody could change the ledger"))
    } else {
        Ok(())
    }
}
