//! Training on meshes against training on one device, and its parts against the reference.

#[path = "../../examples/train_text/model.rs"]
#[allow(dead_code)]
mod model;

use crate::support::{Assembled, difference, ranks};
use model::{Batch, Config, Gpt};
use ndarray::ArrayD;
use shardwise::{
    Error, Result, Tensor,
    comm::DeviceMesh,
    device::{Cpu, Element},
    optim::{AdamW, AdamWConfig, LossScale, clip_scale, require_finite},
    parallel::Stream,
    rng::Philox,
    shard::{Axis, Mesh, Replicated, Shard},
    tensor::{Random, Weights},
    train::{Schedule, check_replicas},
};
use std::collections::BTreeMap;

const CONFIG: Config =
    Config { vocabulary: 11, context: 5, hidden: 12, heads: 3, ffn: 10, layers: 4, dropout: 0.2 };

fn batch(step: u64, sequences: usize) -> Batch {
    let stream = Philox::stream(9, step);
    let token = |at: usize| (stream.uniform(at as u64) * CONFIG.vocabulary as f64) as u32;
    let count = sequences * CONFIG.context;
    Batch {
        tokens: (0..count).map(token).collect(),
        targets: (count..2 * count).map(token).collect(),
        length: CONFIG.context,
    }
}

/// The parameters of the whole model after some steps, and the losses and norms on the way.
struct Trained {
    params: BTreeMap<String, ArrayD<f64>>,
    curve: Vec<(f64, f64)>,
}

fn train<S: Stream, T: Element>(
    [dp, pp, tp]: [usize; 3],
    schedule: impl Fn() -> Result<Schedule> + Sync,
    sequences: usize,
    steps: u64,
    clip: f64,
) -> Result<Trained> {
    let outcomes = ranks(dp * pp * tp).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
        let source = Random::normal(3, 0.3);
        let mut model = Gpt::<S, T>::load(&mesh, &Weights::new(&source), &CONFIG, schedule()?)?;
        let mut optimizer = AdamW::new(AdamWConfig { weight_decay: 0.1, ..AdamWConfig::default() });
        let mut curve = Vec::new();
        for step in 0..steps {
            let (loss, norm) = model.gradients(&batch(step, sequences), step, 1.0)?;
            optimizer.step(|f| model.visit(f), 1e-2, clip_scale(norm, clip))?;
            curve.push((loss, norm));
        }
        check_replicas(|f| model.visit(f), mesh.group(Axis::Data), |_| true)?;
        let mut params = Vec::new();
        model.visit(&mut |param| {
            let values: Vec<f64> = param.value().to_vec()?.into_iter().map(Element::to_f64).collect();
            params.push((param.pieces().to_vec(), param.value().shape().dims().to_vec(), values));
            Ok(())
        })?;
        Ok((mesh.group(Axis::Data).rank(), curve, params))
    })?;
    let mut whole = Assembled::default();
    let curve = outcomes[0].1.clone();
    for (replica, own, params) in outcomes {
        assert_eq!(own, curve, "every rank knows the same losses and norms");
        if replica == 0 {
            params.iter().for_each(|(pieces, shape, values)| whole.add(pieces, shape, values));
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
    for (got, want) in got.curve.iter().zip(&want.curve) {
        assert!(
            (got.0 - want.0).abs() <= tolerance && (got.1 - want.1).abs() <= tolerance * want.1,
            "{got:?} {want:?}"
        );
    }
}

/// dp x pp x tp meshes, uneven batches and cuts, dropout and clipping on: 20 steps as on one device.
#[test]
fn meshes_train_as_one_device_does() {
    let one = train::<Replicated, f64>([1, 1, 1], alternating(1, 1), 7, 20, 1.0).unwrap();
    assert!(one.curve.last().unwrap().0 < one.curve[0].0, "the loss falls");
    for (mesh, microbatches) in [
        ([2, 1, 1], 1),
        ([1, 2, 1], 3),
        ([1, 1, 2], 2),
        ([1, 4, 1], 5),
        ([2, 2, 2], 2),
        ([3, 1, 2], 1),
        ([8, 1, 1], 1),
    ] {
        let got = train::<Replicated, f64>(mesh, alternating(mesh[1], microbatches), 7, 20, 1.0).unwrap();
        same(&got, &one, 1e-10);
        let got = train::<Shard<0>, f64>(mesh, alternating(mesh[1], microbatches), 7, 20, 1.0).unwrap();
        same(&got, &one, 1e-10);
    }
}

/// All schedules add gradients in the same order: the same bits, where the norm, which is summed rank by rank, has no say.
#[test]
fn schedules_give_the_same_bits() {
    let train = |schedule: Schedule| {
        let trained =
            train::<Replicated, f32>([1, 2, 1], || Ok(schedule.clone()), 4, 3, f64::INFINITY).unwrap();
        let bits = |array: &ArrayD<f64>| array.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        trained.params.iter().map(|(name, array)| (name.clone(), bits(array))).collect::<BTreeMap<_, _>>()
    };
    let gpipe = train(Schedule::gpipe(2, 4));
    for schedule in [Schedule::one_forward_one_backward(2, 4), Schedule::interleaved(2, 2, 4).unwrap()] {
        let got = train(schedule);
        gpipe.iter().for_each(|(name, want)| assert!(got[name] == *want, "{name}"));
    }
}

/// What each rank of a mesh is told after `spoil` has had its way with a rank's model or batch before step 2.
fn faulty(
    [dp, pp, tp]: [usize; 3],
    spoil: impl Fn(usize, &mut Gpt<Replicated, f32>, &mut Batch) -> Result<()> + Sync,
) -> Vec<Error> {
    let outcomes = ranks(dp * pp * tp).run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(dp, pp, tp)?)?;
        let source = Random::normal(3, 0.3);
        let mut model = Gpt::load(&mesh, &Weights::new(&source), &CONFIG, alternating(pp, 2)()?)?;
        let mut optimizer = AdamW::default();
        for step in 0..4 {
            let mut batch = batch(step, 8);
            if step == 2 {
                spoil(world.rank(), &mut model, &mut batch)?;
            }
            let (_, norm) = model.gradients(&batch, step, 1.0)?;
            optimizer.step(|f| model.visit(f), 1e-2, clip_scale(require_finite(norm)?, 1.0))?;
        }
        Ok(())
    });
    outcomes.unwrap().into_iter().map(|outcome| outcome.unwrap_err()).collect()
}

