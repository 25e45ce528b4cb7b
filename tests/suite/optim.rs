//! Compares optimizers, gradient norms and data parallelism with the reference.

use crate::dev::{self, DTensor, Dev, Tensor, ranks};
use crate::support::{arrays, close, matrix, random};
use half::{bf16, f16};
use ndarray::{Array2, ArrayD};
use proptest::prelude::*;
use shardwise::{
    Error, Result,
    comm::Group,
    device::Element,
    kernels::{Activation, AdamWStep, AttentionChoices, NormKind, SgdStep, Update},
    ops,
    optim::{AdamW, AdamWConfig, Sgd, SgdConfig, grad_norm},
    parallel::{
        AttentionConfig, Bias, BlockConfig, ColumnLinear, ColumnParallelLinear, Columns, Layer, Normalize,
        ParallelAttention, QkvLayout, TransformerBlock,
    },
    reference,
    shard::{Partition, Replicated, Shard},
    tensor::{Arrays, Param, Random, Weights},
    train::{DataParallel, GradReduce, ShardedSampler, check_replicas},
};

fn cases(count: u32) -> ProptestConfig {
    ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() }
}

fn solo() -> Group<Dev> {
    Group::solo(&dev::poisoned())
}

/// Returns a linear layer with a weight `[3, 5]` and a bias of some element type.
fn layer<T: Element>(seed: u64) -> ColumnLinear<T, Dev> {
    let source = arrays([("weight", random(seed, "w", &[3, 5])), ("bias", random(seed, "b", &[3]))]);
    let group = solo();
    let columns = Columns::even(&group, 3).unwrap();
    ColumnLinear::load(&group, &Weights::new(&source), 5, &columns, Bias::Add).unwrap()
}

/// Runs some optimizer steps on a layer and in the reference, with the same gradients. The
/// reference's numbers are f64 throughout.
fn steps<T: Element>(
    seed: u64,
    mut step: impl FnMut(&ColumnLinear<T, Dev>) -> Result<()>,
    mut reference: impl FnMut(usize, &mut ArrayD<f64>, &ArrayD<f64>),
    tolerance: f64,
) {
    let layer = layer::<T>(seed);
    let params = layer.params();
    let value = |param: &Param<T, Dev>| param.value().unwrap().to_array().unwrap().mapv(T::to_f64);
    let mut want: Vec<_> = params.iter().map(value).collect();
    for at in 0..6 {
        for (number, param) in params.iter().enumerate() {
            let grad =
                random(seed + at, param.name(), param.shape().dims()).mapv(|g| T::Acc::from_f64(g).to_f64());
            reference(number, &mut want[number], &grad);
            param.zero_grad();
            let grad = Tensor::from_array(param.device(), &grad.mapv(T::Acc::from_f64)).unwrap();
            param.add_grad(grad).unwrap();
        }
        step(&layer).unwrap();
    }
    for (param, want) in params.iter().zip(&want) {
        close(param.name(), &value(param), want, tolerance);
    }
}

fn sgd_agrees<T: Element>(config: SgdConfig, seed: u64, tolerance: f64) {
    let SgdConfig { momentum, nesterov, weight_decay, .. } = config;
    let mut sgd = Sgd::<T, Dev>::new(config);
    let same = reference::Sgd { lr: 0.1, momentum, nesterov, weight_decay, velocity: None };
    let mut all = [same.clone(), same];
    // The optimizer scales gradients by 0.5, and so does the reference.
    steps(
        seed,
        |layer: &ColumnLinear<T, Dev>| sgd.step(&layer.params(), 0.1, 0.5),
        |at, w, g| all[at].step(w, &(g * 0.5)),
        tolerance,
    );
}

fn adamw_agrees<T: Element>(decay_vectors: bool, seed: u64, tolerance: f64) {
    let config = AdamWConfig::default().with_weight_decay(0.1).with_decay_vectors(decay_vectors);
    let mut adamw = AdamW::<T, Dev>::new(config);
    let same = |weight_decay| reference::AdamW {
        lr: 0.01,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay,
        steps: 0,
        moments: None,
    };
    let mut all = [same(0.1), same(if decay_vectors { 0.1 } else { 0.0 })];
    steps(
        seed,
        |layer: &ColumnLinear<T, Dev>| adamw.step(&layer.params(), 0.01, 0.5),
        |at, w, g| all[at].step(w, &(g * 0.5)),
        tolerance,
    );
    assert_eq!(adamw.steps(), 6);
}

