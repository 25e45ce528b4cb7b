//! A timeline for `chrome://tracing` and Perfetto, with one track per rank.

use super::{Entry, Record};
use serde_json::{Value, json};

/// Converts records to Chrome's trace event format.
///
/// Each rank's times come from its own clock. On an asynchronous device, the bar of a computation
/// shows only the time to enqueue it.
pub fn chrome(records: &[Record]) -> String {
    let start = records.iter().flat_map(|record| &record.entries).map(|entry| entry.begin).min().unwrap_or(0);
    let micros = |time: u64| time.saturating_sub(start) as f64 / 1e3;
    let mut events: Vec<Value> = Vec::new();
    for record in records {
        let name = json!({ "name": format!("rank {}", record.rank) });
        events.push(json!({ "name": "thread_name", "ph": "M", "pid": 0, "tid": record.rank, "args": name }));
        for (number, entry) in record.entries.iter().enumerate() {
            let end = micros(entry.end.unwrap_or(record.written));
            let begin = micros(entry.begin);
            let mut event = json!({
                "name": entry.op, "cat": if entry.group.is_some() { "collective" } else { "compute" },
                "pid": 0, "tid": record.rank, "ts": begin, "args": arguments(record, entry),
            });
            if entry.started {
                // Started operations may overlap, so they become async events, which get separate
                // bars.
                event["id"] = json!(format!("{}.{number}", record.rank));
                event["ph"] = json!("b");
                let mut finish = event.clone();
                finish["ph"] = json!("e");
                finish["ts"] = json!(end);
                events.extend([event, finish]);
            } else {
                event["ph"] = json!("X");
                event["dur"] = json!(end - begin);
                events.push(event);
            }
        }
    }
    json!({ "traceEvents": events, "displayTimeUnit": "ns" }).to_string()
}

fn arguments(record: &Record, entry: &Entry) -> Value {
    let mut arguments = json!({ "what": entry.what });
    if let Some(id) = &entry.group {
        arguments["group"] = json!(record.groups.get(id).map(|group| &group.name));
        arguments["seq"] = json!(entry.seq);
        arguments["site"] = json!(entry.site);
    }
    if entry.failure.is_some() {
        arguments["error"] = json!(entry.error);
    }
    arguments
}
