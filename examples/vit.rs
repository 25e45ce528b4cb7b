//! Trains a small Vision Transformer on data- and tensor-parallel ranks. The losses agree with
//! those of one device. They also agree if another mesh resumes the run from a checkpoint.
//!
//! `cargo run --release --bin vit`

use shardwise::{prelude::*, reference::worst, rng::Philox};
use std::{ops::Range, path::Path};

/// Images of 8 x 8 pixels, in ViT patches of 4 x 4.
const SIDE: usize = 8;
const PATCH: usize = 4;
const PATCHES: usize = (SIDE / PATCH) * (SIDE / PATCH);
const PIXELS: usize = PATCH * PATCH;
const CLASSES: usize = 3;
const HIDDEN: usize = 16;
const BATCH: usize = 12;
/// The steps of a run, and the step after which it is saved.
const STEPS: u64 = 40;
const SAVED: u64 = 20;
/// The largest allowed difference between the losses of two meshes.
const BOUND: f64 = 1e-12;

/// Returns the pixels of an image, ViT patch by ViT patch, and its class. The image is a noisy
/// wave, and the class is its direction: along x, y or the diagonal.
fn sample(number: u64) -> (Vec<f64>, u32) {
    let stream = Philox::stream(7, number);
    let class = (stream.uniform(0) * CLASSES as f64) as usize;
    let (waves, phase) = ([(1, 0), (0, 1), (1, 1)][class], stream.uniform(1));
    let pixel = |at: usize| {
        let (patch, inner) = (at / PIXELS, at % PIXELS);
        let x = patch % (SIDE / PATCH) * PATCH + inner % PATCH;
        let y = patch / (SIDE / PATCH) * PATCH + inner / PATCH;
        let turns = phase + (waves.0 * x + waves.1 * y) as f64 / SIDE as f64;
        (std::f64::consts::TAU * turns).cos() + 0.3 * stream.normal(at as u64 + 2)
    };
    ((0..SIDE * SIDE).map(pixel).collect(), class as u32)
}

/// Builds the model. Its input, the image patches, is replicated. Its output, the logits, is
/// sharded by class.
fn vit(
    group: &Group<Cpu>,
    source: &dyn WeightSource,
) -> Result<impl Layer<f64, Cpu, In = Replicated, Out = Shard<1>>> {
    let weights = Weights::new(source);
    let norm = NormKind::LayerNorm { eps: 1e-5 };
    let config = BlockConfig::new(
        AttentionConfig::new(HIDDEN, 4).with_out_bias(true),
        2 * HIDDEN,
        Activation::GeluErf,
        norm,
    )
    .with_mlp_bias(true);
    let block =
        |number: usize| TransformerBlock::load(group, &weights.at(&format!("blocks.{number}")), &config);
    let (hidden, classes) = (Columns::even(group, HIDDEN)?, Columns::even(group, CLASSES)?);
    let patches = ColumnParallelLinear::load(group, &weights.at("patches"), PIXELS, &hidden, Bias::Add)?;
    let positions = PositionEmbedding::load(group, &weights.at("positions"), PATCHES, HIDDEN)?;
    let blocks = (0..2).map(block).collect::<Result<Vec<_>>>()?;
    let norm = Normalize::load(group, &weights.at("norm"), norm, HIDDEN)?;
    let head = ColumnParallelLinear::load(group, &weights.at("head"), HIDDEN, &classes, Bias::Add)?;
    Ok(patches.then(GatherFrom::<1>).then(positions).then(blocks).then(norm).then(MeanPool).then(head))
}

