//! `Reduction::Invariant`: the same bits of norms and clipped sums at every number of ranks.

use super::{Batch, Each, Load, Together, bits, clipped, models, sums_close, together};
use crate::models::decoder;
use half::bf16;
use shardwise::{
    device::Element,
    models::DecoderConfig,
    parallel::ResidualStream,
    shard::{Reduction, Replicated, Sequences, Shard},
    tensor::WeightSource,
};

/// The models: their weights, configuration, and number of blocks. Nine query heads share three
/// key/value heads, which several blocks hold. gpt and qwen3 have tied heads.
fn models() -> Vec<(&'static str, Box<dyn WeightSource + Sync>, DecoderConfig, usize)> {
    let (source, config) = models::gpt();
    let mut models: Vec<(_, Box<dyn WeightSource + Sync>, _, _)> = vec![("gpt", Box::new(source), config, 8)];
    for (name, blocks) in [("qwen3", 5), ("llama", 4)] {
        let (checkpoint, config) = decoder(name);
        models.push((name, Box::new(checkpoint), config, blocks));
    }
    models
}

#[track_caller]
fn same_bits(what: &str, got: &Together, want: &Together) {
    let mut values = want.norms.iter().chain(want.sum.values().flatten());
    assert!(values.all(|value| value.is_finite()), "{what}: not finite");
    assert_eq!(bits(&got.norms), bits(&want.norms), "{what}: norms {:?} {:?}", got.norms, want.norms);
    assert_eq!(got.sum.keys().collect::<Vec<_>>(), want.sum.keys().collect::<Vec<_>>());
    for (name, want) in &want.sum {
        assert!(bits(&got.sum[name]) == bits(want), "{what}: the clipped sum of {name}");
    }
}

/// Compares 2, 3 and 4 ranks with one. Returns the number of comparisons.
fn agree<T: Element>(sequences: &Sequences) -> usize {
    let mut count = 0;
    for (name, source, config, blocks) in &models() {
        fn run<S: ResidualStream, T: Element>(
            (source, config): (&(dyn WeightSource + Sync), &DecoderConfig),
            batch: &Batch,
            on: (usize, Reduction),
            bound: f64,
        ) -> Together {
            let load: Load<'_, T> = &|group| models::of_decoder::<S, T>(group, source, config);
            together(load, batch, on, &|norms| clipped(norms, bound))
        }
        let (model, batch) = ((&**source, config), Batch::random(sequences, models::VOCABULARY, [1, 1]));
        let reduction = Reduction::Invariant { blocks: *blocks };
        let on = |world, bound| run::<Replicated, T>(model, &batch, (world, reduction), bound);
        let mut sorted = on(1, 1.0).norms;
        sorted.sort_by(f64::total_cmp);
        let bound = (sorted[1] + sorted[2]) / 2.0;
        let one = on(1, bound);
        let over = one.norms.iter().filter(|norm| **norm > bound).count();
        assert!(over > 0 && over < one.norms.len(), "{name}: {:?}", one.norms);
        for world in [2, 3, 4] {
            let what = format!("{name}, {}, {world} ranks", T::DTYPE);
            same_bits(&what, &on(world, bound), &one);
            let parallel = run::<Shard<0>, T>(model, &batch, (world, reduction), bound);
            same_bits(&format!("{what}, sequence parallel"), &parallel, &one);
            count += 2;
        }
        if T::DTYPE == f64::DTYPE {
            let load: Load<'_, f64> =
                &|group| models::of_decoder::<Replicated, f64>(group, &**source, config);
            let each = Each::run(load, &batch);
            super::norms_close(name, &one.norms, &each.norms, super::EXACT);
            sums_close(name, &one.sum, &each.sum(&clipped(&each.norms, bound)), super::EXACT);
        }
    }
    count
}

#[test]
fn norms_and_clipped_sums_have_the_same_bits() {
    let (packed, padded) = (Sequences::packed([3, 1, 5, 2]), Sequences::padded(&[2, 5, 3, 1], 5).unwrap());
    let count =
        agree::<f32>(&packed) + agree::<f32>(&padded) + agree::<bf16>(&packed) + agree::<f64>(&packed);
    assert_eq!(count, 4 * 3 * 6);
}

/// Without the invariant reduction the bits of norms depend on the number of ranks, so the test
/// above can detect a fault.
#[test]
fn fast_reductions_give_other_bits() {
    let (source, config) = models::gpt();
    let batch = Batch::random(&Sequences::packed([3, 1, 5, 2]), models::VOCABULARY, [1, 1]);
    let norms = |world| {
        let load: Load<'_, f32> = &|group| models::of_decoder::<Replicated, f32>(group, &source, &config);
        together(load, &batch, (world, Reduction::Fast), &|norms| vec![1.0; norms.len()]).norms
    };
    assert_ne!(bits(&norms(1)), bits(&norms(2)));
}
