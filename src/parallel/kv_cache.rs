//! The keys and values of past tokens, so that the next ones need not compute them again.

use crate::{
    device::{Device, Element, zeroed},
    error::{Error, Result, same_size},
    kernels::{Backend, QkvHeads},
    ops::{self, CachedKeys},
    shard::Sequences,
    tensor::Tensor,
};

/// The keys and values of every attention layer for a batch of sequences, each in a slot, of any
/// lengths up to the capacity.
///
/// Each rank holds those of its own key/value heads: `[slots · kv_heads · capacity, head_dim]` a
/// layer, made by the first step. A step ([`KvCache::step`]) says which slots get how many new
/// tokens; the layers append their keys and values and attend to all that is there
/// ([`Layer::infer`](super::Layer::infer)); [`Context::finish`] makes the tokens count. A step that
/// failed midway leaves nothing behind.
///
/// Texts that begin alike share work: [`KvCache::truncate`] keeps the common prefix of a slot, [`KvCache::copy_prefix`]
/// starts a slot with that of another.
#[derive(Debug)]
pub struct KvCache<T: Element, B: Device> {
    layers: Vec<CachedKeys<T, B>>,
    lengths: Vec<usize>,
    capacity: usize,
}

/// What [`Layer::infer`](super::Layer::infer) carries from layer to layer: the cache in which
/// attention finds the tokens that came before, if there is one.
///
/// * [`Context::default`]: no cache. Tokens attend to those of their sequence in the same input.
/// * [`KvCache::step`]: they also attend to the tokens that the cache has of their sequence.
///
/// Attention layers find their part of the cache by their order in the step. So a context is for
/// one pass through the layers: after an error, begin another step.
#[derive(Debug)]
pub struct Context<'a, T: Element, B: Device>(Option<Step<'a, T, B>>);

#[derive(Debug)]
struct Step<'a, T: Element, B: Device> {
    cache: &'a mut KvCache<T, B>,
    slots: Vec<usize>,
    sequences: Sequences,
    /// How many attention layers have had their turn.
    layer: usize,
}

impl<T: Element, B: Device> Default for Context<'_, T, B> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Element, B: Backend> Context<'_, T, B> {
    /// The output of the next attention layer for the `[q | k | v]` of the step's tokens: appends
    /// the keys and values, and attends to all that the slots have. None without a cache.
    ///
    /// # Errors
    /// When these are not the step's sequences, or sizes disagree.
    pub(super) fn attend(
        &mut self,
        heads: &QkvHeads,
        qkv: &Tensor<T, B>,
        sequences: &Sequences,
    ) -> Result<Option<Tensor<T, B>>> {
        let Some(step) = &mut self.0 else { return Ok(None) };
        if *sequences != step.sequences {
            let reason = "the tensor's sequences are not those of the cache's step: see `KvCache::step`";
            return Err(Error::invalid("attention", reason));
        }
        let Step { cache, slots, .. } = step;
        let fits = |keys: &CachedKeys<T, B>| keys.is_for(heads);
        if cache.is_empty() && !cache.layers.get(step.layer).is_some_and(fits) {
            // Nothing is lost with keys of no token.
            cache.layers.truncate(step.layer);
        }
        if step.layer == cache.layers.len() {
            if let Some(slot) = cache.lengths.iter().position(|&length| length > 0) {
                let (have, layer) = (cache.lengths[slot], step.layer);
                let reason = format!(
                    "slot {slot} has {have} tokens, but no keys of attention layer {layer}: they went through fewer layers, \
                     or the context was used twice"
                );
                return Err(Error::invalid("kv cache", reason));
            }
            let room = CachedKeys::new(qkv.device(), heads, cache.slots(), cache.capacity)?;
            cache.layers.push(room);
        }
        let keys = &mut cache.layers[step.layer];
        ops::append_to_cache(heads, qkv, sequences, slots, keys)?;
        let out = ops::attention_cached(heads, qkv, sequences, slots, keys)?;
        step.layer += 1;
        Ok(Some(out))
    }

    /// PipelineEnds a step: its tokens, whose keys and values every layer has appended, count from now on.
    /// Without a cache there is nothing to do.
    ///
    /// # Errors
    /// When no attention layer has had its turn, or not all that have keys in the cache.
    pub fn finish(self) -> Result<()> {
        let Some(Step { cache, slots, sequences, layer }) = self.0 else { return Ok(()) };
        if layer == 0 {
            let reason = "no attention layer was given the context of the step";
            return Err(Error::invalid("kv cache", reason));
        }
        if cache.is_empty() {
            // More are of another model, or of a step that failed.
            cache.layers.truncate(layer);
        }
        let (what, have, want) = ("the number of attention layers of the step", layer, cache.layers.len());
        same_size("kv cache", what, have, "that of the cache", want)?;
        for (&slot, rows) in slots.iter().zip(sequences.iter()) {
            cache.lengths[slot] += rows.len();
        }
        Ok(())
    }
}

