//! Key/value heads that several leaves hold.

use super::{Sums, nodes};
use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Backend, MatMut, MatRef},
    shard::{Heads, Partition},
    tensor::Tensor,
};
use std::ops::Range;

/// The columns of a projection to key/value heads, some of which several leaves hold. The output
/// has one copy of a head for each of the rank's leaves that uses the head. The weight has each
/// head once.
///
/// * Forward: a rank multiplies each head once, and copies the product ([`Holders::spread`]).
/// * Backward: the ranks first sum the gradients of all copies ([`Holders::merge`]). For dX, only
///   the leaf that owns a head multiplies the sum by the head's weights. Every rank that holds the
///   head computes the gradient of the head's rows from the sum, with the same bits.
///
/// The ranks communicate only heads that several ranks hold.
#[derive(Clone, Debug)]
pub(in crate::parallel) struct Holders {
    /// The partition of the weight's rows over the ranks. A head that several ranks hold counts
    /// once for each of them.
    rows: Partition,
    /// The rank's columns of q as one entry, then its heads of k and v.
    heads: Vec<HeadColumns>,
    /// The number of columns of this rank's output.
    columns: usize,
    /// The number of features of all heads that several ranks hold.
    communicated: usize,
}

/// A range of rows of the weight, and the output columns that are products with these rows.
#[derive(Clone, Debug)]
struct HeadColumns {
    rows: Range<usize>,
    /// The rank's leaves that hold the rows, each with its output columns.
    copies: Vec<(usize, Range<usize>)>,
    /// The range of these rows among all communicated rows; `None` if only this rank holds them.
    communicated: Option<Range<usize>>,
}

impl Holders {
    /// Makes the columns of a rank. The query heads come first if `query` is true. The key/value
    /// heads of the rank's leaves follow `kv` times: twice for a projection to keys and values,
    /// once for a projection to only one of the two. Returns `None` if no head of the layer has
    /// several holders.
    pub(in crate::parallel) fn of(heads: &Heads, rank: usize, query: bool, kv: usize) -> Option<Self> {
        if heads.shared().is_empty() {
            return None;
        }
        let dim = heads.head_dim();
        let queries = |rank| if query { heads.query_range(rank).len() } else { 0 };
        let size = |rank| (queries(rank) + kv * heads.kv_range(rank).len()) * dim;
        let across = |head: &usize| heads.holders(*head).len() > 1;
        let communicated: Vec<usize> = (0..heads.kv_heads()).filter(across).collect();

        let (first, leaves) = (queries(rank) * dim, heads.kv_ranges(rank));
        let (mut column, mut row) = (first, first);
        let mut all = vec![HeadColumns { rows: 0..row, copies: vec![(0, 0..column)], communicated: None }];
        for projection in 0..kv {
            for head in heads.kv_range(rank) {
                let mut copies = Vec::new();
                // The leaves that hold a head are consecutive, and so are the copies of the head.
                for (leaf, _) in leaves.iter().enumerate().filter(|(_, heads)| heads.contains(&head)) {
                    copies.push((leaf, column..column + dim));
                    column += dim;
                }
                let at = communicated.binary_search(&head).ok();
                let at = at.map(|at| (projection * communicated.len() + at) * dim);
                let communicated = at.map(|at| at..at + dim);
                all.push(HeadColumns { rows: row..row + dim, copies, communicated });
                row += dim;
            }
        }
        let rows = Partition::from_sizes((0..heads.ranks()).map(size));
        Some(Self { rows, heads: all, columns: column, communicated: kv * communicated.len() * dim })
    }

    /// The partition of the weight's rows over the ranks.
    pub(in crate::parallel) fn rows(&self) -> &Partition {
        &self.rows
    }

    /// Computes the output from `y`, the product with the weight's rows. Copies the columns of a
    /// head to all its holders on this rank.
    pub(in crate::parallel) fn spread<T: Element, B: Backend>(
        &self,
        y: Tensor<T, B>,
    ) -> Result<Tensor<T, B>> {
        if y.shape().cols() == self.columns {
            return Ok(y);
        }
        let device = y.device();
        let mut spread = Tensor::empty(device, y.shape().with(y.shape().rank() - 1, self.columns))?;
        for HeadColumns { rows, copies, .. } in &self.heads {
            for (_, columns) in copies {
                device.copy(y.mat().columns(rows.clone()), spread.mat_mut()?.columns(columns.clone()))?;
            }
        }
        Ok(spread)
    }

    /// Computes the gradient of the product from `dy`, the gradient of the output. Sums the columns
    /// of a head over all its holders.
    pub(in crate::parallel) fn merge<T: Element, B: Backend>(
        &self,
        sums: &Sums<B>,
        dy: MatRef<'_, T, B>,
        mut merged: MatMut<'_, T, B>,
    ) -> Result<()> {
        const OP: &str = "shared key/value heads";
        same_size(OP, "columns of dy", dy.cols(), "features of this rank", self.columns)?;
        let (device, sum_over_ranks) = (sums.group.device(), self.sum_over_ranks(sums, dy)?);
        for HeadColumns { rows, copies, communicated } in &self.heads {
            let to = merged.reborrow().columns(rows.clone());
            match (&sum_over_ranks, communicated, &copies[..]) {
                (Some(sum), Some(at), _) => device.copy(sum.mat().columns(at.clone()), to)?,
                (_, _, [(_, columns)]) => device.copy(dy.columns(columns.clone()), to)?,
                _ => device.copy(sum_on_rank(sums, dy, copies)?.mat(), to)?,
            }
        }
        Ok(())
    }

    /// For each head that several ranks hold, sums the gradients of its copies over its holders.
    /// Returns `None` if there are no such heads.
    fn sum_over_ranks<T: Element, B: Backend>(
        &self,
        sums: &Sums<B>,
        dy: MatRef<'_, T, B>,
    ) -> Result<Option<Tensor<T, B>>> {
        if self.communicated == 0 {
            return Ok(None);
        }
        let device = sums.group.device();
        let sum = sums.total([dy.rows(), self.communicated], |leaf, term: &mut Tensor<T::Acc, B>| {
            device.fill(0.0, term.mat_mut()?)?;
            for HeadColumns { copies, communicated, .. } in &self.heads {
                let own = copies.iter().find(|(holder, _)| *holder == leaf);
                if let (Some((_, columns)), Some(at)) = (own, communicated) {
                    device.copy(dy.columns(columns.clone()), term.mat_mut()?.columns(at.clone()))?;
                }
            }
            Ok(())
        });
        sum.map(Some)
    }
}

/// For a head that only this rank holds, sums the gradients of its copies over its holders, which
/// are leaves of this rank. The bits are those that [`Holders::sum_over_ranks`] gives if the same
/// leaves are on several ranks. The bits therefore do not depend on the number of ranks.
fn sum_on_rank<T: Element, B: Backend>(
    sums: &Sums<B>,
    dy: MatRef<'_, T, B>,
    copies: &[(usize, Range<usize>)],
) -> Result<Tensor<T::Acc, B>> {
    let (device, count, first) = (sums.group.device(), sums.count(), sums.own().start);
    let shape = [dy.rows(), copies[0].1.len()].into();
    let term = |leaf: usize, term: &mut Tensor<T::Acc, B>| match copies
        .iter()
        .find(|(holder, _)| first + holder == leaf)
    {
        Some((_, columns)) => device.copy(dy.columns(columns.clone()), term.mat_mut()?),
        None => device.fill(0.0, term.mat_mut()?),
    };
    Ok(nodes(device, count, 0..count, shape, term)?.swap_remove(0))
}
