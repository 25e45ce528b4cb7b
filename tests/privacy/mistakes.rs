//! Mistakes of programs, each of which would break the guarantee, are errors.

use crate::models::*;
use shardwise::{prelude::*, privacy::*, train::DataParallel};

#[test]
fn a_microbatch_that_was_not_clipped_is_not_released() {
    let error = refused([1, 2], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let step = private.begin()?;
        backward(&ALL)?;
        step.release(None).map(drop)
    });
    assert!(error.contains("a backward that reached up.weight was not clipped"), "{error}");
}

#[test]
fn a_backward_outside_of_a_step_is_an_error() {
    let error = refused([1, 1], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        backward(&ALL)?;
        assert!(params.iter().all(|param| param.grad().is_none()), "a gradient without noise");
        private.begin().map(drop)
    });
    assert!(error.contains("a backward that reached up.weight was not clipped"), "{error}");
}

#[test]
fn two_backwards_are_not_one_microbatch() {
    // Samples i of both microbatches would count as one sample of norm C.
    let error = refused([1, 2], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        backward(&ALL[..3])?;
        backward(&ALL[3..])?;
        step.clip(3).map(drop)
    });
    assert!(error.contains("2 terms of 1 layers") && error.contains("several backwards"), "{error}");
}

#[test]
fn every_drawn_sample_is_clipped_once() {
    let too_few = refused([1, 1], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        backward(&ALL[..4])?;
        step.clip(4)?;
        step.release(None).map(drop)
    });
    assert!(too_few.contains("drew 6 samples") && too_few.contains("4 were clipped"), "{too_few}");
    let too_many = refused([1, 1], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        backward(&ALL)?;
        step.clip(6)?;
        backward(&ALL[..1])?;
        step.clip(1).map(drop)
    });
    assert!(too_many.contains("drew 6 samples") && too_many.contains("7 were clipped"), "{too_many}");
}

#[test]
fn the_number_of_samples_is_that_of_the_layers() {
    let error = refused([1, 2], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        backward(&ALL)?;
        step.clip(5).map(drop)
    });
    assert!(error.contains(" is 6") && error.contains(" is 5"), "{error}");
    assert!(Samples::padded(3, 2).is_err());
}

#[test]
fn replicas_are_summed() {
    let error = refused([2, 1], |mesh, params, backward| {
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        let own = step.samples().to_vec();
        backward(&own)?;
        step.clip(own.len())?;
        // Both replicas would add the same noise to different sums.
        step.release(None).map(drop)
    });
    assert!(error.contains("2 replicas"), "{error}");
}

#[test]
fn a_data_parallel_reduces_all_parameters_over_the_replicas() {
    let step = |replicas: &dyn Fn(&DeviceMesh<Cpu>, &[Param<f64, Cpu>]) -> Result<DataParallel<f64, Cpu>>,
                mesh: &DeviceMesh<Cpu>,
                params: &[Param<f64, Cpu>],
                backward: &dyn Fn(&[usize]) -> Result<()>| {
        let replicas = replicas(mesh, params)?;
        let mut private = private(mesh, params)?;
        let mut step = private.begin()?;
        let own = step.samples().to_vec();
        backward(&own)?;
        step.clip(own.len())?;
        step.release(Some(&replicas)).map(drop)
    };
    let error = refused([2, 1], |mesh, params, backward| {
        step(&|mesh, params| DataParallel::new(mesh.group(Axis::Data), &params[1..]), mesh, params, backward)
    });
    assert!(error.contains("does not reduce the gradient of up"), "{error}");
    let error = refused([2, 1], |mesh, params, backward| {
        step(&|mesh, params| DataParallel::new(&mesh.world().split_all(0)?, params), mesh, params, backward)
    });
    assert!(error.contains("but the replicas are"), "{error}");
}

