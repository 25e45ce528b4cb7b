//! Times kernels, layers and calls on one GPU, and compares the times with limits that the same run
//! measures. `scripts/peers/gpu_torch.py` has lines with the same names and shapes.
//! `scripts/gpu/run.sh` runs both programs.
//!
//! ```text
//! cargo bench --features nccl --bench gpu [-- --only attention,decode] [--json FILE]
//!     [--seconds N] [--quick]
//! ```
//!
//! Operands are random. A few elements of each result are compared with sums in f64 on the host, or
//! with the results of another computation. The bench fails at its end if a result was wrong or
//! could not be computed.

mod attention;
mod block;
mod check;
mod data;
mod decode;
mod gemm;
mod launch;
mod nccl;
mod optim;
mod quantized;
mod report;
mod streams;

use clap::{Parser, ValueEnum};
use report::Bench;
use shardwise::{Result, device::Cuda};
use std::{path::PathBuf, process::ExitCode};

#[derive(Parser)]
struct Args {
    /// Runs each line once with small shapes, to check that everything works.
    #[arg(long)]
    quick: bool,
    /// Appends one JSON object per line to this file.
    #[arg(long)]
    json: Option<PathBuf>,
    /// The groups of lines to run; default: all.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
    /// Skips lines that have not begun after this many seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Section {
    Limits,
    Gemm,
    Streams,
    Attention,
    Decode,
    Launch,
    Optim,
    Nccl,
    Block,
    Quantized,
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
    let wanted = |section: &Section| args.only.is_empty() || args.only.contains(section);
    bench.measure_limits(wanted(&Section::Limits))?;
    for section in Section::value_variants().iter().filter(|section| wanted(section)) {
        match section {
            Section::Limits => {}
            Section::Gemm => gemm::run(&mut bench)?,
            Section::Streams => streams::run(&mut bench)?,
            Section::Attention => attention::run(&mut bench)?,
            Section::Decode => decode::run(&mut bench)?,
            Section::Launch => launch::run(&mut bench)?,
            Section::Optim => optim::run(&mut bench)?,
            Section::Nccl => nccl::run(&mut bench)?,
            Section::Block => block::run(&mut bench)?,
            Section::Quantized => quantized::run(&mut bench)?,
        }
    }
    Ok(if bench.is_sound() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
