//! The program `shardwise`: starts ranks on this machine.

#[cfg(target_os = "linux")]
mod keep;
#[cfg(target_os = "linux")]
mod launch;
#[cfg(target_os = "linux")]
mod output;
#[cfg(target_os = "linux")]
mod tree;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Tensor-parallel ranks: starts them.
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
    Launch(launch::Job),
    /// Keeps the ranks of `launch`, whose child it is.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Keep(launch::Job),
    /// Becomes a rank's program. Started by `keep`.
    #[cfg(target_os = "linux")]
    #[command(hide = true)]
    Become(keep::Become),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        #[cfg(target_os = "linux")]
        Command::Launch(job) => launch::launch(&job),
        #[cfg(target_os = "linux")]
        Command::Keep(job) => keep::keep(&job),
        #[cfg(target_os = "linux")]
        Command::Become(program) => program.run(),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("shardwise: {error}");
            ExitCode::FAILURE
        }
    }
}
