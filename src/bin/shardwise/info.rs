//! `shardwise info`: this build of the program, and how the data of a job travelled.

use shardwise::{Result, security::Policy, trace::Record};
use std::{
    collections::BTreeMap,
    env::{self, consts},
    fmt::Write,
};

/// Describes this build, and the policy that the environment sets.
///
/// # Errors
/// When the environment variable is no policy.
pub(crate) fn build() -> Result<String> {
    let features = [
        (cfg!(feature = "cuda"), "cuda"),
        (cfg!(feature = "nccl"), "nccl"),
        (cfg!(feature = "mpi"), "mpi"),
        // The program is not built without it.
        (true, "tls (ring, TLS 1.3)"),
    ];
    let features: Vec<_> = features.into_iter().filter_map(|(has, name)| has.then_some(name)).collect();
    let policy = env::var("SHARDWISE_POLICY").ok().filter(|text| !text.is_empty());
    let policy = policy.map_or(Ok(Policy::Any), |text| text.parse())?;
    Ok(format!(
        "shardwise {}\nfeatures: {}\nsystem: {} {}\npolicy: {policy}\n",
        env!("CARGO_PKG_VERSION"),
        features.join(", "),
        consts::OS,
        consts::ARCH
    ))
}

/// Describes the groups of a job and how their data travelled, by the records of its ranks.
pub(crate) fn job(records: &[Record]) -> String {
    // The ranks of the job that name each channel, by the group's name, id and size.
    let mut groups = BTreeMap::<_, BTreeMap<&str, Vec<usize>>>::new();
    for record in records {
        for (id, group) in &record.groups {
            let channels = groups.entry((&group.name, id, group.size)).or_default();
            let channel = if group.channel.is_empty() { "not recorded" } else { &group.channel };
            channels.entry(channel).or_default().push(record.rank);
        }
    }
    let mut text = String::new();
    if let Some(record) = records.first() {
        let _ = writeln!(text, "job {}: records of {} of {} ranks", record.job, records.len(), record.world);
    }
    for ((name, _, size), channels) in groups {
        let ranks = if size == 1 { "rank" } else { "ranks" };
        let _ = write!(text, "group {name}, {size} {ranks}: ");
        let list = |(channel, ranks)| format!("{channel} (ranks {ranks:?})");
        let _ = match channels.len() {
            1 => writeln!(text, "{}", channels.into_keys().collect::<String>()),
            _ => {
                let channels: Vec<_> = channels.into_iter().map(list).collect();
                writeln!(text, "the ranks disagree: {}", channels.join("; "))
            }
        };
    }
    text
}
