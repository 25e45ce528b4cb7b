//! What outlives a step: optimizers' states, masters, absent gradients and scales.

use crate::dev::{self, Dev, Tensor, ranks};
use crate::support::{arrays, close, random};
use half::{bf16, f16};
use ndarray::ArrayD;
use shardwise::{
    comm::Group,
    device::Element,
    optim::{AdamW, AdamWConfig, LossScale, Sgd, SgdConfig, clip_scale},
    parallel::BoxLayer,
    reference,
    shard::{Reduction, Replicated},
    tensor::{Param, Region, Role, Weights},
    train::{DataParallel, GradReduce, Pipeline, Schedule},
};

/// A whole parameter with random values.
fn param<T: Element>(device: &Dev, name: &str, shape: &[usize]) -> Param<T, Dev> {
    let source = arrays([(name, random(1, name, shape))]);
    let region = Region::whole(shape);
    Param::load_region(device, &Weights::new(&source), name, Role::Weight, region, true).unwrap()
}

/// Its gradient of a step, and the parameter has it.
fn give<T: Element>(param: &mut Param<T, Dev>, step: u64) -> ArrayD<f64> {
    let grad =
        random(100 + step, param.name(), param.value().shape().dims()).mapv(|g| T::Acc::from_f64(g).to_f64());
    param.zero_grad();
    let device = dev::beside(param.value().device());
    param.add_grad(Tensor::from_array(&device, &grad.mapv(T::Acc::from_f64)).unwrap()).unwrap();
    grad
}

fn values<T: Element>(param: &Param<T, Dev>) -> ArrayD<f64> {
    param.value().to_array().unwrap().mapv(T::to_f64)
}

fn bits<T: Element>(param: &Param<T, Dev>) -> Vec<u64> {
    values(param).iter().map(|value| value.to_bits()).collect()
}

fn set<T: Element>(param: &mut Param<T, Dev>, value: &ArrayD<f64>) {
    let device = dev::beside(param.value().device());
    *param.value_mut() = Tensor::from_array(&device, &value.mapv(T::from_f64)).unwrap();
}

const LR: f64 = 0.01;
const DECAY: f64 = 0.1;

fn adamw_config() -> AdamWConfig {
    AdamWConfig { weight_decay: DECAY, decay_vectors: true, ..AdamWConfig::default() }
}

fn plain_adamw(lr: f64, weight_decay: f64) -> reference::AdamW {
    reference::AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, steps: 0, moments: None }
}

fn plain_sgd(lr: f64, weight_decay: f64) -> reference::Sgd {
    reference::Sgd { lr, momentum: 0.9, nesterov: false, weight_decay, velocity: None }
}

fn sgd_config() -> SgdConfig {
    SgdConfig { momentum: 0.9, nesterov: false, weight_decay: DECAY }
}

/// Parameters of one shape and of others, which come and go, in any order: each is stepped as if it were alone, and its
/// bias correction counts its own steps.
fn each_as_if_alone<T: Element>(tolerance: f64) {
    let device = dev::poisoned();
    let names = ["a", "b", "c"];
    let shapes: [&[usize]; 3] = [&[3, 5], &[3, 5], &[4]];
    let mut params: Vec<_> =
        names.iter().zip(shapes).map(|(name, shape)| param::<T>(&device, name, shape)).collect();
    let mut moved: Vec<_> =
        names.iter().zip(shapes).map(|(name, shape)| param::<T>(&device, name, shape)).collect();
    let mut want: Vec<_> = params.iter().map(values).collect();
    let mut want_moved = want.clone();
    let (mut adamw, mut sgd) = (AdamW::<T, Dev>::new(adamw_config()), Sgd::<T, Dev>::new(sgd_config()));
    let mut one: Vec<_> = names.map(|_| plain_adamw(LR, DECAY)).into();
    let mut other: Vec<_> = names.map(|_| plain_sgd(LR, DECAY)).into();
    let visits: [&[usize]; 6] = [&[0, 1], &[1], &[1, 0], &[2, 0, 1], &[2], &[1, 2, 0]];
    for (step, visited) in visits.into_iter().enumerate() {
        for &at in visited {
            // One that is visited without a gradient is left alone.
            if step == 3 && at == 0 {
                params[at].zero_grad();
                moved[at].zero_grad();
                continue;
            }
            let grad = give(&mut params[at], step as u64);
            one[at].step(&mut want[at], &grad);
            give(&mut moved[at], step as u64);
            other[at].step(&mut want_moved[at], &grad);
        }
        adamw.step(|f| visited.iter().try_for_each(|&at| f(&mut params[at])), LR, 1.0).unwrap();
        sgd.step(|f| visited.iter().try_for_each(|&at| f(&mut moved[at])), LR, 1.0).unwrap();
        for at in 0..names.len() {
            close(&format!("adamw, {} at {step}", names[at]), &values(&params[at]), &want[at], tolerance);
            close(&format!("sgd, {} at {step}", names[at]), &values(&moved[at]), &want_moved[at], tolerance);
        }
    }
}

