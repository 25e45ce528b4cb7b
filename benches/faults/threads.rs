//! Faults on thread ranks.

use crate::trial::{MOMENTS, OPS, Trial};
use shardwise::{
    Error,
    launch::Threads,
    trace::{Record, blame},
};
use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

const FAULTS: [&str; 3] = ["panic", "return", "error"];
/// One of every ten trials writes flight records, which must name the lost rank. The bench does not
/// count the times of these trials, because they write files.
const RECORDED: u64 = 10;

/// Injects faults. Returns an error if a surviving rank did not receive the lost rank's number.
pub(crate) fn campaign(trials: u64, seed: u64, limits: bool) -> Result<(), Box<dyn std::error::Error>> {
    let mut times = Vec::new();
    let mut wrong = Vec::new();
    let mut kinds: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut recorded, mut blamed) = (0, 0);
    let start = Instant::now();
    for number in 0..trials {
        let trial = Trial::random(seed, number, usize::MAX);
        let fault = trial.fault % FAULTS.len();
        let injected = Mutex::new(None);
        let inject = || {
            *injected.lock().unwrap_or_else(|poison| poison.into_inner()) = Some(Instant::now());
            match fault {
                0 => panic!("injected"),
                1 => Ok(true),
                _ => Err(Error::Invalid { op: "campaign", reason: "injected".into() }),
            }
        };
        let folder = number.is_multiple_of(RECORDED).then(tempfile::tempdir).transpose()?;
        let mut threads = Threads::new(trial.ranks).deadline(Duration::from_secs(10));
        if let Some(folder) = &folder {
            threads = threads.flight(folder.path());
        }
        let outcomes = threads.run_each(|world| {
            let outcome = trial.run(&world, inject);
            // The lost rank fails here. Only the outcomes of the other ranks are checked below.
            if world.rank() == trial.culprit && outcome.is_err() {
                return Err(Error::Invalid { op: "campaign", reason: "injected".into() });
            }
            Ok((outcome, Instant::now()))
        })?;
        let injected = injected
            .into_inner()
            .unwrap_or_else(|poison| poison.into_inner())
            .ok_or("no fault was injected")?;
        let text = format!(
            "trial {number}: rank {} of {} was lost {} {} by {}",
            trial.culprit, trial.ranks, MOMENTS[trial.moment], OPS[trial.op], FAULTS[fault]
        );
        for (rank, outcome) in outcomes.into_iter().enumerate().filter(|(rank, _)| *rank != trial.culprit) {
            let at = match outcome {
                Ok((Err(Error::PeerLost { rank: named, .. }), at)) if named == trial.culprit => at,
                // In a group that `split` made, rank r of the world has number r / 2.
                Ok((Err(Error::PeerLost { rank: named, group, .. }), at))
                    if group != "world" && named == trial.culprit / 2 && rank % 2 == trial.culprit % 2 =>
                {
                    at
                }
                other => {
                    wrong.push(format!("{text}, and rank {rank} received {other:?}"));
                    continue;
                }
            };
            if folder.is_none() {
                times.push(at.saturating_duration_since(injected));
            }
        }
        if let Some(folder) = folder {
            recorded += 1;
            let verdict = blame(&Record::read_all([folder.path()])?);
            if verdict.ranks == [trial.culprit] {
                blamed += 1;
            } else {
                println!("{text}, and the records say: {verdict}");
            }
        }
        *kinds.entry(OPS[trial.op]).or_default() += 1;
    }
    times.sort_unstable();
    let quantile = |part: f64| {
        times.get((part * times.len() as f64) as usize).or(times.last()).copied().unwrap_or_default()
    };
    println!("threads: {trials} faults in {:.1?}, {} survivors timed", start.elapsed(), times.len());
    println!("faults by collective: {kinds:?}");
    println!(
        "from the fault to the error: median {:.0?}, p99 {:.0?}, largest {:.0?}",
        quantile(0.5),
        quantile(0.99),
        quantile(1.0)
    );
    println!("wrong or missing names: {}", wrong.len());
    wrong.iter().take(10).for_each(|line| println!("{line}"));
    println!("named by the records: {blamed} of {recorded}");
    if !wrong.is_empty() {
        return Err("a survivor did not receive the number of the lost rank".into());
    }
    if limits && quantile(0.99) > crate::LIMIT {
        return Err("survivors received the error late".into());
    }
    if blamed * 100 < recorded * 99 {
        return Err("the records name the wrong rank too often".into());
    }
    Ok(())
}
