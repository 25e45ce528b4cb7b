//! Audit logs of jobs: what they have, what they do not have, and that they verify.

use crate::{
    dev::{Tensor, ranks},
    support::say,
};
use serde_json::Value;
use shardwise::{
    Error, Result,
    comm::{Group, ReduceOp},
    launch::Threads,
    parallel::{Bias, ColumnLinear, Columns, Layer},
    security::{
        Role::{Checkpointer, Trainer},
        audit::{self, Event, Verdict},
    },
    tensor::{Random, Weights},
    weights::{self, Checkpoint},
};
use std::{collections::BTreeMap, fs, path::Path, time::Duration};

/// The lines of each rank.
fn logs(folder: &Path) -> BTreeMap<u64, Vec<Value>> {
    let mut logs = BTreeMap::new();
    for file in fs::read_dir(folder).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert!(logs.insert(lines[0]["rank"].as_u64().unwrap(), lines).is_none());
    }
    logs
}

fn events(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["event"].as_str().unwrap()).collect()
}

fn verdict(folder: &Path) -> Verdict {
    let report = audit::verify([folder]).unwrap();
    say(&report.to_string());
    report.verdict()
}

fn layer(group: &Group<crate::dev::Dev>) -> Result<ColumnLinear<f32, crate::dev::Dev>> {
    let source = Random::normal(5, 0.5);
    ColumnLinear::load(group, &Weights::new(&source).at("fc"), 4, &Columns::even(group, 7)?, Bias::Add)
}

#[test]
fn a_job_writes_logs_that_verify() {
    for world in [1, 2, 3, 5] {
        let folder = tempfile::tempdir().unwrap();
        let (log, model) = (folder.path().join("audit"), folder.path().join("model"));
        let roles = (0..world).map(|rank| if rank == world - 1 { Checkpointer } else { Trainer });
        let job = ranks(world).roles(roles).audit(&log);
        job.run(|group| {
            let layer = layer(&group)?;
            audit::record(&Event::new("data_set").text("sha256", "9f86d081").number("rows", 7))?;
            weights::save(&group, &layer.params(), &model)?;
            Checkpoint::open(&model)?;
            group.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::full(group.device(), [3], 1234.5678)?)?;
            group.split_all(group.rank() as u64 % 2)?.witness()?;
            let denied = group.all_reduce(ReduceOp::Sum, &mut layer.params()[0].value()?);
            assert_eq!(matches!(denied, Err(Error::NotPermitted { .. })), world > 1);
            Ok(())
        })
        .unwrap();
        assert_eq!(verdict(&log), Verdict::Intact);
        let logs = logs(&log);
        assert_eq!(logs.len(), world);
        for (&rank, lines) in &logs {
            let mut want = vec!["start", "join", "witness", "data_set", "gather", "save", "witness"];
            want.extend(["load", "witness", "deny", "end", "witness"]);
            if world == 1 {
                want.retain(|event| *event != "deny");
            }
            assert_eq!(events(lines), want, "rank {rank} of {world}");
            let fields = |event: &str| &lines.iter().find(|line| line["event"] == event).unwrap()["fields"];
            assert_eq!(fields("start")["world"], world);
            assert_eq!(fields("data_set")["rows"], 7);
            assert_eq!(fields("gather")["op"], "save");
            assert_eq!(fields("end")["result"], "ok");
            let heads = lines.last().unwrap()["fields"]["heads"].as_array().unwrap();
            assert_eq!(heads.len(), world);
            // Only the rank that writes knows the files.
            let saved = &fields("save")["files"];
            assert_eq!(saved.is_array(), rank == world as u64 - 1, "{saved}");
            if let Some([file]) = saved.as_array().map(Vec::as_slice) {
                use sha2::{Digest, Sha256};
                let bytes = fs::read(model.join("model.safetensors")).unwrap();
                let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(file["sha256"], hash);
                assert_eq!(fields("load")["files"][0]["bytes"], bytes.len());
            }
        }
    }
}

/// No event has a value of a tensor.
#[test]
fn logs_have_no_values() {
    let folder = tempfile::tempdir().unwrap();
    const CANARY: f64 = 73.515625;
    let outcomes = ranks(2).audit(folder.path()).run_each(|group| {
        let layer = layer(&group)?;
        for param in layer.params() {
            param.set(Tensor::full(group.device(), param.shape(), CANARY)?)?;
        }
        let _ = group.all_reduce(ReduceOp::Sum, &mut layer.params()[0].value()?);
        if group.rank() == 1 {
            panic!("the loss is {CANARY}");
        }
        group.barrier()
    });
    assert!(outcomes.unwrap().iter().all(Result::is_err));
    let logs = logs(folder.path());
    assert_eq!(logs[&1].last().unwrap()["fields"]["result"], "panicked");
    let end = &logs[&0].last().unwrap()["fields"];
    assert_eq!(end["result"], "failed");
    assert!(end["error"].as_str().unwrap().contains("rank 1 was lost (it panicked)"), "{end}");
    assert!(events(&logs[&0]).contains(&"deny"));
    for file in fs::read_dir(folder.path()).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        assert!(!text.contains("73.5") && !text.contains("515625"), "{text}");
    }
    // The ranks that failed have witnessed nothing after the start.
    assert_eq!(verdict(folder.path()), Verdict::Incomplete);
}

#[test]
fn a_log_that_cannot_be_written_is_an_error_on_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let job = || ranks(3).deadline(Duration::from_secs(5));
    for outcome in job().audit(&file).run_each(|_| Ok(())).unwrap() {
        let Err(Error::Io { path, .. }) = outcome else { panic!("{outcome:?}") };
        assert_eq!(path, file);
    }
}

#[test]
fn a_job_without_logs_writes_none() {
    assert!(audit::record(&Event::new("data_set")).is_ok());
    for name in ["end", "save", "Data", ""] {
        assert!(audit::record(&Event::new(name)).is_err(), "{name}");
    }
    let moved = Threads::new(2).run(|group| {
        let (own, log) = group.recorded();
        own.witness()?;
        Ok(log.take().len())
    });
    assert_eq!(moved.unwrap(), [0, 0]);
}
