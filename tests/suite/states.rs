//! State that outlives a step: optimizer states, master weights, absent gradients and loss scales.

use crate::dev::{self, Dev, Tensor, ranks};
use crate::support::{Assembled, arrays, close, random};
use crate::training::{
    batch,
    model::{Config, Gpt},
};
use half::{bf16, f16};
use ndarray::ArrayD;
use shardwise::{
    Result,
    comm::{DeviceMesh, Group},
    device::Element,
    optim::{AdamW, AdamWConfig, LossScale, ParamGroup, Sgd, SgdConfig, clip_scale},
    reference,
    shard::{Axis, Mesh, Reduction, Replicated},
    tensor::{Arrays, Param, ParamRegion, Random, Region, Role, WeightSource, Weights},
    train::{DataParallel, GradReduce, Pipeline, Schedule},
    weights::{self, Checkpoint, Save},
};
use std::{collections::BTreeMap, ops::Range, path::Path, slice};

/// Returns a whole parameter with random values.
fn param<T: Element>(device: &Dev, name: &str, shape: &[usize]) -> Param<T, Dev> {
    let source = arrays([(name, random(1, name, shape))]);
    let region = Region::whole(shape);
    Param::load_region(device, &Weights::new(&source), name, Role::Weight, region, true).unwrap()
}

/// Sets the parameter's gradient of a step and returns it.
fn give<T: Element>(param: &Param<T, Dev>, step: u64) -> ArrayD<f64> {
    let grad = random(100 + step, param.name(), param.shape().dims()).mapv(|g| T::Acc::from_f64(g).to_f64());
    param.zero_grad();
    let device = dev::another_handle(param.device());
    param.add_grad(Tensor::from_array(&device, &grad.mapv(T::Acc::from_f64)).unwrap()).unwrap();
    grad
}

fn values<T: Element>(param: &Param<T, Dev>) -> ArrayD<f64> {
    param.value().unwrap().to_array().unwrap().mapv(T::to_f64)
}

fn bits<T: Element>(param: &Param<T, Dev>) -> Vec<u64> {
    values(param).iter().map(|value| value.to_bits()).collect()
}

fn set<T: Element>(param: &Param<T, Dev>, value: &ArrayD<f64>) {
    let device = dev::another_handle(param.device());
    param.set(Tensor::from_array(&device, &value.mapv(T::from_f64)).unwrap()).unwrap();
}

const LR: f64 = 0.01;
const DECAY: f64 = 0.1;

fn adamw_config() -> AdamWConfig {
    AdamWConfig::default().with_weight_decay(DECAY).with_decay_vectors(true)
}

fn plain_adamw(lr: f64, weight_decay: f64) -> reference::AdamW {
    reference::AdamW { lr, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay, steps: 0, moments: None }
}

fn plain_sgd(lr: f64, weight_decay: f64) -> reference::Sgd {
    reference::Sgd { lr, momentum: 0.9, nesterov: false, weight_decay, velocity: None }
}

fn sgd_config() -> SgdConfig {
    SgdConfig::default().with_momentum(0.9).with_weight_decay(DECAY)
}

