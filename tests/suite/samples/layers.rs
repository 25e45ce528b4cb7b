//! Every operator with parameters, on both residual streams.

use super::{Batch, BoxModel, Each, Load, Model, brute_force, of_layer, replicated, shapes, together};
use crate::{
    dev::Dev,
    support::{Spread, arrays, random, uneven},
};
use shardwise::{
    Result,
    comm::Group,
    device::Element,
    kernels::{Activation, AttentionChoices, NormKind},
    parallel::{
        Activate, AddBias, Attention, AttentionConfig, Bias, BlockConfig, ColumnLinear, ColumnParallelLinear,
        Columns, CopyTo, Gate, GatherFrom, GatherSequence, Layer, MeanPool, MlpNames, NormPlacement,
        Normalize, ParallelAttention, ParallelMlp, PositionEmbedding, QkNorm, QkvLayout, Recompute,
        ReduceFrom, ReduceScatterSequence, ReplicatedLinear, Residual, ResidualStream, RowLinear,
        RowParallelLinear, ScatterSequence, ScatterTo, TransformerBlock,
    },
    shard::{Heads, Reduction, Replicated, Sequences, Shard},
    tensor::{Arrays, Param, Random, Weights},
};

const WORLDS: [usize; 3] = [1, 2, 3];
/// The features of the stream, and those between two linear layers.
const HIDDEN: usize = 7;
const WIDE: usize = 11;

