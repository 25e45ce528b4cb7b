//! Training on MPI ranks with an invariant reduction. The losses, norms and parameters are those of
//! one thread rank, bit for bit.

// The model of the example `train_text`. This test does not use all of it.
#[path = "../../examples/text/train_text/model.rs"]
#[allow(dead_code)]
mod model;

use half::bf16;
use model::{Batch, Config, Gpt};
use shardwise::{
    Result,
    comm::{DeviceMesh, Group, Overlap},
    device::{Cpu, Element},
    launch,
    optim::{AdamW, AdamWConfig, clip_scale},
    parallel::ResidualStream,
    rng::Philox,
    shard::{Axis, Mesh, Reduction, Replicated, Shard},
    tensor::Random,
    train::Schedule,
};
use std::collections::BTreeMap;

const CONFIG: Config = Config {
    vocabulary: 19,
    context: 40,
    hidden: 16,
    heads: 8,
    ffn: 21,
    layers: 2,
    dropout: 0.2,
    recomputed: 2,
};

fn batch(step: u64) -> Batch {
    let stream = Philox::stream(9, step);
    let token = |at: usize| (stream.uniform(at as u64) * CONFIG.vocabulary as f64) as u32;
    let count = 6 * CONFIG.context;
    Batch {
        tokens: (0..count).map(token).collect(),
        targets: (count..2 * count).map(token).collect(),
        length: CONFIG.context,
    }
}

/// One rank's results after some steps: the losses and norms, and the elements that the rank holds
/// of each tensor of the model.
#[derive(PartialEq)]
struct Trained {
    curve: Vec<(u64, u64)>,
    shards: BTreeMap<(String, Vec<usize>), u64>,
}

/// Trains by AdamW with dropout, clipping and decay. Each of `dp` replicas has its share of the
/// ranks, and all replicas together have four microbatches.
fn train<S: ResidualStream, T: Element>(world: &Group<Cpu>, dp: usize, overlap: Overlap) -> Result<Trained> {
    let world = world.with_reduction(Reduction::Invariant { blocks: 8 }).with_overlap(overlap);
    let mesh = DeviceMesh::new(&world, Mesh::new(dp, 1, world.size() / dp)?)?;
    let (source, schedule) = (Random::normal(3, 0.3), Schedule::one_forward_one_backward(1, 4 / dp));
    let model = Gpt::<S, T>::load(&mesh, &source, &CONFIG, schedule)?;
    let mut optimizer = AdamW::new(AdamWConfig::default().with_weight_decay(0.1));
    let (mut curve, mut shards) = (Vec::new(), BTreeMap::new());
    for step in 0..3 {
        let (loss, norm) = model.gradients(&batch(step), step, 1.0)?;
        optimizer.step(&model.params(), 1e-2, clip_scale(norm, 0.5)?)?;
        curve.push((loss.to_bits(), norm.to_bits()));
    }
    for param in model.params() {
        let (values, width) = (param.value()?.to_vec()?, param.shape().split_at(0).1);
        for own in param.regions().iter() {
            let (ranges, extent) = (own.region.ranges(), own.region.extent());
            for (at, value) in values[own.row * width..][..extent.len()].iter().enumerate() {
                let inner: usize = extent.dims()[1..].iter().product();
                let rest = ranges.get(1).map(|range| range.start + at % inner);
                let index = std::iter::once(ranges[0].start + at / inner).chain(rest).collect();
                shards.insert((own.tensor.clone(), index), value.to_f64().to_bits());
            }
        }
    }
    assert_eq!(mesh.group(Axis::Data).size(), dp);
    Ok(Trained { curve, shards })
}

fn agree<T: Element>(world: &Group<Cpu>) -> Result<()> {
    let one = launch::threads(1, |alone| train::<Replicated, T>(&alone, 1, Overlap::Off))?.swap_remove(0);
    let same = |what: &str, got: Trained| {
        assert_eq!(got.curve, one.curve, "{what} of {} on {world:?}: losses and norms", T::DTYPE);
        assert!(got.shards.len() > 100, "{what}: a rank holds nothing");
        for (element, bits) in &got.shards {
            assert_eq!(bits, &one.shards[element], "{what} of {} on {world:?}: {element:?}", T::DTYPE);
        }
    };
    same("tensor parallel", train::<Replicated, T>(world, 1, Overlap::Off)?);
    same("sequence parallel", train::<Shard<0>, T>(world, 1, Overlap::Chunks(2))?);
    if world.size().is_multiple_of(2) {
        same("two replicas", train::<Replicated, T>(world, 2, Overlap::Chunks(2))?);
        same("two replicas, sequence parallel", train::<Shard<0>, T>(world, 2, Overlap::Off)?);
    }
    Ok(())
}

/// A training run with AdamW, dropout and clipping.
pub(crate) fn invariant(world: &Group<Cpu>) -> Result<()> {
    agree::<f32>(world)?;
    agree::<bf16>(world)
}
