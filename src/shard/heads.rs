//! Which attention heads a rank computes.

use super::Partition;
use crate::error::{Error, Result};
use std::ops::Range;

/// The heads of multi-head, grouped-query or multi-query attention over the ranks of a group.
///
/// Query head `h` attends with key/value head `h / (query_heads / kv_heads)`. A rank owns a contiguous run of *query*
/// heads and holds every key/value head that those touch. When the runs do not end at group boundaries, neighbouring
/// ranks hold the same key/value head; its gradient is the sum over its holders, and [`Heads::owner`] is the one that
/// counts it. This covers the usual schemes (even split; replication when there are fewer key/value heads than ranks)
/// and every case between, such as 9 query and 3 key/value heads on 4 ranks.
///
/// Where the query heads are cut into canonical blocks ([`super::Tree`]), it is the *blocks* that hold key/value heads: a
/// rank's keys and values have one copy for each of its blocks that touches a head, as a rank of that block alone would have.
/// So what is summed with what does not depend on the number of ranks. The weights of a head a rank has once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heads {
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    query: Partition,
}

impl Heads {
    /// Assigns `query_heads` heads, sharing `kv_heads` key/value heads, of `head_dim` features each, to `ranks` ranks.
    ///
    /// # Errors
    /// When `query_heads` is not a multiple of `kv_heads`, or there are more ranks than query heads.
    pub fn new(query_heads: usize, kv_heads: usize, head_dim: usize, ranks: usize) -> Result<Self> {
        let query = Partition::by_unit("attention", "query heads", query_heads, 1, ranks)?;
        Self::with_partition(query, kv_heads, head_dim)
    }

