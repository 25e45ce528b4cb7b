//! The parts of generation.

use super::{Part, Probe, kinds, with_blocks};
use crate::{
    device::{DType, Device, Element, Meta},
    error::{Error, Result},
    models::{Decoder, DecoderConfig},
    parallel::{DTensor, Sampler},
    plan::Machine,
    shard::{Partition, Replicated},
    tensor::{Random, Tensor},
};

/// Generation on one tensor-parallel rank.
#[derive(Clone, Debug)]
pub(in crate::plan) struct Serving {
    /// The bytes of the weights.
    pub(in crate::plan) weights: u64,
    /// The bytes of the key/value cache.
    pub(in crate::plan) cache: u64,
    /// Reading a prompt that fills the context of one sequence, and sampling its first token.
    pub(in crate::plan) prefill: Part,
    /// Generating the last token of the context, for all sequences at once.
    pub(in crate::plan) decode: Part,
}

impl Serving {
    /// Runs rank `rank` of `ranks` tensor-parallel ranks, which generate `sequences` sequences of
    /// at most `context` tokens.
    ///
    /// Every block of a kind does the same. So models with one and with two blocks of a kind give
    /// the parts of a model with any number.
    pub(in crate::plan) fn run<T: Element>(
        model: &DecoderConfig,
        (rank, ranks): (usize, usize),
        (sequences, context): (usize, usize),
        dtype: DType,
    ) -> Result<Self> {
        if context < 2 || sequences == 0 {
            let reason =
                format!("{sequences} sequences of {context} tokens: a context has at least 2 tokens");
            return Err(Error::invalid("plan", reason));
        }
        let probe = |layer, count| {
            let config = with_blocks(model, layer, count, false);
            Self::measure::<T>(&config, (rank, ranks), (sequences, context), dtype)
        };
        let (first_of, kind_of) = kinds(model);
        let mut all: Option<Self> = None;
        for (kind, &layer) in first_of.iter().enumerate() {
            let blocks = kind_of.iter().filter(|&&other| other == kind).count() as u64;
            let (one, two) = (probe(layer, 1)?, probe(layer, 2)?);
            // The first kind's model has one block already.
            let count = blocks - u64::from(all.is_none());
            let all = all.get_or_insert_with(|| one.clone());
            all.weights += (two.weights - one.weights) * count;
            all.cache += (two.cache - one.cache) * count;
            all.prefill.extend(&two.prefill, &one.prefill, count);
            all.decode.extend(&two.decode, &one.decode, count);
        }
        all.ok_or_else(|| Error::invalid("plan", "the model has no blocks"))
    }

    /// Sets the seconds of all parts on a machine, with `ranks` ranks of which a tensor-parallel
    /// group has `tensor`.
    pub(in crate::plan) fn price(&mut self, machine: &Machine, ranks: usize, tensor: usize) -> Result<()> {
        [&mut self.prefill, &mut self.decode]
            .into_iter()
            .try_for_each(|part| part.price(machine, ranks, tensor))
    }

    fn measure<T: Element>(
        config: &DecoderConfig,
        (rank, ranks): (usize, usize),
        (sequences, context): (usize, usize),
        dtype: DType,
    ) -> Result<Self> {
        let probe = Probe::new(rank, ranks, dtype)?;
        let source = Random::normal(1, 0.02);
        let model = Decoder::<Replicated, T, Meta>::load(&probe.group, &source, config)?;
        let weights = probe.device.memory().live as u64;
        let (mut cache, sampler) = (model.cache(sequences, context)?, Sampler::greedy());
        // The first step allocates the cache.
        drop(model.step(&[0], &[0], &[1], &mut cache)?);
        let allocated = probe.device.memory().live as u64 - weights;
        cache.truncate(0, 0)?;
        let prompt = vec![0; context - 1];
        let step = |cache: &mut _, ids: &[u32], slots: &[usize], counts: &[usize]| {
            let (_, part) = probe.run(|| {
                let _logits = model.step(ids, slots, counts, cache)?;
                // Samples from one token a rank. The sampler runs on the host, and its transfers
                // depend on the number of rows only.
                let tokens = Tensor::<T, _>::zeros(&probe.device, [slots.len(), 1])?;
                let tokens = DTensor::shard(&probe.group, tokens, &Partition::even(ranks, ranks))?;
                sampler.sample::<T, Meta>(&tokens, &vec![0; slots.len()])
            })?;
            Ok::<_, Error>(part)
        };
        let prefill = step(&mut cache, &prompt, &[0], &[context - 1])?;
        let slots: Vec<_> = (0..sequences).collect();
        slots.iter().try_for_each(|&slot| cache.copy_prefix(0, slot, context - 1))?;
        let decode = step(&mut cache, &vec![0; sequences], &slots, &vec![1; sequences])?;
        Ok(Self { weights, cache: allocated, prefill, decode })
    }
}
