//! Audit logs of jobs: what they have, what they do not have, and that they verify.

use crate::{
    access::layer,
    dev::{Tensor, ranks},
    support::say,
};
use serde_json::Value;
use shardwise::{
    Error, Result,
    comm::ReduceOp,
    launch::Threads,
    parallel::Layer,
    security::{
        Role::{Checkpointer, Trainer},
        audit::{self, Event, Verdict},
    },
    train::DataParallel,
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
            if let Some(files) = saved.as_array() {
                let [file] = files.as_slice() else { panic!("{saved}") };
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
    let outcomes = ranks(3).audit(folder.path()).run_each(|group| {
        let layer = layer(&group)?;
        for param in layer.params() {
            param.set(Tensor::full(group.device(), param.shape(), CANARY)?)?;
        }
        let _ = group.all_reduce(ReduceOp::Sum, &mut layer.params()[0].value()?);
        match group.rank() {
            1 => panic!("the loss is {CANARY}"),
            2 => Err(Error::invalid("loss", format!("the loss is {CANARY}"))),
            _ => group.barrier(),
        }
    });
    assert!(outcomes.unwrap().iter().all(Result::is_err));
    let logs = logs(folder.path());
    assert_eq!(logs[&1].last().unwrap()["fields"]["result"], "panicked");
    assert_eq!(logs[&2].last().unwrap()["fields"]["error"], "loss: invalid");
    let end = &logs[&0].last().unwrap()["fields"];
    assert_eq!(end["result"], "failed");
    let lost = end["error"].as_str().unwrap();
    assert!(lost.contains(" was lost (it "), "{end}");
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

/// If one rank works on for longer than the deadline after the others have ended, nobody witnesses
/// its end. The ranks have not failed.
#[test]
fn ranks_that_end_far_apart_do_not_fail() {
    let folder = tempfile::tempdir().unwrap();
    let job = ranks(2).deadline(Duration::from_millis(200)).audit(folder.path());
    let outcomes = job.run_each(|group| {
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_millis(700));
        }
        Ok(group.rank())
    });
    assert_eq!(outcomes.unwrap(), [Ok(0), Ok(1)]);
    assert_eq!(verdict(folder.path()), Verdict::Incomplete);
}

/// A log does not change what a job reports.
#[test]
fn a_job_reports_with_logs_what_it_reports_without() {
    type Act = fn(&shardwise::comm::Group<crate::dev::Dev>) -> Result<()>;
    let acts: [(&str, Act); 3] = [
        ("never received a message", |group| {
            let (all, x) = (group.split_all(0)?, Tensor::<f32>::zeros(group.device(), [1])?);
            if group.rank() == 0 {
                group.exchange(Some((1, &x)), None)?;
            }
            // Rank 1 has not left before rank 0 sends.
            all.barrier()
        }),
        ("was lost (it left the group)", |group| if group.rank() == 0 { Ok(()) } else { group.barrier() }),
        ("was lost (it returned an error)", |group| {
            if group.rank() == 0 { Err(Error::invalid("act", "fails")) } else { group.barrier() }
        }),
    ];
    for (words, act) in acts {
        let folder = tempfile::tempdir().unwrap();
        for (at, job) in [ranks(2), ranks(2).audit(folder.path())].into_iter().enumerate() {
            let outcomes = job.run_each(|group| act(&group)).unwrap();
            let reported = outcomes[1].as_ref().is_err_and(|error| error.to_string().contains(words));
            assert!(reported, "{words}, job {at}: {outcomes:?}");
            assert_eq!(outcomes[0].is_err(), words.contains("error"), "{outcomes:?}");
        }
    }
}

/// Replicas may be sent in every step, and no rank sees another weight than its own.
#[test]
fn replicas_are_not_logged() {
    let folder = tempfile::tempdir().unwrap();
    let job = ranks(2).audit(folder.path()).run(|group| {
        let layer = layer(&shardwise::comm::Group::solo(group.device()))?;
        DataParallel::central(&group, &layer.params(), 0)?.publish()
    });
    job.unwrap();
    for lines in logs(folder.path()).values() {
        assert_eq!(events(lines), ["start", "join", "witness", "end", "witness"]);
    }
}

/// A job within a rank does not write to the rank's log.
#[test]
fn a_job_within_a_job_has_its_own_log_or_none() {
    let [outer, inner] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let job = ranks(1).audit(outer.path()).run(|_| {
        for job in [Threads::new(1), Threads::new(1).audit(inner.path())] {
            job.run(|_| audit::record(&Event::new("within")))?;
        }
        audit::record(&Event::new("outside"))
    });
    job.unwrap();
    let of = |folder: &Path| events(&logs(folder)[&0]).join(" ");
    assert_eq!(of(outer.path()), "start join witness outside end witness");
    assert_eq!(of(inner.path()), "start join witness within end witness");
}

#[test]
fn roles_are_those_of_ranks() {
    for (roles, words) in [
        (vec![Trainer], "the number of roles is 1, but the number of ranks is 2"),
        (vec![Checkpointer, shardwise::security::Role::Auditor], "rank 1 has the role `auditor`"),
    ] {
        let error = Threads::new(2).roles(roles).run(|_| Ok(())).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// Other threads of the process have no log.
#[test]
fn events_are_those_of_the_ranks_thread() {
    let folder = tempfile::tempdir().unwrap();
    let event = || Event::new("data_set").flag("here", true);
    let job = Threads::new(1).audit(folder.path()).run(|_| {
        audit::record(&event())?;
        std::thread::scope(|scope| scope.spawn(|| audit::record(&event())).join().unwrap())
    });
    job.unwrap();
    let lines = logs(folder.path()).remove(&0).unwrap();
    assert_eq!(events(&lines).iter().filter(|event| **event == "data_set").count(), 1);
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
