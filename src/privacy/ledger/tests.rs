//! Tests of the ledger and its file.

use super::*;
use crate::{
    privacy::{epsilon, steps_within},
    shard::Shape,
    weights::write,
};
use std::{fs, time::Instant};

const BUDGET: Budget = Budget { epsilon: 3.0, delta: 1e-5 };

/// Makes a folder whose checkpoint has the id of a save, as an index has it.
fn checkpoint(folder: &Path, id: &str) {
    use crate::device::{AnyRef, Cpu};
    let file = "model-00001-of-00001.safetensors";
    let tensor = ("a".to_string(), Shape::new(&[1]), AnyRef::<Cpu>::F32(&[1.0]));
    write(folder.join(file), [tensor]).unwrap();
    let index = format!(r#"{{"metadata":{{"shardwise_save":"{id}"}},"weight_map":{{"a":"{file}"}}}}"#);
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
}

const SAVE: &str = "0123456789abcdef";

/// Returns a folder with a checkpoint and a ledger.
fn saved(key: &Secret) -> (tempfile::TempDir, Ledger) {
    let folder = tempfile::tempdir().unwrap();
    checkpoint(folder.path(), SAVE);
    let mut ledger = Ledger::new(BUDGET).unwrap();
    for (sigma, rate, steps) in [(1.0 / 3.0 + 1.0, 0.01, 40), (2.0, 1e-3, 3), (1e7, 1e-300, 2)] {
        (0..steps).for_each(|_| ledger.charge(sigma, rate).unwrap());
    }
    ledger.save(folder.path(), key).unwrap();
    (folder, ledger)
}

fn reason(outcome: Result<Ledger>) -> String {
    match outcome.unwrap_err() {
        Error::Checkpoint { path, reason } if path.ends_with(FILE) => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn what_would_exceed_the_budget_is_not_charged() {
    let mut ledger = Ledger::new(BUDGET).unwrap();
    let events = [(1.0, 0.02), (1.5, 0.05), (0.8, 0.01)];
    let refused = (0..).find_map(|at: usize| {
        let (sigma, rate) = events[at % events.len()];
        ledger.charge(sigma, rate).err().map(|error| (at, error))
    });
    let (count, error) = refused.unwrap();
    assert_eq!(ledger.steps(), count as u64);
    let all: Vec<_> = ledger.events().collect();
    assert_eq!(all.iter().map(|event| (event.sigma, event.rate)).collect::<Vec<_>>(), events);
    assert_eq!(Ok(ledger.spent()), epsilon(&all, BUDGET.delta));
    let mut more = all.clone();
    more[count % events.len()].steps += 1;
    let next = epsilon(&more, BUDGET.delta).unwrap().epsilon;
    let (spent, budget, delta) = (ledger.spent().epsilon, BUDGET.epsilon, BUDGET.delta);
    assert!(spent <= budget && next > budget, "{spent}, {next}");
    assert_eq!(error, Error::PrivacyBudget { spent, next, budget, delta });
    let text = error.to_string();
    assert!(
        text.contains(&format!("ε is {spent} at δ = 1e-5")) && text.contains("the budget is 3"),
        "{text}"
    );
    // Nothing of the refused steps stays, and a smaller step may still fit.
    assert!(ledger.charge(0.1, 0.5).is_err() && ledger.charge(0.0, 0.5).is_err());
    assert_eq!((ledger.steps(), ledger.events().collect::<Vec<_>>()), (count as u64, all.clone()));
    ledger.charge(100.0, 1e-4).unwrap();
    assert_eq!((ledger.steps(), ledger.events().count()), (count as u64 + 1, all.len() + 1));
    assert!(ledger.spent().epsilon >= spent);
}

#[test]
fn steps_are_those_that_the_accountant_allows() {
    let mut ledger = Ledger::new(BUDGET).unwrap();
    let most = steps_within(&BUDGET, 1.2, 0.03).unwrap();
    (0..most).for_each(|_| ledger.charge(1.2, 0.03).unwrap());
    assert!(most > 100 && ledger.charge(1.2, 0.03).is_err());
    assert_eq!((ledger.steps(), ledger.events().count()), (most, 1));
}

#[test]
fn lost_steps_are_charged_even_beyond_the_budget() {
    let mut ledger = Ledger::new(BUDGET).unwrap();
    ledger.charge(1.0, 0.01).unwrap();
    ledger.charge_lost(1.0, 0.01, 0).unwrap();
    ledger.charge_lost(1.0, 0.01, 100_000).unwrap();
    assert_eq!((ledger.steps(), ledger.events().count()), (100_001, 1));
    assert!(ledger.spent().epsilon > BUDGET.epsilon);
    assert!(matches!(ledger.charge(1.0, 0.01), Err(Error::PrivacyBudget { .. })));
    let before = ledger.spent();
    for (sigma, rate, steps) in
        [(f64::NAN, 0.1, 1), (1.0, 2.0, 1), (1.0, 0.1, u64::MAX), (1.0, 0.01, 1 << 53)]
    {
        assert!(matches!(ledger.charge_lost(sigma, rate, steps), Err(Error::Invalid { .. })));
    }
    assert_eq!((ledger.steps(), ledger.spent()), (100_001, before));
    assert!(matches!(ledger.charge(-1.0, 0.1), Err(Error::Invalid { .. })));
    assert!(Ledger::new(Budget { epsilon: 0.0, ..BUDGET }).is_err());
    assert!(Ledger::new(Budget { delta: 1.0, ..BUDGET }).is_err());
}

/// The limit is ten times that of a release build, for the machine's other work.
#[test]
fn a_charge_is_cheap() {
    let mut ledger = Ledger::new(Budget { epsilon: 1e9, ..BUDGET }).unwrap();
    (1..=10).for_each(|sigma| ledger.charge(f64::from(sigma), 0.01).unwrap());
    let start = Instant::now();
    (0..1000).for_each(|_| ledger.charge(5.0, 0.01).unwrap());
    let each = start.elapsed() / 1000;
    assert!(each.as_micros() < 200, "{each:?}");
    println!("a charge takes {each:?}");
}

#[test]
fn a_ledger_survives_its_file() {
    let key = Secret::from("key");
    let (folder, ledger) = saved(&key);
    let loaded = Ledger::load(folder.path(), &key, BUDGET).unwrap();
    assert!(loaded.events().eq(ledger.events()) && loaded.events().count() == 3);
    assert_eq!((loaded.spent(), loaded.steps()), (ledger.spent(), 45));
    // Another budget has another δ.
    let other = Budget { epsilon: 1.0, delta: 1e-9 };
    let loaded = Ledger::load(folder.path(), &key, other).unwrap();
    assert_eq!((loaded.budget(), loaded.spent().delta), (other, 1e-9));
    // The second save replaces the first.
    let mut more = loaded;
    more.charge_lost(1.0, 0.5, 1).unwrap();
    more.save(folder.path(), &key).unwrap();
    assert_eq!(Ledger::load(folder.path(), &key, BUDGET).unwrap().steps(), 46);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3, "no temporary file stays");
}

#[test]
fn every_change_of_the_file_is_noticed() {
    let key = Secret::from("key");
    let (folder, _) = saved(&key);
    let content = fs::read(folder.path().join(FILE)).unwrap();
    assert!(file::parse(&content, SAVE, &key).is_ok());
    for at in 0..content.len() {
        for change in (0..8).map(|bit| 1 << bit).chain([0x7f, 0xff]) {
            let mut changed = content.clone();
            changed[at] ^= change;
            assert!(file::parse(&changed, SAVE, &key).is_err(), "byte {at} ^ {change}");
        }
        let mut shorter = content.clone();
        shorter.remove(at);
        assert!(file::parse(&shorter, SAVE, &key).is_err(), "without byte {at}");
        assert!(file::parse(&content[..at], SAVE, &key).is_err(), "the first {at} bytes");
        for byte in *b" \n0" {
            let mut longer = content.clone();
            longer.insert(at, byte);
            assert!(file::parse(&longer, SAVE, &key).is_err(), "with {byte} before {at}");
        }
    }
    let longer = [&content[..], b"\n"].concat();
    assert!(file::parse(&longer, SAVE, &key).is_err());
}

#[test]
fn a_ledger_that_does_not_fit_says_why() {
    let key = Secret::from("key");
    let (folder, _) = saved(&key);
    let path = folder.path().join(FILE);
    let content = fs::read_to_string(&path).unwrap();
    let load = || reason(Ledger::load(folder.path(), &key, BUDGET));
    let contains = |text: String, part: &str| assert!(text.contains(part), "{text}");

    let other_key = Secret::from("other key");
    contains(reason(Ledger::load(folder.path(), &other_key, BUDGET)), "the key is another one");
    fs::write(&path, content.replacen("1.333", "1.334", 1)).unwrap();
    contains(load(), "the HMAC of the privacy ledger is wrong");
    fs::write(&path, content.replacen("\"version\":1", "\"version\":2", 1)).unwrap();
    contains(load(), "has version 2, but only 1 is known");
    fs::write(&path, "{}").unwrap();
    contains(load(), "has no version");
    fs::write(&path, r#"{"version":1}"#).unwrap();
    contains(load(), "does not end with an HMAC");
    fs::write(&path, "").unwrap();
    contains(load(), "is no JSON");
    fs::write(&path, vec![b' '; file::MOST + 1]).unwrap();
    contains(load(), "16777217 bytes");
    fs::remove_file(&path).unwrap();
    contains(load(), "there is no privacy ledger");

    // The ledger of an earlier save of the same folder.
    fs::write(&path, &content).unwrap();
    checkpoint(folder.path(), "fedcba9876543210");
    contains(load(), "belongs to save 0123456789abcdef, but the checkpoint is of save fedcba9876543210");
    checkpoint(folder.path(), "");
    assert!(
        Ledger::load(folder.path(), &key, BUDGET)
            .unwrap_err()
            .to_string()
            .contains("no checkpoint with the id")
    );
    let error = Ledger::new(BUDGET).unwrap().save(folder.path(), &key).unwrap_err();
    assert!(error.to_string().contains("no checkpoint with the id"), "{error}");
    for outcome in [
        Ledger::load(folder.path(), &Secret::default(), BUDGET).map(drop),
        Ledger::new(BUDGET).unwrap().save(folder.path(), &Secret::default()),
    ] {
        assert!(outcome.unwrap_err().to_string().contains("the key is empty"));
    }
}

/// What has the right HMAC is checked all the same.
#[test]
fn numbers_of_an_authentic_file_are_checked() {
    let key = Secret::from("key");
    let (folder, _) = saved(&key);
    let good = Event { sigma: 1.5, rate: 0.25, steps: 7 };
    let load = |event: Event| {
        let content = file::content(SAVE, [event].into_iter(), &key);
        fs::write(folder.path().join(FILE), content).unwrap();
        Ledger::load(folder.path(), &key, BUDGET)
    };
    assert_eq!(load(good).unwrap().events().collect::<Vec<_>>(), [good]);
    for (event, part) in [
        (Event { sigma: f64::NAN, ..good }, "`sigma` of an event is \"NaN\", which is no finite number"),
        (Event { rate: f64::INFINITY, ..good }, "`rate` of an event is \"inf\", which is no finite number"),
        (Event { sigma: -1.5, ..good }, "σ is -1.5"),
        (Event { rate: 1.5, ..good }, "the sampling rate is 1.5"),
        (Event { steps: u64::MAX, ..good }, "18446744073709551615 steps"),
    ] {
        let text = reason(load(event));
        assert!(text.contains(part), "{text}");
    }
}
