//! In how many chunks of tokens layers make their collectives.

use super::Group;
use crate::{device::Device, shard::Partition};

/// Whether layers make their collectives in chunks of tokens: one chunk under way while the rank computes another.
///
/// The bits are the same in any case: only tokens are cut, over which nothing is summed. (Where sums are not made in rank order,
/// as with NCCL's `Order::Any`, that is up to the transport.)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Overlap {
    /// At once.
    #[default]
    Off,
    /// In this many chunks, or as many as there are tokens.
    Chunks(usize),
    /// In chunks of at least so many bytes, at most four of them: at once for few tokens. From which size on chunks pay depends on
    /// the transport and on the machine: [`crate::parallel::MeasuredOverlap`] finds it.
    From(usize),
}

/// The most chunks where their size is given: what is left exposed is one of them.
const MOST: usize = 4;

impl<B: Device> Group<B> {
    /// This group with another way to make collectives beside products. The same on every rank. Groups that are split from it
    /// inherit it.
    ///
    /// ```
    /// # use shardwise::{comm::{Group, Overlap}, device::Cpu};
    /// let world = Group::solo(&Cpu::new()).with_overlap(Overlap::Chunks(2));
    /// ```
    pub fn with_overlap(&self, overlap: Overlap) -> Self {
        let mut group = self.clone();
        group.overlap = overlap;
        group
    }

    /// Whether layers make their collectives in chunks.
    pub fn overlap(&self) -> Overlap {
        self.overlap
    }

    /// The chunks of `tokens` tokens of so many bytes each in which a layer makes a collective of them; none where it makes it
    /// at once.
    pub fn chunks(&self, tokens: usize, bytes: usize) -> Option<Partition> {
        let count = match self.overlap {
            Overlap::Off => 0,
            Overlap::Chunks(count) => count.min(tokens),
            Overlap::From(least) => match (tokens * bytes / least.max(1)).min(MOST).min(tokens) {
                1 => 0,
                count => count,
            },
        };
        (count > 0 && self.size() > 1).then(|| Partition::even(tokens, count))
    }
}
