//! Layers and models on MPI ranks have the bits of the same number of thread ranks. Other tests
//! compare thread ranks with the reference.

use half::{bf16, f16};
use shardwise::{
    Result, Tensor,
    comm::{Group, Overlap},
    device::{Cpu, Element},
    kernels::{Activation, AttentionChoices, Format, NormKind},
    launch,
    models::{Decoder, ModelConfig},
    parallel::{
        AttentionConfig, BlockConfig, DTensor, Layer, ResidualStream, ScatterSequence, TransformerBlock,
    },
    rng::Philox,
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::{Param, Random, WeightSource, Weights},
    weights::{Checkpoint, Quantization},
};

fn bits<T: Element>(tensor: &Tensor<T>, to: &mut Vec<u64>) -> Result<()> {
    to.extend(tensor.to_vec()?.into_iter().map(|value| value.to_f64().to_bits()));
    Ok(())
}

fn gradient_bits<T: Element>(param: &Param<T, Cpu>, to: &mut Vec<u64>) -> Result<()> {
    if let Some(gradient) = param.grad() {
        to.extend(gradient.to_vec()?.into_iter().map(|value| Element::to_f64(value).to_bits()));
    }
    Ok(())
}

/// Runs the same program on this process's rank and on thread ranks, and compares the bits.
#[track_caller]
fn as_threads(group: &Group<Cpu>, program: impl Fn(&Group<Cpu>) -> Result<Vec<u64>> + Sync) -> Result<()> {
    let (reduction, off) = (group.reduction(), Overlap::Off);
    let want =
        launch::threads(group.size(), |world| program(&world.with_reduction(reduction).with_overlap(off)))?;
    let got = program(group)?;
    assert!(got.len() > 10, "the program has no results");
    assert_eq!(got, want[group.rank()]);
    Ok(())
}

fn config(gated: bool) -> BlockConfig {
    BlockConfig::new(
        AttentionConfig::new(10, 9)
            .with_kv_heads(3)
            .with_head_dim(4)
            .with_choices(AttentionChoices::CAUSAL)
            .with_qkv_bias(!gated)
            .with_out_bias(!gated),
        13,
        if gated { Activation::Silu } else { Activation::GeluTanh },
        if gated { NormKind::RmsNorm { eps: 0.1 } } else { NormKind::LayerNorm { eps: 0.1 } },
    )
    .with_gate(gated)
    .with_mlp_bias(!gated)
}

/// Runs a layer forward and backward on 700 tokens. Some payloads are small enough to be sent with
/// the call, and others are not.
fn step<S: ResidualStream, T: Element, L: Layer<T, Cpu, In = S, Out = S>>(
    group: &Group<Cpu>,
    layer: L,
    spread: impl Fn(DTensor<Replicated, T>) -> Result<DTensor<S, T>>,
) -> Result<Vec<u64>> {
    let random = |name| {
        let stream = Philox::named(2, name);
        let values: Vec<T> = (0..7000).map(|at| T::from_f64(stream.normal(at))).collect();
        spread(DTensor::replicated(group, Tensor::from_slice(group.device(), [700, 10], &values)?)?)
    };
    let (x, dy) = (random("x")?.with_sequences(Sequences::packed([300, 400]))?, random("dy")?);
    let mut all = Vec::new();
    let (y, saved) = layer.forward(x)?;
    let dx = layer.backward(saved, dy)?;
    bits(y.local(), &mut all)?;
    bits(dx.local(), &mut all)?;
    layer.params().iter().try_for_each(|param| gradient_bits(param, &mut all))?;
    Ok(all)
}

fn block<S: ResidualStream, T: Element>(
    group: &Group<Cpu>,
    gated: bool,
    spread: impl Fn(DTensor<Replicated, T>) -> Result<DTensor<S, T>>,
) -> Result<Vec<u64>> {
    let source = Random::normal(1, 0.3);
    let (weights, config) = (Weights::new(&source), config(gated));
    let layer = TransformerBlock::<S, T, Cpu>::load(group, &weights, &config)?;
    step(group, layer, spread)
}

