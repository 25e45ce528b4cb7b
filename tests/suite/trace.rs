//! The records of ranks, what readers derive from the records, and which rank is blamed.

use proptest::{collection::vec, prelude::*};
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    kernels::Activation,
    launch::Threads,
    parallel::{DTensor, Layer, MlpNames, ParallelMlp},
    shard::{Partition, Replicated},
    tensor::{Random, Weights},
    trace::{CAPACITY, Ended, Entry, GroupInfo, Record, blame, chrome, snapshot},
};
use std::{
    panic::resume_unwind,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};
use tracing::{Event, Metadata, Subscriber, field::Visit, span};

fn all_reduce(group: &Group<Cpu>, len: usize) -> Result<()> {
    let mut x = Tensor::<f32>::full(group.device(), [len], 12345.678)?;
    group.all_reduce(ReduceOp::Max, &mut x)
}

#[test]
fn calls_are_noted_with_all_but_their_values() {
    Threads::new(2)
        .run(|world| {
            all_reduce(&world, 3)?;
            let pair = world.split_all(7)?;
            let x = Tensor::<f64>::full(world.device(), [2, 5], 9876.5)?;
            let pending = pair.start_all_gather(x, 1, &Partition::even(10, 2))?;
            let entered = snapshot().entries.pop().unwrap();
            assert_eq!((entered.started, entered.end), (true, None));
            pending.wait()?;
            let record = snapshot();
            assert_eq!((record.rank, record.world, record.forgotten), (world.rank(), 2, 0));
            let [reduce, split, gather, wait] = &record.entries[..] else { panic!("{:?}", record.entries) };
            assert_eq!(
                (reduce.op.as_str(), reduce.what.as_str(), reduce.seq),
                ("all_reduce", "max, f32 [3]", 0)
            );
            assert!(reduce.site.contains("trace.rs:"), "{}", reduce.site);
            assert_eq!((split.op.as_str(), split.seq), ("split", 1));
            assert_eq!((gather.op.as_str(), gather.started), ("all_gather", true));
            assert!(gather.what.starts_with("f64 [2, 10], partition "), "{}", gather.what);
            assert_eq!((wait.op.as_str(), &wait.what, &wait.group), ("wait", &gather.what, &None));
            let group = &record.groups[gather.group.as_ref().unwrap()];
            assert_eq!((group.name.as_str(), group.rank, group.size), ("world/7", world.rank(), 2));
            for entry in &record.entries {
                assert!(entry.begin <= entry.end.unwrap() && record.began <= entry.begin);
            }
            assert!(!record.to_lines().contains("12345") && !record.to_lines().contains("9876"));
            Ok(())
        })
        .unwrap();
}

#[test]
fn the_last_operations_are_kept() {
    Threads::new(1)
        .run(|world| {
            for len in 0..CAPACITY + 10 {
                all_reduce(&world, len % 7)?;
            }
            let record = snapshot();
            assert_eq!((record.forgotten, record.entries.len()), (10, CAPACITY));
            assert_eq!((record.entries[0].seq, record.entries[CAPACITY - 1].seq), (10, CAPACITY as u64 + 9));
            Ok(())
        })
        .unwrap();
}

