//! Timed steps of generation.

use super::{random_tokens, seconds};
use crate::{
    comm::{DeviceMesh, Group},
    device::Element,
    error::Result,
    kernels::Backend,
    models::{Decoder, DecoderConfig},
    parallel::Sampler,
    plan::Strategy,
    shard::{Axis, Replicated},
    tensor::Random,
};

/// Generates the last of `context` tokens once and `steps` times more. Returns the seconds of each.
pub(super) fn run<T: Element, B: Backend>(
    world: &Group<B>,
    model: &DecoderConfig,
    strategy: &Strategy,
    context: usize,
    steps: usize,
) -> Result<Vec<f64>> {
    let mesh = DeviceMesh::new(world, strategy.mesh()?)?;
    let source = Random::normal(1, 0.02);
    let replica = mesh.group(Axis::Data).rank();
    let prompt = context - 1;
    let ids = random_tokens(model, replica, prompt + strategy.sequences);
    let (before, last) = ids.split_at(prompt);
    let model = Decoder::<Replicated, T, B>::load(mesh.group(Axis::Tensor), &source, model)?;
    let mut cache = model.cache(strategy.sequences, context)?;
    drop(model.step(before, &[0], &[prompt], &mut cache)?);
    let slots: Vec<_> = (0..strategy.sequences).collect();
    slots.iter().try_for_each(|&slot| cache.copy_prefix(0, slot, prompt))?;

    let (sampler, counts, draws) = (Sampler::greedy(), vec![1; slots.len()], vec![0; slots.len()]);
    let mut times = Vec::new();
    for _ in 0..=steps {
        times.push(seconds(world, || {
            let logits = model.step(last, &slots, &counts, &mut cache)?;
            sampler.sample(&logits, &draws).map(drop)
        })?);
        slots.iter().try_for_each(|&slot| cache.truncate(slot, prompt))?;
    }
    Ok(times)
}
