//! Programs that would receive less privacy than is stated: each has to be refused or bounded.

use crate::models::*;
use shardwise::{
    optim::{Sgd, sample_norms},
    prelude::*,
    privacy::*,
    tensor::{GradSink, GradSum, GradTerm, Region, Role, SampleTerm},
    train::{DataParallel, GradReduce},
};

fn vector(cpu: &Cpu, name: &str, len: usize) -> Result<Param<f64, Cpu>> {
    let source = Random::normal(1, 1.0);
    Param::load_region(cpu, &Weights::new(&source), name, Role::Bias, Region::whole([len]), true)
}

#[test]
fn tensors_of_one_name_would_have_the_same_noise() {
    let error = refused([1, 1], |mesh, _, _| {
        let cpu = mesh.world().device();
        let params = [vector(cpu, "bias", 3)?, vector(cpu, "bias", 4)?];
        let mut private = private(mesh, &params)?;
        private.begin()?.clip(0)?;
        Ok(())
    });
    assert!(error.contains("`bias`") && error.contains("same noise"), "{error}");
}

#[test]
fn two_trainings_of_a_parameter_are_refused() {
    let error = refused([1, 2], |mesh, params, backward| {
        let mut private = self::private(mesh, params)?;
        private.begin()?;
        // The old one is dropped after the new one was made, and ends the clipping.
        private = self::private(mesh, params)?;
        let mut step = private.begin()?;
        backward(&ALL)?;
        let norms = step.clip(SAMPLES)?.disclose("test")?;
        step.release(None)?;
        panic!("norms {norms:?}");
    });
    assert!(error.contains("another `Private`"), "{error}");
}

#[test]
fn a_step_whose_parameters_stop_keeping_terms_is_refused() {
    let error = refused([1, 2], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        params[1].keep_terms(false);
        backward(&ALL)?;
        step.clip(SAMPLES)?;
        step.release(None).map(drop)
    });
    assert!(error.contains("keeps no terms"), "{error}");
}

#[test]
fn a_clip_without_a_backward_is_refused() {
    let error = refused([1, 1], |mesh, params, _| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        step.clip(SAMPLES)?;
        step.release(None).map(drop)
    });
    assert!(error.contains("no backward"), "{error}");
}

#[test]
fn sums_that_the_program_reduces_or_changes_are_refused() {
    // The sum over replicas would be summed over the replicas once more.
    let error = refused([2, 1], |mesh, params, backward| {
        let replicas = DataParallel::new(mesh.group(Axis::Data), params)?;
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        let own = step.samples().to_vec();
        backward(&own)?;
        step.clip(own.len())?;
        replicas.begin(GradReduce::Sum)?;
        replicas.finish()?;
        step.release(Some(&replicas)).map(drop)
    });
    assert!(error.contains("was changed"), "{error}");
    let error = refused([2, 1], |mesh, params, backward| {
        let replicas = DataParallel::new(mesh.group(Axis::Data), params)?;
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        let own = step.samples().to_vec();
        replicas.begin(GradReduce::Sum)?;
        backward(&own)?;
        step.clip(own.len())?;
        step.release(Some(&replicas)).map(drop)
    });
    assert!(error.contains("has begun"), "{error}");
    for when in 0..3 {
        let error = refused([1, 1], |mesh, params, backward| {
            let mut private = private(mesh, params)?;
            let mut step = private.begin()?;
            let change = |now: usize| -> Result<()> {
                match when {
                    _ if when != now => Ok(()),
                    0 => params[0].set_grad(Tensor::full(params[0].device(), params[0].shape(), 9.0)?),
                    1 => {
                        params[0].zero_grad();
                        Ok(())
                    }
                    _ => params[0].add_kept(&[100.0; 3]),
                }
            };
            change(0)?;
            backward(&ALL[..3])?;
            step.clip(3)?;
            change(1)?;
            backward(&ALL[3..])?;
            change(2)?;
            step.clip(3)?;
            step.release(None).map(drop)
        });
        assert!(error.contains("was changed"), "{when}: {error}");
    }
}

#[test]
fn sums_without_noise_train_nothing() {
    for forget in [false, true] {
        let error = refused([1, 2], |mesh, params, backward| {
            let mut private = private(mesh, params)?;
            let mut step = private.begin()?;
            backward(&ALL)?;
            step.clip(SAMPLES)?;
            if forget {
                std::mem::forget(step);
                return Sgd::default().step(params, 0.1, 1.0);
            }
            Sgd::default().step(params, 0.1, 1.0)?;
            step.release(None).map(drop)
        });
        assert!(error.contains("no noise"), "{error}");
    }
}

/// Fails once.
struct Fails(Box<dyn GradSink<f64, Cpu>>, bool);

impl GradSink<f64, Cpu> for Fails {
    fn add(&mut self, grad: GradTerm<'_, f64, Cpu>, sum: &mut GradSum<f64, Cpu>) -> Result<()> {
        if std::mem::take(&mut self.1) {
            return Err(Error::invalid("test", "out of memory, once".to_string()));
        }
        self.0.add(grad, sum)
    }
}

