//! Trains a small transformer block on 1 to 8 tensor-parallel ranks, with and without sequence parallelism, and prints a
//! hash of all its numbers: with `Reduction::Invariant` they have the same bits at every size, with `Reduction::Fast` not.
//!
//! `cargo run --release --example same_bits`

use shardwise::{
    Result, Tensor,
    comm::Group,
    device::Cpu,
    kernels::{Activation, NormKind},
    launch,
    optim::{AdamW, clip_scale, grad_norm},
    parallel::{
        AttentionConfig, BlockConfig, BlockNames, DTensor, Layer, NormPlacement, ParallelMlp, Stream,
        TransformerBlock,
    },
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
    BlockConfig {
        attention: AttentionConfig { causal: true, kv_heads: 4, ..AttentionConfig::new(HIDDEN, HEADS) },
        ffn: 4 * HIDDEN,
        activation: Activation::GeluTanh,
        mlp_bias: true,
        norm: NormKind::LayerNorm { eps: 1e-5 },
        placement: NormPlacement::Pre,
        names: BlockNames::default(),
    }
}

/// The rows of a random tensor that a rank holds.
fn random<S: Stream>(world: &Group<Cpu>, name: &str) -> Result<DTensor<S>> {
    let stream = Philox::named(1, name);
    let rows = S::local_rows(world, TOKENS)?;
    let values: Vec<f32> =
        (rows.start * HIDDEN..rows.end * HIDDEN).map(|at| stream.normal(at as u64) as f32).collect();
    S::of_local(world, TOKENS, Tensor::from_slice(world.device(), [rows.len(), HIDDEN], &values)?)
}

/// The hash of the outputs and gradient norms of some steps of training.
fn train<S: Stream>(ranks: usize, reduction: Reduction) -> Result<u64> {
    let outcomes = launch::threads(ranks, |world| {
        let world = world.with_reduction(reduction);
        let source = Random::normal(1, 0.1);
        let mut block = TransformerBlock::<S, ParallelMlp<S, f32, Cpu>, f32, Cpu>::load(
            &world,
            &Weights::new(&source),
            &config(),
        )?;
        let (x, target) = (random::<S>(&world, "x")?, random::<S>(&world, "target")?);
        let (mut optimizer, mut outputs, mut norms) = (AdamW::default(), Vec::new(), Vec::new());
        for _ in 0..5 {
            block.visit(&mut |param| {
                param.zero_grad();
                Ok(())
            })?;
            let (y, saved) = block.forward(&x)?;
            // The gradient of y · target.
            block.backward(saved, &target)?;
            let norm = grad_norm(|f| block.visit(f), &[&world])?;
            optimizer.step(|f| block.visit(f), 1e-2, clip_scale(norm, 1.0)?)?;
            outputs.push(y.into_local().to_vec()?);
            norms.push(norm.to_bits());
        }
        Ok((outputs, norms))
    })?;
    let mut hash = DefaultHasher::new();
    outcomes[0].1.hash(&mut hash);
    for step in 0..outcomes[0].0.len() {
        // With sequence parallelism the ranks have the rows of one tensor; without, each has all of them.
        let rows: Vec<u32> = outcomes
            .iter()
            .flat_map(|(outputs, _)| outputs[step].iter().map(|value| value.to_bits()))
            .collect();
        rows[..TOKENS * HIDDEN].hash(&mut hash);
    }
    Ok(hash.finish())
}

fn main() -> Result<()> {
    let invariant = Reduction::Invariant { blocks: BLOCKS };
    println!("{:>5}  {:<16}  {:<16}  {:<16}", "ranks", "invariant", "with Shard<0>", "fast");
    let mut hashes = Vec::new();
    for ranks in 1..=BLOCKS {
        let own = [train::<Replicated>(ranks, invariant)?, train::<Shard<0>>(ranks, invariant)?];
        let fast = train::<Replicated>(ranks, Reduction::Fast)?;
        println!("{ranks:>5}  {:016x}  {:016x}  {fast:016x}", own[0], own[1]);
        hashes.extend(own);
    }
    match hashes.iter().all(|hash| *hash == hashes[0]) {
        true => println!("the same bits at every size"),
        false => return Err(shardwise::Error::Invalid { op: "same_bits", reason: "the bits differ".into() }),
    }
    Ok(())
}