/// The action of the odd rank, and the reason for which this rank is blamed.
type Fate = (fn(&Group<Cpu>) -> Result<()>, &'static str);

const FATES: [Fate; 5] = [
    (
        |_| resume_unwind(Box::new("lost")),
        "it panicked, after all_reduce (max, f32 [3], call 0 of group `world`",
    ),
    (|_| Err(Error::Invalid { op: "test", reason: "fails".into() }), "it returned an error"),
    (|_| Ok(()), "it returned while others needed it, after all_reduce"),
    (|group| group.barrier(), "called something else than the others"),
    // The odd rank arrives after the others have given up: see the test below.
    (|group| group.barrier(), "it did not join, after all_reduce"),
];

/// The deadline of ranks that wait for a late rank. It is long enough that, even on a busy machine,
/// only a rank that deserves the blame exceeds it.
const LATE: Duration = Duration::from_secs(1);

#[test]
fn the_rank_that_broke_the_job_is_blamed() {
    for world in [2, 3, 5] {
        for odd in 0..world {
            for (case, (fate, text)) in FATES.into_iter().enumerate() {
                let folder = tempfile::tempdir().unwrap();
                let deadline = if case == 4 { LATE } else { Duration::from_secs(60) };
                let given_up = AtomicUsize::new(0);
                let outcomes =
                    Threads::new(world).flight(folder.path()).deadline(deadline).run_each(|group| {
                        all_reduce(&group, 3)?;
                        if group.rank() != odd {
                            let outcome = all_reduce(&group, 8);
                            given_up.fetch_add(1, Ordering::SeqCst);
                            return outcome;
                        }
                        while case == 4 && given_up.load(Ordering::SeqCst) < world - 1 {
                            sleep(Duration::from_millis(1));
                        }
                        fate(&group)
                    });
                assert!(outcomes.unwrap().iter().any(Result::is_err));
                let records = Record::read_all([folder.path()]).unwrap();
                assert_eq!(records.len(), world);
                let blame = blame(&records);
                // Of two ranks that disagree, neither is in the minority, so both are blamed.
                let want = if case == 3 && world == 2 { vec![0, 1] } else { vec![odd] };
                assert_eq!(blame.ranks, want, "{world} ranks, case {case}: {blame}");
                assert!(blame.reason.contains(text), "case {case}: {blame}");
                let text = blame.to_string();
                assert!(
                    text.contains("all_reduce(max, f32 [8]") || text.contains("all_reduce (call 1"),
                    "{text}"
                );
            }
        }
    }
}

/// A deadline names two ranks that had not met the others. One of them had already entered the call
/// and was only slow, so it is not blamed.
#[test]
fn of_those_that_were_late_who_was_on_its_way_is_not_blamed() {
    let record = |rank: usize, begin: u64, failure: Option<&str>| {
        let group = Some("0".to_string());
        let call = Entry { op: "all_reduce".into(), group, begin, end: Some(1000), ..Entry::default() };
        let failed =
            failure.map(|kind| Entry { failure: Some(kind.into()), named: vec![1, 2], ..call.clone() });
        Record {
            job: "job".into(),
            rank,
            world: 3,
            began: 0,
            written: 2000,
            ended: Ended::Failed,
            groups: [(
                "0".to_string(),
                GroupInfo { name: "world".into(), rank, size: 3, channel: String::new() },
            )]
            .into(),
            forgotten: 0,
            entries: vec![failed.unwrap_or(call)],
        }
    };
    let records = |third: u64| {
        [record(0, 0, Some("deadline")), record(1, 999, Some("deadline")), record(2, third, Some("deadline"))]
    };
    assert_eq!(blame(&records(1500)).ranks, [2]);
    // Both named ranks entered the call in time. Nothing distinguishes them, so both are blamed.
    assert_eq!(blame(&records(999)).ranks, [1, 2]);
}

#[test]
fn a_rank_without_a_record_is_blamed() {
    let folder = tempfile::tempdir().unwrap();
    let run = Threads::new(3)
        .flight(folder.path())
        .run(|group| if group.rank() == 1 { resume_unwind(Box::new("lost")) } else { group.barrier() });
    run.unwrap_err();
    let mut records = Record::read_all([folder.path()]).unwrap();
    records.retain(|record| record.rank != 1);
    let verdict = blame(&records);
    assert_eq!(verdict.ranks, [1]);
    assert!(verdict.to_string().contains("barrier (call 0 of group `world`"), "{verdict}");
    assert!(blame(&[]).ranks.is_empty());
}

#[test]
fn records_are_read_as_they_were_written_and_damaged_ones_refused() {
    let folder = tempfile::tempdir().unwrap();
    let run = || {
        Threads::new(2).flight(folder.path()).run(|group| {
            all_reduce(&group, 3)?;
            all_reduce(&group, group.rank())
        })
    };
    run().unwrap_err();
    let first = Record::read_all([folder.path()]).unwrap();
    run().unwrap_err();
    // If a folder has the records of two jobs, only those of the second job are read.
    let second = Record::read_all([folder.path()]).unwrap();
    assert_eq!((first.len(), second.len()), (2, 2));
    assert_ne!(first[0].job, second[0].job);
    assert_eq!(second[0].ended, Ended::Failed);
    // Audit logs may be in the same folder.
    Threads::new(2).flight(folder.path()).audit(folder.path()).run(|world| world.barrier()).unwrap();
    assert_eq!(Record::read_all([folder.path()]).unwrap()[0].ended, Ended::Returned);
    assert_eq!(shardwise::security::audit::verify([folder.path()]).unwrap().logs().len(), 2);
    let path = folder.path().join("copy.jsonl");
    std::fs::write(&path, first[1].to_lines()).unwrap();
    assert_eq!(Record::read(&path).unwrap(), first[1]);
    for damaged in ["", "{}", "not json", "{\"job\":1}", &first[1].to_lines()[..300]] {
        std::fs::write(&path, damaged).unwrap();
        assert!(matches!(Record::read(&path), Err(Error::Io { .. })), "{damaged}");
    }
    assert!(Record::read_all::<&str>([]).is_err());
}

#[test]
fn time_lines_show_products_and_collectives_of_each_rank() {
    let folder = tempfile::tempdir().unwrap();
    let source = Random::normal(1, 0.02);
    Threads::new(3)
        .flight(folder.path())
        .run(|world| {
            let (weights, names) = (Weights::new(&source), MlpNames::default());
            let mlp = ParallelMlp::<Replicated, f32, Cpu>::load(
                &world,
                &weights,
                &names,
                (8, 12),
                Activation::Relu,
                true,
            )?;
            let x = DTensor::replicated(&world, Tensor::full(world.device(), [4, 8], 1.0)?)?;
            let (y, saved) = mlp.forward(x)?;
            mlp.backward(saved, y).map(drop)
        })
        .unwrap();
    let line = chrome(&Record::read_all([folder.path()]).unwrap());
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    let events = line["traceEvents"].as_array().unwrap();
    for rank in 0..3 {
        let count = |name: &str, phase: &str| {
            let is = |e: &&serde_json::Value| e["name"] == name && e["tid"] == rank && e["ph"] == phase;
            events.iter().filter(is).count()
        };
        assert_eq!(count("thread_name", "M"), 1);
        assert_eq!(count("gemm", "X"), 6, "two layers, forward, dX and dW");
        // The collective of the backward is started while dW is computed.
        assert_eq!((count("all_reduce", "X"), count("all_reduce", "b"), count("all_reduce", "e")), (1, 1, 1));
    }
    for event in events.iter().filter(|event| event["ph"] == "X") {
        assert!(event["ts"].as_f64().unwrap() >= 0.0 && event["dur"].as_f64().unwrap() >= 0.0);
    }
}

/// Absurd numbers in a damaged file cost no time and no memory.
#[test]
fn absurd_numbers_in_records_are_named_or_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let run = Threads::new(3).flight(folder.path()).run(|group| all_reduce(&group, group.rank().min(1)));
    run.unwrap_err();
    let mut records = Record::read_all([folder.path()]).unwrap();
    let last = records[2].entries.last_mut().unwrap();
    (last.failure, last.named) = (Some("lost".into()), vec![0, usize::MAX]);
    for record in &mut records[..2] {
        (record.ended, record.entries) = (Ended::NotYet, Vec::new());
    }
    for world in [1 << 20, usize::MAX] {
        records[2].world = world;
        let begin = Instant::now();
        let verdict = blame(&records);
        assert_eq!(verdict.ranks[..3], [3, 4, 5]);
        let text = verdict.to_string();
        let more = world - 3 - verdict.ranks.len();
        assert!(text.starts_with("ranks [3, 4, 5, 6, 7, 8, 9, 10] and 4088 more: no record: "), "{text}");
        assert!(
            text.contains(&format!("; the same holds for {more} more ranks\n")) && text.len() < 1000,
            "{text}"
        );
        assert!(begin.elapsed() < Duration::from_secs(1));
    }
    // A file longer than any record is not read to its end.
    assert!(matches!(Record::read("/dev/zero"), Err(Error::Io { .. })));
}

