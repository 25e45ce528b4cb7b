//! A training step of the GPT of `train_text` on one rank, and on two ranks along each axis of a
//! mesh.
//!
//! `cargo bench --bench training [-- --rounds 9] [--json FILE]`. In each round, every mesh runs a
//! few steps. The bench reports the median over the rounds. `scripts/peers/gpt_ddp.py` trains the
//! same model with PyTorch.

#[path = "../examples/text/train_text/model.rs"]
#[allow(dead_code)]
mod model;

use clap::Parser;
use model::{Batch, Config, Gpt};
use shardwise::{
    Result,
    comm::DeviceMesh,
    launch,
    optim::{AdamW, clip_scale},
    reference::worst,
    rng::Philox,
    shard::{Mesh, Replicated},
    tensor::Random,
    train::Schedule,
};
use std::time::Instant;

/// Times training steps.
#[derive(Parser)]
struct Args {
    /// The number of rounds. The bench reports the median.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Writes the results to this file.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// Passed by `cargo bench`; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

const CONFIG: Config = Config {
    vocabulary: 65,
    context: 128,
    hidden: 384,
    heads: 6,
    ffn: 1536,
    layers: 4,
    dropout: 0.0,
    recomputed: 0,
};
const SEQUENCES: usize = 8;
const STEPS: u64 = 2;

/// Returns the seconds of a step on a mesh, and the loss, on each rank.
fn step([dp, pp, tp]: [usize; 3]) -> Result<Vec<(f64, f64)>> {
    let microbatches = if pp > 1 { 2 * pp } else { 1 };
    launch::threads(dp * pp * tp, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
        let (source, schedule) =
            (Random::normal(1, 0.02), Schedule::one_forward_one_backward(pp, microbatches));
        let model = Gpt::<Replicated, f32>::load(&mesh, &source, &CONFIG, schedule)?;
        let mut adamw = AdamW::default();
        let random = Philox::stream(1, 1);
        let token = |at: usize| (random.uniform(at as u64) * CONFIG.vocabulary as f64) as u32;
        let tokens: Vec<u32> = (0..SEQUENCES * CONFIG.context).map(token).collect();
        let batch = Batch { targets: tokens.iter().rev().copied().collect(), tokens, length: CONFIG.context };
        let mut start = Instant::now();
        let mut last = 0.0;
        // The first step warms up.
        for number in 0..=STEPS {
            let (loss, norm) = model.gradients(&batch, number, 1.0)?;
            adamw.step(&model.params(), 1e-4, clip_scale(norm, 1.0)?)?;
            world.barrier()?;
            if number == 0 {
                start = Instant::now();
            }
            last = loss;
        }
        Ok((start.elapsed().as_secs_f64() / STEPS as f64, last))
    })
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let meshes = [("1 rank", [1, 1, 1]), ("dp 2", [2, 1, 1]), ("pp 2", [1, 2, 1]), ("tp 2", [1, 1, 2])];
    let mut times = vec![Vec::new(); meshes.len()];
    let mut losses = vec![Vec::new(); meshes.len()];
    for _ in 0..args.rounds.max(1) {
        for (at, (_, mesh)) in meshes.iter().enumerate() {
            let ranks = step(*mesh)?;
            times[at].push(ranks[0].0);
            losses[at].extend(ranks.iter().map(|(_, loss)| *loss));
        }
    }
    println!("{:<8} {:>10} {:>10} {:>9} {:>12}", "mesh", "median ms", "min ms", "speed-up", "loss");
    let mut rows = Vec::new();
    let mut one = f64::NAN;
    for (at, (name, _)) in meshes.iter().enumerate() {
        times[at].sort_by(f64::total_cmp);
        let (median, least) = (times[at][times[at].len() / 2], times[at][0]);
        one = if at == 0 { median } else { one };
        println!(
            "{name:<8} {:>10.1} {:>10.1} {:>9.2} {:>12.8}",
            median * 1e3,
            least * 1e3,
            one / median,
            losses[at][0]
        );
        rows.push(
            serde_json::json!({ "mesh": name, "median_s": median, "min_s": least, "loss": losses[at][0] }),
        );
        let difference = worst(&losses[at], &vec![losses[0][0]; losses[at].len()]);
        if difference > 1e-5 {
            return Err(format!("{name}: the loss differs by {difference:.1e}").into());
        }
    }
    if let Some(path) = args.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(())
}
