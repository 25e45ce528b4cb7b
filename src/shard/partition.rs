//! A dimension cut into contiguous parts. Every boundary in the crate comes from here.

use crate::error::{Error, Result};
use std::{ops::Range, sync::Arc};

/// A dimension `0..len` cut into one contiguous part a rank; parts may differ in size.
///
/// `part(r) = bounds[r] .. bounds[r + 1]`, with `bounds[0] = 0` and `bounds[parts] = len`.
/// An even cut gives the first `len mod parts` parts one unit more than the others. Cloning shares the boundaries.
/// A boundary beyond `usize::MAX` is there: no tensor has such a dimension.
///
/// ```
/// use shardwise::shard::Partition;
/// let heads = Partition::by_unit("attention", "heads", 9, 64, 2)?; // 9 heads of 64 features on 2 ranks
/// assert_eq!((heads.range(0), heads.range(1)), (0..320, 320..576));
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Partition {
    bounds: Arc<[usize]>,
    /// The boundaries of the canonical blocks that it consists of, if it does.
    blocks: Option<Arc<[usize]>>,
}

impl Partition {
    /// `len` indices over `parts` ranks, as evenly as whole indices allow. Some parts are empty when `len < parts`:
    /// that is right for tokens; layers that need at least one unit a rank use [`Partition::by_unit`].
    ///
    /// # Panics
    /// When `parts` is 0.
    pub fn even(len: usize, parts: usize) -> Self {
        Self::of_units(len, 1, parts)
    }

    /// `units` indivisible runs of `unit_len` indices each over `parts` ranks, at least one unit a rank.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`], naming `op` and `unit`, when there are fewer units than ranks.
    pub fn by_unit(
        op: &'static str,
        unit: &'static str,
        units: usize,
        unit_len: usize,
        parts: usize,
    ) -> Result<Self> {
        if units < parts {
            return Err(Error::TooManyRanks { op, ranks: parts, units, unit });
        }
        Ok(Self::of_units(units, unit_len, parts))
    }

    /// Items of these costs in contiguous parts, such that the most expensive part is as cheap as can be; at least one
    /// item a part.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`], naming `op` and `unit`, when there are fewer items than parts.
    pub fn balanced(op: &'static str, unit: &'static str, costs: &[f64], parts: usize) -> Result<Self> {
        if costs.len() < parts || parts == 0 {
            return Err(Error::TooManyRanks { op, ranks: parts, units: costs.len(), unit });
        }
        // best[i]: the cheapest most expensive part of the first i items in so many parts, and where the last begins.
        let sums: Vec<f64> = std::iter::once(0.0)
            .chain(costs.iter().scan(0.0, |sum, cost| {
                *sum += cost;
                Some(*sum)
            }))
            .collect();
        let mut best = sums.clone();
        let mut starts = vec![vec![0; costs.len() + 1]];
        for part in 1..parts {
            let (mut next, mut start) = (vec![f64::INFINITY; costs.len() + 1], vec![0; costs.len() + 1]);
            for end in part + 1..=costs.len() {
                for at in part..end {
                    let worst = best[at].max(sums[end] - sums[at]);
                    if worst < next[end] {
                        (next[end], start[end]) = (worst, at);
                    }
                }
            }
            best = next;
            starts.push(start);
        }
        let mut bounds = vec![costs.len()];
        for start in starts.iter().rev() {
            bounds.push(start[bounds[bounds.len() - 1]]);
        }
        bounds.reverse();
        Ok(Self { bounds: bounds.into(), blocks: None })
    }

    /// Parts of the given sizes, in rank order.
    ///
    /// # Panics
    /// When there is no part.
    pub fn from_sizes(sizes: impl IntoIterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        bounds.extend(sizes.into_iter().scan(0_usize, |end, size| {
            *end = end.saturating_add(size);
            Some(*end)
        }));
        assert!(bounds.len() > 1, "a partition has at least one part");
        Self { bounds: bounds.into(), blocks: None }
    }

    fn of_units(units: usize, unit_len: usize, parts: usize) -> Self {
        let (each, extra) = (units / parts, units % parts);
        let size = |part: usize| (each + usize::from(part < extra)).saturating_mul(unit_len);
        Self::from_sizes((0..parts).map(size))
    }

    /// The size of the whole dimension.
    pub fn total(&self) -> usize {
        self.bounds[self.shards()]
    }

