//! Compares training on meshes with training on one device, and its components with the reference.

#[path = "../../examples/text/train_text/model.rs"]
#[allow(dead_code)]
pub(crate) mod model;

use crate::dev::{self, Dev, Tensor, ranks};
use crate::support::{Assembled, difference};
use model::{Batch, Config, Gpt};
use ndarray::{Array2, ArrayD};
use proptest::prelude::*;
use shardwise::{
    Error, Result,
    comm::DeviceMesh,
    device::Element,
    optim::{AdamW, AdamWConfig, LossScale, clip_scale, require_finite},
    parallel::ResidualStream,
    reference,
    rng::Philox,
    shard::{Axis, Mesh, Replicated, Shard},
    tensor::{Random, WeightSource},
    train::{Schedule, check_replicas},
    weights::{self, Checkpoint},
};
use std::collections::BTreeMap;

/// Adam's ε. The gradient of a key's bias is only rounding error, which Adam would scale up to a
/// full step. ε bounds this step.
const EPS: f64 = 1e-5;

/// The learning rate. It is so small that twenty steps of any random model do not amplify a
/// rounding error beyond the bound.
const RATE: f64 = 1e-3;

const CONFIG: Config = Config {
    vocabulary: 11,
    context: 5,
    hidden: 12,
    heads: 3,
    ffn: 10,
    layers: 4,
    dropout: 0.2,
    recomputed: 4,
};

pub(crate) fn batch(config: &Config, step: u64, sequences: usize) -> Batch {
    let stream = Philox::stream(9, step);
    let token = |at: usize| (stream.uniform(at as u64) * config.vocabulary as f64) as u32;
    let count = sequences * config.context;
    Batch {
        tokens: (0..count).map(token).collect(),
        targets: (count..2 * count).map(token).collect(),
        length: config.context,
    }
}

/// The parameters of the whole model after some steps, and the losses and norms of each step.
struct Trained {
    params: BTreeMap<String, ArrayD<f64>>,
    curve: Vec<(f64, f64)>,
}

fn train<S: ResidualStream, T: Element>(
    config: &Config,
    [dp, pp, tp]: [usize; 3],
    schedule: impl Fn() -> Result<Schedule> + Sync,
    sequences: usize,
    steps: u64,
    clip: f64,
) -> Result<Trained> {
    let outcomes = ranks(dp * pp * tp).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
        let source = Random::normal(3, 0.3);
        let model = Gpt::<S, T, Dev>::load(&mesh, &source, config, schedule()?)?;
        let mut optimizer = AdamW::new(AdamWConfig::default().with_weight_decay(0.1).with_eps(EPS));
        let mut curve = Vec::new();
        for step in 0..steps {
            let (loss, norm) = model.gradients(&batch(config, step, sequences), step, 1.0)?;
            optimizer.step(&model.params(), RATE, clip_scale(norm, clip)?)?;
            curve.push((loss, norm));
        }
        for axis in [Axis::Data, Axis::Tensor, Axis::Pipeline] {
            check_replicas(&model.params(), mesh.group(axis))?;
        }
        let mut params = Vec::new();
        for param in model.params() {
            let values: Vec<f64> = param.value()?.to_vec()?.into_iter().map(Element::to_f64).collect();
            params.push((param.regions().to_vec(), param.shape().dims().to_vec(), values));
        }
        Ok((mesh.group(Axis::Data).rank(), curve, params))
    })?;
    let mut whole = Assembled::default();
    let curve = outcomes[0].1.clone();
    for (replica, own, params) in outcomes {
        assert_eq!(own, curve, "every rank knows the same losses and norms");
        if replica == 0 {
            params.iter().for_each(|(regions, shape, values)| whole.add(regions, shape, values));
        }
    }
    Ok(Trained { params: whole.finish(), curve })
}

fn alternating(ranks: usize, microbatches: usize) -> impl Fn() -> Result<Schedule> + Sync {
    move || Ok(Schedule::one_forward_one_backward(ranks, microbatches))
}

