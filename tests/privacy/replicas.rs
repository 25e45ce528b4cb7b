//! Replicas whose gradients are reduced in a fixed order, or to a central aggregator.

use crate::models::*;
use shardwise::{prelude::*, privacy::*, reference::worst_relative, train::DataParallel};

const SAMPLES: usize = 40;
/// The microbatches of all replicas together.
const MICROBATCHES: usize = 4;

/// How gradients are reduced over the replicas.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reduce {
    Fast,
    Invariant,
    Central,
}

/// Runs a step on `dp` replicas, each of which has as many microbatches, with padding. Leaves out
/// the last `missing` microbatches of padding. Returns the released gradient of each replica.
fn step(dp: usize, reduce: Reduce, rate: f64, missing: usize) -> Result<Vec<Option<Vec<f64>>>> {
    launch::Threads::new(dp).device(Cpu::poisoned).run(|world| {
        let mut mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, 1)?)?;
        if reduce == Reduce::Invariant {
            mesh = mesh.with_reduction(Axis::Data, Reduction::Invariant { blocks: 4 });
        }
        let (data, tensor) = (mesh.group(Axis::Data), mesh.group(Axis::Tensor));
        let model = classifier::<f64>(tensor)?;
        let params = model.params();
        let microbatches = MICROBATCHES / dp;
        params.iter().for_each(|param| param.set_microbatches(microbatches));
        let replicas = match reduce {
            Reduce::Central => DataParallel::central(data, &params, 1)?,
            Reduce::Fast | Reduce::Invariant => DataParallel::new(data, &params)?,
        };
        let key = RunKey::known_without_privacy(7);
        let mechanism = DpSgd::new(SAMPLES, rate, 1.5, 1.0);
        let mut private = Private::new(&mesh, [model.params()], mechanism, key, ledger()?)?;
        let mut step = private.begin()?;
        let (own, room) = (step.samples().to_vec(), SAMPLES / MICROBATCHES);
        let mut rest = &own[..];
        for _ in missing..microbatches {
            let (samples, later) = rest.split_at(rest.len().min(room));
            rest = later;
            backward(&model, tensor, samples, room - samples.len())?;
            step.clip(Samples::padded(samples.len(), room)?)?;
        }
        step.release(Some(&replicas))?;
        let has_gradients = params.iter().all(|param| param.grad().is_some());
        assert_eq!(has_gradients, params.iter().any(|param| param.grad().is_some()));
        has_gradients.then(|| gradients(tensor, &params)).transpose()
    })
}

#[test]
fn an_invariant_reduction_has_the_bits_of_one_replica() -> Result<()> {
    let same = |dp: usize| -> Result<_> {
        let ranks = step(dp, Reduce::Invariant, 1.0, 0)?;
        assert!(ranks.iter().all(|rank| *rank == ranks[0]), "replicas differ");
        Ok(ranks[0].as_ref().expect("a gradient").iter().map(|value| value.to_bits()).collect::<Vec<_>>())
    };
    let one = same(1)?;
    assert!(one.iter().all(|bits| f64::from_bits(*bits).is_finite()));
    assert_eq!([same(2)?, same(4)?], [one.clone(), one]);
    Ok(())
}

#[test]
fn every_reduction_releases_the_same_gradient() -> Result<()> {
    for rate in [0.2, 1.0] {
        let want = step(1, Reduce::Fast, rate, 0)?[0].clone().expect("a gradient");
        for (dp, reduce) in [(2, Reduce::Central), (2, Reduce::Invariant), (4, Reduce::Invariant)] {
            let ranks = step(dp, reduce, rate, 0)?;
            for (rank, got) in ranks.iter().enumerate() {
                if reduce == Reduce::Central && rank != 1 {
                    assert_eq!(*got, None, "only the aggregator has a gradient");
                    continue;
                }
                let error = worst_relative(got.as_ref().expect("a gradient"), &want);
                assert!(error < 1e-12, "rate {rate}, {dp} replicas, {reduce:?}, rank {rank}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn an_invariant_reduction_needs_every_microbatch() -> Result<()> {
    // At this rate, every replica has a microbatch of padding alone, which it may leave out
    // otherwise.
    step(2, Reduce::Fast, 0.2, 1)?;
    let error = step(2, Reduce::Invariant, 0.2, 1).unwrap_err().to_string();
    assert!(error.contains("has received 1 of the 2 terms of an invariant reduction"), "{error}");
    Ok(())
}