#[test]
fn ranks_train_by_the_same_mechanism_and_key() {
    let error = refused([1, 3], |mesh, params, _| {
        let noise = if mesh.world().rank() == 2 { 1.5 } else { 1.0 };
        let (mechanism, key) = (DpSgd { noise, ..MECHANISM }, RunKey::agree(mesh.world())?);
        Private::new(mesh, [params.to_vec()], mechanism, key, ledger()?).map(drop)
    });
    assert!(
        error.contains("noise: 1.0") && error.contains("noise: 1.5") && error.contains("rank 2"),
        "{error}"
    );
    let error = refused([1, 2], |mesh, params, _| {
        let key = RunKey::known_without_privacy(mesh.world().rank() as u64);
        Private::new(mesh, [params.to_vec()], MECHANISM, key, ledger()?).map(drop)
    });
    let keys: Vec<_> = error.split("and key ").skip(1).filter_map(|rest| rest.get(..16)).collect();
    assert!(keys.len() == 2 && keys[0] != keys[1], "{error}");
    let error = refused([1, 2], |mesh, params, _| {
        let epsilon = if mesh.world().rank() == 1 { 3.0 } else { 2.0 };
        let ledger = Ledger::new(Budget { epsilon, delta: 1e-5 })?;
        Private::new(mesh, [params.to_vec()], MECHANISM, RunKey::agree(mesh.world())?, ledger).map(drop)
    });
    assert!(
        error.contains("ε = 0 of 2") && error.contains("rank 1 with") && error.contains("ε = 0 of 3"),
        "{error}"
    );
}

#[test]
fn mechanisms_are_checked() {
    let cases = [
        (DpSgd { samples: 0, ..MECHANISM }, "no samples"),
        (DpSgd { rate: 0.0, ..MECHANISM }, "the rate is 0"),
        (DpSgd { rate: 1.1, ..MECHANISM }, "the rate is 1.1"),
        (DpSgd { rate: f64::NAN, ..MECHANISM }, "the rate is NaN"),
        (DpSgd { clip: 0.0, ..MECHANISM }, "clipping is 0"),
        (DpSgd { clip: f64::INFINITY, ..MECHANISM }, "clipping is inf"),
        (DpSgd { noise: -1.0, ..MECHANISM }, "the noise is -1"),
        (DpSgd { noise: f64::NAN, ..MECHANISM }, "the noise is NaN"),
        (DpSgd { loss_scale: 0.0, ..MECHANISM }, "the loss scale is 0"),
    ];
    for (mechanism, want) in cases {
        let error = refused([1, 1], |mesh, params, _| {
            Private::new(mesh, [params.to_vec()], mechanism, RunKey::agree(mesh.world())?, ledger()?)
                .map(drop)
        });
        assert!(error.contains(want), "{error}");
    }
    let error = refused([1, 1], |mesh, params, _| {
        let parts = [params.to_vec(), params[..1].to_vec()];
        Private::new(mesh, parts, MECHANISM, RunKey::agree(mesh.world())?, ledger()?).map(drop)
    });
    assert!(error.contains("up.weight is listed twice"), "{error}");
    let error = refused([1, 1], |mesh, _, _| {
        Private::<f64, Cpu>::new(mesh, [], MECHANISM, RunKey::agree(mesh.world())?, ledger()?).map(drop)
    });
    assert!(error.contains("no part"), "{error}");
}

#[test]
fn the_budget_stops_a_step_before_it_sees_data() -> Result<()> {
    launch::threads(2, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
        let tensor = mesh.group(Axis::Tensor);
        let model = classifier::<f64>(tensor)?;
        let params = model.params();
        // σ = 1 and q = 1: about ε 4.7 for one step.
        let budget = Budget { epsilon: 12.0, delta: 1e-5 };
        let mut private =
            Private::new(&mesh, [params.clone()], MECHANISM, RunKey::agree(&world)?, Ledger::new(budget)?)?;
        let mut steps = 0;
        let (error, before) = loop {
            let before = private.spent()?;
            assert!(before.epsilon <= 12.0);
            let mut step = match private.begin() {
                Ok(step) => step,
                Err(error) => break (error, before),
            };
            assert_eq!(step.number(), steps);
            backward(&model, tensor, &ALL, 0)?;
            step.clip(SAMPLES)?;
            step.release(None)?;
            steps += 1;
        };
        assert_eq!(private.spent()?, before, "a refused step was charged");
        assert!((2..10).contains(&steps), "{steps} steps");
        assert!(matches!(error, Error::PrivacyBudget { .. }), "{error}");
        assert!(error.to_string().contains("12"), "{error}");
        // It stays refused.
        assert!(private.begin().is_err());
        Ok(())
    })
    .map(drop)
}