/// A function that loads a layer.
type LoadLayer = fn(&Group<Dev>, &Weights<'_>) -> Result<BoxModel<f64>>;

/// Compares layers for all shapes of microbatches. Returns the number of comparisons.
fn check(layers: &[(&str, LoadLayer)], [inputs, outputs]: [usize; 2]) -> usize {
    let source = Random::normal(1, 0.5);
    let mut count = 0;
    for sequences in shapes() {
        let batch = Batch::random(&sequences, 9, [inputs, outputs]);
        for (name, layer) in layers {
            let load: Load<'_, f64> = &|group| layer(group, &Weights::new(&source));
            count += brute_force(name, load, &batch, &WORLDS);
        }
    }
    count
}

fn linear_layers<S: ResidualStream + Spread>() -> usize {
    let column: LoadLayer = |group, weights| {
        let columns = Columns::even(group, WIDE)?;
        let up = ColumnParallelLinear::<S, f64, Dev>::load(group, weights, HIDDEN, &columns, Bias::Add)?;
        Ok(of_layer(up.then(GatherFrom::<1>)))
    };
    let column_alone: LoadLayer = |group, weights| {
        let columns = Columns::from_partition(group, uneven(5, WIDE, group.size()))?;
        let up = ColumnParallelLinear::<S, f64, Dev>::load(group, weights, HIDDEN, &columns, Bias::None)?;
        Ok(of_layer(up.then(GatherFrom::<1>)))
    };
    // Two weights with the same input and with biases. A rank's columns of one follow those of the
    // other, as the gate takes them.
    let two: LoadLayer = |group, weights| {
        let columns = Columns::even(group, WIDE)?;
        let load = |name| ColumnLinear::load(group, &weights.at(name), HIDDEN, &columns, Bias::Add);
        let both = ColumnParallelLinear::<S, f64, Dev>::concat(vec![load("gate")?, load("up")?])?;
        Ok(of_layer(both.then(Gate::new(Activation::Silu)).then(GatherFrom::<1>)))
    };
    let count = check(&[("column", column), ("column without bias", column_alone)], [HIDDEN, WIDE])
        + check(&[("two weights", two)], [HIDDEN, WIDE]);
    let row = |bias: bool| -> LoadLayer {
        if bias {
            |group, weights| {
                let inputs = uneven(2, WIDE, group.size());
                let down = RowParallelLinear::<S, f64, Dev>::load(group, weights, &inputs, HIDDEN, true)?;
                Ok(of_layer(ScatterTo::<1>::new(inputs).then(down)))
            }
        } else {
            |group, weights| {
                let inputs = group.even_partition(WIDE)?;
                let down = RowParallelLinear::<S, f64, Dev>::load(group, weights, &inputs, HIDDEN, false)?;
                Ok(of_layer(ScatterTo::<1>::new(inputs).then(down)))
            }
        }
    };
    count + check(&[("row", row(true)), ("row without bias", row(false))], [WIDE, HIDDEN])
}

#[test]
fn linear_layers_have_the_gradients_of_each_sample() {
    assert_eq!(linear_layers::<Replicated>() + linear_layers::<Shard<0>>(), 2 * 5 * 6 * 3);
}

/// The chains of mappings that the fused layers replace.
#[test]
fn layers_between_mappings_have_the_gradients_of_each_sample() {
    let whole: LoadLayer = |group, weights| {
        let columns = Columns::even(group, WIDE)?;
        let up = ColumnLinear::<f64, Dev>::load(group, &weights.at("up"), HIDDEN, &columns, Bias::Add)?;
        let down = RowLinear::load(group, &weights.at("down"), columns.partition(), HIDDEN)?;
        Ok(of_layer(CopyTo.then(up).then(Activate::new(Activation::GeluErf)).then(down).then(ReduceFrom)))
    };
    let tokens: LoadLayer = |group, weights| {
        let columns = Columns::even(group, WIDE)?;
        let up = ColumnLinear::<f64, Dev>::load(group, &weights.at("up"), HIDDEN, &columns, Bias::Add)?;
        let down = RowLinear::load(group, &weights.at("down"), columns.partition(), HIDDEN)?;
        let act = Activate::new(Activation::GeluErf);
        Ok(of_layer(GatherSequence.then(up).then(act).then(down).then(ReduceScatterSequence)))
    };
    let replicated: LoadLayer = |group, weights| {
        let layer = |name: &str, bias: bool| {
            ReplicatedLinear::<f64, Dev>::load(group, &weights.at(name), (HIDDEN, HIDDEN), bias)
        };
        Ok(of_layer(layer("one", true)?.then(layer("two", false)?)))
    };
    let scattered: LoadLayer = |group, weights| {
        let layer = ReplicatedLinear::<f64, Dev>::load(group, weights, (HIDDEN, HIDDEN), true)?;
        let bias = AddBias::<Shard<0>, f64, Dev>::load(group, &weights.at("more"), HIDDEN)?;
        Ok(of_layer(layer.then(ScatterSequence::even()).then(bias)))
    };
    let layers =
        [("mappings", whole), ("tokens", tokens), ("replicated", replicated), ("scattered", scattered)];
    assert_eq!(check(&layers, [HIDDEN; 2]), 4 * 6 * 3);
}

fn stream_layers<S: ResidualStream + Spread>() -> usize {
    let rms: LoadLayer = |group, weights| {
        let kind = NormKind::RmsNorm { eps: 1e-3 };
        Ok(of_layer(Normalize::<S, f64, Dev>::load(group, weights, kind, HIDDEN)?))
    };
    let layer_norm: LoadLayer = |group, weights| {
        let kind = NormKind::LayerNorm { eps: 1e-3 };
        Ok(of_layer(Normalize::<S, f64, Dev>::load(group, weights, kind, HIDDEN)?))
    };
    let bias: LoadLayer =
        |group, weights| Ok(of_layer(AddBias::<S, f64, Dev>::load(group, weights, HIDDEN)?));
    let positions: LoadLayer =
        |group, weights| Ok(of_layer(PositionEmbedding::<S, f64, Dev>::load(group, weights, 5, HIDDEN)?));
    let mlp: LoadLayer = |group, weights| {
        let (names, sizes) = (MlpNames::default(), (HIDDEN, WIDE));
        Ok(of_layer(ParallelMlp::<S, f64, Dev>::load(
            group,
            weights,
            &names,
            sizes,
            Activation::GeluTanh,
            true,
        )?))
    };
    let gated: LoadLayer = |group, weights| {
        let (names, sizes, f) = (MlpNames::default(), (HIDDEN, WIDE), Activation::Silu);
        Ok(of_layer(ParallelMlp::<S, f64, Dev>::load_gated(group, weights, &names, sizes, f, false)?))
    };
    let gated_bias: LoadLayer = |group, weights| {
        let (names, sizes, f) = (MlpNames::default(), (HIDDEN, WIDE), Activation::Silu);
        let mlp = ParallelMlp::<S, f64, Dev>::load_gated(group, weights, &names, sizes, f, true)?;
        let norm = Normalize::load(group, &weights.at("norm"), NormKind::RmsNorm { eps: 1e-3 }, HIDDEN)?;
        Ok(of_layer(Recompute::new(Residual(norm.then(mlp)))))
    };
    let layers = [
        ("rms norm", rms),
        ("layer norm", layer_norm),
        ("bias", bias),
        ("positions", positions),
        ("mlp", mlp),
        ("gated mlp", gated),
        ("recomputed", gated_bias),
    ];
    check(&layers, [HIDDEN; 2])
}

#[test]
fn layers_of_the_stream_have_the_gradients_of_each_sample() {
    assert_eq!(stream_layers::<Replicated>() + stream_layers::<Shard<0>>(), 2 * 7 * 6 * 3);
}

/// (Query heads, key/value heads). Up to three ranks hold a key/value head, or a rank holds one
/// alone and shares another.
const HEADS: [(usize, usize); 5] = [(3, 3), (3, 1), (4, 2), (6, 2), (5, 5)];

fn attention<S: ResidualStream + Spread>(
    (heads, kv): (usize, usize),
    layout: &QkvLayout,
    norm: bool,
    bias: bool,
) -> impl Fn(&Group<Dev>) -> Result<BoxModel<f64>> + Sync {
    let config = AttentionConfig::new(HIDDEN, heads)
        .with_kv_heads(kv)
        .with_head_dim(2)
        .with_choices(AttentionChoices { causal: norm, ..AttentionChoices::default() })
        .with_qk_norm(norm.then(|| QkNorm::new(1e-3, "qn", "kn")))
        .with_qkv_bias(bias)
        .with_out_bias(bias);
    let layout = layout.clone();
    move |group| {
        let source = Random::normal(1, 0.5);
        let weights = Weights::new(&source);
        Ok(of_layer(ParallelAttention::<S, f64, Dev>::load(group, &weights, &layout, "o", &config)?))
    }
}

fn attentions<S: ResidualStream + Spread>() -> usize {
    let mut count = 0;
    for sequences in shapes() {
        let batch = Batch::random(&sequences, 9, [HIDDEN; 2]);
        for (heads, kv) in HEADS {
            let mut layouts = vec![
                QkvLayout::separate("q", "k", "v"),
                QkvLayout::Concatenated("qkv".into()),
                QkvLayout::PerKvGroup("qkv".into()),
            ];
            if heads == kv {
                layouts = vec![QkvLayout::PerHead("qkv".into())];
            }
            for (at, layout) in layouts.iter().enumerate() {
                let what = format!("attention {heads} {kv} {layout:?}");
                let load = attention::<S>((heads, kv), layout, at != 1, at != 2);
                count += brute_force(&what, &load, &batch, &WORLDS);
            }
            // Three layers with normalized heads.
            let load: Load<'_, f64> = &|group| {
                let source = Random::normal(1, 0.5);
                let weights = Weights::new(&source);
                let heads = Heads::new(heads, kv, 2, group.size())?;
                let config = AttentionConfig::new(HIDDEN, heads.query_features().total() / 2)
                    .with_kv_heads(kv)
                    .with_head_dim(2)
                    .with_qk_norm(QkNorm::new(1e-3, "qn", "kn"));
                let layout = QkvLayout::separate("q", "k", "v");
                let load =
                    |columns: &Columns| ColumnLinear::load(group, &weights, HIDDEN, columns, Bias::Add);
                let columns = Columns::separate_qkv(group, &heads, &layout)?;
                let layers = columns.iter().map(load).collect::<Result<_>>()?;
                let qkv = ColumnParallelLinear::<S, f64, Dev>::concat(layers)?;
                let core = Attention::load(group, &weights, &heads, &config)?;
                let (inputs, out) = (heads.query_features(), weights.at("o"));
                let out = RowParallelLinear::<S, f64, Dev>::load(group, &out, &inputs, HIDDEN, false)?;
                Ok(of_layer(qkv.then(core).then(out)))
            };
            count += brute_force(&format!("separate attention {heads} {kv}"), load, &batch, &WORLDS);
        }
    }
    count
}