impl<T: Element, B: Backend> KvCache<T, B> {
    /// A cache of `slots` slots of `capacity` positions, to be filled by one model. That another
    /// model of the same sizes goes on is not noticed. When all slots are empty, any may begin.
    ///
    /// # Errors
    /// When there is no memory left for a number a slot.
    pub fn new(slots: usize, capacity: usize) -> Result<Self> {
        Ok(Self { layers: Vec::new(), lengths: zeroed(slots)?, capacity })
    }

    /// The positions that a slot has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The number of slots.
    pub fn slots(&self) -> usize {
        self.lengths.len()
    }

    /// The number of tokens in a slot.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn len(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Whether no slot holds a token.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&length| length == 0)
    }

    /// Begins a step in which slot `slots[i]` gets `counts[i]` new tokens after those that it has,
    /// the same on every rank. Returns their sequences, for the tensor of the tokens
    /// ([`DTensor::with_sequences`]), and the context, for the layers. [`Context::finish`] counts
    /// the tokens; without it the next step begins where this one did.
    ///
    /// ```
    /// use shardwise::{
    ///     Tensor,
    ///     comm::Group,
    ///     device::Cpu,
    ///     kernels::AttentionChoices,
    ///     parallel::{AttentionConfig, DTensor, KvCache, Layer, ParallelAttention, QkvLayout},
    ///     shard::Replicated,
    ///     tensor::{Random, Weights},
    /// };
    /// let group = Group::solo(&Cpu::new());
    /// let choices = AttentionChoices::CAUSAL;
    /// let config = AttentionConfig { choices, ..AttentionConfig::new(8, 2) };
    /// let (source, layout) = (Random::normal(1, 0.1), QkvLayout::separate("q", "k", "v"));
    /// let layer = ParallelAttention::<Replicated, f32, _>::load(
    ///     &group, &Weights::new(&source), &layout, "o", &config,
    /// )?;
    /// let mut cache = KvCache::new(1, 16)?;
    /// for count in [5, 1, 1] {
    ///     let (sequences, mut step) = cache.step(&[0], &[count])?;
    ///     let x = Tensor::full(group.device(), [count, 8], 0.5)?;
    ///     let x = DTensor::<Replicated, f32>::replicated(&group, x)?.with_sequences(sequences)?;
    ///     let y = layer.infer(x, &mut step)?;
    ///     assert_eq!(y.shape().dims(), [count, 8]);
    ///     step.finish()?;
    /// }
    /// assert_eq!(cache.len(0), 7);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// [`DTensor::with_sequences`]: super::DTensor::with_sequences
    ///
    /// # Errors
    /// When there is no such slot, one is named twice, or the tokens do not fit.
    pub fn step(&mut self, slots: &[usize], counts: &[usize]) -> Result<(Sequences, Context<'_, T, B>)> {
        const OP: &str = "kv cache";
        same_size(OP, "the number of slots", slots.len(), "that of counts", counts.len())?;
        for (at, (&slot, &count)) in slots.iter().zip(counts).enumerate() {
            self.check(slot)?;
            if slots[..at].contains(&slot) {
                return Err(Error::invalid(OP, format!("slot {slot} is in a step twice")));
            }
            let end = self.lengths[slot].saturating_add(count);
            if end > self.capacity {
                let what = format!("the end of slot {slot}");
                return Err(Error::sizes(OP, what, end, "the capacity", self.capacity));
            }
        }
        let starts: Vec<usize> = slots.iter().map(|&slot| self.lengths[slot]).collect();
        let sequences = Sequences::packed(counts.iter().copied()).starting_at(&starts)?.in_cache();
        let step = Step { cache: self, slots: slots.to_vec(), sequences: sequences.clone(), layer: 0 };
        Ok((sequences, Context(Some(step))))
    }

    /// Forgets the tokens of a slot from position `len` on.
    ///
    /// # Errors
    /// When there is no such slot, or it has fewer tokens.
    pub fn truncate(&mut self, slot: usize, len: usize) -> Result<()> {
        self.check(slot)?;
        self.has(slot, len)?;
        self.lengths[slot] = len;
        Ok(())
    }

    /// Makes slot `to` begin as slot `from` does: its first `len` tokens, and no others.
    ///
    /// # Errors
    /// When there is no such slot, or `from` has fewer tokens.
    pub fn copy_prefix(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        self.check(from)?;
        self.check(to)?;
        self.has(from, len)?;
        if from != to {
            self.layers.iter_mut().try_for_each(|layer| layer.copy(from, to, len))?;
        }
        self.lengths[to] = len;
        Ok(())
    }

    fn check(&self, slot: usize) -> Result<()> {
        if slot < self.slots() {
            return Ok(());
        }
        Err(Error::invalid("kv cache", format!("slot {slot} of a cache of {} slots", self.slots())))
    }

    fn has(&self, slot: usize, len: usize) -> Result<()> {
        if len <= self.lengths[slot] {
            return Ok(());
        }
        let what = format!("the tokens of slot {slot}");
        Err(Error::sizes("kv cache", "the tokens to keep", len, what, self.lengths[slot]))
    }
}
