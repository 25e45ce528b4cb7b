//! Compares every mapping and layer with the reference: f64 at 1e-12, forward and gradient, random
//! sizes, 1 to 8 ranks, uneven shards. `support::run` adds the checks common to all layers:
//! traffic, run-to-run bits, replicas, ownership, NaN-poisoned memory.

use crate::dev::Dev;
use crate::support::{
    Case, Spread, arrays, close, grads_close, integers, matrix, random, run, run_unplanned, uneven,
};
use ndarray::{Array1, Array2};
use proptest::prelude::*;
use shardwise::{
    device::{Element, Meta},
    kernels::{Activation, AttentionChoices, NormKind},
    parallel::{
        Activate, AddBias, AttentionConfig, Bias, ColumnLinear, ColumnParallelLinear, Columns, CopyTo,
        GatherFrom, GatherSequence, Layer, MeanPool, MlpNames, Normalize, ParallelAttention, ParallelMlp,
        QkvLayout, ReduceFrom, ReduceScatterSequence, ReplicatedLinear, Residual, ResidualStream, RowLinear,
        RowParallelLinear, ScatterSequence, ScatterTo,
    },
    reference,
    shard::{Copied, Elementwise, Partition, Placement, Replicated, Sequences, Shard},
    tensor::Arrays,
};

const EXACT: f64 = 1e-12;

fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() }
}

fn vector(seed: u64, name: &str, len: usize) -> Array1<f64> {
    random(seed, name, &[len]).into_dimensionality().unwrap()
}

fn dot(a: &Array2<f64>, b: &Array2<f64>) -> f64 {
    (a * b).sum()
}