    /// The number of parts.
    pub fn shards(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The indices of one part.
    ///
    /// # Panics
    /// When there is no such part.
    pub fn range(&self, part: usize) -> Range<usize> {
        self.bounds[part]..self.bounds[part + 1]
    }

    /// The number of indices of one part.
    pub fn size(&self, part: usize) -> usize {
        self.range(part).len()
    }

    /// The sizes of all parts, in rank order.
    pub fn sizes(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.bounds.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// The same cut when every index stands for `inner` elements.
    pub fn scaled(&self, inner: usize) -> Self {
        let scaled = |bounds: &Arc<[usize]>| bounds.iter().map(|bound| bound.saturating_mul(inner)).collect();
        Self { bounds: scaled(&self.bounds), blocks: self.blocks.as_ref().map(scaled) }
    }

    /// The cut of which this one is [`Partition::scaled`] by `inner`.
    pub(crate) fn shrunk(&self, inner: usize) -> Self {
        let shrunk = |bounds: &Arc<[usize]>| bounds.iter().map(|bound| bound / inner).collect();
        Self { bounds: shrunk(&self.bounds), blocks: self.blocks.as_ref().map(shrunk) }
    }

    /// The same cut, made of whole ones of these blocks.
    pub(super) fn with_blocks(self, blocks: &Self) -> Self {
        Self { blocks: Some(blocks.bounds.clone()), ..self }
    }

    /// The canonical blocks of one part, as indices within it; none if the cut is not made of such blocks.
    ///
    /// See [`super::Tree::cut`]. A cut of blocks differs from one with the same parts and other blocks, or none.
    pub fn blocks(&self, part: usize) -> Option<Vec<Range<usize>>> {
        let blocks = self.blocks.as_ref()?;
        let owned = Self::even(blocks.len() - 1, self.shards()).range(part);
        let start = self.bounds[part];
        Some(owned.map(|block| blocks[block] - start..blocks[block + 1] - start).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_cuts_cover_the_dimension_and_differ_by_at_most_one() {
        for len in 0..40 {
            for parts in 1..9 {
                let cut = Partition::even(len, parts);
                assert_eq!((cut.total(), cut.shards()), (len, parts));
                let sizes: Vec<_> = cut.sizes().collect();
                assert_eq!(sizes.iter().sum::<usize>(), len);
                assert!(sizes.windows(2).all(|pair| pair[0] >= pair[1] && pair[0] - pair[1] <= 1));
                assert!((1..parts).all(|part| cut.range(part - 1).end == cut.range(part).start));
            }
        }
    }

    #[test]
    fn balanced_cuts_are_the_best_of_all() {
        fn worst(costs: &[f64], parts: usize) -> f64 {
            let all = costs.iter().sum();
            match parts {
                1 => all,
                _ => (1..=costs.len() + 1 - parts)
                    .map(|at| costs[..at].iter().sum::<f64>().max(worst(&costs[at..], parts - 1)))
                    .fold(f64::INFINITY, f64::min),
            }
        }
        for (costs, parts) in [
            (vec![1.0; 7], 3),
            (vec![5.0, 1.0, 1.0, 1.0], 2),
            (vec![1.0, 1.0, 1.0, 9.0], 3),
            (vec![3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0], 4),
            (vec![2.0], 1),
        ] {
            let cut = Partition::balanced("stages", "layers", &costs, parts).unwrap();
            assert_eq!((cut.shards(), cut.total()), (parts, costs.len()));
            assert!(cut.sizes().all(|size| size > 0));
            let got = (0..parts).map(|part| costs[cut.range(part)].iter().sum()).fold(0.0, f64::max);
            assert_eq!(got, worst(&costs, parts), "{costs:?} in {parts}");
        }
        assert!(Partition::balanced("stages", "layers", &[1.0], 2).is_err());
    }

    #[test]
    fn units_are_never_cut() {
        let cut = Partition::by_unit("attention", "heads", 9, 64, 4).unwrap();
        assert_eq!(cut.sizes().collect::<Vec<_>>(), [192, 128, 128, 128]);
        let error = Partition::by_unit("attention", "heads", 3, 64, 4).unwrap_err();
        assert_eq!(
            error.to_string(),
            "attention: 4 ranks cannot share 3 heads: each rank needs at least one"
        );
    }
}
