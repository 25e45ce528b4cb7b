//! A cut dimension in chunks to which every part gives some of its indices.

use super::Partition;
use std::ops::Range;

/// The indices of a cut dimension, dealt to chunks of the given sizes: one index of each part in turn, while it has any. Of
/// each chunk, the run of indices that each part gives to it.
///
/// So every part has nearly as much in each chunk as the others, its runs follow one another, and the sizes of the chunks
/// do not depend on the cut.
pub(crate) fn deal(cut: &Partition, chunks: &Partition) -> Vec<Vec<Range<usize>>> {
    let dealt = |chunk: usize| {
        let bounds = chunks.range(chunk);
        let ends = first(cut, bounds.start).into_iter().zip(first(cut, bounds.end));
        let run = |(part, (start, end)): (usize, (usize, usize))| {
            let base = cut.range(part).start;
            base + start..base + end
        };
        ends.enumerate().map(run).collect()
    };
    (0..chunks.shards()).map(dealt).collect()
}

/// How many indices of each part are among the first `count` that are dealt.
fn first(cut: &Partition, count: usize) -> Vec<usize> {
    let (mut given, mut left) = (vec![0; cut.shards()], count);
    loop {
        let open: Vec<usize> = (0..cut.shards()).filter(|&part| given[part] < cut.size(part)).collect();
        let Some(rounds) = open.iter().map(|&part| cut.size(part) - given[part]).min() else { return given };
        let rounds = rounds.min(left / open.len());
        if rounds == 0 {
            open.iter().take(left).for_each(|&part| given[part] += 1);
            return given;
        }
        open.iter().for_each(|&part| given[part] += rounds);
        left -= rounds * open.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_have_their_sizes_and_parts_are_dealt_in_order() {
        for sizes in
            [vec![4, 4], vec![5, 4, 4], vec![7, 0, 3], vec![0, 0, 1], vec![1, 9], vec![0, 0], vec![6]]
        {
            let cut = Partition::from_sizes(sizes.clone());
            for count in 1..=cut.total() + 2 {
                let chunks = Partition::even(cut.total(), count);
                let dealt = deal(&cut, &chunks);
                let sizes_of = dealt.iter().map(|runs| runs.iter().map(|run| run.len()).sum::<usize>());
                assert!(chunks.sizes().eq(sizes_of), "{sizes:?} in {count}: {dealt:?}");
                for part in 0..cut.shards() {
                    let indices: Vec<usize> = dealt.iter().flat_map(|runs| runs[part].clone()).collect();
                    assert!(indices.into_iter().eq(cut.range(part)), "{sizes:?} in {count}: {dealt:?}");
                }
            }
        }
        let dealt = deal(&Partition::from_sizes([7, 0, 3]), &Partition::even(10, 2));
        assert_eq!(dealt, [[0..3, 7..7, 7..9], [3..7, 7..7, 9..10]]);
    }
}