#[test]
fn a_step_ends_with_its_first_error() {
    let error = refused([1, 1], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let last = params.last().expect("a parameter");
        let own = last.set_sink(Box::new(shardwise::tensor::Accumulate))?;
        drop(last.set_sink(Box::new(Fails(own, true)))?);
        let mut step = private.begin()?;
        backward(&ALL)?;
        assert!(step.clip(SAMPLES).is_err());
        // Most parameters would have the samples twice.
        backward(&ALL)?;
        step.clip(SAMPLES)?;
        step.release(None).map(drop)
    });
    assert!(error.contains("an error before"), "{error}");
}

/// Two stages whose layers have the same names.
#[test]
fn stages_of_one_name_would_have_the_same_noise() {
    let results = launch::Threads::new(2).run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 2, 1)?)?;
        private(&mesh, &[vector(world.device(), "layer.bias", 3)?]).map(drop)
    });
    for result in results.expect("the ranks start") {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("`layer.bias`") && error.contains("pipeline stages"), "{error}");
    }
}

/// Two ranks that hold tensors of their own by the same names.
#[test]
fn ranks_with_tensors_of_one_name_would_have_the_same_noise() {
    let results = launch::Threads::new(2).run_each(|world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        let other = ["a", "b"][world.rank()];
        let params = [vector(world.device(), "expert", 3)?, vector(world.device(), other, 2)?];
        private(&mesh, &params).map(drop)
    });
    for result in results.expect("the ranks start") {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("`expert`") && error.contains("several tensor-parallel ranks"), "{error}");
    }
}

/// The released norm of one sample, whose tokens cancel but for a rest above C.
#[test]
fn samples_whose_tokens_cancel_are_clipped() -> Result<()> {
    fn norms<T: Element>() -> Result<[f64; 2]> {
        let ranks = launch::threads(1, |world| {
            let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 1)?)?;
            let (source, width, tokens) = (Random::normal(2, 0.0), 64, 8);
            let columns = Columns::even(&world, width)?;
            let layer =
                ColumnLinear::<T, _>::load(&world, &Weights::new(&source), width, &columns, Bias::None)?;
            let params = layer.params();
            let mechanism = DpSgd { samples: 1, noise: 0.0, ..MECHANISM };
            let key = RunKey::known_without_privacy(1);
            let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger()?)?;
            let mut step = private.begin()?;
            // x is nearly constant over the tokens, and dy has signs that cancel.
            let x = (0..tokens * width).map(|at| {
                let (token, feature) = (at / width, at % width);
                T::from_f64(1000.0 + if token == 0 && feature == 0 { 8.0 } else { 0.0 })
            });
            let x = Tensor::from_vec(world.device(), [tokens, width], x.collect())?;
            let x = DTensor::copied(&world, x)?.with_sequences(Sequences::one(tokens))?;
            let (y, saved) = layer.forward(x)?;
            let dy = (0..tokens * width).map(|at| {
                let (token, feature) = (at / width, at % width);
                let size = 1.0 + feature as f64 / width as f64;
                T::from_f64(if token % 2 == 0 { size } else { -size })
            });
            let dy = Tensor::from_vec(world.device(), [tokens, width], dy.collect())?;
            layer.backward(saved, y.with_local(dy)?)?;
            let norm = step.clip(1)?.disclose("a test")?[0];
            step.release(None)?;
            let grad = params[0].grad().expect("a gradient").to_vec()?;
            Ok([norm, grad.iter().map(|g| g.to_f64().powi(2)).sum::<f64>().sqrt()])
        })?;
        Ok(ranks[0])
    }
    let [want, released] = norms::<f64>()?;
    assert!(want > 10.0 && (released - 1.0).abs() < 1e-6, "{want}, {released}");
    for [norm, released] in [norms::<f32>()?, norms::<half::bf16>()?] {
        // A bound of the rounding error is part of the norm, so less is released, and never more.
        assert!(norm > want && norm.is_finite(), "{norm} for {want}");
        assert!(released > 0.01 && released <= 1.0 + 1e-3, "{released}");
    }
    Ok(())
}

#[test]
fn rows_of_gradients_of_matrices_count_as_a_whole() -> Result<()> {
    let cpu = Cpu::new();
    let source = Random::normal(1, 1.0);
    let whole = Region::whole([3, 2]);
    let w = Param::<f64, _>::load_region(&cpu, &Weights::new(&source), "w", Role::Weight, whole, true)?;
    let each: Vec<f64> = (1..=12).map(f64::from).collect();
    let want: Vec<f64> = each.chunks(6).map(|g| g.iter().map(|g| g * g).sum::<f64>().sqrt()).collect();
    let other = w.tie();
    for terms in 1..=2 {
        w.keep_terms(true);
        for _ in 0..terms {
            w.keep_term(SampleTerm::Each(Tensor::from_slice(&cpu, [2, 6], &each)?));
        }
        let norms = sample_norms(std::slice::from_ref(&w), &[], 2)?;
        for (norm, want) in norms.iter().zip(&want) {
            assert!((norm - f64::from(terms) * want).abs() < 1e-12, "{terms} terms: {norms:?} for {want:?}");
        }
        assert_eq!(norms.len(), 2);
    }
    drop(other);
    Ok(())
}