#[test]
fn state_follows_the_name_whatever_is_visited_and_in_which_order() {
    each_as_if_alone::<f64>(1e-12);
    each_as_if_alone::<f32>(1e-5);
    each_as_if_alone::<bf16>(bf16::EPSILON.to_f64());
    each_as_if_alone::<f16>(f16::EPSILON.to_f64());
}

#[test]
fn a_name_visited_twice_or_with_other_pieces_is_refused_before_anything_changes() {
    let device = dev::poisoned();
    let cut = |rows: std::ops::Range<usize>, owned: bool| {
        let source = arrays([("w", random(1, "w", &[6, 5]))]);
        let region = Region::whole([6, 5]).cut(0, rows);
        let weights = Weights::new(&source);
        Param::<bf16, Dev>::load_region(&device, &weights, "w", Role::Weight, region, owned).unwrap()
    };
    let mut first = param::<bf16>(&device, "first", &[2]);
    let (mut adamw, mut sgd) = (AdamW::<bf16, Dev>::default(), Sgd::<bf16, Dev>::default());
    let mut step = |params: &mut [&mut Param<bf16, Dev>], step: u64| {
        params.iter_mut().for_each(|param| drop(give(param, step)));
        let before: Vec<_> = params.iter().map(|param| bits(param)).collect();
        let outcomes = [
            adamw.step(|f| params.iter_mut().try_for_each(|param| f(param)), LR, 1.0),
            sgd.step(|f| params.iter_mut().try_for_each(|param| f(param)), LR, 1.0),
        ];
        let after: Vec<_> = params.iter().map(|param| bits(param)).collect();
        assert_eq!(outcomes[0].is_err(), after == before);
        outcomes.map(|outcome| outcome.map_or_else(|error| error.to_string(), |()| String::new()))
    };
    let mut w = cut(0..3, true);
    assert_eq!(step(&mut [&mut first, &mut w], 1), ["", ""]);
    for (mut other, says) in [
        (cut(0..2, true), "w has shape [2, 5], but its state has shape [3, 5]"),
        (cut(1..4, true), "w holds w [1..4, 0..5], but its state is of w [0..3, 0..5]"),
        (cut(0..3, false), "w holds w [0..3, 0..5] (not owned), but its state is of w [0..3, 0..5]"),
    ] {
        assert_eq!(
            step(&mut [&mut first, &mut other], 2),
            [format!("adamw: {says}"), format!("sgd: {says}")]
        );
    }
    let mut again = cut(0..3, true);
    let says = "w is visited twice in one step";
    assert_eq!(
        step(&mut [&mut w, &mut first, &mut again], 3),
        [format!("adamw: {says}"), format!("sgd: {says}")]
    );
    assert_eq!(step(&mut [&mut w, &mut first], 4), ["", ""]);
}

/// A value that is set between steps, in place or by another parameter of that name, is what the next step begins with.
fn sets_values<T: Element>() {
    let device = dev::poisoned();
    let mut param = param::<T>(&device, "w", &[3, 5]);
    let (mut adamw, mut plain) = (AdamW::<T, Dev>::new(adamw_config()), plain_adamw(LR, DECAY));
    let mut want = values(&param);
    for step in 0..6 {
        if step > 0 {
            let loaded = random(step, "loaded", &[3, 5]).mapv(|value| T::from_f64(value).to_f64());
            if step % 2 == 0 {
                param = self::param::<T>(&device, "w", &[3, 5]);
            }
            set(&mut param, &loaded);
            give(&mut param, step);
            let before = bits(&param);
            adamw.step(|f| f(&mut param), 0.0, 1.0).unwrap();
            assert_eq!(bits(&param), before, "{} at {step}: a step of rate 0", T::DTYPE);
            plain.lr = 0.0;
            want = loaded;
            let grad = give(&mut param, step);
            plain.step(&mut want, &grad);
            plain.lr = LR;
        }
        let grad = give(&mut param, step);
        adamw.step(|f| f(&mut param), LR, 1.0).unwrap();
        plain.step(&mut want, &grad);
        close(&format!("{} at {step}", T::DTYPE), &values(&param), &want, T::EPSILON);
    }
}

#[test]
fn masters_are_taken_anew_from_values_set_after_them_and_moments_are_kept() {
    sets_values::<bf16>();
    sets_values::<f16>();
    sets_values::<f32>();
}

