//! The assignment of attention heads to ranks.

use super::Partition;
use crate::error::{Error, Result};
use std::ops::Range;

/// The assignment of the heads of multi-head, grouped-query or multi-query attention to ranks.
///
/// Query head `h` attends with key/value head `h / (query_heads / kv_heads)`. A rank owns a
/// contiguous range of *query* heads and holds every key/value head that they use. If a range ends
/// between query heads of the same key/value head, both neighbouring ranks hold this key/value
/// head. The gradient of a key/value head is the sum over its holders. Only the [`Heads::owner`]
/// counts the head in gradient norms and saves it to checkpoints. This assignment covers even
/// splits, replication when there are fewer key/value heads than ranks, and every case between.
///
/// If the query heads are partitioned by canonical blocks ([`super::Tree`]), the holders are the
/// *blocks* instead of the ranks. A rank then has one copy of a head's keys and values for each of
/// its blocks that uses the head. So the order of sums does not depend on the number of ranks. A
/// rank has the weights of a head only once.
///
/// ```
/// use shardwise::shard::Heads;
/// let heads = Heads::new(9, 3, 64, 4)?; // 9 query and 3 key/value heads on 4 ranks
/// assert_eq!((heads.query_range(2), heads.kv_range(2)), (5..7, 1..3));
/// assert_eq!((heads.holders(1), heads.owner(1)), (1..3, 1)); // ranks 1 and 2 hold head 1
/// assert_eq!(heads.shared(), [1, 2]);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Heads {
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    query: Partition,
}

impl Heads {
    /// Assigns `query_heads` query heads and `kv_heads` key/value heads, of `head_dim` features
    /// each, to `ranks` ranks.
    ///
    /// # Errors
    /// When `query_heads` is not a multiple of `kv_heads`, or there are more ranks than query
    /// heads, or `head_dim` is 0.
    pub fn new(query_heads: usize, kv_heads: usize, head_dim: usize, ranks: usize) -> Result<Self> {
        let query = Partition::by_unit("attention", "query heads", query_heads, 1, ranks)?;
        Self::with_partition(query, kv_heads, head_dim)
    }

    /// [`Heads::new`] with a given partition of the query heads.
    ///
    /// # Errors
    /// When the number of query heads is not a multiple of `kv_heads`, or `head_dim` is 0.
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

    /// The number of features of one head.
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

    /// The key/value heads that the query heads of one rank use.
    pub fn kv_range(&self, rank: usize) -> Range<usize> {
        self.kv_of(&self.query_range(rank))
    }

    fn kv_of(&self, query: &Range<usize>) -> Range<usize> {
        if query.is_empty() {
            return 0..0;
        }
        query.start / self.group()..(query.end - 1) / self.group() + 1
    }

    /// The query heads of each holder on a rank. The holders are the rank's canonical blocks if the
    /// query heads are partitioned by blocks. Otherwise the rank itself is the only holder.
    pub fn query_ranges(&self, rank: usize) -> Vec<Range<usize>> {
        let own = self.query_range(rank);
        match self.query.blocks(rank) {
            None => vec![own],
            Some(blocks) => {
                blocks.into_iter().map(|block| own.start + block.start..own.start + block.end).collect()
            }
        }
    }

    /// The key/value heads of each holder on a rank, in the order of [`Heads::query_ranges`].
    pub fn kv_ranges(&self, rank: usize) -> Vec<Range<usize>> {
        self.query_ranges(rank).iter().map(|query| self.kv_of(query)).collect()
    }

    /// The key/value heads that one rank holds, in order. A head occurs once for each of its
    /// holders on the rank.
    pub fn local_kv_heads(&self, rank: usize) -> Vec<usize> {
        self.kv_ranges(rank).into_iter().flatten().collect()
    }

    /// For each query head of a rank, the index in [`Heads::local_kv_heads`] of the key/value head
    /// that it uses.
    pub fn kv_of_query(&self, rank: usize) -> Vec<usize> {
        let (mut offset, mut indices) = (0, Vec::new());
        for query in self.query_ranges(rank) {
            let kv = self.kv_of(&query);
            indices.extend(query.map(|head| offset + head / self.group() - kv.start));
            offset += kv.len();
        }
        indices
    }

    /// The key/value heads of all holders, in rank order.
    fn all_kv_ranges(&self) -> Vec<Range<usize>> {
        (0..self.ranks()).flat_map(|rank| self.kv_ranges(rank)).collect()
    }

    /// The index of a rank's first holder among all holders.
    fn first_holder(&self, rank: usize) -> usize {
        (0..rank).map(|rank| self.query_ranges(rank).len()).sum()
    }

    /// Whether the rank's holder number `holder` owns a key/value head. The owner of a head is its
    /// first holder in rank order.
    pub fn owns(&self, rank: usize, holder: usize, kv_head: usize) -> bool {
        let first = self.all_kv_ranges().iter().position(|kv| kv.contains(&kv_head));
        first == Some(self.first_holder(rank) + holder)
    }

    /// The ranks that hold a key/value head, in order.
    pub fn holders(&self, kv_head: usize) -> Range<usize> {
        let holds = |rank: &usize| self.kv_range(*rank).contains(&kv_head);
        let first = (0..self.ranks()).find(holds).unwrap_or(0);
        first..first + (first..self.ranks()).take_while(holds).count()
    }

    /// The rank that owns a key/value head: the first rank that holds the head.
    pub fn owner(&self, kv_head: usize) -> usize {
        self.holders(kv_head).start
    }

    /// The key/value heads with more than one holder, in order.
    pub fn shared(&self) -> Vec<usize> {
        let kv_ranges = self.all_kv_ranges();
        let holders = |head: &usize| kv_ranges.iter().filter(|kv| kv.contains(head)).count();
        (0..self.kv_heads).filter(|head| holders(head) > 1).collect()
    }

    /// The partition of the `query_heads · head_dim` query features.
    pub fn query_features(&self) -> Partition {
        self.query.scaled(self.head_dim)
    }

    /// The partition of the ranks' `[q | k | v]` features, concatenated in rank order. A key/value
    /// head occurs as often as it has holders.
    pub fn qkv_features(&self) -> Partition {
        let heads = |rank: usize| self.query_range(rank).len() + 2 * self.local_kv_heads(rank).len();
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
                    let holders: usize = (0..kv).map(|head| heads.holders(head).len()).sum();
                    assert_eq!(holders, (0..ranks).map(|rank| heads.kv_range(rank).len()).sum::<usize>());
                }
            }
        }
    }

    /// Six query and two key/value heads in four blocks; two blocks use each key/value head.
    #[test]
    fn blocks_hold_their_own_kv_heads() {
        let tree = |ranks| super::super::Tree::new("attention", "blocks", 4, ranks).unwrap();
        let heads = |ranks| {
            let partition = tree(ranks).partition("attention", "heads", 6, 1, false).unwrap();
            Heads::with_partition(partition, 2, 4).unwrap()
        };
        // Blocks of 1, 2, 1 and 2 heads.
        let (one, two, four) = (heads(1), heads(2), heads(4));
        assert_eq!(one.local_kv_heads(0), [0, 0, 1, 1]);
        assert_eq!(one.kv_of_query(0), [0, 1, 1, 2, 3, 3]);
        assert_eq!((two.local_kv_heads(0), two.local_kv_heads(1)), (vec![0, 0], vec![1, 1]));
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