    /// As [`Heads::new`], with the query heads cut as given.
    ///
    /// # Errors
    /// When the number of query heads is not a multiple of `kv_heads`.
    pub fn with_partition(query: Partition, kv_heads: usize, head_dim: usize) -> Result<Self> {
        let query_heads = query.total();
        if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
            return Err(Error::invalid(
                "attention",
                format!("{query_heads} query heads are not a multiple of {kv_heads} key/value heads"),
            ));
        }
        if head_dim == 0 {
            return Err(Error::invalid("attention", "the head dimension is 0"));
        }
        Ok(Self { query_heads, kv_heads, head_dim, query })
    }

    /// The number of query heads of the whole layer.
    pub fn query_heads(&self) -> usize {
        self.query_heads
    }

    /// The number of key/value heads of the whole layer.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// The features of one head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The number of ranks.
    pub fn ranks(&self) -> usize {
        self.query.shards()
    }

    /// The number of query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// The query heads of one rank.
    pub fn query_range(&self, rank: usize) -> Range<usize> {
        self.query.range(rank)
    }

    /// The key/value heads that the query heads of one rank touch.
    pub fn kv_range(&self, rank: usize) -> Range<usize> {
        self.kv_of(&self.query_range(rank))
    }

    fn kv_of(&self, query: &Range<usize>) -> Range<usize> {
        if query.is_empty() {
            return 0..0;
        }
        query.start / self.group()..(query.end - 1) / self.group() + 1
    }

    /// The query heads of those parts of a rank that hold key/value heads of their own: the whole rank, or each block.
    pub fn holding(&self, rank: usize) -> Vec<Range<usize>> {
        let own = self.query_range(rank);
        match self.query.blocks(rank) {
            None => vec![own],
            Some(blocks) => {
                blocks.into_iter().map(|block| own.start + block.start..own.start + block.end).collect()
            }
        }
    }

    /// The key/value heads that each holding part of a rank holds: [`Heads::holding`].
    pub fn kv_ranges(&self, rank: usize) -> Vec<Range<usize>> {
        self.holding(rank).iter().map(|query| self.kv_of(query)).collect()
    }

    /// The key/value heads that one rank holds, in order; one that several blocks hold is there several times.
    pub fn kv_held(&self, rank: usize) -> Vec<usize> {
        self.kv_ranges(rank).into_iter().flatten().collect()
    }

    /// The key/value head, as a place among those that the rank holds, that each of the rank's query heads uses.
    pub fn kv_of_query(&self, rank: usize) -> Vec<usize> {
        let (mut held, mut places) = (0, Vec::new());
        for query in self.holding(rank) {
            let kv = self.kv_of(&query);
            places.extend(query.map(|head| held + head / self.group() - kv.start));
            held += kv.len();
        }
        places
    }

    /// All holding parts' key/value heads, in order.
    fn all_kv_ranges(&self) -> Vec<Range<usize>> {
        (0..self.ranks()).flat_map(|rank| self.kv_ranges(rank)).collect()
    }

    /// The number of holders before a rank's.
    fn holders_before(&self, rank: usize) -> usize {
        (0..rank).map(|rank| self.holding(rank).len()).sum()
    }

    /// Whether the holding part number `part` of a rank is the one that counts a key/value head: the first holder.
    pub fn owns(&self, rank: usize, part: usize, kv_head: usize) -> bool {
        let first = self.all_kv_ranges().iter().position(|held| held.contains(&kv_head));
        first == Some(self.holders_before(rank) + part)
    }

    /// The ranks that hold a key/value head, in order.
    pub fn holders(&self, kv_head: usize) -> Range<usize> {
        let holds = |rank: &usize| self.kv_range(*rank).contains(&kv_head);
        let first = (0..self.ranks()).find(holds).unwrap_or(0);
        first..first + (first..self.ranks()).take_while(holds).count()
    }

    /// The rank that counts a key/value head: the first of its holders.
    pub fn owner(&self, kv_head: usize) -> usize {
        self.holders(kv_head).start
    }

    /// The key/value heads that have more than one holder, in order.
    pub fn shared(&self) -> Vec<usize> {
        let held = self.all_kv_ranges();
        let holders = |head: &usize| held.iter().filter(|held| held.contains(head)).count();
        (0..self.kv_heads).filter(|head| holders(head) > 1).collect()
    }

    /// The cut of the query features `query_heads · head_dim`.
    pub fn query_features(&self) -> Partition {
        self.query.scaled(self.head_dim)
    }

    /// The sizes of the ranks' `[q | k | v]` parts, as a cut of all of them laid side by side. A key/value head that
    /// two ranks, or two blocks, hold is there twice.
    pub fn qkv_features(&self) -> Partition {
        let heads = |rank: usize| self.query_range(rank).len() + 2 * self.kv_held(rank).len();
        Partition::from_sizes((0..self.ranks()).map(|rank| heads(rank).saturating_mul(self.head_dim)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nine_query_and_three_kv_heads_on_four_ranks() {
        let heads = Heads::new(9, 3, 2, 4).unwrap();
        let query: Vec<_> = (0..4).map(|rank| heads.query_range(rank)).collect();
        assert_eq!(query, [0..3, 3..5, 5..7, 7..9]);
        let kv: Vec<_> = (0..4).map(|rank| heads.kv_range(rank)).collect();
        assert_eq!(kv, [0..1, 1..2, 1..3, 2..3]);
        assert_eq!(heads.kv_of_query(2), [0, 1]);
        assert_eq!(heads.shared(), [1, 2]);
        assert_eq!((heads.holders(1), heads.owner(1)), (1..3, 1));
        assert_eq!(heads.qkv_features().sizes().collect::<Vec<_>>(), [10, 8, 12, 8]);
    }

    #[test]
    fn every_query_head_is_computed_once_next_to_its_kv_head() {
        for kv in 1..5 {
            for group in 1..5 {
                for ranks in 1..=kv * group {
                    let heads = Heads::new(kv * group, kv, 1, ranks).unwrap();
                    let mut seen = 0;
                    for rank in 0..ranks {
                        for (head, local) in heads.query_range(rank).zip(heads.kv_of_query(rank)) {
                            assert_eq!(head, seen);
                            assert_eq!(heads.kv_range(rank).start + local, head / group);
                            seen += 1;
                        }
                    }
                    assert_eq!(seen, kv * group);
                    let held: usize = (0..kv).map(|head| heads.holders(head).len()).sum();
                    assert_eq!(held, (0..ranks).map(|rank| heads.kv_range(rank).len()).sum::<usize>());
                }
            }
        }
    }

    /// Six query and two key/value heads in four blocks: the second head of keys is touched by three of them.
    #[test]
    fn blocks_hold_their_own_kv_heads() {
        let tree = |ranks| super::super::Tree::new("attention", "blocks", 4, ranks).unwrap();
        let heads = |ranks| {
            let cut = tree(ranks).partition("attention", "heads", 6, 1, false).unwrap();
            Heads::with_partition(cut, 2, 4).unwrap()
        };
        // Blocks of 1, 2, 1 and 2 heads.
        let (one, two, four) = (heads(1), heads(2), heads(4));
        assert_eq!(one.kv_held(0), [0, 0, 1, 1]);
        assert_eq!(one.kv_of_query(0), [0, 1, 1, 2, 3, 3]);
        assert_eq!((two.kv_held(0), two.kv_held(1)), (vec![0, 0], vec![1, 1]));
        assert_eq!(two.kv_of_query(1), [0, 1, 1]);
        for heads in [&one, &two, &four] {
            assert_eq!(heads.shared(), [0, 1]);
        }
        assert!(one.owns(0, 0, 0) && !one.owns(0, 1, 0) && one.owns(0, 2, 1));
        assert!(four.owns(0, 0, 0) && !four.owns(1, 0, 0) && four.owns(2, 0, 1));
        assert_eq!(one.qkv_features().total(), (6 + 2 * 4) * 4);
    }

    #[test]
    fn impossible_heads_are_refused() {
        assert_eq!(
            Heads::new(9, 2, 4, 1).unwrap_err().to_string(),
            "attention: 9 query heads are not a multiple of 2 key/value heads"
        );
        assert_eq!(
            Heads::new(4, 2, 4, 5).unwrap_err().to_string(),
            "attention: 5 ranks cannot share 4 query heads: each rank needs at least one"
        );
    }
}
