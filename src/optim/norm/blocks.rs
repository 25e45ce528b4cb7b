//! Sums over all elements of a sharded model, each of which counts once.

use super::{OP, owned::Owned, terms::Terms};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result},
    kernels::Backend,
    shard::{Reduction, Tree},
    tensor::{Param, check_once},
};
use std::ops::Range;

/// A sum over the elements of parameters, in the order of their groups' reductions.
pub(super) struct ModelSum<'a, B: Device> {
    /// The groups that shard the parameters. The first has the tree, if there is one.
    groups: Vec<&'a Group<B>>,
    tree: Option<Tree>,
    /// The number of this rank's leaves.
    leaves: usize,
    owned: Owned,
}

/// A part of a parameter that this rank owns. A vector is one row.
pub(super) struct Piece {
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    /// The number of the leaf that the part belongs to, or the number of leaves if it belongs to
    /// none.
    pub(super) leaf: usize,
}

impl<'a, B: Backend> ModelSum<'a, B> {
    /// # Errors
    /// When the sum over several groups cannot be invariant, or a parameter is listed twice.
    pub(super) fn new<T: Element>(params: &[Param<T, B>], groups: &[&'a Group<B>]) -> Result<Self> {
        let fixed = groups.iter().copied().filter(|group| group.reduction() != Reduction::Fast);
        let ordered = fixed.clone().find(|group| group.size() > 1).or(fixed.clone().next());
        let others =
            groups.iter().copied().filter(|other| !ordered.is_some_and(|group| other.is_same(group)));
        let depends = |other: &&Group<B>| other.size() > 1 && other.reduction() != Reduction::Fast;
        if let Some(other) = others.clone().find(depends) {
            return Err(unsupported(format!(
                "the sum over {other:?} depends on its number of ranks: give that group `Reduction::Fast`"
            )));
        }
        let tree = match ordered {
            None => None,
            Some(group) => {
                Some(group.tree()?.ok_or_else(|| unsupported(format!("{group:?} has no blocks")))?)
            }
        };
        let leaves = match (&tree, ordered) {
            (Some(tree), Some(group)) => tree.owned(group.rank()).len(),
            _ => 0,
        };
        check_once(OP, params)?;
        let mut owned = Owned::default();
        params.iter().for_each(|param| owned.count(param));
        Ok(Self { groups: ordered.into_iter().chain(others).collect(), tree, leaves, owned })
    }

    /// Returns the number of terms that this rank has of a sum: one for each leaf, and one for
    /// parts outside all leaves.
    pub(super) fn terms(&self) -> usize {
        self.leaves + 1
    }

    /// Returns the parts of a parameter that this rank owns.
    ///
    /// # Errors
    /// When the order is fixed, and the parameter was not loaded by the canonical blocks of the
    /// group.
    pub(super) fn pieces<T: Element>(&self, param: &Param<T, B>) -> Result<Vec<Piece>> {
        let name = param.name();
        let blocks = match (&self.tree, param.blocks()) {
            (None, _) => None,
            (Some(_), Some(blocks)) => blocks,
            (Some(_), None) => {
                return Err(unsupported(format!(
                    "{name} was not loaded by canonical blocks: it was loaded on another group, or its layer has no canonical blocks"
                )));
            }
        };
        if let Some(count) = blocks.map(<[_]>::len).filter(|&count| count != self.leaves) {
            let own = self.leaves;
            let reason = format!("{name} has {count} canonical blocks on this rank, but its group has {own}");
            return Err(unsupported(reason));
        }
        let (shape, regions) = (param.shape(), param.regions());
        let (rows, width) = (shape.dims()[0], shape.split_at(0).1);
        let mut pieces = Vec::new();
        let mut add = |rows: Range<usize>, cols: Range<usize>, leaf: usize| {
            for own in regions.iter().filter(|own| own.owned) {
                let end = own.row + own.region.extent().len().checked_div(width).unwrap_or(0);
                let rows = rows.start.max(own.row)..rows.end.min(end);
                if rows.is_empty() || cols.is_empty() {
                    continue;
                }
                // A matrix of one column keeps its rows, because the sum over a block of columns
                // must not depend on the number of columns of this rank.
                let (rows, cols) = if shape.rank() == 1 { (0..1, rows) } else { (rows, cols.clone()) };
                pieces.push(Piece { rows, cols, leaf });
            }
        };
        match blocks {
            None => add(0..rows, 0..width, self.leaves),
            Some(blocks) => {
                for (leaf, regions) in blocks.iter().enumerate() {
                    regions.iter().for_each(|region| add(region.rows.clone(), region.cols.clone(), leaf));
                }
            }
        }
        Ok(pieces)
    }

    /// Returns `count` sums over all ranks. `terms` has the terms of this rank: first those of the
    /// first sum.
    ///
    /// # Errors
    /// When the ranks of the groups do not own every element once, or a collective fails.
    #[track_caller]
    pub(super) fn total(mut self, count: usize, terms: Terms<B>) -> Result<Vec<f64>> {
        let mut sums = terms.into_sums(count * self.terms())?;
        let mut tree = self.tree.as_ref();
        for group in &self.groups {
            sums = self.owned.total(group, tree.take(), (count, &sums))?;
        }
        self.owned.check_whole()?;
        // Without groups, there is one term of each sum.
        Ok(sums)
    }
}

fn unsupported(reason: String) -> Error {
    Error::Unsupported { op: OP, reason }
}