#[track_caller]
fn same(got: &Trained, want: &Trained, tolerance: f64) {
    assert_eq!(got.params.len(), want.params.len());
    for (name, want) in &want.params {
        let error = difference(&got.params[name], want);
        assert!(error <= tolerance, "{name}: {error:e}");
    }
    assert_eq!(got.curve.len(), want.curve.len());
    for (got, want) in got.curve.iter().zip(&want.curve) {
        assert!(
            (got.0 - want.0).abs() <= tolerance && (got.1 - want.1).abs() <= tolerance * want.1,
            "{got:?} {want:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12 / dev::FEWER, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random models on dp x pp x tp meshes, with uneven batches and shards, dropout and clipping:
    /// 20 steps equal those of one device.
    #[test]
    fn meshes_train_as_one_device_does(
        mesh in prop::sample::select(vec![[2, 1, 1], [1, 2, 1], [1, 1, 2], [1, 4, 1], [2, 2, 2], [3, 1, 2], [8, 1, 1], [1, 1, 5]]),
        microbatches in 1..4usize, sequences in 1..9usize, context in 1..6usize, heads in 5..7usize, head_dim in 1..3usize,
        ffn in 5..9usize, layers in 4..6usize, vocabulary in 5..14usize, dropout in prop::sample::select(vec![0.0, 0.2]),
    ) {
        let config = Config { vocabulary, context, hidden: heads * head_dim, heads, ffn, layers, dropout, recomputed: if layers == 4 { layers } else { 0 } };
        let one = train::<Replicated, f64>(&config, [1, 1, 1], alternating(1, 1), sequences, 20, 1.0).unwrap();
        let schedule = || alternating(mesh[1], microbatches);
        same(&train::<Replicated, f64>(&config, mesh, schedule(), sequences, 20, 1.0).unwrap(), &one, 1e-10);
        same(&train::<Shard<0>, f64>(&config, mesh, schedule(), sequences, 20, 1.0).unwrap(), &one, 1e-10);
    }
}

/// The same model as [`Gpt`], built from the reference's functions.
struct Reference(BTreeMap<String, ArrayD<f64>>);

impl Reference {
    fn matrix(&self, name: &str) -> Array2<f64> {
        self.0[name].clone().into_dimensionality().unwrap()
    }

    fn norm(&self, name: &str) -> reference::Norm {
        let vector = |part| self.0[&format!("{name}.{part}")].clone().into_dimensionality().unwrap();
        reference::Norm::LayerNorm { gamma: vector("weight"), beta: vector("bias"), eps: 1e-5 }
    }

    fn block(&self, layer: usize) -> reference::BlockWeights {
        let name = |part: &str| format!("layers.{layer}.{part}");
        let matrix = |part: &str| self.matrix(&name(&format!("{part}.weight")));
        let bias =
            |part: &str| Some(self.0[&name(&format!("{part}.bias"))].clone().into_dimensionality().unwrap());
        let (heads, head_dim) = (CONFIG.heads, CONFIG.hidden / CONFIG.heads);
        let scale = 1.0 / (head_dim as f64).sqrt();
        reference::BlockWeights {
            spec: reference::AttentionSpec {
                heads,
                kv_heads: heads,
                head_dim,
                causal: true,
                window: None,
                scale,
            },
            attention: reference::AttentionWeights {
                q: matrix("attention.q"),
                q_bias: bias("attention.q"),
                k: matrix("attention.k"),
                k_bias: bias("attention.k"),
                v: matrix("attention.v"),
                v_bias: bias("attention.v"),
                o: matrix("attention.o"),
                o_bias: bias("attention.o"),
            },
            norm1: self.norm(&name("norm1")),
            norm2: self.norm(&name("norm2")),
            mlp: reference::Mlp::Plain {
                weights: reference::MlpWeights {
                    up: matrix("mlp.up"),
                    up_bias: bias("mlp.up"),
                    down: matrix("mlp.down"),
                    down_bias: bias("mlp.down"),
                },
                act: reference::Activation::GeluTanh,
            },
            placement: reference::NormPlacement::Pre,
        }
    }

    /// Returns the mean loss and the gradient of every tensor.
    fn gradients(&self, batch: &Batch) -> (f64, BTreeMap<String, ArrayD<f64>>) {
        let (table, positions) = (self.matrix("embedding.weight"), self.matrix("positions.weight"));
        let ids: Vec<usize> = batch.tokens.iter().map(|&token| token as usize).collect();
        let places: Vec<usize> = (0..ids.len()).map(|at| at % batch.length).collect();
        let sequences: Vec<_> =
            (0..ids.len() / batch.length).map(|at| at * batch.length..(at + 1) * batch.length).collect();
        let blocks: Vec<_> = (0..CONFIG.layers).map(|layer| self.block(layer)).collect();
        let mut xs = vec![reference::embedding(&ids, &table) + reference::embedding(&places, &positions)];
        for block in &blocks {
            xs.push(reference::block(block, &xs[xs.len() - 1], &sequences, None));
        }
        let (norm, last) = (self.norm("norm"), &xs[CONFIG.layers]);
        let normed = norm.apply(last);
        let logits = reference::linear(&normed, &table, None);
        let (entropy, part) = (reference::CrossEntropy::default(), 1.0 / ids.len() as f64);
        let loss = entropy.losses(&logits, &batch.targets).sum() * part;
        let head =
            reference::linear_backward(&normed, &table, &entropy.backward(&logits, &batch.targets, part));
        let mut grads = BTreeMap::new();
        let (mut dx, dnorm) = norm.backward(last, &head.dx);
        if let reference::Norm::LayerNorm { gamma, beta, .. } = dnorm {
            grads.insert("norm.weight".to_string(), gamma.into_dyn());
            grads.insert("norm.bias".to_string(), beta.into_dyn());
        }
        for (layer, block) in blocks.iter().enumerate().rev() {
            let back = reference::block_backward(block, &xs[layer], &sequences, None, &dx);
            dx = back.dx;
            let named = back.weights.named().into_iter();
            grads.extend(named.map(|(name, grad)| (format!("layers.{layer}.{name}"), grad)));
        }
        let dtable = head.dw + reference::embedding_backward(&ids, CONFIG.vocabulary, &dx);
        grads.insert("embedding.weight".to_string(), dtable.into_dyn());
        let dpositions = reference::embedding_backward(&places, CONFIG.context, &dx);
        grads.insert("positions.weight".to_string(), dpositions.into_dyn());
        (loss, grads)
    }
}

/// Compares a 2 x 2 x 2 mesh with a model and an optimizer that share no code with it.
#[test]
fn a_mesh_trains_as_the_reference_does() {
    let config = Config { dropout: 0.0, ..CONFIG };
    let (steps, sequences) = (20, 6);
    let initial = train::<Replicated, f64>(&config, [1, 1, 1], alternating(1, 1), 1, 0, 1.0).unwrap();
    let mut model = Reference(initial.params);
    let same_adamw = |weight_decay| reference::AdamW {
        lr: RATE,
        beta1: 0.9,
        beta2: 0.999,
        eps: EPS,
        weight_decay,
        steps: 0,
        moments: None,
    };
    let mut adamw: BTreeMap<_, _> = model
        .0
        .iter()
        .map(|(name, tensor)| (name.clone(), same_adamw(if tensor.ndim() > 1 { 0.1 } else { 0.0 })))
        .collect();
    let mut curve = Vec::new();
    for step in 0..steps {
        let (loss, grads) = model.gradients(&batch(&config, step, sequences));
        assert_eq!(grads.keys().collect::<Vec<_>>(), model.0.keys().collect::<Vec<_>>());
        let norm = grads.values().flatten().map(|grad| grad * grad).sum::<f64>().sqrt();
        curve.push((loss, norm));
        for (name, weight) in &mut model.0 {
            adamw.get_mut(name).unwrap().step(weight, &(&grads[name] * clip_scale(norm, 1.0).unwrap()));
        }
    }
    let got = train::<Shard<0>, f64>(&config, [2, 2, 2], alternating(2, 3), sequences, steps, 1.0).unwrap();
    let first = (curve[0], got.curve[0]);
    assert!((first.0.1 - first.1.1).abs() <= 1e-12 * first.0.1, "the gradient's norm: {first:?}");
    same(&got, &Trained { params: model.0, curve }, 1e-10);
}

/// All schedules add gradients in the same order, so they give the same bits. The test does not
/// clip gradients, because the bits of the norm depend on how the ranks share the parameters.
#[test]
fn schedules_give_the_same_bits() {
    let train = |schedule: Schedule| {
        let trained =
            train::<Replicated, f32>(&CONFIG, [1, 2, 1], || Ok(schedule.clone()), 4, 3, f64::INFINITY)
                .unwrap();
        let bits = |array: &ArrayD<f64>| array.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        trained.params.iter().map(|(name, array)| (name.clone(), bits(array))).collect::<BTreeMap<_, _>>()
    };
    let gpipe = train(Schedule::gpipe(2, 4));
    for schedule in [Schedule::one_forward_one_backward(2, 4), Schedule::interleaved(2, 2, 4).unwrap()] {
        let got = train(schedule);
        gpipe.iter().for_each(|(name, want)| assert!(got[name] == *want, "{name}"));
    }
}

/// Returns each rank's error after `damage` has changed a rank's model or batch before step 2.
fn faulty(
    [dp, pp, tp]: [usize; 3],
    damage: impl Fn(usize, &Gpt<Replicated, f32, Dev>, &mut Batch) -> Result<()> + Sync,
) -> Vec<Error> {
    let outcomes = ranks(dp * pp * tp).run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
        let source = Random::normal(3, 0.3);
        let model = Gpt::<_, _, Dev>::load(&mesh, &source, &CONFIG, alternating(pp, 2)()?)?;
        let mut optimizer = AdamW::default();
        for step in 0..4 {
            let mut batch = batch(&CONFIG, step, 8);
            if step == 2 {
                damage(world.rank(), &model, &mut batch)?;
            }
            let (_, norm) = model.gradients(&batch, step, 1.0)?;
            optimizer.step(&model.params(), 1e-2, clip_scale(require_finite(norm)?, 1.0)?)?;
        }
        Ok(())
    });
    outcomes.unwrap().into_iter().map(|outcome| outcome.unwrap_err()).collect()
}