/// Trains on `dp` x `tp` ranks, from the start or from a checkpoint. Returns the loss of each step.
fn train(
    [dp, tp]: [usize; 2],
    steps: Range<u64>,
    from: Option<&weights::Checkpoint>,
    save: Option<&Path>,
) -> Result<Vec<f64>> {
    let mut ranks = launch::threads(dp * tp, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, tp)?)?;
        let (data, tensor) = (mesh.group(Axis::Data), mesh.group(Axis::Tensor));
        let random = Random::normal(1, 0.1);
        let source: &dyn WeightSource = match from {
            Some(checkpoint) => checkpoint,
            None => &random,
        };
        let model = vit(tensor, source)?;
        let params = model.params();
        let config = optim::AdamWConfig::default();
        let mut adamw = match from {
            Some(checkpoint) => optim::AdamW::load(config, checkpoint, &params)?,
            None => optim::AdamW::new(config),
        };
        let replicas = train::DataParallel::new(data, &params)?;
        let loss = VocabParallelCrossEntropy::default();
        let own = Partition::even(BATCH, dp).range(data.rank());
        let mut curve = Vec::new();
        for step in steps.clone() {
            let samples = own.clone().map(|at| sample(step * BATCH as u64 + at as u64));
            let (pixels, targets): (Vec<_>, Vec<_>) = samples.unzip();
            let x = Tensor::from_vec(world.device(), [own.len() * PATCHES, PIXELS], pixels.concat())?;
            // Each image is a sequence: its patches attend only to each other.
            let images = Sequences::packed(own.clone().map(|_| PATCHES));
            let x = DTensor::replicated(tensor, x)?.with_sequences(images)?;

            params.iter().for_each(Param::zero_grad);
            let (logits, saved) = model.forward(x)?;
            let (losses, saved_loss) = loss.forward(logits, &targets)?;
            // Each replica divides by the size of the whole batch, because the replicas' sums are
            // added.
            replicas.begin(train::GradReduce::Sum)?;
            model.backward(saved, loss.backward(saved_loss, 1.0 / BATCH as f64)?)?;
            replicas.finish()?;
            adamw.step(&params, 3e-3, 1.0)?;
            curve.push(replicas.sum(&[losses.sum()? / BATCH as f64])?);

            // Replicas hold the same parameters, so only the first replica saves. The optimizer's
            // states of f64 weights are f64 as well, so one list holds the weights and the states.
            if let Some(folder) = save.filter(|_| step + 1 == SAVED && data.rank() == 0) {
                weights::save(tensor, &[params.clone(), adamw.state()?].concat(), folder)?;
            }
        }
        Ok(curve)
    })?;
    Ok(ranks.swap_remove(0))
}

/// Returns an error if a loss differs too much from the expected one.
fn compare(name: &str, losses: &[f64], want: &[f64]) -> Result<()> {
    let difference = worst(losses, want);
    let [first, last] = [losses[0], losses[losses.len() - 1]];
    println!("{name}: loss {first:.4} to {last:.4}, largest difference {difference:.1e}");
    if difference <= BOUND {
        Ok(())
    } else {
        Err(Error::invalid("vit", format!("the losses of {name} differ by {difference:.1e}")))
    }
}

fn run(folder: &Path) -> Result<()> {
    let one = train([1, 1], 0..STEPS, None, None)?;
    let [first, last] = [one[0], one[one.len() - 1]];
    println!("1 x 1: loss {first:.4} to {last:.4}");
    // The comparison is false for NaN, so a NaN loss is an error too.
    let falls = last < first / 2.0;
    if !falls {
        return Err(Error::invalid("vit", format!("the loss goes from {first} to {last}")));
    }
    // The sizes need not be divisible by the number of ranks: 3 ranks share 4 heads, and 4 ranks
    // share 3 classes.
    for mesh @ [dp, tp] in [[1, 2], [1, 3], [1, 4], [2, 2]] {
        compare(&format!("{dp} x {tp}"), &train(mesh, 0..STEPS, None, Some(folder))?, &one)?;
    }
    let saved = weights::Checkpoint::open(folder)?;
    let rest = train([2, 1], SAVED..STEPS, Some(&saved), None)?;
    compare("2 x 1, from step 20 of 2 x 2", &rest, &one[SAVED as usize..])
}

fn main() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("shardwise-vit-{}", std::process::id()));
    let outcome = run(&folder);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|error| Error::io(&folder, &error))?;
    }
    outcome
}