#[test]
fn a_step_that_is_dropped_leaves_no_gradient() -> Result<()> {
    launch::threads(1, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 1)?)?;
        let model = classifier::<f64>(&world)?;
        let params = model.params();
        let mut private = private(&mesh, &params)?;
        let mut step = private.begin()?;
        backward(&model, &world, &ALL, 0)?;
        step.clip(SAMPLES)?;
        assert!(params.iter().all(|param| param.grad().is_some()));
        backward(&model, &world, &ALL[..2], 0)?;
        drop(step);
        assert!(params.iter().all(|param| param.grad().is_none() && param.kept() == 0));
        // The step was charged: its gradient may have been seen.
        assert_eq!(private.ledger().steps(), 1);
        drop(private);
        backward(&model, &world, &ALL, 0)?;
        assert!(params.iter().all(|param| param.grad().is_some()), "training goes on without privacy");
        Ok(())
    })
    .map(drop)
}

#[test]
fn a_known_key_has_no_epsilon() -> Result<()> {
    launch::threads(1, |world| {
        let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 1)?)?;
        let params = classifier::<f64>(&world)?.params();
        let key = RunKey::known_without_privacy(1);
        let private = Private::new(&mesh, [params], MECHANISM, key, ledger()?)?;
        let error = private.spent().unwrap_err().to_string();
        assert!(error.contains("known"), "{error}");
        Ok(())
    })
    .map(drop)
}

#[test]
fn a_sample_without_a_finite_norm_adds_nothing() -> Result<()> {
    let released = |bad: bool| {
        launch::Threads::new(2).device(Cpu::poisoned).run(move |world| {
            let mesh = DeviceMesh::new(&world, Mesh::new(1, 1, 2)?)?;
            let (tensor, source) = (mesh.group(Axis::Tensor), Random::normal(2, 1.0));
            let columns = Columns::even(tensor, 3)?;
            let layer = ColumnLinear::<f64, _>::load(tensor, &Weights::new(&source), 2, &columns, Bias::Add)?;
            let params = layer.params();
            let key = RunKey::known_without_privacy(1);
            let mechanism = DpSgd { samples: 2, ..MECHANISM };
            let mut private = Private::new(&mesh, [params.clone()], mechanism, key, ledger()?)?;
            let mut step = private.begin()?;
            // An infinite input, or padding in its place.
            let x = if bad { [1.0, 2.0, f64::INFINITY, 1.0] } else { [1.0, 2.0, 3.0, 4.0] };
            let x = Tensor::from_slice(world.device(), [2, 2], &x)?;
            let x = DTensor::copied(tensor, x)?.with_sequences(Sequences::packed([1, 1]))?;
            let (y, saved) = layer.forward(x)?;
            layer.backward(saved, y)?;
            step.clip(Samples::padded(if bad { 2 } else { 1 }, 2)?)?;
            let counts = if bad {
                step.release(None)?.disclose("a test")?
            } else {
                backward_of_nothing(&layer, tensor)?;
                step.clip(1)?;
                step.release(None)?.disclose("a test")?
            };
            assert_eq!((counts.samples, counts.not_finite), (2, usize::from(bad)));
            gradients(tensor, &params)
        })
    };
    let (with, without) = (released(true)?, released(false)?);
    assert!(with[0].iter().all(|value| value.is_finite()));
    assert_eq!(with, without);
    Ok(())
}

/// A backward whose gradient is 0.
fn backward_of_nothing(layer: &ColumnLinear<f64, Cpu>, tensor: &Group<Cpu>) -> Result<()> {
    let x = DTensor::copied(tensor, Tensor::zeros(tensor.device(), [1, 2])?)?;
    let (y, saved) = layer.forward(x)?;
    let zero = Tensor::zeros(tensor.device(), y.local().shape())?;
    layer.backward(saved, y.with_local(zero)?).map(drop)
}