/// If a rank panics, a weight turns NaN, or ranks have different batches in mid-training, every
/// rank returns an error.
#[test]
fn faults_are_typed_errors_on_every_rank() {
    for mesh in [[2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2, 2]] {
        let world: usize = mesh.iter().product();
        let panicked = faulty(mesh, |rank, _, _| if rank == 1 { panic!("a fault") } else { Ok(()) });
        for (rank, error) in panicked.iter().enumerate() {
            match error {
                Error::RankPanicked { rank: 1, message } if rank == 1 => assert_eq!(message, "a fault"),
                Error::PeerLost { .. } if rank != 1 => {}
                other => panic!("{mesh:?}: rank {rank} returned {other:?}"),
            }
        }
        let nan = faulty(mesh, |rank, model, _| match rank {
            0 => model.params().iter().try_for_each(|param| {
                param.set(Tensor::full(&dev::another_handle(param.device()), param.shape(), f64::NAN)?)
            }),
            _ => Ok(()),
        });
        for error in nan {
            assert_eq!(
                error.to_string(),
                "gradient norm: the gradient is not finite: its norm is NaN",
                "{mesh:?}"
            );
        }
        let disagree = faulty(mesh, |rank, _, batch| {
            if rank == world - 1 {
                batch.tokens.truncate(6 * CONFIG.context);
                batch.targets.truncate(6 * CONFIG.context);
            }
            Ok(())
        });
        for error in disagree {
            let fine = match &error {
                Error::Mismatch(_) | Error::PeerLost { .. } => true,
                Error::Invalid { reason, .. } => reason.contains("the replicas had"),
                _ => false,
            };
            assert!(fine, "{mesh:?}: {error:?}");
        }
    }
}