#[test]
fn attention_has_the_gradients_of_each_sample() {
    // Two layers for each case of as many heads of both kinds, and four for each other case.
    assert_eq!(attentions::<Replicated>() + attentions::<Shard<0>>(), 2 * (2 * 2 + 3 * 4) * 6 * 3);
}

fn blocks<S: ResidualStream + Spread>() -> usize {
    let mut count = 0;
    for (gated, placement) in
        [(false, NormPlacement::Pre), (true, NormPlacement::Pre), (false, NormPlacement::Post)]
    {
        let norm = if gated { NormKind::RmsNorm { eps: 0.1 } } else { NormKind::LayerNorm { eps: 0.1 } };
        let attention = AttentionConfig::new(HIDDEN, 6)
            .with_kv_heads(if gated { 2 } else { 6 })
            .with_head_dim(2)
            .with_choices(AttentionChoices::CAUSAL)
            .with_qkv_bias(!gated)
            .with_out_bias(!gated);
        let config = BlockConfig::new(attention, WIDE, Activation::Silu, norm)
            .with_gate(gated)
            .with_mlp_bias(!gated)
            .with_placement(placement);
        for sequences in shapes() {
            let batch = Batch::random(&sequences, 9, [HIDDEN; 2]);
            for recomputed in [false, true] {
                let load: Load<'_, f64> = &|group| {
                    let source = Random::normal(1, 0.5);
                    let weights = Weights::new(&source);
                    let block = TransformerBlock::<S, f64, Dev>::load(group, &weights, &config)?;
                    Ok(of_layer(Recompute::when(recomputed, block)))
                };
                count += brute_force(&format!("block {gated} {placement:?}"), load, &batch, &WORLDS);
            }
        }
    }
    count
}