proptest! {
    #![proptest_config(cases(16))]

    /// The tolerance for f32 is a few roundings per step. bf16 and f16 have f32 master weights, so
    /// only the last rounding is to the element type.
    #[test]
    fn optimizers_agree_with_the_reference(
        momentum in prop::sample::select(vec![0.0, 0.9]), nesterov: bool, weight_decay in prop::sample::select(vec![0.0, 0.1]),
        decay_vectors: bool, seed in 0..1000_u64,
    ) {
        let config = SgdConfig::default()
            .with_momentum(momentum)
            .with_nesterov(nesterov && momentum > 0.0)
            .with_weight_decay(weight_decay);
        sgd_agrees::<f64>(config, seed, 1e-13);
        sgd_agrees::<f32>(config, seed, 1e-5);
        sgd_agrees::<bf16>(config, seed, bf16::EPSILON.to_f64());
        sgd_agrees::<f16>(config, seed, f16::EPSILON.to_f64());
        adamw_agrees::<f64>(decay_vectors, seed, 1e-13);
        adamw_agrees::<f32>(decay_vectors, seed, 1e-5);
        adamw_agrees::<bf16>(decay_vectors, seed, bf16::EPSILON.to_f64());
        adamw_agrees::<f16>(decay_vectors, seed, f16::EPSILON.to_f64());
    }
}

/// A thousand steps, each too small to change a bf16, still move the weight.
#[test]
fn master_weights_keep_what_bf16_cannot() {
    let (layer, mut sgd) = (layer::<bf16>(1), Sgd::<bf16, Dev>::default());
    let params = layer.params();
    let value = || params[0].value().unwrap().to_vec().unwrap()[0].to_f64();
    let before = value();
    for _ in 0..1000 {
        for param in &params {
            param.zero_grad();
            param.add_grad(Tensor::full(param.device(), param.shape(), 1.0).unwrap()).unwrap();
        }
        sgd.step(&params, 1e-4, 1.0).unwrap();
    }
    assert!((value() - (before - 0.1)).abs() <= bf16::EPSILON.to_f64() * before.abs().max(0.1));
}

#[test]
fn updates_refuse_what_does_not_fit() {
    let device = dev::fresh();
    let zeros = |len: usize| Tensor::<f32>::zeros(&device, [len]).unwrap();
    let step = SgdStep { lr: 1.0, momentum: 0.0, nesterov: false, weight_decay: 0.0, grad_scale: 1.0 };
    let (grad, mut weight) = (zeros(2), zeros(3));
    let refused = device.sgd::<f32>(&step, grad.slice(), weight.slice_mut().unwrap(), None, None);
    assert_eq!(refused.unwrap_err().to_string(), "sgd: the gradient is 2, but the number of weights is 3");
    let step =
        AdamWStep { lr: 1.0, beta1: 0.9, beta2: 0.9, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
    let (grad, mut first, mut second) = (zeros(3), zeros(3), zeros(4));
    let moments = [first.slice_mut().unwrap(), second.slice_mut().unwrap()];
    let refused = device.adamw::<f32>(&step, grad.slice(), weight.slice_mut().unwrap(), None, moments);
    assert_eq!(
        refused.unwrap_err().to_string(),
        "adamw: the second moment is 4, but the number of weights is 3"
    );
}

/// The layer is an attention with shared key/value heads and a norm. The gradient norm is that of
/// one device, on any number of ranks, with tokens replicated or sharded.
#[test]
fn gradient_norms_are_those_of_one_device() {
    let (hidden, heads, kv_heads, head_dim, tokens) = (6, 9, 3, 2, 7);
    let source = Random::normal(5, 0.4);
    let x = matrix(1, "x", tokens, hidden);
    let norm_on = |world: usize| {
        let norms = ranks(world).run(|group| {
            fn grads<S: shardwise::parallel::ResidualStream>(
                group: &Group<Dev>,
                source: &Random,
                config: &AttentionConfig,
                x: &Array2<f64>,
            ) -> Result<f64> {
                let weights = Weights::new(source);
                let norm = Normalize::<S, f64, Dev>::load(
                    group,
                    &weights.at("n"),
                    NormKind::RmsNorm { eps: 1e-5 },
                    config.hidden,
                )?;
                let layout = QkvLayout::separate("q", "k", "v");
                let attention =
                    ParallelAttention::<S, f64, Dev>::load(group, &weights, &layout, "o", config)?;
                let model = Layer::<f64, Dev>::then(norm, attention);
                let own = S::local_rows(group, x.nrows())?;
                let part = Tensor::from_array(group.device(), &x.slice(ndarray::s![own, ..]))?;
                let x = S::of_local(group, x.nrows(), part)?;
                let (y, saved) = model.forward(x)?;
                model.backward(saved, y)?;
                grad_norm(&model.params(), &[group])
            }
            let config = AttentionConfig::new(hidden, heads)
                .with_kv_heads(kv_heads)
                .with_head_dim(head_dim)
                .with_choices(AttentionChoices::CAUSAL)
                .with_qkv_bias(true)
                .with_out_bias(true);
            Ok([
                grads::<Replicated>(&group, &source, &config, &x)?,
                grads::<Shard<0>>(&group, &source, &config, &x)?,
            ])
        });
        let norms = norms.unwrap();
        assert!(norms.iter().all(|own| own.map(f64::to_bits) == norms[0].map(f64::to_bits)));
        norms[0]
    };
    let one = norm_on(1);
    for world in [2, 4, 5, 8, 9] {
        for norm in norm_on(world) {
            assert!((norm - one[0]).abs() <= 1e-12 * one[0], "{world} ranks: {norm} != {}", one[0]);
        }
    }
}

type Model = ColumnParallelLinear<Replicated, f64, Dev>;

/// Loads a linear layer on a tensor-parallel group of one rank.
fn model(device: &Dev, source: &Arrays) -> Result<Model> {
    let alone = Group::solo(&dev::another_handle(device));
    Model::load(&alone, &Weights::new(source), 3, &Columns::even(&alone, 2)?, Bias::Add)
}

/// Runs a backward that adds the gradient of `scale` · Σ (y − t)² over some samples.
fn backward(model: &Model, x: &Array2<f64>, t: &Array2<f64>, rows: &[usize], scale: f64) -> Result<()> {
    let alone = Group::solo(&dev::another_handle(model.weight().device()));
    let pick = |x: &Array2<f64>| Tensor::from_array(alone.device(), &x.select(ndarray::Axis(0), rows));
    let (y, saved) = model.forward(DTensor::replicated(&alone, pick(x)?)?)?;
    let dy = ops::squared_error_backward(y.local(), &pick(t)?, scale)?;
    model.backward(saved, DTensor::shard(&alone, dy, &Partition::even(2, 1))?)?;
    Ok(())
}

fn values(model: &Model) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    for param in model.params() {
        all.extend(param.value()?.to_vec()?);
    }
    Ok(all)
}

