//! Trains a small transformer block on 1 to 8 tensor-parallel ranks, with and without sequence
//! parallelism, and prints a hash of its outputs and gradient norms. With `Reduction::Invariant`
//! the hash is the same at every number of ranks. With `Reduction::Fast` it is not.
//!
//! `cargo run --release --bin same_bits`

use shardwise::{
    Error, Result, Tensor,
    comm::Group,
    device::Cpu,
    kernels::{Activation, AttentionChoices, NormKind},
    launch,
    optim::{AdamW, clip_scale, grad_norm},
    parallel::{AttentionConfig, BlockConfig, DTensor, Layer, ResidualStream, TransformerBlock},
    reference::worst,
    rng::Philox,
    shard::{Reduction, Replicated, Shard},
    tensor::{Random, Weights},
};
use std::hash::{DefaultHasher, Hash, Hasher};

const TOKENS: usize = 48;
const HIDDEN: usize = 96;
const HEADS: usize = 12;
const BLOCKS: usize = 8;

fn config() -> BlockConfig {
    BlockConfig::new(
        AttentionConfig::new(HIDDEN, HEADS).with_kv_heads(4).with_choices(AttentionChoices::CAUSAL),
        4 * HIDDEN,
        Activation::GeluTanh,
        NormKind::LayerNorm { eps: 1e-5 },
    )
    .with_mlp_bias(true)
}

/// Returns this rank's rows of a random tensor.
fn random<S: ResidualStream>(world: &Group<Cpu>, name: &str) -> Result<DTensor<S>> {
    let stream = Philox::named(1, name);
    let rows = S::local_rows(world, TOKENS)?;
    let values: Vec<f32> =
        (rows.start * HIDDEN..rows.end * HIDDEN).map(|at| stream.normal(at as u64) as f32).collect();
    S::of_local(world, TOKENS, Tensor::from_slice(world.device(), [rows.len(), HIDDEN], &values)?)
}

fn fail(reason: &str) -> Error {
    Error::Invalid { op: "same_bits", reason: reason.into() }
}

/// Returns the hash of the outputs and gradient norms of some training steps. Returns an error if a
/// step does not change the outputs.
fn train<S: ResidualStream>(ranks: usize, reduction: Reduction) -> Result<u64> {
    let outcomes = launch::threads(ranks, |world| {
        let world = world.with_reduction(reduction);
        let source = Random::normal(1, 0.1);
        let block = TransformerBlock::<S, f32, Cpu>::load(&world, &Weights::new(&source), &config())?;
        let (x, target) = (random::<S>(&world, "x")?, random::<S>(&world, "target")?);
        let (mut optimizer, mut outputs, mut norms) = (AdamW::default(), Vec::new(), Vec::new());
        let params = block.params();
        for _ in 0..5 {
            for param in &params {
                param.zero_grad();
            }
            let (y, saved) = block.forward(x.clone())?;
            // The loss is Σ y · target, so its gradient is `target`.
            block.backward(saved, target.clone())?;
            let norm = grad_norm(&params, &[&world])?;
            optimizer.step(&params, 1e-2, clip_scale(norm, 1.0)?)?;
            outputs.push(y.into_local().to_vec()?);
            norms.push(norm);
        }
        Ok((outputs, norms))
    })?;
    let mut hash = DefaultHasher::new();
    let mut before = vec![0.0; TOKENS * HIDDEN];
    for (step, norm) in outcomes[0].1.iter().enumerate() {
        // With sequence parallelism each rank has some rows of one tensor. Without it each rank has
        // a copy of all rows.
        let mut rows: Vec<f32> = outcomes.iter().flat_map(|(outputs, _)| &outputs[step]).copied().collect();
        let copies = rows.split_off(TOKENS * HIDDEN);
        if outcomes.iter().any(|(_, norms)| norms[step] != *norm)
            || copies.chunks(rows.len()).any(|copy| copy != rows)
        {
            return Err(fail("the ranks' numbers differ"));
        }
        let moved = worst(&rows, &before);
        if !(norm.is_normal() && moved.is_normal()) {
            return Err(fail(&format!(
                "step {step} moved the outputs by {moved:e}, with a gradient of {norm:e}"
            )));
        }
        norm.to_bits().hash(&mut hash);
        rows.iter().for_each(|value| value.to_bits().hash(&mut hash));
        before = rows;
    }
    Ok(hash.finish())
}

fn main() -> Result<()> {
    let invariant = Reduction::Invariant { blocks: BLOCKS };
    println!("{:>5}  {:<16}  {:<16}  {:<16}", "ranks", "invariant", "with Shard<0>", "fast");
    let (mut hashes, mut fasts) = (Vec::new(), Vec::new());
    for ranks in 1..=BLOCKS {
        let own = [train::<Replicated>(ranks, invariant)?, train::<Shard<0>>(ranks, invariant)?];
        let fast = train::<Replicated>(ranks, Reduction::Fast)?;
        println!("{ranks:>5}  {:016x}  {:016x}  {fast:016x}", own[0], own[1]);
        hashes.extend(own);
        fasts.push(fast);
    }
    if hashes.iter().any(|hash| *hash != hashes[0]) {
        return Err(fail("the bits differ"));
    }
    // Returns an error if fast sums have the same bits too, because then the comparison detects
    // nothing.
    if fasts.iter().all(|hash| *hash == fasts[0]) {
        return Err(fail(
            "fast sums have the same bits at every size too, so the comparison detects nothing",
        ));
    }
    println!("the same bits at every size");
    Ok(())
}