/// Checks ⟨F x, y⟩ = ⟨x, F* y⟩ for a linear layer, and its forward against `want`.
fn adjoint<In, Out, L>(case: &Case<'_>, layer: impl Fn() -> L + Sync, want: &Array2<f64>)
where
    In: Spread + Placement<Dual: Spread>,
    Out: Spread + Placement<Dual: Spread>,
    L: Layer<f64, Dev, In = In, Out = Out, Saved: 'static>
        + Layer<f64, Meta, In = In, Out = Out, Saved: 'static>
        + 'static,
{
    let got = run!(f64, case, |_, _| Ok(layer())).unwrap();
    close("the mapping", &got.y.clone().into_dyn(), want, EXACT);
    let (left, right) = (dot(&got.y, case.dy), dot(case.x, &got.dx));
    assert!((left - right).abs() <= EXACT * (1.0 + left.abs()), "{left} != {right}");
}

proptest! {
    #![proptest_config(cases(16))]

    /// The seven mappings change the placement, never the value, and each is the adjoint of its
    /// backward.
    #[test]
    fn mappings_keep_the_value_and_are_adjoint(world in 1..=8usize, rows in 0..12usize, extra in 0..9usize, seed: u64) {
        let cols = world + extra;
        let (x, dy) = (matrix(seed, "x", rows, cols), matrix(seed, "dy", rows, cols));
        let none = Arrays::default();
        let case = || Case::new(world, &x, &dy, &none);
        adjoint(&case(), || CopyTo, &x);
        adjoint(&case(), || ReduceFrom, &x);
        adjoint(&case(), || GatherSequence, &x);
        adjoint(&case(), || ReduceScatterSequence, &x);
        adjoint(&case(), ScatterSequence::even, &x);
        adjoint(&case(), ScatterTo::<1>::even, &x);
        adjoint(&case(), || GatherFrom::<0>, &x);
        let partition = uneven(seed, cols, world);
        let sharded_case = || Case { x_partition: Some(partition.clone()), ..case() };
        adjoint(&sharded_case(), || GatherFrom::<1>, &x);
        let sharded_case = || Case { dy_partition: Some(partition.clone()), ..case() };
        adjoint(&sharded_case(), || ScatterTo::<1>::new(partition.clone()), &x);
    }

    /// Sequence parallelism may shard tokens unevenly. The output has the same partition as the
    /// input.
    #[test]
    fn uneven_tokens_come_back_as_they_were(world in 1..=8usize, extra in 0..5usize, seed: u64) {
        let rows = world + extra;
        let partition = uneven(seed, rows, world);
        let eye = || Array2::<f64>::eye(world.max(3)).into_dyn();
        let cols = world.max(3);
        let weights = arrays([("up.weight", eye()), ("down.weight", eye())]);
        let (x, dy) = (matrix(seed, "x", rows, cols), matrix(seed, "dy", rows, cols));
        let case = Case { x_partition: Some(partition.clone()), dy_partition: Some(partition), ..Case::new(world, &x, &dy, &weights) };
        let got = run!(f64, &case, |group, weights| {
            let columns = Columns::even(group, cols)?;
            let (up, down) = (weights.at("up"), weights.at("down"));
            let up = ColumnParallelLinear::<Shard<0>, f64, Dev>::load(group, &up, cols, &columns, Bias::None)?;
            let down = RowParallelLinear::<Shard<0>, f64, Dev>::load(group, &down, columns.partition(), cols, false)?;
            Ok(up.then(down))
        }).unwrap();
        close("the identity", &got.y.into_dyn(), &x, EXACT);
        close("its gradient", &got.dx.into_dyn(), &dy, EXACT);
    }

    #[test]
    fn column_and_row_linear(world in 1..=8usize, rows in 1..9usize, more in 0..9usize, inputs in 1..9usize, seed: u64) {
        let outputs = world + more;
        let (x, dy) = (matrix(seed, "x", rows, inputs), matrix(seed, "dy", rows, outputs));
        let (w, b) = (matrix(seed, "w", outputs, inputs), vector(seed, "b", outputs));
        let weights = arrays([("weight", w.clone().into_dyn()), ("bias", b.clone().into_dyn())]);
        let partition = uneven(seed, outputs, world);

        // Y = X Wᵀ + b, the columns of Y sharded.
        let want = reference::linear_backward(&x, &w, &dy);
        let case = Case { dy_partition: Some(partition.clone()), ..Case::new(world, &x, &dy, &weights) };
        let got = run!(f64, &case, |group, weights| {
            let columns = Columns::from_partition(group, partition.clone())?;
            ColumnLinear::load(group, weights, inputs, &columns, Bias::Add)
        }).unwrap();
        close("column", &got.y.into_dyn(), &reference::linear(&x, &w, Some(&b)), EXACT);
        close("column dx", &got.dx.into_dyn(), &want.dx, EXACT);
        grads_close(&got.grads, &[("weight", want.dw.clone().into_dyn()), ("bias", want.db.into_dyn())], EXACT);
        let got = run!(f64, &case, |group, weights| {
            let columns = Columns::from_partition(group, partition.clone())?;
            ColumnLinear::load(group, weights, inputs, &columns, Bias::None)
        }).unwrap();
        close("column without bias", &got.y.clone().into_dyn(), &reference::linear(&x, &w, None), EXACT);
        let (left, right) = (dot(&got.y, &dy), dot(&x, &got.dx));
        prop_assert!((left - right).abs() <= EXACT * (1.0 + left.abs()));

        // The transpose: Y = Σ Xᵣ Wᵣᵀ, the columns of X sharded.
        let (x, dy) = (dy, x);
        let w = w.t().as_standard_layout().into_owned();
        let weights = arrays([("weight", w.clone().into_dyn())]);
        let want = reference::linear_backward(&x, &w, &dy);
        let case = Case { x_partition: Some(partition.clone()), ..Case::new(world, &x, &dy, &weights) };
        let got = run!(f64, &case, |group, weights| RowLinear::load(group, weights, &partition, inputs)).unwrap();
        close("row", &got.y.clone().into_dyn(), &reference::linear(&x, &w, None), EXACT);
        close("row dx", &got.dx.clone().into_dyn(), &want.dx, EXACT);
        grads_close(&got.grads, &[("weight", want.dw.into_dyn())], EXACT);
        let (left, right) = (dot(&got.y, &dy), dot(&x, &got.dx));
        prop_assert!((left - right).abs() <= EXACT * (1.0 + left.abs()));
    }

    #[test]
    fn parallel_linear_on_both_streams(world in 1..=8usize, rows in 1..12usize, outputs in 1..17usize, inputs in 1..9usize, seed: u64) {
        parallel_linear::<Replicated>(world, rows, outputs, inputs, seed);
        parallel_linear::<Shard<0>>(world, rows, outputs, inputs, seed);
    }

    #[test]
    fn activations_norms_and_biases(world in 1..=8usize, rows in 1..12usize, cols in 1..20usize, seed: u64) {
        elementwise::<Replicated>(world, rows, cols, seed);
        elementwise::<Shard<0>>(world, rows, cols, seed);
        norms::<Replicated>(world, rows, cols, seed);
        norms::<Shard<0>>(world, rows, cols, seed);
    }

    #[test]
    fn mlps(world in 1..=8usize, rows in 1..9usize, hidden in 1..9usize, ffn in 1..15usize, bias: bool, seed: u64) {
        mlp::<Replicated>(world, rows, hidden, ffn, bias, seed);
        mlp::<Shard<0>>(world, rows, hidden, ffn, bias, seed);
    }

    #[test]
    fn residuals_and_layers_without_collectives(world in 1..=8usize, inputs in 1..9usize, outputs in 1..9usize, masked: bool, seed: u64) {
        residual::<Replicated>(world, inputs, outputs, seed);
        residual::<Shard<0>>(world, inputs, outputs, seed);
        replicated(world, inputs, outputs, seed);
        pooled(world, inputs, &batch(masked, seed), seed);
    }

    #[test]
    fn attention(kv in 1..=4usize, group in 1..=4usize, world in 1..=8usize, dim in 1..4usize, causal: bool, masked: bool, seed: u64) {
        let heads = kv * group;
        let world = world.min(heads);
        attend::<Replicated>(world, heads, kv, dim, causal, masked, seed);
        attend::<Shard<0>>(world, heads, kv, dim, causal, masked, seed);
    }
}

/// Compares the parallel linear layers with the reference. With fewer features than ranks, some
/// ranks hold none.
fn parallel_linear<S: ResidualStream + Spread>(
    world: usize,
    rows: usize,
    outputs: usize,
    inputs: usize,
    seed: u64,
) {
    let (x, dy) = (matrix(seed, "x", rows, inputs), matrix(seed, "dy", rows, outputs));
    let (w, b) = (matrix(seed, "w", outputs, inputs), vector(seed, "b", outputs));
    let weights = arrays([("weight", w.clone().into_dyn()), ("bias", b.clone().into_dyn())]);
    let (want, want_y) = (reference::linear_backward(&x, &w, &dy), reference::linear(&x, &w, Some(&b)));
    let want_grads = [("weight", want.dw.into_dyn()), ("bias", want.db.into_dyn())];

    let got = run!(f64, &Case::new(world, &x, &dy, &weights), |group, weights| {
        ColumnParallelLinear::<S, f64, Dev>::load(
            group,
            weights,
            inputs,
            &Columns::even(group, outputs)?,
            Bias::Add,
        )
    })
    .unwrap();
    close("column", &got.y.into_dyn(), &want_y, EXACT);
    close("column dx", &got.dx.into_dyn(), &want.dx, EXACT);
    grads_close(&got.grads, &want_grads, EXACT);

    // With `GatherFrom`, every rank gets the whole output.
    let got = run!(f64, &Case::new(world, &x, &dy, &weights), |group, weights| {
        let columns = Columns::even(group, outputs)?;
        Ok(ColumnParallelLinear::<S, f64, Dev>::load(group, weights, inputs, &columns, Bias::Add)?
            .then(GatherFrom::<1>))
    })
    .unwrap();
    close("gathered", &got.y.into_dyn(), &want_y, EXACT);
    close("gathered dx", &got.dx.into_dyn(), &want.dx, EXACT);

    // The row layer with as many inputs as the column layer has outputs.
    let (x, dy) = (dy, x);
    let w = w.t().as_standard_layout().into_owned();
    let b = vector(seed, "row b", inputs);
    let weights = arrays([("weight", w.clone().into_dyn()), ("bias", b.clone().into_dyn())]);
    let (want, want_y) = (reference::linear_backward(&x, &w, &dy), reference::linear(&x, &w, Some(&b)));
    let partition = Partition::even(outputs, world);
    let got = run!(f64, &Case::new(world, &x, &dy, &weights), |group, weights| {
        RowParallelLinear::<S, f64, Dev>::load(group, weights, &partition, inputs, true)
    })
    .unwrap();
    close("row", &got.y.into_dyn(), &want_y, EXACT);
    close("row dx", &got.dx.into_dyn(), &want.dx, EXACT);
    grads_close(&got.grads, &[("weight", want.dw.into_dyn()), ("bias", want.db.into_dyn())], EXACT);

    // A chain scatters the row layer's input first.
    let got = run!(f64, &Case::new(world, &x, &dy, &weights), |group, weights| {
        Ok(ScatterTo::<1>::new(partition.clone())
            .then(RowParallelLinear::<S, f64, Dev>::load(group, weights, &partition, inputs, true)?))
    })
    .unwrap();
    close("scattered", &got.y.into_dyn(), &want_y, EXACT);
    close("scattered dx", &got.dx.into_dyn(), &want.dx, EXACT);
}

const ACTIVATIONS: [(Activation, reference::Activation); 4] = [
    (Activation::Relu, reference::Activation::Relu),
    (Activation::Silu, reference::Activation::Silu),
    (Activation::GeluErf, reference::Activation::GeluErf),
    (Activation::GeluTanh, reference::Activation::GeluTanh),
];

fn elementwise<P: Elementwise + Spread<Dual: Spread>>(world: usize, rows: usize, cols: usize, seed: u64) {
    let (x, dy) = (matrix(seed, "x", rows, cols), matrix(seed, "dy", rows, cols));
    let none = Arrays::default();
    for (f, reference) in ACTIVATIONS {
        let case = Case::new(world, &x, &dy, &none);
        let got = run!(f64, &case, |_, _| Ok(Activate::<P>::new(f))).unwrap();
        close("activation", &got.y.into_dyn(), &reference.apply(&x), EXACT);
        close("activation dx", &got.dx.into_dyn(), &reference.backward(&x, &dy), EXACT);
    }
}

fn norms<S: ResidualStream + Spread>(world: usize, rows: usize, cols: usize, seed: u64) {
    let (x, dy) = (matrix(seed, "x", rows, cols), matrix(seed, "dy", rows, cols));
    let (gamma, beta) = (vector(seed, "gamma", cols), vector(seed, "beta", cols));
    let weights = arrays([("weight", gamma.clone().into_dyn()), ("bias", beta.clone().into_dyn())]);
    let case = Case::new(world, &x, &dy, &weights);
    let eps = 1e-3;
    let load =
        |kind| run!(f64, &case, |group, weights| Normalize::<S, f64, Dev>::load(group, weights, kind, cols));

    let got = load(NormKind::LayerNorm { eps }).unwrap();
    let want = reference::layer_norm_backward(&x, &gamma, eps, &dy);
    close("layer norm", &got.y.into_dyn(), &reference::layer_norm(&x, &gamma, &beta, eps), EXACT);
    close("layer norm dx", &got.dx.into_dyn(), &want.dx, EXACT);
    grads_close(&got.grads, &[("weight", want.dgamma.into_dyn()), ("bias", want.dbeta.into_dyn())], EXACT);

    let got = load(NormKind::RmsNorm { eps }).unwrap();
    let want = reference::rms_norm_backward(&x, &gamma, eps, &dy);
    close("rms norm", &got.y.into_dyn(), &reference::rms_norm(&x, &gamma, eps), EXACT);
    close("rms norm dx", &got.dx.into_dyn(), &want.dx, EXACT);
    grads_close(&got.grads, &[("weight", want.dgamma.into_dyn())], EXACT);

    let got = run!(f64, &case, |group, weights| AddBias::<S, f64, Dev>::load(group, weights, cols)).unwrap();
    close("bias", &got.y.into_dyn(), &(&x + &beta), EXACT);
    close("bias dx", &got.dx.into_dyn(), &dy, EXACT);
    grads_close(&got.grads, &[("bias", dy.sum_axis(ndarray::Axis(0)).into_dyn())], EXACT);
}

fn mlp<S: ResidualStream + Spread>(
    world: usize,
    rows: usize,
    hidden: usize,
    ffn: usize,
    bias: bool,
    seed: u64,
) {
    let (x, dy) = (matrix(seed, "x", rows, hidden), matrix(seed, "dy", rows, hidden));
    let weights = reference::MlpWeights {
        up: matrix(seed, "up", ffn, hidden),
        up_bias: bias.then(|| vector(seed, "up bias", ffn)),
        down: matrix(seed, "down", hidden, ffn),
        down_bias: bias.then(|| vector(seed, "down bias", hidden)),
    };
    let mut named = arrays([
        ("up.weight", weights.up.clone().into_dyn()),
        ("down.weight", weights.down.clone().into_dyn()),
        ("gate.weight", matrix(seed, "gate", ffn, hidden).into_dyn()),
    ]);
    if let (Some(up), Some(down)) = (&weights.up_bias, &weights.down_bias) {
        named.0.insert("up.bias".into(), up.clone().into_dyn());
        named.0.insert("down.bias".into(), down.clone().into_dyn());
    }
    let case = Case::new(world, &x, &dy, &named);
    let names = MlpNames::default();

    let act = reference::Activation::GeluErf;
    let got = run!(f64, &case, |group, weights| {
        ParallelMlp::<S, f64, Dev>::load(group, weights, &names, (hidden, ffn), Activation::GeluErf, bias)
    })
    .unwrap();
    let want = reference::mlp_backward(&weights, act, &x, &dy);
    close("mlp", &got.y.into_dyn(), &reference::mlp(&weights, act, &x), EXACT);
    close("mlp dx", &got.dx.into_dyn(), &want.dx, EXACT);
    let mut grads =
        vec![("up.weight", want.weights.up.into_dyn()), ("down.weight", want.weights.down.into_dyn())];
    if let (Some(up), Some(down)) = (want.weights.up_bias, want.weights.down_bias) {
        grads.extend([("up.bias", up.into_dyn()), ("down.bias", down.into_dyn())]);
    }
    grads_close(&got.grads, &grads, EXACT);

    let gated = reference::GatedMlpWeights {
        gate: matrix(seed, "gate", ffn, hidden),
        up: weights.up.clone(),
        down: weights.down.clone(),
    };
    for (f, act) in ACTIVATIONS {
        let got = run!(f64, &case, |group, weights| {
            ParallelMlp::<S, f64, Dev>::load_gated(group, weights, &names, (hidden, ffn), f, false)
        })
        .unwrap();
        let want = reference::gated_mlp_backward(&gated, act, &x, &dy);
        close("gated mlp", &got.y.into_dyn(), &reference::gated_mlp(&gated, act, &x), EXACT);
        close("gated mlp dx", &got.dx.into_dyn(), &want.dx, EXACT);
        let want = [
            ("gate.weight", want.weights.gate.into_dyn()),
            ("up.weight", want.weights.up.into_dyn()),
            ("down.weight", want.weights.down.into_dyn()),
        ];
        grads_close(&got.grads, &want, EXACT);
    }
}

/// x + f(x).
fn residual<S: ResidualStream + Spread>(world: usize, hidden: usize, ffn: usize, seed: u64) {
    let (x, dy) = (matrix(seed, "x", 6, hidden), matrix(seed, "dy", 6, hidden));
    let (up, down) = (matrix(seed, "up", ffn, hidden), matrix(seed, "down", hidden, ffn));
    let named = arrays([("up.weight", up.clone().into_dyn()), ("down.weight", down.clone().into_dyn())]);
    let (names, case) = (MlpNames::default(), Case::new(world, &x, &dy, &named));
    let got = run!(f64, &case, |group, weights| {
        let f = Activation::Relu;
        Ok(Residual(ParallelMlp::<S, f64, Dev>::load(group, weights, &names, (hidden, ffn), f, false)?))
    })
    .unwrap();
    let (weights, act) =
        (reference::MlpWeights { up, up_bias: None, down, down_bias: None }, reference::Activation::Relu);
    let want = reference::mlp_backward(&weights, act, &x, &dy);
    close("residual", &got.y.into_dyn(), &(reference::mlp(&weights, act, &x) + &x), EXACT);
    close("residual dx", &got.dx.into_dyn(), &(want.dx + &dy), EXACT);
    let want = [("up.weight", want.weights.up.into_dyn()), ("down.weight", want.weights.down.into_dyn())];
    grads_close(&got.grads, &want, EXACT);
}

/// Every rank computes the whole product, and one rank owns the parameters.
fn replicated(world: usize, inputs: usize, outputs: usize, seed: u64) {
    let (x, dy) = (matrix(seed, "x", 7, inputs), matrix(seed, "dy", 7, outputs));
    let (w, b) = (matrix(seed, "w", outputs, inputs), vector(seed, "b", outputs));
    let weights = arrays([("weight", w.clone().into_dyn()), ("bias", b.clone().into_dyn())]);
    let want = reference::linear_backward(&x, &w, &dy);
    let case = Case::new(world, &x, &dy, &weights);
    let grads = [("weight", want.dw.into_dyn()), ("bias", want.db.into_dyn())];
    for (bias, grads) in [(None, &grads[..1]), (Some(&b), &grads[..])] {
        let got = run!(f64, &case, |group, weights| {
            ReplicatedLinear::<f64, Dev>::load(group, weights, (inputs, outputs), bias.is_some())
        })
        .unwrap();
        close("replicated", &got.y.into_dyn(), &reference::linear(&x, &w, bias), EXACT);
        close("replicated dx", &got.dx.into_dyn(), &want.dx, EXACT);
        grads_close(&got.grads, grads, EXACT);
    }
}

/// Pools each sequence to one row. The next layer shards the features of these rows over the ranks.
fn pooled(world: usize, hidden: usize, sequences: &Sequences, seed: u64) {
    let (x, dy) = (matrix(seed, "x", sequences.rows(), hidden), matrix(seed, "dy", sequences.len(), 2));
    let w = matrix(seed, "w", 2, hidden);
    let weights = arrays([("weight", w.clone().into_dyn())]);
    let ranges: Vec<_> = sequences.iter().collect();
    let means = reference::mean_sequences(&x, &ranges, sequences.valid());
    let want = reference::linear_backward(&means, &w, &dy);
    let dx = reference::mean_sequences_backward(x.nrows(), &ranges, sequences.valid(), &want.dx);
    let case = Case { sequences: sequences.clone(), ..Case::new(world, &x, &dy, &weights) };
    let got = run!(f64, &case, |group, weights| {
        let columns = Columns::even(group, 2)?;
        let head =
            ColumnParallelLinear::<Replicated, f64, Dev>::load(group, weights, hidden, &columns, Bias::None)?;
        Ok(MeanPool.then(head))
    })
    .unwrap();
    close("pooled", &got.y.into_dyn(), &reference::linear(&means, &w, None), EXACT);
    close("pooled dx", &got.dx.into_dyn(), &dx, EXACT);
    grads_close(&got.grads, &[("weight", want.dw.into_dyn())], EXACT);
}

/// Returns a batch of three sequences of different lengths. With `masked`, some rows are padding,
/// including one whole sequence.
fn batch(masked: bool, seed: u64) -> Sequences {
    let sequences = Sequences::packed([3, 1, 4]);
    if !masked {
        return sequences;
    }
    let stream = shardwise::rng::Philox::stream(seed, 5);
    let valid: Vec<bool> = (0..8).map(|row| row != 3 && stream.uniform(row) < 0.7).collect();
    sequences.masked(&valid).unwrap()
}

fn attend<S: ResidualStream + Spread>(
    world: usize,
    heads: usize,
    kv: usize,
    dim: usize,
    causal: bool,
    masked: bool,
    seed: u64,
) {
    let (hidden, sequences) = (5, batch(masked, seed));
    let rows = sequences.rows();
    let (x, dy) = (matrix(seed, "x", rows, hidden), matrix(seed, "dy", rows, hidden));
    let (q, k, v, o) = (heads * dim, kv * dim, kv * dim, hidden);
    let weights = reference::AttentionWeights {
        q: matrix(seed, "q", q, hidden),
        k: matrix(seed, "k", k, hidden),
        v: matrix(seed, "v", v, hidden),
        o: matrix(seed, "o", hidden, q),
        q_bias: Some(vector(seed, "qb", q)),
        k_bias: Some(vector(seed, "kb", k)),
        v_bias: Some(vector(seed, "vb", v)),
        o_bias: Some(vector(seed, "ob", o)),
    };
    let scale = 1.0 / (dim as f64).sqrt();
    let spec = reference::AttentionSpec { heads, kv_heads: kv, head_dim: dim, causal, window: None, scale };
    let ranges: Vec<_> = sequences.iter().collect();
    let want_y = reference::self_attention(&spec, &weights, &x, &ranges, sequences.valid());
    let want = reference::self_attention_backward(&spec, &weights, &x, &ranges, sequences.valid(), &dy);
    let named = |w: &reference::AttentionWeights| {
        let vector = |bias: &Option<Array1<f64>>| bias.clone().unwrap().into_dyn();
        arrays([
            ("q.weight", w.q.clone().into_dyn()),
            ("k.weight", w.k.clone().into_dyn()),
            ("v.weight", w.v.clone().into_dyn()),
            ("o.weight", w.o.clone().into_dyn()),
            ("q.bias", vector(&w.q_bias)),
            ("k.bias", vector(&w.k_bias)),
            ("v.bias", vector(&w.v_bias)),
            ("o.bias", vector(&w.o_bias)),
        ])
    };
    let (given, want_grads) = (named(&weights), named(&want.weights));
    let config = AttentionConfig::new(hidden, heads)
        .with_kv_heads(kv)
        .with_head_dim(dim)
        .with_choices(AttentionChoices { causal, ..AttentionChoices::default() })
        .with_qkv_bias(true)
        .with_out_bias(true);
    let mut layouts = vec![
        (QkvLayout::separate("q", "k", "v"), None),
        (QkvLayout::Concatenated("qkv".into()), Some(Fuse::Concatenated)),
        (QkvLayout::PerKvGroup("qkv".into()), Some(Fuse::PerKvGroup)),
    ];
    if kv == heads {
        // The two layouts coincide if every query head has its own key/value head.
        layouts.push((QkvLayout::PerHead("qkv".into()), Some(Fuse::PerKvGroup)));
    }
    for (layout, fuse) in layouts {
        let (given, want_grads) = match fuse {
            None => (given.clone(), want_grads.clone()),
            Some(fuse) => (fuse.apply(&given, kv, dim), fuse.apply(&want_grads, kv, dim)),
        };
        let case = Case { sequences: sequences.clone(), ..Case::new(world, &x, &dy, &given) };
        let got = run!(f64, &case, |group, weights| {
            ParallelAttention::<S, f64, Dev>::load(group, weights, &layout, "o", &config)
        })
        .unwrap();
        close("attention", &got.y.into_dyn(), &want_y, EXACT);
        close("attention dx", &got.dx.into_dyn(), &want.dx, EXACT);
        let want: Vec<_> = want_grads.0.iter().map(|(name, grad)| (name.as_str(), grad.clone())).collect();
        grads_close(&got.grads, &want, EXACT);
    }
}

/// How one tensor holds q, k and v.
#[derive(Clone, Copy)]
enum Fuse {
    Concatenated,
    PerKvGroup,
}

impl Fuse {
    fn apply(self, separate: &Arrays, kv: usize, dim: usize) -> Arrays {
        let mut fused = Arrays::default();
        for suffix in ["weight", "bias"] {
            let part = |name: &str| &separate.0[&format!("{name}.{suffix}")];
            let (q, k, v) = (part("q"), part("k"), part("v"));
            let rows = |from: &ndarray::ArrayD<f64>, range: std::ops::Range<usize>| {
                from.slice_axis(ndarray::Axis(0), range.into()).to_owned()
            };
            let group = q.shape()[0] / kv;
            let parts: Vec<_> = match self {
                Self::Concatenated => vec![q.clone(), k.clone(), v.clone()],
                Self::PerKvGroup => (0..kv)
                    .flat_map(|head| {
                        let own = head * dim..(head + 1) * dim;
                        [rows(q, head * group..(head + 1) * group), rows(k, own.clone()), rows(v, own)]
                    })
                    .collect(),
            };
            let views: Vec<_> = parts.iter().map(|part| part.view()).collect();
            let one = ndarray::concatenate(ndarray::Axis(0), &views).unwrap();
            fused.0.insert(format!("qkv.{suffix}"), one);
            fused.0.insert(format!("o.{suffix}"), part("o").clone());
        }
        fused
    }
}

/// Fused layers give the bits of the chain of mappings that they replace.
#[test]
fn fused_layers_equal_their_chains_bit_for_bit() {
    for world in 1..=8 {
        fused_on::<f32>(world);
        fused_on::<half::bf16>(world);
    }
}

fn fused_on<T: Element>(world: usize) {
    let (rows, hidden, ffn, seed) = (9, 6, 11, world as u64);
    let (x, dy) = (matrix(seed, "x", rows, hidden), matrix(seed, "dy", rows, hidden));
    let weights = arrays([
        ("up.weight", random(seed, "up", &[ffn, hidden])),
        ("up.bias", random(seed, "ub", &[ffn])),
        ("down.weight", random(seed, "down", &[hidden, ffn])),
        ("down.bias", random(seed, "db", &[hidden])),
    ]);
    let (case, names, f) = (Case::new(world, &x, &dy, &weights), MlpNames::default(), Activation::Silu);
    let fused = |outcome: crate::support::Outcome| (outcome.y, outcome.dx, outcome.grads);
    let plain = run_unplanned!(T, &case, |group, weights| {
        ParallelMlp::<Replicated, T, Dev>::load(group, weights, &names, (hidden, ffn), f, true)
    });
    let chain = run_unplanned!(T, &case, |group, weights| {
        let columns = Columns::even(group, ffn)?;
        let up = ColumnLinear::<T, Dev>::load(group, &weights.at("up"), hidden, &columns, Bias::Add)?;
        let down = RowLinear::<T, Dev>::load(group, &weights.at("down"), columns.partition(), hidden)?;
        let bias = AddBias::<Replicated, T, Dev>::load(group, &weights.at("down"), hidden)?;
        let enter = CopyTo.then(up);
        Ok(enter.then(Activate::new(f)).then(down).then(ReduceFrom).then(bias))
    });
    assert_eq!(fused(plain.unwrap()), fused(chain.unwrap()), "replicated stream");
    let plain = run_unplanned!(T, &case, |group, weights| {
        ParallelMlp::<Shard<0>, T, Dev>::load(group, weights, &names, (hidden, ffn), f, true)
    });
    let chain = run_unplanned!(T, &case, |group, weights| {
        let columns = Columns::even(group, ffn)?;
        let up = ColumnLinear::<T, Dev>::load(group, &weights.at("up"), hidden, &columns, Bias::Add)?;
        let down = RowLinear::<T, Dev>::load(group, &weights.at("down"), columns.partition(), hidden)?;
        let bias = AddBias::<Shard<0>, T, Dev>::load(group, &weights.at("down"), hidden)?;
        let enter = GatherSequence.then(up);
        Ok(enter.then(Activate::new(f)).then(down).then(ReduceScatterSequence).then(bias))
    });
    assert_eq!(fused(plain.unwrap()), fused(chain.unwrap()), "sequence-parallel stream");
}

/// Whole numbers are exact, so the sharded layer gives the reference's bits in every element type.
#[test]
fn integers_are_bit_equal_in_every_element() {
    for world in 1..=8 {
        integers_on::<f64>(world);
        integers_on::<f32>(world);
        integers_on::<half::bf16>(world);
        integers_on::<half::f16>(world);
    }
}

fn integers_on<T: Element>(world: usize) {
    let (rows, hidden, ffn, seed) = (5, 4, 8, world as u64);
    let (x, dy) = (integers(seed, "x", rows, hidden), integers(seed, "dy", rows, hidden));
    let (up, down) = (integers(seed, "up", ffn, hidden), integers(seed, "down", hidden, ffn));
    let weights = arrays([("up.weight", up.clone().into_dyn()), ("down.weight", down.clone().into_dyn())]);
    let case = Case::new(world, &x, &dy, &weights);
    let got = run_unplanned!(T, &case, |group, weights| {
        ParallelMlp::<Replicated, T, Dev>::load(
            group,
            weights,
            &MlpNames::default(),
            (hidden, ffn),
            Activation::Relu,
            false,
        )
    })
    .unwrap();
    let weights = reference::MlpWeights { up, up_bias: None, down, down_bias: None };
    let want = reference::mlp_backward(&weights, reference::Activation::Relu, &x, &dy);
    let want_y = reference::mlp(&weights, reference::Activation::Relu, &x);
    let exact = want_y.iter().chain(&want.dx).all(|value| T::from_f64(*value).to_f64() == *value);
    assert!(exact, "the test's numbers are too large for {}", T::DTYPE);
    assert_eq!(got.y, want_y);
    assert_eq!(got.dx, want.dx);
    assert_eq!(got.grads["up.weight"], want.weights.up.into_dyn());
    assert_eq!(got.grads["down.weight"], want.weights.down.into_dyn());
}

/// Linear layers in f32, bf16 and f16 stay within the rounding bound. Let u = ε / 2 of the element
/// type, v = ε / 2 of the accumulator type, and K the number of terms. Rounding the inputs and
/// summing in the accumulator type give |error| ≤ (2u + K v) Σ|x||w|. Each rank's partial sum and
/// the result are rounded once more.
#[test]
fn narrow_elements_stay_within_the_rounding_bound() {
    for world in [1, 2, 3, 8] {
        rounding::<f32>(world);
        rounding::<half::bf16>(world);
        rounding::<half::f16>(world);
    }
}

fn rounding<T: Element>(world: usize) {
    let (rows, inputs, outputs, seed) = (6, 700, 9, 3);
    let (x, dy) = (matrix(seed, "x", rows, inputs), matrix(seed, "dy", rows, outputs));
    let w = matrix(seed, "w", outputs, inputs);
    let weights = arrays([("weight", w.clone().into_dyn())]);
    let partition = Partition::even(inputs, world);
    let got = run_unplanned!(T, &Case::new(world, &x, &dy, &weights), |group, weights| {
        RowParallelLinear::<Replicated, T, Dev>::load(group, weights, &partition, outputs, false)
    })
    .unwrap();
    let bound = |terms: usize, absolute: Array2<f64>| {
        let (u, v) = (T::EPSILON / 2.0, T::Acc::EPSILON / 2.0);
        absolute * ((2.0 * u + terms as f64 * v + 2.0 * u) * 1.01)
    };
    let check = |what: &str, got: &Array2<f64>, want: Array2<f64>, bound: Array2<f64>| {
        assert_eq!((got.dim(), bound.dim()), (want.dim(), want.dim()), "{what}: shapes");
        for ((got, want), bound) in got.iter().zip(&want).zip(&bound) {
            assert!((got - want).abs() <= *bound, "{what} {}: |{got} - {want}| > {bound}", T::DTYPE);
        }
    };
    let (ax, aw, ady) = (x.mapv(f64::abs), w.mapv(f64::abs), dy.mapv(f64::abs));
    let want = reference::linear_backward(&x, &w, &dy);
    let absolute = reference::linear_backward(&ax, &aw, &ady);
    check("y", &got.y, reference::linear(&x, &w, None), bound(inputs, reference::linear(&ax, &aw, None)));
    check("dx", &got.dx, want.dx, bound(outputs, absolute.dx));
    let dw: Array2<f64> = got.grads["weight"].clone().into_dimensionality().unwrap();
    check("dw", &dw, want.dw, bound(rows, absolute.dw));
}

/// A copied tensor may pass through an activation too; its gradient is a partial sum.
#[test]
fn activation_of_a_copied_tensor_has_a_partial_gradient() {
    for world in 1..=4 {
        elementwise::<Copied>(world, 5, 6, 1);
        elementwise::<Shard<1>>(world, 5, 6, 1);
    }
}
