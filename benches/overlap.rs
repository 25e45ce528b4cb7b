//! Measures for which numbers of tokens it pays to overlap chunked collectives with matrix
//! products. Times the forward and backward of a feed-forward layer.
//!
//! `cargo bench --bench overlap` on thread ranks. On processes over MPI: `cargo bench --features
//! mpi --bench overlap --no-run`, then `mpirun -n 2` with the program that it prints.
//!
//! The results with and without chunks have the same bits, as a test checks.

use clap::Parser;
use shardwise::{
    Result,
    comm::{Group, Overlap},
    device::{Cpu, Element},
    launch::Threads,
    parallel::{MeasuredOverlap, ResidualStream},
    shard::{Replicated, Shard},
};
use std::time::Duration;

#[derive(Clone, Copy, Parser)]
struct Args {
    /// The number of thread ranks.
    #[arg(long, default_value_t = 2)]
    ranks: usize,
    /// The width of the residual stream.
    #[arg(long, default_value_t = 1024)]
    hidden: usize,
    /// The width of the hidden layer.
    #[arg(long, default_value_t = 4096)]
    ffn: usize,
    /// The largest number of tokens.
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn measure<S: ResidualStream, T: Element>(world: &Group<Cpu>, args: Args, what: &str) -> Result<()> {
    let measured = MeasuredOverlap::of::<S, T, Cpu>(world, (args.hidden, args.ffn), args.tokens)?;
    if world.rank() > 0 {
        return Ok(());
    }
    for (tokens, at_once, chunked) in measured.times {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let ratio = ms(chunked) / ms(at_once);
        println!("{what:<34} {tokens:>7} {:>11.3} {:>13.3} {ratio:>7.3}", ms(at_once), ms(chunked));
    }
    match measured.overlap {
        Overlap::From(bytes) => println!("{what}: chunks pay from {bytes} bytes each on"),
        _ => println!("{what}: chunks do not pay"),
    }
    Ok(())
}

fn all(world: &Group<Cpu>, args: Args, transport: &str) -> Result<()> {
    if world.rank() == 0 {
        println!("{transport}, {} ranks, {} - {} - {}", world.size(), args.hidden, args.ffn, args.hidden);
        println!(
            "{:<34} {:>7} {:>11} {:>13} {:>7}",
            "stream", "tokens", "at once ms", "two chunks ms", "ratio"
        );
    }
    measure::<Replicated, f32>(world, args, "replicated, f32")?;
    measure::<Shard<0>, f32>(world, args, "sequence parallel, f32")
}

fn main() -> Result<()> {
    let args = Args::parse();
    #[cfg(feature = "mpi")]
    if ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"].iter().any(|name| std::env::var_os(name).is_some()) {
        return shardwise::launch::mpi(|world| all(&world, args, "MPI"));
    }
    Threads::new(args.ranks).run(|world| all(&world, args, "threads")).map(|_| ())
}