/// Values that are taken away for a while, such as for an average of weights, and put back: masters keep what bf16 cannot.
#[test]
fn masters_are_kept_where_values_are_still_their_rounding() {
    let device = dev::poisoned();
    let train = |swaps: bool| {
        let mut param = param::<bf16>(&device, "w", &[3, 5]);
        let mut sgd = Sgd::<bf16, Dev>::default();
        for _ in 0..100 {
            param.zero_grad();
            param.add_grad(Tensor::full(&device, [3, 5], 1.0).unwrap()).unwrap();
            sgd.step(|f| f(&mut param), 1e-4, 1.0).unwrap();
            if swaps {
                let kept = param.value().clone();
                set(&mut param, &ArrayD::ones(vec![3, 5]));
                *param.value_mut() = kept;
            }
        }
        bits(&param)
    };
    assert_eq!(train(true), train(false));
}

/// The aggregator sends its values after each step and keeps its masters: the bits of replicas that all step.
#[test]
fn a_broadcast_leaves_the_senders_masters_alone() {
    let train = |central: bool| {
        let all = ranks(3).run(|group| {
            let mut param = param::<bf16>(group.device(), "w", &[3, 5]);
            let replicas = match central {
                true => DataParallel::central(&group, |f| f(&mut param), 1)?,
                false => DataParallel::new(&group, |f| f(&mut param))?,
            };
            let mut sgd = Sgd::<bf16, Dev>::default();
            for _ in 0..50 {
                param.zero_grad();
                replicas.begin(GradReduce::Sum)?;
                param.add_grad(Tensor::full(group.device(), [3, 5], 1.0)?)?;
                replicas.finish(|f| f(&mut param))?;
                if replicas.steps() {
                    sgd.step(|f| f(&mut param), 1e-4, 1.0)?;
                }
                replicas.publish(|f| f(&mut param))?;
            }
            Ok(bits(&param))
        });
        all.unwrap()
    };
    let (one, all) = (train(true), train(false));
    assert_eq!(one, all);
    let device = dev::poisoned();
    let begin = values(&param::<bf16>(&device, "w", &[3, 5]));
    assert!(one[0].iter().zip(&begin).any(|(got, before)| (f64::from_bits(*got) - before).abs() > 0.01));
}

/// A parameter without a gradient on any replica has none after the reduction, so that nothing decays it; where some
/// replica has one, zeros stand in for the others'.
#[test]
fn absent_gradients_stay_absent_through_every_reduction() {
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum How {
        Sum,
        SmallBuckets,
        Mean,
        Central,
        Invariant,
    }
    for (world, how) in (1..=4).flat_map(|world| {
        [How::Sum, How::SmallBuckets, How::Mean, How::Central, How::Invariant].map(|how| (world, how))
    }) {
        let all = ranks(world).run(|group| {
            let group = match how {
                How::Invariant => group.with_reduction(Reduction::Invariant { blocks: 4 }),
                _ => group,
            };
            let names = ["first", "idle", "last", "some"];
            let mut params = names.map(|name| param::<f64>(group.device(), name, &[3, 2]));
            let before = bits(&params[1]);
            let mut adamw = AdamW::<f64, Dev>::new(adamw_config());
            let replicas = match how {
                How::SmallBuckets => {
                    DataParallel::with_buckets(&group, |f| params.iter_mut().try_for_each(f), 100)?
                }
                How::Central => {
                    DataParallel::central(&group, |f| params.iter_mut().try_for_each(f), world - 1)?
                }
                _ => DataParallel::new(&group, |f| params.iter_mut().try_for_each(f))?,
            };
            let some = group.rank() == 0;
            for step in 0..3 {
                params.iter_mut().for_each(Param::zero_grad);
                let weight = group.rank() as f64;
                replicas.begin(match how {
                    How::Mean if world > 1 => GradReduce::Mean { weight },
                    _ => GradReduce::Sum,
                })?;
                for name in if some { vec![3, 2, 0] } else { vec![2, 0] } {
                    give(&mut params[name], step);
                }
                replicas.finish(|f| params.iter_mut().try_for_each(f))?;
                let here = replicas.steps();
                let present: Vec<_> = params.iter().map(|param| param.grad().is_some()).collect();
                assert_eq!(present, [here, false, here, here], "{world} ranks, {how:?}");
                if here {
                    let ones = if how == How::Mean { 1.0 } else { world as f64 };
                    let some = if how == How::Mean && world > 1 { 0.0 } else { 1.0 };
                    for (param, times) in params.iter().zip([ones, 0.0, ones, some]) {
                        let Some(grad) = param.grad() else { continue };
                        let want = random(100 + step, param.name(), &[3, 2]) * times;
                        close(param.name(), &grad.to_array()?, &want, 1e-14);
                    }
                    adamw.step(|f| params.iter_mut().try_for_each(f), LR, 1.0)?;
                }
                replicas.publish(|f| params.iter_mut().try_for_each(f))?;
            }
            assert_eq!(bits(&params[1]), before, "{world} ranks, {how:?}");
            Ok(params.map(|param| bits(&param)))
        });
        let all: Vec<_> = all.unwrap();
        assert!(all.iter().all(|own| *own == all[0]));
    }
}