/// Data parallelism over any number of ranks, with uneven batches, trains like one device with the
/// whole batch. The five modes are: sums, sums in small buckets, weighted means, several backwards
/// before one reduction, and a central aggregator.
#[test]
fn data_parallel_equals_the_big_batch() {
    let (samples, x, t) = (11, matrix(1, "x", 11, 3), matrix(1, "t", 11, 2));
    let source = arrays([("weight", random(1, "w", &[2, 3])), ("bias", random(1, "b", &[2]))]);
    let sampler = ShardedSampler { samples, batch: 5, shuffle: Some(3) };
    let train = |world: usize, how: usize| {
        let all = ranks(world).run(|group| {
            // Rank 0's parameters are broadcast, so the others may start with different ones.
            let own = match group.rank() {
                0 => source.clone(),
                rank => {
                    arrays([("weight", random(rank as u64, "?", &[2, 3])), ("bias", random(9, "?", &[2]))])
                }
            };
            let model = model(group.device(), &own)?;
            let replicas = match how {
                1 => DataParallel::with_buckets(&group, &model.params(), 8)?,
                4 => DataParallel::central(&group, &model.params(), group.size() - 1)?,
                _ => DataParallel::new(&group, &model.params())?,
            };
            let mut sgd = Sgd::new(SgdConfig::default().with_momentum(0.9));
            for epoch in 0..2 {
                let order = sampler.order(epoch);
                for batch in 0..sampler.batches() {
                    let size = sampler.range(batch, 0, 1).len() as f64;
                    let mine = &order[sampler.range(batch, group.rank(), group.size())];
                    model.params().iter().for_each(Param::zero_grad);
                    match how {
                        // The mean over the rank's own samples, weighted by their number.
                        2 => {
                            replicas.begin(GradReduce::Mean { weight: mine.len() as f64 })?;
                            if !mine.is_empty() {
                                backward(&model, &x, &t, mine, 1.0 / mine.len() as f64)?;
                            }
                        }
                        // The rank runs one sample at a time. The accumulated gradients are reduced
                        // in the last backward.
                        3 => {
                            let last = mine.len().saturating_sub(1);
                            for sample in &mine[..last] {
                                backward(&model, &x, &t, &[*sample], 1.0 / size)?;
                            }
                            replicas.begin(GradReduce::Sum)?;
                            if !mine.is_empty() {
                                backward(&model, &x, &t, &mine[last..], 1.0 / size)?;
                            }
                        }
                        _ => {
                            replicas.begin(GradReduce::Sum)?;
                            backward(&model, &x, &t, mine, 1.0 / size)?;
                        }
                    }
                    replicas.finish()?;
                    if replicas.steps() {
                        sgd.step(&model.params(), 0.05, 1.0)?;
                    }
                    replicas.publish()?;
                }
            }
            check_replicas(&model.params(), &group)?;
            values(&model)
        });
        let all = all.unwrap();
        assert!(all.iter().all(|own| *own == all[0]));
        all[0].clone()
    };
    let one = train(1, 0);
    for world in [1, 2, 3, 4, 7] {
        for how in 0..5 {
            let error = reference::worst(&train(world, how), &one);
            assert!(error <= 1e-13, "{world} ranks, {how}: {error:e}");
        }
        // The aggregator sums in the order of the all-reduce, so the bits are the same.
        assert_eq!(train(world, 4), train(world, 0));
    }
}

