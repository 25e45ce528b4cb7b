//! `shardwise audit`: verifies the audit logs of a job.

use clap::Subcommand;
use shardwise::{
    Result,
    security::{
        Membership, PublicKey,
        audit::{Report, Verdict, verify_signed},
    },
};
use std::{
    io::{self, Write},
    path::PathBuf,
};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Verifies that no line was changed, added or removed, and that no end is missing. The exit
    /// code is 1 if something was changed, and 3 if something is missing at an end.
    Verify {
        /// Audit logs of all ranks of a job, or folders of them.
        #[arg(required = true)]
        paths: Vec<PathBuf>,
        /// A list of the job's keys, to verify signatures. May be given several times.
        #[arg(long, value_name = "FILE", requires = "owner")]
        membership: Vec<PathBuf>,
        /// The public key of the owner of the lists, in PEM.
        #[arg(long, value_name = "FILE", requires = "membership")]
        owner: Option<PathBuf>,
    },
}

impl Command {
    /// Prints a report. Returns the exit code.
    pub(crate) fn run(&self) -> io::Result<u8> {
        let Self::Verify { paths, membership, owner } = self;
        let report = verify(paths, membership, owner.as_ref()).map_err(io::Error::other)?;
        io::stdout().write_all(report.to_string().as_bytes())?;
        Ok(match report.verdict() {
            Verdict::Intact => 0,
            Verdict::Changed => 1,
            Verdict::Incomplete => 3,
        })
    }
}

fn verify(paths: &[PathBuf], lists: &[PathBuf], owner: Option<&PathBuf>) -> Result<Report> {
    let owner = owner.map(PublicKey::read).transpose()?;
    let read = |owner: &PublicKey| lists.iter().map(|list| Membership::read(list, owner)).collect();
    let lists: Vec<_> = owner.as_ref().map_or(Ok(Vec::new()), read)?;
    verify_signed(paths, &lists)
}