/// Two backwards to one parameter of a bucket leave out no other, whose gradient is from before.
#[test]
fn a_gradient_that_is_completed_twice_does_not_stand_for_another() {
    let all = ranks(2).run(|group| {
        let mut params = ["a", "b"].map(|name| param::<f64>(group.device(), name, &[3, 2]));
        let replicas = DataParallel::new(&group, |f| params.iter_mut().try_for_each(f))?;
        give(&mut params[1], 0);
        replicas.begin(GradReduce::Sum)?;
        give(&mut params[0], 0);
        give(&mut params[0], 0);
        replicas.finish(|f| params.iter_mut().try_for_each(f))?;
        for param in &params {
            let want = random(100, param.name(), &[3, 2]) * 2.0;
            close(param.name(), &param.grad().unwrap().to_array()?, &want, 1e-15);
        }
        Ok(())
    });
    all.unwrap();
}

/// The ends of a pipeline sum the gradients of a parameter that both hold.
#[test]
fn absent_gradients_stay_absent_where_the_ends_of_a_pipeline_share_a_parameter() {
    for (given, want) in
        [([false; 2], None), ([true, false], Some(1.0)), ([false, true], Some(1.0)), ([true; 2], Some(2.0))]
    {
        let all = ranks(3).run(|group| {
            let chunks = [Vec::<BoxLayer<Replicated, Replicated, f64, Dev>>::new()];
            let alone = Group::solo(group.device());
            let pipeline = Pipeline::new(&group, &alone, Schedule::gpipe(3, 1), &chunks, 2)?;
            if !pipeline.is_first() && !pipeline.is_last() {
                return Ok(None);
            }
            let mut table = param::<f64>(group.device(), "table", &[3, 2]);
            if given[usize::from(pipeline.is_last())] {
                give(&mut table, 0);
            }
            pipeline.sum_tied(&mut table)?;
            table.grad().map(Tensor::to_array).transpose()
        });
        let all = all.unwrap();
        for got in [&all[0], &all[2]] {
            assert_eq!(got.is_some(), want.is_some());
            if let (Some(got), Some(times)) = (got, want) {
                close("table", got, &(random(100, "table", &[3, 2]) * times), 1e-15);
            }
        }
    }
}

#[test]
fn a_loss_scale_stays_within_what_f32_holds() {
    let mut scale = LossScale::new(1.0, 1).unwrap();
    (0..1100).for_each(|_| assert!(scale.update(0.0)));
    assert_eq!(scale.scale(), 2f64.powi(127));
    assert!(!scale.update(f64::NAN));
    assert_eq!(scale.scale(), 2f64.powi(126));
    (0..1100).for_each(|_| assert!(!scale.update(f64::INFINITY)));
    assert_eq!(scale.scale(), f64::from(f32::MIN_POSITIVE));
    assert!(scale.update(0.0));
    assert_eq!(scale.scale(), 2.0 * f64::from(f32::MIN_POSITIVE));
    for (scale, interval, says) in [
        (0.0, 1, "loss scale: 0 is not in 1.1754943508222875e-38..=3.4028234663852886e38"),
        (-1.0, 1, "loss scale: -1 is not in 1.1754943508222875e-38..=3.4028234663852886e38"),
        (f64::NAN, 1, "loss scale: NaN is not in 1.1754943508222875e-38..=3.4028234663852886e38"),
        (f64::INFINITY, 1, "loss scale: inf is not in 1.1754943508222875e-38..=3.4028234663852886e38"),
        (1.0, 0, "loss scale: it cannot grow after every 0 steps"),
    ] {
        assert_eq!(LossScale::new(scale, interval).unwrap_err().to_string(), says);
    }
}

#[test]
fn a_norm_that_cannot_be_clipped_is_an_error_and_no_factor() {
    assert_eq!(
        [(0.5, 1.0), (4.0 - 1e-6, 1.0)].map(|(norm, max)| clip_scale(norm, max).unwrap()),
        [1.0, 0.25]
    );
    assert_eq!(
        [(0.0, 0.0), (3.0, f64::INFINITY)].map(|(norm, max)| clip_scale(norm, max).unwrap()),
        [0.0, 1.0]
    );
    let (nan, infinite) = (f64::NAN, f64::INFINITY);
    for (norm, max) in
        [(nan, 1.0), (infinite, 1.0), (infinite, infinite), (-1.0, 1.0), (1.0, -1.0), (1.0, nan)]
    {
        let says = format!("clip scale: a gradient of norm {norm} cannot be clipped to a norm of {max}");
        assert_eq!(clip_scale(norm, max).unwrap_err().to_string(), says);
    }
}
