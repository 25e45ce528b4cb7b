//! A run that is stopped and resumed from a checkpoint: the budget goes on, and no noise is used
//! twice.

use crate::models::*;
use shardwise::{prelude::*, privacy::*, security::Secret};
use std::path::Path;

const SAMPLES: usize = 6;
const MECHANISM: DpSgd = DpSgd { samples: SAMPLES, rate: 1.0, clip: 1.0, noise: 4.0, loss_scale: 1.0 };
const BUDGET: Budget = Budget { epsilon: 6.0, delta: 1e-5 };

fn secret() -> Secret {
    Secret::from("the key of the ledgers of this job")
}

/// Runs up to `steps` steps, from a checkpoint if there is one, and saves. Returns how many steps
/// ran, the budget that was spent, and the released gradient of the first step, from the same
/// weights and samples in every run.
fn run(folder: &Path, steps: u64, resume: bool) -> Result<(u64, Epsilon, Vec<f64>)> {
    let ranks = launch::threads(2, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        let tensor = mesh.group(Axis::Tensor);
        let model = classifier::<f64>(tensor)?;
        let params = model.params();
        let ledger = if resume { Ledger::load(folder, &secret(), BUDGET)? } else { Ledger::new(BUDGET)? };
        let mut private = Private::new(&mesh, [params.clone()], MECHANISM, RunKey::agree(&world)?, ledger)?;
        let (mut done, mut first) = (0, Vec::new());
        while done < steps {
            let mut step = match private.begin() {
                Ok(step) => step,
                Err(Error::PrivacyBudget { .. }) => break,
                Err(error) => return Err(error),
            };
            backward(&model, tensor, &[0, 1, 2, 3, 4, 5], 0)?;
            step.clip(SAMPLES)?;
            step.release(None)?;
            if done == 0 {
                first = gradients(tensor, &params)?;
            }
            done += 1;
        }
        weights::Save::new(folder).config("{}").write(tensor, &params)?;
        if world.rank() == 0 {
            private.ledger().save(folder, &secret())?;
        }
        world.barrier()?;
        Ok((done, private.spent()?, first))
    })?;
    assert_eq!(ranks[0], ranks[1]);
    Ok(ranks[0].clone())
}

#[test]
fn a_resumed_run_goes_on_with_its_budget_and_with_other_noise() -> Result<()> {
    let whole = tempfile::tempdir().expect("a folder");
    let (all, spent, _) = run(whole.path(), 1000, false)?;
    assert!((5..200).contains(&all), "{all} steps fit into the budget");

    let folder = tempfile::tempdir().expect("a folder");
    let (first, of_first, noise) = run(folder.path(), 3, false)?;
    assert_eq!(first, 3);
    let (second, of_second, other) = run(folder.path(), 1000, true)?;
    assert_eq!(first + second, all, "the resumed run has another budget");
    assert_eq!(of_second, spent);
    assert!(of_first.epsilon < of_second.epsilon && of_second.epsilon <= BUDGET.epsilon);
    // The sums are the same, so equal noise would give equal gradients.
    let equal = noise.iter().zip(&other).filter(|(a, b)| a == b).count();
    assert_eq!(equal, 0, "{equal} elements of {} have the same noise", noise.len());
    assert!(noise.len() > 50);

    let (third, ..) = run(folder.path(), 1000, true)?;
    assert_eq!(third, 0);
    Ok(())
}

#[test]
fn a_checkpoint_without_its_ledger_is_not_resumed() -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    run(folder.path(), 2, false)?;
    let ledger = folder.path().join("privacy.json");
    let text = std::fs::read(&ledger).expect("the ledger");
    std::fs::remove_file(&ledger).expect("to remove it");
    let error = run(folder.path(), 2, true).unwrap_err().to_string();
    assert!(error.contains("there is no privacy ledger"), "{error}");
    // The ledger of an earlier save does not fit a later checkpoint.
    run(folder.path(), 3, false)?;
    let newer = std::fs::read(&ledger).expect("the ledger");
    assert_ne!(text, newer);
    std::fs::write(&ledger, text).expect("to write it");
    let error = run(folder.path(), 2, true).unwrap_err().to_string();
    assert!(error.contains("the privacy ledger belongs to save"), "{error}");
    std::fs::write(&ledger, newer).expect("to write it");
    run(folder.path(), 1, true).map(drop)
}
