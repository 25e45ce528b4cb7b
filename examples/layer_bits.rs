//! Prints hashes of the outputs and gradients of every layer. Each line is for one combination of
//! sizes, layer, residual stream, element type and reduction. It has one hash for each number of
//! ranks from 1 to 8. A refactoring must not change the listing. Hashes differ between processors,
//! because processors round sums differently.
//!
//! `cargo run --release --bin layer_bits > after.txt` writes the listing.
//! `scripts/same_layers.sh COMMIT` compares the listing with that of a commit.

use half::bf16;
use shardwise::{
    Error, Result, Tensor,
    comm::{Group, Overlap},
    device::{Cpu, Element},
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    launch,
    ops::{RopeConfig, RopeScaling},
    optim::grad_norm,
    parallel::{
        AttentionConfig, Bias, BlockConfig, ColumnLinear, ColumnParallelLinear, Columns, DTensor, Layer,
        MlpNames, NormPlacement, Normalize, ParallelAttention, ParallelMlp, PositionEmbedding, QkNorm,
        QkvLayout, ResidualStream, RowParallelLinear, TransformerBlock, VocabParallelCrossEntropy,
        VocabParallelEmbedding,
    },
    rng::Philox,
    shard::{Heads, Placement, Reduction, Replicated, Sequences, Shard},
    tensor::{Param, Random, Weights},
};
use std::hash::{DefaultHasher, Hash, Hasher};

const RANKS: usize = 8;

/// The sizes of one set of layers.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    words: usize,
}

/// The small sizes give uneven shards, and key/value heads that several ranks hold. The large sizes
/// give products for blocked kernels.
const SIZES: [(&str, Sizes); 2] = [
    ("small", Sizes { tokens: 37, hidden: 24, ffn: 41, heads: 9, kv_heads: 3, head_dim: 6, words: 29 }),
    ("large", Sizes { tokens: 150, hidden: 96, ffn: 260, heads: 12, kv_heads: 4, head_dim: 16, words: 130 }),
];

/// The hash of all bits that a rank has computed, and the number of values that are not 0.
#[derive(Default)]
struct Bits {
    hash: DefaultHasher,
    count: usize,
}

impl Bits {
    fn push<T: Element>(&mut self, tensor: &Tensor<T>) -> Result<()> {
        for value in tensor.to_vec()? {
            let value = value.to_f64();
            if !value.is_finite() {
                return Err(Error::Invalid { op: "layer_bits", reason: format!("a value is {value}") });
            }
            value.to_bits().hash(&mut self.hash);
            self.count += usize::from(value != 0.0);
        }
        Ok(())
    }

    fn push_grad<T: Element>(&mut self, param: &Param<T, Cpu>) -> Result<()> {
        param.settle()?;
        let name = param.name();
        let missing = || Error::Invalid { op: "layer_bits", reason: format!("{name} has no gradient") };
        self.push(&param.grad().ok_or_else(missing)?)
    }
}

/// Returns this rank's rows of a random tensor.
fn random<S: ResidualStream, T: Element>(
    group: &Group<Cpu>,
    name: &str,
    tokens: usize,
    cols: usize,
) -> Result<DTensor<S, T>> {
    let (stream, rows) = (Philox::named(1, name), S::local_rows(group, tokens)?);
    let value = |at: usize| T::from_f64(stream.normal(at as u64));
    let values: Vec<T> = (rows.start * cols..rows.end * cols).map(value).collect();
    let lens = [tokens / 3, tokens - tokens / 3];
    S::of_local(group, tokens, Tensor::from_slice(group.device(), [rows.len(), cols], &values)?)?
        .with_sequences(Sequences::packed(lens))
}

/// Runs a layer forward and backward twice, so that gradients accumulate. The output is its own
/// gradient.
fn two_steps<T: Element, L: Layer<T, Cpu>>(
    group: &Group<Cpu>,
    layer: L,
    input: impl Fn(&str) -> Result<DTensor<L::In, T>>,
) -> Result<Bits>
where
    L::Out: Placement<Dual = L::Out>,
{
    let mut bits = Bits::default();
    for name in ["first", "second"] {
        let (y, saved) = layer.forward(input(name)?)?;
        bits.push(y.local())?;
        bits.push(layer.backward(saved, y)?.local())?;
    }
    let params = layer.params();
    params.iter().try_for_each(|param| bits.push_grad(param))?;
    grad_norm(&params, &[group])?.to_bits().hash(&mut bits.hash);
    Ok(bits)
}