/// A rank panics, a weight turns NaN, or ranks are given different batches, in mid-training: an error on every rank.
#[test]
fn faults_are_typed_errors_on_every_rank() {
    for mesh in [[2, 1, 1], [1, 2, 1], [1, 1, 2], [2, 2, 2]] {
        let world: usize = mesh.iter().product();
        let panicked = faulty(mesh, |rank, _, _| if rank == 1 { panic!("a fault") } else { Ok(()) });
        for (rank, error) in panicked.iter().enumerate() {
            match error {
                Error::RankPanicked { rank: 1, message } if rank == 1 => assert_eq!(message, "a fault"),
                Error::PeerLost { .. } if rank != 1 => {}
                other => panic!("{mesh:?}: rank {rank} was told {other:?}"),
            }
        }
        let nan = faulty(mesh, |rank, model, _| match rank {
            0 => model.visit(&mut |param| {
                *param.value_mut() = Tensor::full(&Cpu::new(), param.value().shape(), f64::NAN)?;
                Ok(())
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

/// f16 with a loss scale that is too large at first: steps are left out until it fits, and then the loss falls.
#[test]
fn loss_scaling_finds_a_scale_that_fits() {
    let outcomes = ranks(2).run(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        let source = Random::normal(3, 0.3);
        let mut model =
            Gpt::<Replicated, half::f16>::load(&mesh, &Weights::new(&source), &CONFIG, alternating(1, 1)()?)?;
        let (mut adamw, mut scale) = (AdamW::default(), LossScale::new(2f64.powi(24), 4));
        let (mut losses, mut left_out) = (Vec::new(), 0);
        for step in 0..40 {
            let (loss, norm) = model.gradients(&batch(0, 8), step, scale.scale())?;
            let undo = 1.0 / scale.scale();
            match scale.update(norm) {
                true => adamw.step(|f| model.visit(f), 1e-2, undo * clip_scale(norm * undo, 1.0))?,
                false => left_out += 1,
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