#[test]
fn blocks_have_the_gradients_of_each_sample() {
    assert_eq!(blocks::<Replicated>() + blocks::<Shard<0>>(), 2 * 3 * 2 * 6 * 3);
}

/// How many products of samples of several tokens take each way: by Gram matrices, or by the
/// gradient of the sample. Each rank has its shard.
fn ways(features: [usize; 2], sequences: &Sequences, world: usize) -> [usize; 2] {
    let mut ways = [0; 2];
    let [inputs, outputs] = features;
    for rank in 0..world {
        let rows = shardwise::shard::Partition::even(outputs, world).size(rank);
        for sample in sequences.iter().filter(|sample| sample.len() > 1) {
            let by_gram = sample.len() * (rows + inputs) <= rows * inputs;
            ways[usize::from(!by_gram)] += 1;
        }
    }
    ways
}

/// Samples that are short or long for the size of the weight. Both ways give the same norms.
#[test]
fn both_ways_of_a_product_have_the_norms() {
    let mut taken = [0; 2];
    let sequences = Sequences::packed([2, 30, 5, 9, 1, 3, 16]);
    for (features, split_inputs) in [([24, 30], false), ([30, 24], true), ([60, 60], false), ([3, 3], true)] {
        let [inputs, outputs] = features;
        let batch = Batch::random(&sequences, 9, features);
        let load: Load<'_, f64> = &|group| {
            let source = Random::normal(1, 0.5);
            let weights = Weights::new(&source);
            if split_inputs {
                let partition = group.even_partition(inputs)?;
                let down = RowParallelLinear::<Replicated, f64, Dev>::load(
                    group, &weights, &partition, outputs, false,
                )?;
                return Ok(of_layer(ScatterTo::<1>::new(partition).then(down)));
            }
            let columns = Columns::even(group, outputs)?;
            let up = ColumnParallelLinear::<Shard<0>, f64, Dev>::load(
                group,
                &weights,
                inputs,
                &columns,
                Bias::None,
            )?;
            Ok(of_layer(up.then(GatherFrom::<1>)))
        };
        brute_force("product", load, &batch, &WORLDS);
        for world in WORLDS {
            let of = if split_inputs { [outputs, inputs] } else { features };
            let more = ways(of, &sequences, world);
            taken = [taken[0] + more[0], taken[1] + more[1]];
        }
    }
    assert!(taken.iter().all(|&count| count > 20), "{taken:?}");
    assert_eq!(taken[0] + taken[1], 4 * (1 + 2 + 3) * 6);
}

/// The tokens of a sample cancel in its gradient, or nearly. Rounding must not make a norm NaN or
/// too small: from Gram matrices, a bound of the error of n² is added, 16 ε ‖dy‖² ‖x‖².
#[test]
fn gradients_that_cancel_have_small_norms() {
    cancel::<f64>();
    cancel::<f32>();
}

