//! The cache of the keys and values of past tokens.

use crate::{
    device::{Device, Element, zeroed},
    error::{Error, Result, same_size},
    kernels::{Backend, QkvHeads},
    ops::{self, CachedKeys},
    shard::Sequences,
    tensor::Tensor,
};

/// Stores the keys and values of every attention layer for a batch of sequences. Each sequence
/// occupies one slot, and has any length up to the capacity.
///
/// Each rank stores only its own key/value heads. For each layer, the first step allocates two
/// tensors of shape `[slots · kv_heads · capacity, head_dim]`: the keys and the values. A caller
/// begins a step by [`KvCache::step`], with the number of new tokens of some slots. In
/// [`Layer::infer`](crate::parallel::Layer::infer), each attention layer appends the keys and
/// values of the new tokens. The new tokens then attend to the tokens of their slot.
/// [`Context::finish`] commits the new tokens. If a step fails before that, the committed tokens
/// are unchanged.
///
/// Texts with a common prefix can reuse the keys and values of the prefix: [`KvCache::truncate`]
/// keeps only the prefix of a slot, and [`KvCache::copy_prefix`] copies a prefix to another slot.
///
/// ```
/// use shardwise::prelude::*;
///
/// let mut cache = KvCache::<f32, Cpu>::new(2, 8)?;
/// assert_eq!((cache.slots(), cache.capacity(), cache.is_empty()), (2, 8, true));
/// let (sequences, _) = cache.step(&[1], &[3])?; // three new tokens in slot 1
/// assert_eq!(sequences.rows(), 3);
/// assert_eq!(cache.len(1), 0); // the step was not finished
/// assert!(cache.step(&[1], &[9]).is_err());
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache<T: Element, B: Device> {
    layers: Vec<CachedKeys<T, B>>,
    lengths: Vec<usize>,
    capacity: usize,
}

/// The state that [`Layer::infer`](crate::parallel::Layer::infer) passes from layer to layer: the
/// current step of a cache, if the caller uses a cache.
///
/// * [`Context::default`]: without a cache. A token attends to the tokens of its sequence in the
///   same input.
/// * [`KvCache::step`]: with a cache. A token also attends to the cached tokens of its sequence.
///
/// The n-th attention layer that gets the context uses the n-th layer of the cache. A context is
/// therefore valid for one pass through the layers. After an error, begin a new step.
#[derive(Debug)]
pub struct Context<'a, T: Element, B: Device>(Option<Step<'a, T, B>>);

#[derive(Debug)]
struct Step<'a, T: Element, B: Device> {
    cache: &'a mut KvCache<T, B>,
    slots: Vec<usize>,
    sequences: Sequences,
    /// The number of attention layers that have computed this step.
    layer: usize,
}

impl<T: Element, B: Device> Default for Context<'_, T, B> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Element, B: Backend> Context<'_, T, B> {
    /// Computes the output of the next attention layer from the `[q | k | v]` of the step's tokens.
    /// First appends their keys and values to the cache, then attends to all tokens of the slots.
    /// Returns `None` if the context has no cache.
    ///
    /// # Errors
    /// When `sequences` are not those of the step, sizes disagree, or a slot has tokens but the
    /// cache has no keys of this layer.
    pub(in crate::parallel) fn attend(
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
            // The cache has no tokens, so a model whose heads do not fit the buffers may replace
            // them.
            cache.layers.truncate(step.layer);
        }
        if step.layer == cache.layers.len() {
            if let Some(slot) = cache.lengths.iter().position(|&length| length > 0) {
                let (have, layer) = (cache.lengths[slot], step.layer);
                let reason = format!(
                    "slot {slot} has {have} tokens, but the cache has no keys of attention layer {layer}: the tokens passed \
                     fewer layers, or the context was used twice"
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

    /// Commits the tokens of the step. Every attention layer must have appended their keys and
    /// values. Does nothing without a cache.
    ///
    /// # Errors
    /// When no attention layer got the context, or fewer attention layers got it than the cache has
    /// layers.
    pub fn finish(self) -> Result<()> {
        let Some(Step { cache, slots, sequences, layer }) = self.0 else { return Ok(()) };
        if layer == 0 {
            let reason = "no attention layer was given the context of the step";
            return Err(Error::invalid("kv cache", reason));
        }
        if cache.is_empty() {
            // Drops layers that another model or a failed step has added.
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
    /// Makes a cache of `slots` slots of `capacity` positions. Only one model may fill the cache:
    /// the cache does not detect a second model with the same sizes. While all slots are empty, any
    /// model may begin.
    ///
    /// # Errors
    /// When there is no memory for the lengths of the slots.
    pub fn new(slots: usize, capacity: usize) -> Result<Self> {
        Ok(Self { layers: Vec::new(), lengths: zeroed(slots)?, capacity })
    }

    /// Returns the number of positions in each slot.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the number of slots.
    pub fn slots(&self) -> usize {
        self.lengths.len()
    }

    /// Returns the number of tokens in a slot.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn len(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Returns whether no slot has a token.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&length| length == 0)
    }

    /// Begins a step that appends `counts[i]` new tokens to slot `slots[i]`. Every rank passes the
    /// same slots and counts. Returns the sequences of the tokens, for
    /// [`DTensor::with_sequences`](crate::parallel::DTensor::with_sequences), and the context, for
    /// [`Layer::infer`](crate::parallel::Layer::infer). [`Context::finish`] commits the tokens.
    /// Without that call, the next step begins at the same positions as this step.
    ///
    /// ```
    /// use shardwise::prelude::*;
    ///
    /// let group = Group::solo(&Cpu::new());
    /// let config = AttentionConfig::new(8, 2).with_choices(AttentionChoices::CAUSAL);
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
    /// # Errors
    /// When a slot does not exist or is listed twice, there is not one count per slot, or the
    /// tokens exceed the capacity.
    pub fn step(&mut self, slots: &[usize], counts: &[usize]) -> Result<(Sequences, Context<'_, T, B>)> {
        const OP: &str = "kv cache";
        same_size(OP, "the number of slots", slots.len(), "that of counts", counts.len())?;
        for (at, (&slot, &count)) in slots.iter().zip(counts).enumerate() {
            self.check(slot)?;
            if slots[..at].contains(&slot) {
                return Err(Error::invalid(OP, format!("a step lists slot {slot} twice")));
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

    /// Removes the tokens of a slot from position `len` on.
    ///
    /// # Errors
    /// When the slot does not exist, or has fewer than `len` tokens.
    pub fn truncate(&mut self, slot: usize, len: usize) -> Result<()> {
        self.check(slot)?;
        self.has(slot, len)?;
        self.lengths[slot] = len;
        Ok(())
    }

    /// Replaces the tokens of slot `to` by the first `len` tokens of slot `from`.
    ///
    /// # Errors
    /// When a slot does not exist, or `from` has fewer than `len` tokens.
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
        Err(Error::invalid(
            "kv cache",
            format!("there is no slot {slot} in a cache of {} slots", self.slots()),
        ))
    }

    fn has(&self, slot: usize, len: usize) -> Result<()> {
        if len <= self.lengths[slot] {
            return Ok(());
        }
        let what = format!("the tokens of slot {slot}");
        Err(Error::sizes("kv cache", "the tokens to keep", len, what, self.lengths[slot]))
    }
}
