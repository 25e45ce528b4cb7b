//! What one GPU takes for kernels, layers and calls, as parts of the limits that the same run
//! measures on it. `scripts/peers/gpu_torch.py` has lines of the same names and shapes;
//! `scripts/gpu/run.sh` runs both.
//!
//! ```text
//! cargo bench --features nccl --bench gpu [-- --only attention,decode] [--json FILE]
//!     [--seconds N] [--quick]
//! ```
//!
//! Operands are random. Each result is compared with sums in f64 on the host, or with another path
//! to it, at a few places; the bench fails at its end if one was wrong or could not be computed.

mod attention;
mod block;
mod data;
mod decode;
mod gemm;
mod launch;
mod nccl;
mod optim;
mod report;
mod streams;

use clap::{Parser, ValueEnum};
use report::Bench;
use shardwise::{Result, device::Cuda};
use std::{path::PathBuf, process::ExitCode};

#[derive(Parser)]
struct Args {
    /// Small shapes, each once: to see whether all of it runs.
    #[arg(long)]
    quick: bool,
    /// Appends a JSON object a line to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// The groups of lines to run; all if not given.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// After so many seconds, lines that have not begun are skipped.
    #[arg(long)]
    seconds: Option<f64>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Part {
    Limits,
    Gemm,
    Streams,
    Attention,
    Decode,
    Launch,
    Optim,
    Nccl,
    Block,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let cuda = match Cuda::new(0) {
        Ok(cuda) => cuda,
        Err(error) => {
            println!("not run: {error}");
            return Ok(ExitCode::SUCCESS);
        }
    };
    let mut bench = Bench::new(cuda, args.quick, args.json.as_deref(), args.seconds)?;
    let wanted = |part: &Part| args.only.is_empty() || args.only.contains(part);
    bench.measure_limits(wanted(&Part::Limits))?;
    for part in Part::value_variants().iter().filter(|part| wanted(part)) {
        match part {
            Part::Limits => {}
            Part::Gemm => gemm::run(&mut bench)?,
            Part::Streams => streams::run(&mut bench)?,
            Part::Attention => attention::run(&mut bench)?,
            Part::Decode => decode::run(&mut bench)?,
            Part::Launch => launch::run(&mut bench)?,
            Part::Optim => optim::run(&mut bench)?,
            Part::Nccl => nccl::run(&mut bench)?,
            Part::Block => block::run(&mut bench)?,
        }
    }
    Ok(if bench.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