/// Trains in f16 with a loss scale that is too large at first. Steps are skipped until the scale
/// fits, and then the loss falls.
#[test]
fn loss_scaling_finds_a_scale_that_fits() {
    let outcomes = ranks(2).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        let source = Random::normal(3, 0.3);
        let model = Gpt::<Replicated, half::f16, Dev>::load(&mesh, &source, &CONFIG, alternating(1, 1)()?)?;
        let (mut adamw, mut scale) = (AdamW::default(), LossScale::new(2f64.powi(24), 4)?);
        let (mut losses, mut left_out) = (Vec::new(), 0);
        for step in 0..40 {
            let (loss, norm) = model.gradients(&batch(&CONFIG, 0, 8), step, scale.scale())?;
            let undo = 1.0 / scale.scale();
            if scale.update(norm) {
                adamw.step(&model.params(), 1e-2, undo * clip_scale(norm * undo, 1.0)?)?
            } else {
                left_out += 1
            }
            losses.push(loss);
        }
        Ok((losses, left_out))
    });
    let outcomes = outcomes.unwrap();
    assert_eq!(outcomes[0], outcomes[1]);
    let (losses, left_out) = &outcomes[0];
    assert!(*left_out > 2 && *left_out < 20, "{left_out} steps were left out");
    assert!(losses.iter().all(|loss| loss.is_finite()) && losses[39] < 0.7 * losses[0], "{losses:?}");
}

/// The ranks of a replica hold stages and shards of tensors. They save the model together, and one
/// rank reads it.
#[test]
fn a_model_on_a_mesh_is_saved_whole() {
    let source = Random::normal(5, 0.5);
    let whole = |source: &(dyn WeightSource + Sync)| {
        let read = ranks(1).run(|group| {
            let mesh = DeviceMesh::new(&group, Mesh::new(1, 1, 1)?)?;
            let schedule = Schedule::one_forward_one_backward(1, 1);
            let model = Gpt::<Replicated, f32, Dev>::load(&mesh, source, &CONFIG, schedule)?;
            let mut all = BTreeMap::new();
            for param in model.params() {
                let bits: Vec<_> = param.value()?.to_vec()?.into_iter().map(f32::to_bits).collect();
                all.insert(param.name().to_string(), bits);
            }
            Ok(all)
        });
        read.unwrap().remove(0)
    };
    for (dp, pp, tp) in [(1, 2, 1), (2, 2, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let saved = ranks(dp * pp * tp).run(|world| {
            let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
            let schedule = Schedule::one_forward_one_backward(pp, pp);
            let model = Gpt::<Replicated, f32, Dev>::load(&mesh, &source, &CONFIG, schedule)?;
            let number = mesh.group(Axis::Data).rank();
            let replica = world.split_all(number as u64)?;
            match number {
                0 => weights::save(&replica, &model.params(), folder.path()),
                _ => Ok(()),
            }
        });
        saved.unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(whole(&checkpoint), whole(&source), "{dp}, {pp}, {tp}");
    }
}