fn blocks_of<T: Element>(world: &Group<Cpu>) -> Result<()> {
    for gated in [false, true] {
        as_threads(world, |group| block::<Replicated, T>(group, gated, Ok))?;
        as_threads(world, |group| {
            block::<Shard<0>, T>(group, gated, |x| {
                Ok(Layer::<T, Cpu>::forward(&ScatterSequence::even(), x)?.0)
            })
        })?;
    }
    Ok(())
}

pub(crate) fn blocks(world: &Group<Cpu>) -> Result<()> {
    blocks_of::<f64>(world)?;
    blocks_of::<f32>(world)?;
    blocks_of::<bf16>(world)?;
    blocks_of::<f16>(world)
}

/// In 1, 3 and 100 chunks the bits are those of the thread ranks' unchunked collectives.
pub(crate) fn chunks(world: &Group<Cpu>) -> Result<()> {
    for overlap in [Overlap::Chunks(1), Overlap::Chunks(3), Overlap::Chunks(100)] {
        let group = world.with_overlap(overlap);
        blocks_of::<f32>(&group)?;
        blocks_of::<bf16>(&group)?;
        blocks_of::<f64>(&group.with_reduction(Reduction::Invariant { blocks: 4 }))?;
    }
    Ok(())
}

/// y and dX on this many processes have the bits of one thread rank, in both residual streams.
pub(crate) fn invariant(world: &Group<Cpu>) -> Result<()> {
    fn same<T: Element>(world: &Group<Cpu>) -> Result<()> {
        // Nine query heads in eight blocks.
        let reduction = Reduction::Invariant { blocks: 8 };
        for gated in [false, true] {
            let one = launch::threads(1, |alone| {
                block::<Replicated, T>(&alone.with_reduction(reduction), gated, Ok)
            })?;
            let got = block::<Replicated, T>(&world.with_reduction(reduction), gated, Ok)?;
            // The values after y and dX are gradients of this rank's weight shards.
            assert_eq!(got[..14_000], one[0][..14_000], "{} on {world:?}", T::DTYPE);
            let group = world.with_reduction(reduction).with_overlap(Overlap::Chunks(2));
            let part = block::<Shard<0>, T>(&group, gated, |x| {
                Ok(Layer::<T, Cpu>::forward(&ScatterSequence::even(), x)?.0)
            })?;
            let rows = Shard::<0>::local_rows(&group, 700)?;
            let (own, len) = (rows.start * 10..rows.end * 10, rows.len() * 10);
            assert_eq!(part[..len], one[0][own.clone()], "{} y on {world:?}", T::DTYPE);
            assert_eq!(part[len..2 * len], one[0][7000..14_000][own], "{} dX on {world:?}", T::DTYPE);
        }
        Ok(())
    }
    same::<f32>(world)?;
    same::<f64>(world)?;
    same::<bf16>(world)
}

pub(crate) fn models(world: &Group<Cpu>) -> Result<()> {
    let folder = shardwise_tests::root().join("tests/data/llama");
    let ModelConfig::Decoder(config) = ModelConfig::read(&folder)? else { panic!("llama is a decoder") };
    let run = |group: &Group<Cpu>, source: &dyn WeightSource| {
        let model = Decoder::<Replicated, f32, Cpu>::load(group, source, &config)?;
        let ids: Vec<u32> = (0..24).map(|at| at * 23 % 591).collect();
        let mut all = Vec::new();
        let (logits, saved) = model.forward(&ids, Sequences::one(24))?;
        bits(logits.local(), &mut all)?;
        model.backward(saved, logits)?;
        model.params().iter().try_for_each(|param| gradient_bits(param, &mut all))?;
        Ok(all)
    };
    let checkpoint = Checkpoint::open(&folder)?;
    as_threads(world, |group| run(group, &checkpoint))?;
    let quantized = Quantization::new(&checkpoint, Format::Q8_0)?;
    as_threads(world, |group| run(group, &quantized))
}