fn cause(error: Error) -> String {
    match error {
        Error::RankFailed { source, .. } => source.to_string(),
        error => error.to_string(),
    }
}

#[test]
fn misuse_of_replicas_is_named() {
    let source = arrays([("weight", random(1, "w", &[2, 3])), ("bias", random(1, "b", &[2]))]);
    let run = |f: &(dyn Fn(&Group<Dev>, Model) -> Result<()> + Sync)| {
        cause(ranks(2).run(|group| f(&group, model(group.device(), &source)?)).unwrap_err())
    };
    let (x, t) = (matrix(1, "x", 2, 3), matrix(1, "t", 2, 2));
    assert_eq!(
        run(&|group, model| DataParallel::new(group, &model.params())?.finish()),
        "data parallel: `finish` without `begin`, or after an error"
    );
    assert_eq!(
        run(&|group, model| DataParallel::new(group, &model.params())?
            .begin(GradReduce::Mean { weight: 0.0 })),
        "data parallel: the ranks' weights sum to 0"
    );
    assert_eq!(
        run(&|group, model| DataParallel::central(group, &model.params(), 2).map(drop)),
        "data parallel: the aggregator is rank 2, but the group has 2 ranks"
    );
    let twice = run(&|group, model| {
        let replicas = DataParallel::new(group, &model.params())?;
        replicas.begin(GradReduce::Sum)?;
        backward(&model, &x, &t, &[0], 1.0)?;
        backward(&model, &x, &t, &[1], 1.0)
    });
    assert!(twice.contains("a backward added to a gradient after its reduction had started"), "{twice}");
    // Every rank gets the name of a drifting replica.
    let drift = run(&|group, model| {
        DataParallel::new(group, &model.params())?;
        if group.rank() == 1 {
            for param in model.params() {
                let one = Tensor::full(group.device(), param.shape(), 1.0)?;
                param.set(if param.name() == "bias" { one } else { param.value()? })?;
            }
        }
        check_replicas(&model.params(), group)
    });
    assert_eq!(drift, "rank 1 of group `world` has drifted: its `bias` differs from rank 0's");
}

/// One parameter merges q, k and v, and another merges gate and up. Each is named after its
/// tensors, so that the parameters' states have different names.
#[test]
fn a_block_of_merged_weights_is_trained() {
    let config =
        BlockConfig::new(AttentionConfig::new(6, 3), 5, Activation::Silu, NormKind::RmsNorm { eps: 1e-5 })
            .with_gate(true);
    let trained = ranks(2).run(|group| {
        let source = Random::normal(1, 0.5);
        let block = TransformerBlock::<Replicated, f64, Dev>::load(&group, &Weights::new(&source), &config)?;
        let params = block.params();
        let before = params.iter().map(|param| param.value()?.to_vec()).collect::<Result<Vec<_>>>()?;
        let x = DTensor::replicated(&group, Tensor::full(group.device(), [4, 6], 0.5)?)?;
        let (y, saved) = block.forward(x)?;
        block.backward(saved, y)?;
        AdamW::default().step(&params, 0.1, 1.0)?;
        for (param, before) in params.iter().zip(&before) {
            assert_ne!(param.value()?.to_vec()?, *before, "{} has not moved", param.name());
        }
        Ok(params.iter().map(|param| param.name().to_string()).collect::<Vec<_>>())
    });
    let want = [
        "norm1.weight",
        "attention.q|k|v.weight",
        "attention.o.weight",
        "norm2.weight",
        "mlp.gate|up.weight",
        "mlp.down.weight",
    ];
    assert_eq!(trained.unwrap(), [want, want]);
}