/// Steps visit parameters of the same and of different shapes in any order. Each parameter steps as
/// if it were alone, and its bias correction counts its own steps.
fn each_as_if_alone<T: Element>(tolerance: f64) {
    let device = dev::poisoned();
    let names = ["a", "b", "c"];
    let shapes: [&[usize]; 3] = [&[3, 5], &[3, 5], &[4]];
    let params: Vec<_> =
        names.iter().zip(shapes).map(|(name, shape)| param::<T>(&device, name, shape)).collect();
    let moved: Vec<_> =
        names.iter().zip(shapes).map(|(name, shape)| param::<T>(&device, name, shape)).collect();
    let mut want: Vec<_> = params.iter().map(values).collect();
    let mut want_moved = want.clone();
    let (mut adamw, mut sgd) = (AdamW::<T, Dev>::new(adamw_config()), Sgd::<T, Dev>::new(sgd_config()));
    let mut one: Vec<_> = names.map(|_| plain_adamw(LR, DECAY)).into();
    let mut other: Vec<_> = names.map(|_| plain_sgd(LR, DECAY)).into();
    let visits: [&[usize]; 6] = [&[0, 1], &[1], &[1, 0], &[2, 0, 1], &[2], &[1, 2, 0]];
    for (step, visited) in visits.into_iter().enumerate() {
        for &at in visited {
            // A parameter without a gradient stays unchanged.
            if step == 3 && at == 0 {
                params[at].zero_grad();
                moved[at].zero_grad();
                continue;
            }
            let grad = give(&params[at], step as u64);
            one[at].step(&mut want[at], &grad);
            give(&moved[at], step as u64);
            other[at].step(&mut want_moved[at], &grad);
        }
        let pick =
            |params: &[Param<T, Dev>]| -> Vec<_> { visited.iter().map(|&at| params[at].clone()).collect() };
        adamw.step(&pick(&params), LR, 1.0).unwrap();
        sgd.step(&pick(&moved), LR, 1.0).unwrap();
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
fn a_name_visited_twice_or_with_other_shards_is_refused_before_anything_changes() {
    let device = dev::poisoned();
    let load = |rows: std::ops::Range<usize>, owned: bool| {
        let source = arrays([("w", random(1, "w", &[6, 5]))]);
        let region = Region::whole([6, 5]).narrow(0, rows);
        let weights = Weights::new(&source);
        Param::<bf16, Dev>::load_region(&device, &weights, "w", Role::Weight, region, owned).unwrap()
    };
    let first = param::<bf16>(&device, "first", &[2]);
    let (mut adamw, mut sgd) = (AdamW::<bf16, Dev>::default(), Sgd::<bf16, Dev>::default());
    let mut step = |params: &[&Param<bf16, Dev>], step: u64| {
        params.iter().for_each(|param| drop(give(param, step)));
        let before: Vec<_> = params.iter().map(|param| bits(param)).collect();
        let all: Vec<_> = params.iter().map(|&param| param.clone()).collect();
        let outcomes = [adamw.step(&all, LR, 1.0), sgd.step(&all, LR, 1.0)];
        let after: Vec<_> = params.iter().map(|param| bits(param)).collect();
        assert_eq!(outcomes[0].is_err(), after == before);
        outcomes.map(|outcome| outcome.map_or_else(|error| error.to_string(), |()| String::new()))
    };
    let w = load(0..3, true);
    assert_eq!(step(&[&first, &w], 1), ["", ""]);
    for (other, says) in [
        (load(0..2, true), "w has shape [2, 5], but its state has shape [3, 5]"),
        (load(1..4, true), "w holds w [1..4, 0..5], but its state is of w [0..3, 0..5]"),
        (load(0..3, false), "w holds w [0..3, 0..5] (not owned), but its state is of w [0..3, 0..5]"),
    ] {
        assert_eq!(step(&[&first, &other], 2), [format!("adamw: {says}"), format!("sgd: {says}")]);
    }
    let again = load(0..3, true);
    let says =
        "w is listed twice: state is kept by name, so each parameter needs a unique name (`Weights::at`)";
    assert_eq!(step(&[&w, &first, &again], 3), [format!("adamw: {says}"), format!("sgd: {says}")]);
    assert_eq!(step(&[&w, &first], 4), ["", ""]);
}

/// A caller sets a value between steps, in place or through a second parameter of the same name.
/// The next step starts from this value.
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
            set(&param, &loaded);
            give(&param, step);
            let before = bits(&param);
            adamw.step(slice::from_ref(&param), 0.0, 1.0).unwrap();
            assert_eq!(bits(&param), before, "{} at {step}: a step of rate 0", T::DTYPE);
            plain.lr = 0.0;
            want = loaded;
            let grad = give(&param, step);
            plain.step(&mut want, &grad);
            plain.lr = LR;
        }
        let grad = give(&param, step);
        adamw.step(slice::from_ref(&param), LR, 1.0).unwrap();
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

/// A caller replaces values for a while, such as by an average of the weights, and restores them.
/// Masters keep what bf16 cannot represent.
#[test]
fn masters_are_kept_where_values_are_still_their_rounding() {
    let device = dev::poisoned();
    let train = |swaps: bool| {
        let param = param::<bf16>(&device, "w", &[3, 5]);
        let mut sgd = Sgd::<bf16, Dev>::default();
        for _ in 0..100 {
            param.zero_grad();
            param.add_grad(Tensor::full(&device, [3, 5], 1.0).unwrap()).unwrap();
            sgd.step(slice::from_ref(&param), 1e-4, 1.0).unwrap();
            if swaps {
                let kept = param.value().unwrap();
                set(&param, &ArrayD::ones(vec![3, 5]));
                param.set(kept).unwrap();
            }
        }
        bits(&param)
    };
    assert_eq!(train(true), train(false));
}

/// A value set in one element changes the master of that element and of no other.
#[test]
fn a_value_set_in_one_element_leaves_the_masters_of_the_others() {
    let device = dev::poisoned();
    let train = |sets: bool| {
        let param = param::<bf16>(&device, "w", &[3, 5]);
        let mut sgd = Sgd::<bf16, Dev>::default();
        for step in 0..100 {
            param.zero_grad();
            param.add_grad(Tensor::full(&device, [3, 5], 1.0).unwrap()).unwrap();
            sgd.step(slice::from_ref(&param), 1e-4, 1.0).unwrap();
            if sets && step == 50 {
                let mut all = param.value().unwrap().to_vec().unwrap();
                all[7] = bf16::from_f64(64.0);
                param.set(Tensor::from_slice(&device, [3, 5], &all).unwrap()).unwrap();
            }
        }
        bits(&param)
    };
    let (mut set, mut kept) = (train(true), train(false));
    assert_eq!(set[7], 64.0_f64.to_bits());
    set[7] = 0;
    kept[7] = 0;
    assert_eq!(set, kept);
}

/// The aggregator keeps the masters and broadcasts its values after each step. The bits are those
/// of training in which every replica steps.
#[test]
fn a_broadcast_leaves_the_senders_masters_alone() {
    let train = |central: bool| {
        let all = ranks(3).run(|group| {
            let param = param::<bf16>(group.device(), "w", &[3, 5]);
            let replicas = if central {
                DataParallel::central(&group, slice::from_ref(&param), 1)?
            } else {
                DataParallel::new(&group, slice::from_ref(&param))?
            };
            let mut sgd = Sgd::<bf16, Dev>::default();
            for _ in 0..50 {
                param.zero_grad();
                replicas.begin(GradReduce::Sum)?;
                param.add_grad(Tensor::full(group.device(), [3, 5], 1.0)?)?;
                replicas.finish()?;
                if replicas.steps() {
                    sgd.step(slice::from_ref(&param), 1e-4, 1.0)?;
                }
                replicas.publish()?;
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

/// If no replica has a gradient of a parameter, there is none after the reduction, so that nothing
/// decays the parameter. If some replica has a gradient, those without one count as zeros.
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
            let params = names.map(|name| param::<f64>(group.device(), name, &[3, 2]));
            let before = bits(&params[1]);
            let mut adamw = AdamW::<f64, Dev>::new(adamw_config());
            let replicas = match how {
                How::SmallBuckets => DataParallel::with_buckets(&group, &params, 100)?,
                How::Central => DataParallel::central(&group, &params, world - 1)?,
                _ => DataParallel::new(&group, &params)?,
            };
            let some = group.rank() == 0;
            for step in 0..3 {
                params.iter().for_each(Param::zero_grad);
                let weight = group.rank() as f64;
                replicas.begin(match how {
                    How::Mean if world > 1 => GradReduce::Mean { weight },
                    _ => GradReduce::Sum,
                })?;
                for name in if some { vec![3, 2, 0] } else { vec![2, 0] } {
                    give(&params[name], step);
                }
                replicas.finish()?;
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
                    adamw.step(&params, LR, 1.0)?;
                }
                replicas.publish()?;
            }
            assert_eq!(bits(&params[1]), before, "{world} ranks, {how:?}");
            Ok(params.map(|param| bits(&param)))
        });
        let all: Vec<_> = all.unwrap();
        assert!(all.iter().all(|own| *own == all[0]));
    }
}

/// Two gradients of one parameter must not complete a bucket while another parameter of the bucket
/// has only an older gradient.
#[test]
fn a_gradient_that_is_completed_twice_does_not_stand_for_another() {
    let all = ranks(2).run(|group| {
        let params = ["a", "b"].map(|name| param::<f64>(group.device(), name, &[3, 2]));
        let replicas = DataParallel::new(&group, &params)?;
        give(&params[1], 0);
        replicas.begin(GradReduce::Sum)?;
        give(&params[0], 0);
        give(&params[0], 0);
        replicas.finish()?;
        for param in &params {
            let want = random(100, param.name(), &[3, 2]) * 2.0;
            close(param.name(), &param.grad().unwrap().to_array()?, &want, 1e-15);
        }
        Ok(())
    });
    all.unwrap();
}

/// The ends of a pipeline sum the gradients of a parameter that both ends hold.
#[test]
fn absent_gradients_stay_absent_where_the_ends_of_a_pipeline_share_a_parameter() {
    for (given, want) in
        [([false; 2], None), ([true, false], Some(1.0)), ([false, true], Some(1.0)), ([true; 2], Some(2.0))]
    {
        let all = ranks(3).run(|group| {
            let alone = Group::solo(group.device());
            let pipeline = Pipeline::new(&group, &alone, Schedule::gpipe(3, 1), 2)?;
            if !pipeline.is_first() && !pipeline.is_last() {
                return Ok(None);
            }
            let table = param::<f64>(group.device(), "table", &[3, 2]);
            if given[usize::from(pipeline.is_last())] {
                give(&table, 0);
            }
            pipeline.sum_tied(&table)?;
            table.grad().map(|grad| grad.to_array()).transpose()
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
        (1.0, 0, "loss scale: the growth interval is 0"),
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

/// Parameter groups set decay and rate by name, like PyTorch's `param_groups`. All other parameters
/// have the configuration's defaults. A parameter's first gradient may come in a later step.
#[test]
fn groups_have_rates_and_decays_of_their_own() {
    let device = dev::poisoned();
    let group = |name: &str, shape: usize, otherwise: f64| match name {
        "plain" => (1.0, 0.0),
        "slow" => (0.25, 0.3),
        "frozen" => (0.0, 0.3),
        _ => (1.0, if shape > 1 { DECAY } else { otherwise }),
    };
    let rule = |param: &Param<f64, Dev>| match param.name() {
        "plain" => ParamGroup { weight_decay: Some(0.0), ..ParamGroup::default() },
        "slow" => ParamGroup { lr_scale: 0.25, weight_decay: Some(0.3) },
        "frozen" => ParamGroup { lr_scale: 0.0, weight_decay: Some(0.3) },
        _ => ParamGroup::default(),
    };
    let names: [(&str, &[usize]); 5] =
        [("plain", &[3, 5]), ("slow", &[4]), ("frozen", &[2, 2]), ("matrix", &[2, 3]), ("vector", &[3])];
    let load = || names.map(|(name, shape)| param::<f64>(&device, name, shape));
    let (params, moved) = (load(), load());
    let (mut want, mut want_moved) = (params.each_ref().map(values), moved.each_ref().map(values));
    let config = AdamWConfig::default().with_weight_decay(DECAY);
    let mut adamw = AdamW::<f64, Dev>::new(config).groups(rule);
    let mut sgd = Sgd::<f64, Dev>::new(sgd_config()).groups(rule);
    let mut plain = names.map(|(name, shape)| {
        let (scale, decay) = group(name, shape.len(), 0.0);
        plain_adamw(LR * scale, decay)
    });
    let mut plain_moved = names.map(|(name, shape)| {
        let (scale, decay) = group(name, shape.len(), DECAY);
        plain_sgd(LR * scale, decay)
    });
    for step in 0..8 {
        // Each parameter has its first gradient one step later than the previous parameter.
        for at in 0..names.len().min(step as usize + 1) {
            let grad = give(&params[at], step);
            plain[at].step(&mut want[at], &(&grad * 0.5));
            give(&moved[at], step);
            plain_moved[at].step(&mut want_moved[at], &(&grad * 0.5));
        }
        adamw.step(&params, LR, 0.5).unwrap();
        sgd.step(&moved, LR, 0.5).unwrap();
        for at in 0..names.len() {
            close(&format!("adamw, {} at {step}", names[at].0), &values(&params[at]), &want[at], 1e-12);
            close(&format!("sgd, {} at {step}", names[at].0), &values(&moved[at]), &want_moved[at], 1e-12);
        }
    }
    assert_eq!(adamw.steps(), 8);
}

#[test]
fn numbers_that_make_no_sense_are_refused_before_anything_changes() {
    let (nan, infinite) = (f64::NAN, f64::INFINITY);
    let device = dev::poisoned();
    let w = [param::<f32>(&device, "w", &[3])];
    give(&w[0], 0);
    let before = bits(&w[0]);
    let refused = |step: Result<()>, says: &str| {
        let error = step.unwrap_err().to_string();
        assert!(error.contains(says), "{error}: {says}");
        assert_eq!(bits(&w[0]), before, "{says}");
    };
    for (lr, scale, says) in [
        (nan, 1.0, "lr is NaN, which is not in 0.0..inf"),
        (-0.1, 1.0, "lr is -0.1, which is not in 0.0..inf"),
        (infinite, 1.0, "lr is inf, which"),
        (0.1, nan, "grad_scale is NaN, which"),
        (0.1, infinite, "grad_scale is inf, which"),
        (0.1, -infinite, "grad_scale is -inf, which"),
    ] {
        refused(AdamW::default().step(&w, lr, scale), &format!("adamw: {says}"));
        refused(Sgd::default().step(&w, lr, scale), &format!("sgd: {says}"));
    }
    let adamw = AdamWConfig::default();
    for (config, says) in [
        (adamw.with_beta1(1.0), "adamw: beta1 is 1, which is not in 0.0..1.0"),
        (adamw.with_beta1(-0.1), "adamw: beta1 is -0.1, which"),
        (adamw.with_beta2(1.0), "adamw: beta2 is 1, which"),
        (adamw.with_beta2(nan), "adamw: beta2 is NaN, which"),
        (adamw.with_eps(0.0), "adamw: eps is 0, which"),
        (adamw.with_eps(-1e-8), "adamw: eps is -0.00000001, which"),
        (adamw.with_weight_decay(-0.1), "adamw: weight_decay is -0.1, which"),
    ] {
        refused(AdamW::new(config).step(&w, 0.1, 1.0), says);
    }
    let sgd = SgdConfig::default();
    for (config, says) in [
        (sgd.with_momentum(nan), "sgd: momentum is NaN, which"),
        (sgd.with_momentum(-0.9), "sgd: momentum is -0.9, which"),
        (sgd.with_weight_decay(infinite), "sgd: weight_decay is inf, which"),
    ] {
        refused(Sgd::new(config).step(&w, 0.1, 1.0), says);
    }
    for (group, says) in [
        (ParamGroup { lr_scale: nan, weight_decay: None }, "lr_scale of w is NaN, which"),
        (ParamGroup { lr_scale: 1.0, weight_decay: Some(-1.0) }, "weight_decay of w is -1, which"),
    ] {
        refused(AdamW::default().groups(move |_| group).step(&w, 0.1, 1.0), says);
        refused(Sgd::default().groups(move |_| group).step(&w, 0.1, 1.0), says);
    }
}

/// The numbers of heads, words and features, which two and three ranks shard unevenly.
const GPT: Config = Config {
    vocabulary: 11,
    context: 5,
    hidden: 12,
    heads: 3,
    ffn: 7,
    layers: 1,
    dropout: 0.2,
    recomputed: 0,
};

/// Returns AdamW's configuration with a large ε. It bounds the steps of a key's bias, whose
/// gradient is only rounding error.
fn gpt_config() -> AdamWConfig {
    adamw_config().with_eps(1e-3)
}

/// A model on a mesh, and its optimizer.
struct Training<T: Element, O> {
    mesh: DeviceMesh<Dev>,
    model: Gpt<Replicated, T, Dev>,
    optimizer: O,
}

/// The operations of an optimizer that the tests need.
trait Optimizer<T: Element>: Sized {
    fn fresh() -> Self;
    fn load(source: &dyn WeightSource, model: &Gpt<Replicated, T, Dev>) -> Result<Self>;
    fn step(&mut self, model: &Gpt<Replicated, T, Dev>, scale: f64) -> Result<()>;
    fn state(&mut self) -> Result<Vec<Param<T::Acc, Dev>>>;
}

impl<T: Element> Optimizer<T> for AdamW<T, Dev> {
    fn fresh() -> Self {
        Self::new(gpt_config())
    }

    fn load(source: &dyn WeightSource, model: &Gpt<Replicated, T, Dev>) -> Result<Self> {
        Self::load(gpt_config(), source, &model.params())
    }

    fn step(&mut self, model: &Gpt<Replicated, T, Dev>, scale: f64) -> Result<()> {
        self.step(&model.params(), LR, scale)
    }

    fn state(&mut self) -> Result<Vec<Param<T::Acc, Dev>>> {
        Self::state(self)
    }
}

impl<T: Element> Optimizer<T> for Sgd<T, Dev> {
    fn fresh() -> Self {
        Self::new(sgd_config())
    }

    fn load(source: &dyn WeightSource, model: &Gpt<Replicated, T, Dev>) -> Result<Self> {
        Self::load(sgd_config(), source, &model.params())
    }

    fn step(&mut self, model: &Gpt<Replicated, T, Dev>, scale: f64) -> Result<()> {
        self.step(&model.params(), LR, scale)
    }

    fn state(&mut self) -> Result<Vec<Param<T::Acc, Dev>>> {
        Self::state(self)
    }
}

impl<T: Element, O: Optimizer<T>> Training<T, O> {
    fn new(world: &Group<Dev>, [dp, tp]: [usize; 2], source: &dyn WeightSource) -> Result<Self> {
        let mesh = DeviceMesh::new(world, Mesh::new(dp, 1, tp)?)?;
        let model = Gpt::load(&mesh, source, &GPT, Schedule::gpipe(1, 1))?;
        Ok(Self { mesh, model, optimizer: O::fresh() })
    }

    fn open(world: &Group<Dev>, mesh: [usize; 2], folder: &Path) -> Result<Self> {
        let mut training = Self::new(world, mesh, &Checkpoint::open(folder.join("model"))?)?;
        let states = Checkpoint::open(folder.join("states"))?;
        training.optimizer = O::load(&states, &training.model)?;
        Ok(training)
    }

    fn save(&mut self, folder: &Path) -> Result<()> {
        // Replicas hold the same values, so only the first replica saves.
        if self.mesh.group(Axis::Data).rank() > 0 {
            return Ok(());
        }
        let group = self.mesh.group(Axis::Tensor);
        weights::save(group, &self.model.params(), folder.join("model"))?;
        Save::new(folder.join("states")).max_shard(2000).write(group, &self.optimizer.state()?)
    }

    fn steps(&mut self, steps: Range<u64>) -> Result<()> {
        for step in steps {
            let (_, norm) = self.model.gradients(&batch(&GPT, step, 4), step, 1.0)?;
            self.optimizer.step(&self.model, clip_scale(norm, 1.0)?)?;
        }
        Ok(())
    }

    /// Returns this rank's shards of every tensor of the model and of the states.
    fn shards(&mut self) -> Result<Shards> {
        let mut shards = self.model.params().iter().map(shard_of).collect::<Result<Shards>>()?;
        for param in self.optimizer.state()? {
            shards.push(shard_of(&param)?);
        }
        let replica = self.mesh.group(Axis::Data).rank();
        Ok(if replica == 0 { shards } else { Vec::new() })
    }
}

type TensorShard = (Vec<ParamRegion>, Vec<usize>, Vec<f64>);
type Shards = Vec<TensorShard>;

fn shard_of<T: Element>(param: &Param<T, Dev>) -> Result<TensorShard> {
    let values = param.value()?.to_vec()?.into_iter().map(T::to_f64).collect();
    Ok((param.regions().to_vec(), param.shape().dims().to_vec(), values))
}

fn together(ranks: Result<Vec<Shards>>) -> BTreeMap<String, ArrayD<f64>> {
    let mut whole = Assembled::default();
    let all = ranks.unwrap().into_iter().flatten();
    all.for_each(|(regions, shape, values)| whole.add(&regions, &shape, &values));
    whole.finish()
}

/// Returns the parameters of an uninterrupted run, and of runs on other meshes that resume from its
/// fourth step.
fn stopped_and_not<T: Element, O: Optimizer<T>>(
    mesh: [usize; 2],
    others: &[[usize; 2]],
) -> (BTreeMap<String, ArrayD<f64>>, Vec<BTreeMap<String, ArrayD<f64>>>) {
    let folder = tempfile::tempdir().unwrap();
    let size = |mesh: [usize; 2]| mesh.iter().product();
    let never = together(ranks(size(mesh)).run(|world| {
        let mut training = Training::<T, O>::new(&world, mesh, &Random::normal(3, 0.3))?;
        training.steps(0..4)?;
        training.save(folder.path())?;
        training.steps(4..8)?;
        training.shards()
    }));
    let go_on = |&mesh: &[usize; 2]| {
        together(ranks(size(mesh)).run(|world| {
            let mut training = Training::<T, O>::open(&world, mesh, folder.path())?;
            training.steps(4..8)?;
            training.shards()
        }))
    };
    (never, others.iter().map(go_on).collect())
}

#[test]
fn training_goes_on_from_saved_states_on_any_mesh() {
    fn case<O: Optimizer<f64>>(state: &str) {
        let meshes = [[2, 2], [1, 3], [1, 1], [3, 1]];
        let (never, others) = stopped_and_not::<f64, O>([2, 2], &meshes);
        assert!(never.contains_key(state));
        for (mesh, other) in meshes.iter().zip(others) {
            assert!(other.keys().eq(never.keys()));
            for (name, want) in &never {
                close(&format!("{mesh:?}: {name}"), &other[name], want, 1e-12);
            }
        }
    }
    case::<AdamW<f64, Dev>>("adamw.step.layers.0.attention.k.weight");
    case::<Sgd<f64, Dev>>("sgd.velocity.layers.0.attention.k.weight");
}

#[test]
fn training_goes_on_bit_for_bit_on_the_same_mesh_with_masters_too() {
    fn case<T: Element, O: Optimizer<T>>(state: &str) {
        let (never, others) = stopped_and_not::<T, O>([2, 2], &[[2, 2]]);
        assert!(never.contains_key(state));
        assert!(others[0].keys().eq(never.keys()));
        let bits = |array: &ArrayD<f64>| array.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        never.iter().for_each(|(name, want)| assert!(bits(&others[0][name]) == bits(want), "{name}"));
    }
    case::<bf16, AdamW<bf16, Dev>>("adamw.master.embedding.weight");
    case::<bf16, Sgd<bf16, Dev>>("sgd.master.embedding.weight");
    case::<f64, AdamW<f64, Dev>>("adamw.step.embedding.weight");
}

/// If a source has only a part of a parameter's state, the error names a present and an absent
/// tensor. Without any state of a parameter, the parameter starts anew. A step count must be a
/// whole number.
#[test]
fn states_are_read_whole_or_not_at_all() {
    let device = dev::poisoned();
    let of = |kind: &str, value: f64, shape: &[usize]| {
        (format!("adamw.{kind}.w"), ArrayD::from_elem(shape, value))
    };
    let whole = [of("m", 0.5, &[3]), of("v", 0.25, &[3]), of("master", 1.0, &[3]), of("step", 7.0, &[1])];
    let load = |tensors: &[(String, ArrayD<f64>)]| {
        let source = Arrays(tensors.iter().cloned().collect());
        let params = ["other", "w"].map(|name| param::<bf16>(&device, name, &[3]));
        AdamW::<bf16, Dev>::load(adamw_config(), &source, &params)
    };
    let mut states = load(&whole).unwrap();
    assert_eq!(states.steps(), 7);
    let tensors = states.state().unwrap();
    let names: Vec<_> = tensors.iter().map(Param::name).collect();
    assert_eq!(names, ["adamw.m.w", "adamw.v.w", "adamw.master.w", "adamw.step.w"]);
    assert_eq!(load(&[]).unwrap().steps(), 0);
    for at in 0..whole.len() {
        let mut part = whole.to_vec();
        let (absent, _) = part.remove(at);
        let there = if at == 0 { "adamw.v.w" } else { "adamw.m.w" };
        let says = format!("adamw: the source has `{there}`, but not `{absent}`");
        assert_eq!(load(&part).unwrap_err().to_string(), says);
    }
    for count in [-1.0, 0.5, 2_f64.powi(70), f64::NAN] {
        let mut wrong = whole.to_vec();
        wrong[3] = of("step", count, &[1]);
        let says = format!("adamw: adamw.step.w is [{count:?}], which is not a number of steps");
        assert_eq!(load(&wrong).unwrap_err().to_string(), says);
    }
    let mut wrong = whole.to_vec();
    wrong[1] = of("v", 0.0, &[4]);
    assert!(load(&wrong).unwrap_err().to_string().contains("`adamw.v.w` has shape [4]"));
    // Values that a caller writes to the state tensors take effect, such as another rank's step
    // counts.
    let write = |value: f64| {
        let mut states = load(&whole).unwrap();
        for param in states.state()? {
            param.set(Tensor::full(&device, param.shape(), value)?)?;
        }
        states.state().map(drop)
    };
    write(9.0).unwrap();
    let mut states = load(&whole).unwrap();
    let listed = states.state().unwrap();
    let count = listed.iter().find(|param| param.name() == "adamw.step.w").unwrap();
    let number = || count.value().unwrap().to_vec().unwrap()[0];
    let full = |value| Tensor::full(&device, count.shape(), value).unwrap();
    count.set(full(9.0)).unwrap();
    assert_eq!(states.steps(), 9);
    // The tensors that `states` has listed share the optimizer's state, also after the next step.
    let weight = &param::<bf16>(&device, "w", &[3]);
    let params = std::slice::from_ref(weight);
    weight.set_grad(Tensor::full(&device, weight.shape(), 1.0).unwrap()).unwrap();
    states.step(params, 0.1, 1.0).unwrap();
    assert_eq!((states.steps(), number()), (10, 10.0));
    let before = weight.value().unwrap().to_vec().unwrap();
    count.set(full(9.5)).unwrap();
    let refused = states.step(params, 0.1, 1.0).unwrap_err().to_string();
    assert_eq!(refused, "adamw: adamw.step.w is [9.5], which is not a number of steps");
    assert_eq!(weight.value().unwrap().to_vec().unwrap(), before);
    assert_eq!(
        write(9.5).unwrap_err().to_string(),
        "adamw: adamw.step.w is [9.5], which is not a number of steps"
    );
}
