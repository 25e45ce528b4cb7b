//! The program `shardwise`. It starts ranks on this machine, reads the records of ranks, measures
//! machines, plans how a model is divided over ranks, makes the keys of ranks, verifies their audit
//! logs, and computes budgets of private training.
//!
//! | command | effect |
//! |---|---|
//! | `launch` | starts ranks (Linux); with `--tls`, over TLS 1.3 and with a new key for each rank |
//! | `blame`, `trace` | read the records of ranks |
//! | `info` | describes this build, or how the data of a job travelled |
//! | `measure`, `plan` | measure a machine, and plan a model for it |
//! | `key`, `membership` | make keys, and sign and check the lists of a job's keys |
//! | `audit` | verifies the audit logs of a job |
//! | `privacy` | computes ε, the noise or the number of steps of private training |

mod audit;
#[cfg(feature = "nccl")]
mod gpus;
mod host;
#[cfg(target_os = "linux")]
mod identity;
mod info;
#[cfg(target_os = "linux")]
mod job;
#[cfg(target_os = "linux")]
mod keep;
mod key;
#[cfg(target_os = "linux")]
mod launch;
mod measure;
mod membership;
#[cfg(target_os = "linux")]
mod output;
mod plan;
mod privacy;
#[cfg(target_os = "linux")]
mod signals;
#[cfg(target_os = "linux")]
mod tree;

use clap::{Parser, Subcommand};
use shardwise::trace::{Record, blame, chrome};
use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Starts tensor-parallel ranks and reports how they ended; measures machines and plans models;
/// makes the keys of ranks and verifies their audit logs.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Starts ranks on this machine, and ends all of them when one fails.
    #[cfg(target_os = "linux")]
    Launch(job::Job),
    /// The parent process of the ranks, started by `launch`.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Keep(keep::Keep),
    /// Replaces its process with a rank's program (exec). Started by `keep`.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Become(keep::Become),
    /// Names the rank that broke a job.
    Blame(Records),
    /// Writes the operations of all ranks as a timeline for chrome://tracing or Perfetto.
    Trace {
        #[command(flatten)]
        records: Records,
        /// The file to write.
        #[arg(short, long)]
        output: PathBuf,
    },
    /// Prints version, features, system and policy; or how the data of a job's groups travelled.
    Info {
        /// Record files, or folders of them, as for `blame`.
        records: Vec<PathBuf>,
    },
    /// Makes private keys and prints public keys.
    #[command(subcommand)]
    Key(key::Key),
    /// Signs and checks the list of a job's keys.
    #[command(subcommand)]
    Membership(membership::Command),
    /// Verifies the audit logs of ranks.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Computes ε, the noise or the number of steps of private training from the other two.
    Privacy(privacy::Request),
    /// Measures this machine and prints it as JSON, for `plan --machine`.
    Measure(measure::Request),
    /// Plans how a model is divided over the ranks of a machine: memory and time of the best plans.
    /// The exit code is 3 if nothing fits.
    Plan(plan::Request),
}

/// The records of ranks, from `SHARDWISE_FLIGHT_DIR` or `launch --flight`.
#[derive(clap::Args)]
struct Records {
    /// Record files, or folders of them. If they are from several jobs, reads only those of the job
    /// that started last.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
}

impl Records {
    fn read(&self) -> io::Result<Vec<Record>> {
        Record::read_all(&self.paths).map_err(io::Error::other)
    }
}

/// Prints the text of a command.
fn print(text: shardwise::Result<String>) -> io::Result<u8> {
    io::stdout().write_all(text.map_err(io::Error::other)?.as_bytes())?;
    Ok(0)
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        #[cfg(target_os = "linux")]
        Command::Launch(job) => launch::launch(&job),
        #[cfg(target_os = "linux")]
        Command::Keep(keep) => keep::keep(&keep),
        #[cfg(target_os = "linux")]
        Command::Become(program) => program.run(),
        Command::Blame(records) => records.read().map(|records| {
            println!("{}", blame(&records));
            0
        }),
        Command::Info { records } if records.is_empty() => print(info::build()),
        Command::Info { records } => print(Record::read_all(&records).map(|records| info::job(&records))),
        Command::Key(key) => print(key.run()),
        Command::Membership(command) => print(command.run()),
        Command::Audit(command) => command.run(),
        Command::Privacy(request) => print(request.run()),
        Command::Measure(request) => request.run(),
        Command::Plan(request) => request.run(),
        Command::Trace { records, output } => {
            records.read().and_then(|records| fs::write(&output, chrome(&records))).map(|()| 0)
        }
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("shardwise: {error}");
            ExitCode::FAILURE
        }
    }
}