fn attention_config(sizes: &Sizes) -> AttentionConfig {
    let (dim, pairs) = (sizes.head_dim, RopePairs::Halves);
    let rope = RopeConfig { dim, base: 1e4, pairs, scaling: RopeScaling::None };
    let qk_norm = QkNorm::new(1e-6, "q_norm", "k_norm");
    AttentionConfig::new(sizes.hidden, sizes.heads)
        .with_kv_heads(sizes.kv_heads)
        .with_head_dim(sizes.head_dim)
        .with_choices(AttentionChoices::CAUSAL)
        .with_rope(rope)
        .with_qk_norm(qk_norm)
        .with_qkv_bias(true)
}

fn block_config(sizes: &Sizes, placement: NormPlacement) -> BlockConfig {
    BlockConfig::new(
        attention_config(sizes).with_qk_norm(None).with_out_bias(true),
        sizes.ffn,
        Activation::GeluTanh,
        NormKind::LayerNorm { eps: 1e-5 },
    )
    .with_mlp_bias(true)
    .with_placement(placement)
}

/// Runs an embedding with positions, its tied head and a loss, forward and backward.
fn vocabulary<S: ResidualStream, T: Element>(
    group: &Group<Cpu>,
    weights: &Weights<'_>,
    sizes: &Sizes,
) -> Result<Bits> {
    let (mut bits, hidden) = (Bits::default(), sizes.hidden);
    let embedding = VocabParallelEmbedding::<S, T, Cpu>::load(group, weights, sizes.words, hidden)?;
    let head = embedding.tied_head();
    let positions =
        PositionEmbedding::<S, T, Cpu>::load(group, &weights.at("positions"), sizes.tokens, hidden)?;
    let ids: Vec<u32> = (0..sizes.tokens).map(|at| ((at * 7 + 3) % sizes.words) as u32).collect();
    let sequences = Sequences::packed([sizes.tokens / 3, sizes.tokens - sizes.tokens / 3]);
    let (x, rows) = embedding.forward(&ids, sequences)?;
    let (x, places) = positions.forward(x)?;
    let (logits, saved) = head.forward(x)?;
    let loss = VocabParallelCrossEntropy { z: 1e-4, ..Default::default() };
    let (losses, context) = loss.forward(logits, &ids)?;
    bits.push(losses.rows())?;
    let dlogits = loss.backward(context, 1.0 / sizes.tokens as f64)?;
    let dx = head.backward(saved, dlogits)?;
    let dx = positions.backward(places, dx)?;
    bits.push(dx.local())?;
    embedding.backward(&rows, dx)?;
    embedding.params().iter().try_for_each(|param| bits.push_grad(param))?;
    positions.params().iter().try_for_each(|param| bits.push_grad(param))?;
    Ok(bits)
}