proptest! {
    /// A record with arbitrary numbers is either rejected, or can be read, judged and drawn as a
    /// timeline.
    #[test]
    fn any_numbers_in_records_are_judged_or_refused(
        numbers in vec((any::<prop::sample::Index>(), any::<u64>(), 0..64_u32), 1..6),
    ) {
        static LINES: OnceLock<String> = OnceLock::new();
        let lines = LINES.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let run = Threads::new(2).flight(folder.path()).run(|group| {
                all_reduce(&group, 3)?;
                if group.rank() == 0 { Ok(()) } else { group.barrier() }
            });
            run.unwrap_err();
            Record::read_all([folder.path()]).unwrap()[1].to_lines()
        });
        let segments: Vec<_> = lines.split_inclusive(|character: char| !character.is_ascii_digit()).collect();
        let places: Vec<_> = (0..segments.len()).filter(|at| segments[*at].len() > 1).collect();
        let mut segments: Vec<_> = segments.into_iter().map(str::to_string).collect();
        for (place, number, shift) in numbers {
            let segment = &mut segments[*place.get(&places)];
            *segment = format!("{}{}", number >> shift, segment.chars().last().unwrap_or_default());
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), segments.concat()).unwrap();
        if let Ok(record) = Record::read(file.path()) {
            prop_assert!(blame(std::slice::from_ref(&record)).to_string().len() < 10_000);
            chrome(&[record]);
        }
    }
}

