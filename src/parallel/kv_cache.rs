//! The keys and values of past tokens, so that the next ones need not compute them again.

use crate::{
    device::{Device, Element, zeroed},
    error::{Error, Result, same_size},
    kernels::Backend,
    ops::CachedKeys,
    shard::Sequences,
};

/// One layer's part of a [`KvCache`].
pub type LayerCache<T, B> = CachedKeys<T, B>;

/// The keys and values of every layer for a batch of sequences, each in a slot, of any lengths up to the capacity.
///
/// Each rank holds those of its own key/value heads: `[slots · kv_heads · capacity, head_dim]` a layer, made once. A
/// step ([`KvCache::step`]) says which slots get how many new tokens; the layers append their keys and values and attend
/// to all that is there; [`KvCache::advance`] makes the tokens count. A step that failed midway leaves nothing behind.
///
/// Texts that begin alike share work: [`KvCache::truncate`] keeps the common prefix of a slot, [`KvCache::copy_prefix`]
/// starts a slot with that of another.
#[derive(Debug)]
pub struct KvCache<T: Element, B: Device> {
    layers: Vec<LayerCache<T, B>>,
    lengths: Vec<usize>,
    capacity: usize,
}

impl<T: Element, B: Backend> KvCache<T, B> {
    /// A cache of these layers, all made for `slots` slots of `capacity` positions.
    ///
    /// # Errors
    /// When there is no memory left for a number a slot.
    pub fn new(layers: Vec<LayerCache<T, B>>, slots: usize, capacity: usize) -> Result<Self> {
        Ok(Self { layers, lengths: zeroed(slots)?, capacity })
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

    /// The layers' parts, first layer first.
    pub fn layers_mut(&mut self) -> impl ExactSizeIterator<Item = &mut LayerCache<T, B>> {
        self.layers.iter_mut()
    }

    /// The sequences of a step in which slot `slots[i]` gets `counts[i]` new tokens after those that it has.
    ///
    /// # Errors
    /// When there is no such slot, one is named twice, or the tokens do not fit.
    pub fn step(&self, slots: &[usize], counts: &[usize]) -> Result<Sequences> {
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
        Sequences::packed(counts.iter().copied()).starting_at(&starts)
    }

    /// Counts the tokens of a step whose keys and values every layer has got.
    ///
    /// # Errors
    /// As [`KvCache::step`].
    pub fn advance(&mut self, slots: &[usize], counts: &[usize]) -> Result<()> {
        self.step(slots, counts)?;
        for (&slot, &count) in slots.iter().zip(counts) {
            self.lengths[slot] += count;
        }
        Ok(())
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