/// Runs the layer `name` with these sizes on this rank and hashes this rank's results.
fn layer<S: ResidualStream, T: Element>(name: &str, group: &Group<Cpu>, sizes: &Sizes) -> Result<Bits> {
    let source = Random::normal(1, 0.1);
    let weights = &Weights::new(&source);
    let (hidden, ffn, f) = (sizes.hidden, sizes.ffn, Activation::GeluTanh);
    let input = |name: &str| random::<S, T>(group, name, sizes.tokens, hidden);
    let (names, layout) = (MlpNames::default(), QkvLayout::separate("q", "k", "v"));
    let heads = || -> Result<Heads> {
        let query = group.partition("attention", "query heads", sizes.heads, 1)?;
        Heads::with_partition(query, sizes.kv_heads, sizes.head_dim)
    };
    match name {
        "column" | "column, chunks" => {
            let columns = Columns::even(group, ffn)?;
            let layer = ColumnParallelLinear::<S, T, Cpu>::load(group, weights, hidden, &columns, Bias::Add)?;
            two_steps(group, layer, input)
        }
        "merged" => {
            let columns = Columns::merged(group, &["a", "b"], ffn)?;
            let layer =
                ColumnParallelLinear::<S, T, Cpu>::load(group, weights, hidden, &columns, Bias::None)?;
            two_steps(group, layer, input)
        }
        "qkv" => {
            let columns = Columns::qkv(group, &heads()?, &layout)?;
            let layer = ColumnParallelLinear::<S, T, Cpu>::load(group, weights, hidden, &columns, Bias::Add)?;
            two_steps(group, layer, input)
        }
        "fork" => {
            let columns = Columns::separate_qkv(group, &heads()?, &layout)?;
            let load = |columns| ColumnLinear::<T, Cpu>::load(group, weights, hidden, columns, Bias::Add);
            let layers = columns.iter().map(load).collect::<Result<_>>()?;
            two_steps(group, ColumnParallelLinear::<S, T, Cpu>::concat(layers)?, input)
        }
        "row" => {
            let partition = group.partition("row", "features", hidden, 1)?;
            let row = RowParallelLinear::<S, T, Cpu>::load(group, weights, &partition, ffn, true)?;
            let whole = |name: &str| random::<Replicated, T>(group, name, sizes.tokens, hidden);
            two_steps(group, row, |name| whole(name)?.scatter::<1>(&partition))
        }
        "norm" => {
            let kind = NormKind::LayerNorm { eps: 1e-5 };
            two_steps(group, Normalize::<S, T, Cpu>::load(group, weights, kind, hidden)?, input)
        }
        "attention" => {
            let config = attention_config(sizes);
            let layer = ParallelAttention::<S, T, Cpu>::load(group, weights, &layout, "o", &config)?;
            two_steps(group, layer, input)
        }
        "mlp" | "mlp, chunks" => {
            let layer = ParallelMlp::<S, T, Cpu>::load(group, weights, &names, (hidden, ffn), f, true)?;
            two_steps(group, layer, input)
        }
        "gated mlp" => {
            let f = Activation::Silu;
            let layer = ParallelMlp::<S, T, Cpu>::load_gated(group, weights, &names, (hidden, ffn), f, true)?;
            two_steps(group, layer, input)
        }
        "pre block" | "post block" => {
            let pre = name == "pre block";
            let config = block_config(sizes, if pre { NormPlacement::Pre } else { NormPlacement::Post });
            type Block<S, T> = TransformerBlock<S, T, Cpu>;
            two_steps(group, Block::<S, T>::load(group, weights, &config)?, input)
        }
        _ => vocabulary::<S, T>(group, weights, sizes),
    }
}

const LAYERS: [&str; 14] = [
    "column",
    "column, chunks",
    "merged",
    "qkv",
    "fork",
    "row",
    "norm",
    "attention",
    "mlp",
    "mlp, chunks",
    "gated mlp",
    "pre block",
    "post block",
    "vocabulary",
];

/// Prints the hashes of one layer on 1 to 8 ranks. Each hash covers the results of all ranks.
fn print<S: ResidualStream, T: Element>(
    name: &str,
    what: &str,
    sizes: &Sizes,
    reduction: Reduction,
) -> Result<()> {
    let mut line =
        format!("{what:<5} {name:<14} {:<9} {:<4}", S::SHARD_DIM.map_or("whole", |_| "rows"), T::DTYPE);
    line += if reduction == Reduction::Fast { " fast     " } else { " invariant" };
    for ranks in 1..=RANKS {
        let overlap = if name.ends_with("chunks") { Overlap::Chunks(2) } else { Overlap::Off };
        let all = launch::threads(ranks, |world| {
            let bits = layer::<S, T>(name, &world.with_reduction(reduction).with_overlap(overlap), sizes)?;
            Ok((bits.hash.finish(), bits.count))
        })?;
        if all.iter().any(|(_, count)| *count == 0) {
            return Err(Error::Invalid { op: "layer_bits", reason: format!("{name} computed zeros only") });
        }
        let mut hash = DefaultHasher::new();
        all.hash(&mut hash);
        line += &format!(" {:016x}", hash.finish());
    }
    println!("{line}");
    Ok(())
}

fn all<T: Element>() -> Result<()> {
    for (what, sizes) in &SIZES {
        for name in LAYERS {
            for reduction in [Reduction::Fast, Reduction::Invariant { blocks: RANKS }] {
                print::<Replicated, T>(name, what, sizes, reduction)?;
                print::<Shard<0>, T>(name, what, sizes, reduction)?;
            }
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    all::<f32>()?;
    all::<bf16>()?;
    all::<f64>()
}