/// Collects tracing events, and takes a snapshot at each event.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "shardwise"
    }

    fn new_span(&self, span: &span::Attributes<'_>) -> span::Id {
        let mut text = Text(span.metadata().name().into());
        span.record(&mut text);
        self.0.lock().unwrap().push(text.0);
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(event.metadata().level().to_string());
        event.record(&mut text);
        if let Some(failure) = snapshot().entries.into_iter().find_map(|entry| entry.failure) {
            text.0 += &format!(" noted={failure}");
        }
        self.0.lock().unwrap().push(text.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[test]
fn the_same_events_are_spans_of_tracing() {
    let listener = Listener::default();
    let group = Group::solo(&Cpu::new());
    tracing::subscriber::with_default(listener.clone(), || {
        all_reduce(&group, 5).unwrap();
        let x = Tensor::<f32>::full(group.device(), [1], 1.0).unwrap();
        group.exchange(Some((0, &x)), None).unwrap_err();
    });
    let said = listener.0.lock().unwrap().join("\n");
    assert!(
        said.contains("collective group=\"world\" rank=0 call=all_reduce(max, f32 [5], call 0) at"),
        "{said}"
    );
    assert!(said.contains("ERROR rank=0 error=exchange: the only rank of a group"), "{said}");
    assert!(!said.contains("12345"), "{said}");
}

/// A subscriber may take a snapshot of the rank that emits an event.
#[test]
fn subscribers_that_take_snapshots_fail_no_rank() {
    let listener = Listener::default();
    let outcomes = Threads::new(2).flight("/dev/null/no/folder").run_each(|group| {
        tracing::subscriber::with_default(listener.clone(), || all_reduce(&group, group.rank()))
    });
    for outcome in outcomes.unwrap() {
        assert!(matches!(outcome, Err(Error::Mismatch(_))), "{outcome:?}");
    }
    let said = listener.0.lock().unwrap();
    let count = |level: &str| {
        said.iter().filter(|text| text.starts_with(level) && text.ends_with("noted=mismatch")).count()
    };
    assert_eq!((count("ERROR rank="), count("WARN message=the flight record")), (2, 2), "{said:?}");
}