fn cancel<T: Element>() {
    const WIDTH: usize = 40;
    let sequences = Sequences::packed([4; 12]);
    let mut batch = Batch::random(&sequences, 9, [WIDTH; 2]);
    // The gradients of all samples but the last cancel, except for a part of 10⁻³ of every other.
    for (at, sample) in sequences.iter().take(11).enumerate() {
        let (first, last) = (batch.x.row(sample.start).to_owned(), sample.end - 1);
        let rest = batch.dy.slice(ndarray::s![sample.start..last, ..]).sum_axis(ndarray::Axis(0));
        sample.for_each(|row| batch.x.row_mut(row).assign(&first));
        batch.dy.row_mut(last).assign(&(rest * if at % 2 == 0 { -1.0 } else { -0.999 }));
    }
    for x in [&mut batch.x, &mut batch.dy] {
        x.mapv_inplace(|x| T::from_f64(x).to_f64());
    }
    fn load<T: Element>(group: &Group<Dev>) -> Result<BoxModel<T>> {
        let (source, columns) = (Random::normal(1, 0.5), Columns::even(group, WIDTH)?);
        let weights = Weights::new(&source);
        let up =
            ColumnParallelLinear::<Replicated, T, Dev>::load(group, &weights, WIDTH, &columns, Bias::None)?;
        Ok(of_layer(up.then(GatherFrom::<1>)))
    }
    let each = Each::run::<f64>(&load, &batch);
    let square = |x: &ndarray::Array2<f64>, rows: std::ops::Range<usize>| {
        x.slice(ndarray::s![rows, ..]).mapv(|x| x * x).sum()
    };
    for world in WORLDS {
        let got = together::<T>(&load, &batch, (world, Reduction::Fast), &|norms| vec![1.0; norms.len()]);
        assert_eq!(got.norms.len(), 12);
        for (at, rows) in sequences.iter().enumerate() {
            let [got, want] = [got.norms[at], each.norms[at]];
            let squares = square(&batch.x, rows.clone()) * square(&batch.dy, rows);
            let error = got.powi(2) - want.powi(2);
            // The error of a norm that is computed from the gradient itself is some ε ‖dy‖ ‖x‖.
            let range = -4.0 * T::EPSILON * want * squares.sqrt()..=20.0 * T::EPSILON * squares;
            assert!(range.contains(&error), "sample {at} in {}: {got} for {want}, {range:?}", T::DTYPE);
        }
    }
}

/// A pooled sample is one row.
struct Pooled(ReplicatedLinear<f64, Dev>, Normalize<Replicated, f64, Dev>);

impl Model<f64> for Pooled {
    fn params(&self) -> Vec<Param<f64, Dev>> {
        [self.1.params(), self.0.params()].concat()
    }

    fn pass(&self, group: &Group<Dev>, batch: &Batch) -> Result<()> {
        let (x, norm) = self.1.forward(replicated(group, &batch.x, &batch.sequences)?)?;
        let (means, pool) = MeanPool.forward(x)?;
        let (y, head) = self.0.forward(means)?;
        // The gradient of a sample's row is the sum of its rows of dy.
        let dy = batch.sequences.iter().map(|rows| {
            let dy = batch.dy.slice(ndarray::s![rows, ..]).sum_axis(ndarray::Axis(0));
            dy.to_vec()
        });
        let dy: Vec<f64> = dy.flatten().collect();
        let dy = ndarray::Array2::from_shape_vec((batch.samples(), batch.dy.ncols()), dy).unwrap();
        let dy = y.with_local(super::tensor(group, &dy)?)?;
        self.1.backward(norm, MeanPool.backward(pool, self.0.backward(head, dy)?)?)?;
        Ok(())
    }
}

fn pooled(group: &Group<Dev>) -> Result<BoxModel<f64>> {
    let source = Random::normal(1, 0.5);
    let weights = Weights::new(&source);
    let head = ReplicatedLinear::load(group, &weights.at("head"), (HIDDEN, 3), true)?;
    let kind = NormKind::LayerNorm { eps: 1e-3 };
    let norm = Normalize::load(group, &weights.at("norm"), kind, HIDDEN)?;
    Ok(Box::new(Pooled(head, norm)))
}

#[test]
fn pooled_samples_have_their_gradients() {
    let mut count = 0;
    for sequences in shapes() {
        let batch = Batch::random(&sequences, 9, [HIDDEN, 3]);
        count += brute_force("pooled", &|group| pooled(group), &batch, &WORLDS);
    }
    assert_eq!(count, 6 * 3);
}

/// Uneven shards that leave a rank without columns.
#[test]
fn ranks_without_a_shard_have_the_gradients_of_each_sample() {
    let source: Arrays = arrays([("weight", random(1, "w", &[2, HIDDEN])), ("bias", random(1, "b", &[2]))]);
    let load: Load<'_, f64> = &|group| {
        let columns = Columns::even(group, 2)?;
        let weights = Weights::new(&source);
        let up =
            ColumnParallelLinear::<Shard<0>, f64, Dev>::load(group, &weights, HIDDEN, &columns, Bias::Add)?;
        Ok(of_layer(up.then(GatherFrom::<1>)))
    };
    let count: usize = shapes()
        .iter()
        .map(|sequences| brute_force("small", load, &Batch::random(sequences, 9, [HIDDEN, 2]), &[1, 2, 3, 4]))
        .sum();
    assert_eq!(count, 6 * 4);
}
