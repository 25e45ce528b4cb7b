//! The arguments of `shardwise launch`. The launcher passes them on to the keeper.

use clap::Args;
use std::{env, ffi::OsString, path::PathBuf, time::Duration};

/// How long the other ranks have to report after one rank has failed. Also the least time that a
/// reader of the report has.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(300);

/// The ranks to start, their program and its options.
#[derive(Args)]
pub(crate) struct Job {
    /// The number of ranks.
    #[arg(short = 'n', long, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) ranks: u32,
    /// Seconds between SIGTERM and SIGKILL for a rank. If a signal ends the job, the reader of the
    /// output has the same time.
    #[arg(long, default_value = "5", value_parser = seconds, allow_negative_numbers = true)]
    pub(crate) grace: Duration,
    /// A folder for the records of the ranks' last operations. The default is SHARDWISE_FLIGHT_DIR.
    /// Without either, the records are removed when the job ends.
    #[arg(long)]
    pub(crate) flight: Option<PathBuf>,
    /// Connect the ranks over TLS 1.3. Each rank gets a new key, in a private temporary folder that
    /// is removed when the job ends.
    #[arg(long)]
    pub(crate) tls: bool,
    /// The program that every rank runs, with its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) program: Vec<OsString>,
}

impl Job {
    /// Returns the folder for records that the user has set, if any.
    pub(crate) fn records(&self) -> Option<PathBuf> {
        let named = || env::var_os("SHARDWISE_FLIGHT_DIR").filter(|folder| !folder.is_empty());
        self.flight.clone().or_else(|| named().map(PathBuf::from))
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
