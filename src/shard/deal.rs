//! Chunks of a partitioned dimension to which every shard contributes.

use super::Partition;
use std::ops::Range;

/// Assigns the indices of a partitioned dimension to chunks. Takes one index of each shard in turn,
/// as long as the shard has indices left. Returns, for each chunk, the range of indices that each
/// shard contributes.
///
/// So the shards contribute nearly equal numbers of indices to a chunk, as long as they have
/// indices left. The range of a shard in one chunk begins where its range in the chunk before ends.
/// The sizes of the chunks are those of `chunks`, whatever the partition is.
pub(crate) fn deal(partition: &Partition, chunks: &Partition) -> Vec<Vec<Range<usize>>> {
    let dealt = |chunk: usize| {
        let bounds = chunks.range(chunk);
        let ends = dealt_to(partition, bounds.start).into_iter().zip(dealt_to(partition, bounds.end));
        let range = |(shard, (start, end)): (usize, (usize, usize))| {
            let base = partition.range(shard).start;
            base + start..base + end
        };
        ends.enumerate().map(range).collect()
    };
    (0..chunks.shards()).map(dealt).collect()
}

/// The number of indices of each shard among the first `count` indices that are assigned.
fn dealt_to(partition: &Partition, count: usize) -> Vec<usize> {
    let (mut given, mut left) = (vec![0; partition.shards()], count);
    let rest = |given: &[usize], shard: usize| partition.size(shard) - given[shard];
    loop {
        let open: Vec<usize> = (0..partition.shards()).filter(|&shard| rest(&given, shard) > 0).collect();
        let Some(rounds) = open.iter().map(|&shard| rest(&given, shard)).min() else { return given };
        let rounds = rounds.min(left / open.len());
        if rounds == 0 {
            open.iter().take(left).for_each(|&shard| given[shard] += 1);
            return given;
        }
        open.iter().for_each(|&shard| given[shard] += rounds);
        left -= rounds * open.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_their_sizes_and_shards_are_dealt_in_order() {
        for sizes in
            [vec![4, 4], vec![5, 4, 4], vec![7, 0, 3], vec![0, 0, 1], vec![1, 9], vec![0, 0], vec![6]]
        {
            let partition = Partition::from_sizes(sizes.clone());
            for count in 1..=partition.total() + 2 {
                let chunks = Partition::even(partition.total(), count);
                let dealt = deal(&partition, &chunks);
                let sizes_of =
                    dealt.iter().map(|ranges| ranges.iter().map(|range| range.len()).sum::<usize>());
                assert!(chunks.sizes().eq(sizes_of), "{sizes:?} in {count}: {dealt:?}");
                for shard in 0..partition.shards() {
                    let indices: Vec<usize> = dealt.iter().flat_map(|ranges| ranges[shard].clone()).collect();
                    assert!(
                        indices.into_iter().eq(partition.range(shard)),
                        "{sizes:?} in {count}: {dealt:?}"
                    );
                }
            }
        }
        let dealt = deal(&Partition::from_sizes([7, 0, 3]), &Partition::even(10, 2));
        assert_eq!(dealt, [[0..3, 7..7, 7..9], [3..7, 7..7, 9..10]]);
    }
}
