//! `shardwise launch`: the process that the user sees.
//!
//! The ranks are children of another process, the keeper (`keep.rs`), so that one of the two is there to end them whatever
//! happens to the other. The keeper reads from a pipe that only this process holds open: when this process dies, even by
//! SIGKILL, the keeper finds the pipe's end and ends the ranks. When the keeper dies, the kernel kills the ranks
//! (`PR_SET_PDEATHSIG`), and what they have started becomes this process's children (`PR_SET_CHILD_SUBREAPER`), which
//! kills them.
//!
//! When both are killed at once, the kernel kills the ranks, but not what they have started. A
//! further process beside each rank could find that, and could itself be killed.

use crate::{keep::LAST_WORDS, tree};
use clap::Args;
use rustix::process::{Pid, Signal, getpid, kill_process, set_child_subreaper};
use signal_hook::{consts::signal, iterator::Signals};
use std::{
    env,
    ffi::{OsStr, OsString},
    io::{self, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

/// What is to be started, and how.
#[derive(Args)]
pub(crate) struct Job {
    /// The number of ranks.
    #[arg(short = 'n', long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) ranks: u32,
    /// How many seconds a rank has, from SIGTERM on, until it is killed; then as many for whoever
    /// reads its output, until that is cut off.
    #[arg(long, default_value = "5", value_parser = seconds, allow_negative_numbers = true)]
    pub(crate) grace: Duration,
    /// A folder where the records of the ranks' last operations are kept. Without it, and without
    /// the variable SHARDWISE_FLIGHT_DIR, they are removed at the end.
    #[arg(long)]
    pub(crate) flight: Option<PathBuf>,
    /// The program that every rank runs, with its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) program: Vec<OsString>,
}

impl Job {
    /// The folder that the user has named for records.
    pub(crate) fn records(&self) -> Option<PathBuf> {
        let named = || env::var_os("SHARDWISE_FLIGHT_DIR").filter(|folder| !folder.is_empty());
        self.flight.clone().or_else(|| named().map(PathBuf::from))
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// The signals that are handed on to the ranks.
pub(crate) const FORWARDED: [i32; 6] =
    [signal::SIGINT, signal::SIGTERM, signal::SIGHUP, signal::SIGQUIT, signal::SIGUSR1, signal::SIGUSR2];

pub(crate) fn launch(job: &Job) -> io::Result<u8> {
    // The ranks' records say who failed first. The keeper removes them; if it is killed, this does.
    let private = if job.records().is_none() {
        let folder = tempfile::Builder::new().prefix("shardwise-").tempdir();
        folder.inspect_err(|error| eprintln!("shardwise: no folder for the ranks' records: {error}")).ok()
    } else {
        None
    };
    set_child_subreaper(Some(getpid()))?;
    let mut signals = Signals::new(FORWARDED)?;
    // In a group of its own: what a terminal sends to this process's group comes to the ranks once, by way of this process.
    let mut keeper = Command::new(env::current_exe()?)
        .arg("keep")
        .args(private.iter().flat_map(|folder| [OsStr::new("--private"), folder.path().as_os_str()]))
        .args(env::args_os().skip(2))
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let lifeline = keeper.stdin.take();
    let pid = Pid::from_child(&keeper);
    thread::spawn(move || {
        for signal in signals.forever().filter_map(Signal::from_named_raw) {
            // It may have ended.
            let _ = kill_process(pid, signal);
        }
    });
    let status = keeper.wait()?;
    drop(lifeline);
    if let Some(signal) = status.signal() {
        tree::kill_descendants();
        let words = format!("shardwise: the process that keeps the ranks was killed by {}\n", name(signal));
        // Perhaps nobody reads it.
        let (said, over) = mpsc::channel();
        thread::spawn(move || {
            let _ = io::stderr().write_all(words.as_bytes());
            said.send(())
        });
        let _ = over.recv_timeout(LAST_WORDS);
        return Ok(128 + signal as u8);
    }
    Ok(status.code().unwrap_or(1) as u8)
}

/// A signal's name.
pub(crate) fn name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_string)
}
