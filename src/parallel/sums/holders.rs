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

/// The columns of a projection to key/value heads that leaves share. The output has a head once for
/// each of the rank's leaves that touches it, the weight once.
///
/// * Forward: a head is multiplied once, and copied ([`Holders::spread`]).
/// * Backward: the gradients of all copies are summed before anything else ([`Holders::merge`]).
///   The leaf that owns a head multiplies the sum for dX; every rank that holds the head computes
///   the same gradient of its rows from it.
///
/// Only heads that several ranks hold are moved.
#[derive(Clone, Debug)]
pub(in super::super) struct Holders {
    /// How the weight's rows are cut over the ranks. A head that several ranks hold counts for
    /// each.
    rows: Partition,
    /// The rank's heads of k and v, and its columns of q as if they were one.
    held: Vec<Held>,
    /// The columns of the output.
    columns: usize,
    /// The features of all heads that several ranks hold.
    moved: usize,
}

/// Rows of the weight, and the columns that are products with them.
#[derive(Clone, Debug)]
struct Held {
    rows: Range<usize>,
    /// The rank's leaves that hold them, and each one's columns.
    holders: Vec<(usize, Range<usize>)>,
    /// Where they stand among all that several ranks hold, if they are such.
    at: Option<Range<usize>>,
}

impl Holders {
    /// The columns of a rank: its query heads, if `query`, then `kv` times (as keys, as values) the
    /// key/value heads that its leaves hold. None if no head of the layer has several holders.
    pub(in super::super) fn of(heads: &Heads, rank: usize, query: bool, kv: usize) -> Option<Self> {
        if heads.shared().is_empty() {
            return None;
        }
        let dim = heads.head_dim();
        let queries = |rank| if query { heads.query_range(rank).len() } else { 0 };
        let size = |rank| (queries(rank) + kv * heads.kv_range(rank).len()) * dim;
        let across = |head: &usize| heads.holders(*head).len() > 1;
        let moved: Vec<usize> = (0..heads.kv_heads()).filter(across).collect();

        let (first, leaves) = (queries(rank) * dim, heads.kv_ranges(rank));
        let (mut column, mut row) = (first, first);
        let mut held = vec![Held { rows: 0..row, holders: vec![(0, 0..column)], at: None }];
        for part in 0..kv {
            for head in heads.kv_range(rank) {
                let mut holders = Vec::new();
                // Leaves that hold a head follow each other, and so do its copies.
                for (leaf, _) in leaves.iter().enumerate().filter(|(_, held)| held.contains(&head)) {
                    holders.push((leaf, column..column + dim));
                    column += dim;
                }
                let at = moved.binary_search(&head).ok().map(|at| (part * moved.len() + at) * dim);
                held.push(Held { rows: row..row + dim, holders, at: at.map(|at| at..at + dim) });
                row += dim;
            }
        }
        let rows = Partition::from_sizes((0..heads.ranks()).map(size));
        Some(Self { rows, held, columns: column, moved: kv * moved.len() * dim })
    }

    /// How the weight's rows are cut over the ranks.
    pub(in super::super) fn rows(&self) -> &Partition {
        &self.rows
    }

    /// The output, given the product with the weight's rows: each column is copied to all its
    /// holders.
    pub(in super::super) fn spread<T: Element, B: Backend>(&self, y: Tensor<T, B>) -> Result<Tensor<T, B>> {
        if y.shape().cols() == self.columns {
            return Ok(y);
        }
        let device = y.device();
        let mut spread = Tensor::empty(device, y.shape().with(y.shape().rank() - 1, self.columns))?;
        for Held { rows, holders, .. } in &self.held {
            for (_, columns) in holders {
                device.copy(y.mat().columns(rows.clone()), spread.mat_mut()?.columns(columns.clone()))?;
            }
        }
        Ok(spread)
    }

    /// The gradient of the product, given that of the output: columns that have several holders get
    /// the sum over these.
    pub(in super::super) fn merge<T: Element, B: Backend>(
        &self,
        sums: &Sums<B>,
        dy: MatRef<'_, T, B>,
        mut merged: MatMut<'_, T, B>,
    ) -> Result<()> {
        const OP: &str = "shared key/value heads";
        same_size(OP, "columns of dy", dy.cols(), "features of this rank", self.columns)?;
        let (device, moved) = (sums.group.device(), self.moved(sums, dy)?);
        for Held { rows, holders, at } in &self.held {
            let to = merged.reborrow().columns(rows.clone());
            match (&moved, at, &holders[..]) {
                (Some(moved), Some(at), _) => device.copy(moved.mat().columns(at.clone()), to)?,
                (_, _, [(_, columns)]) => device.copy(dy.columns(columns.clone()), to)?,
                _ => device.copy(sum(sums, dy, holders)?.mat(), to)?,
            }
        }
        Ok(())
    }

    /// The sums over the holders of all heads that several ranks hold, if there are any.
    fn moved<T: Element, B: Backend>(
        &self,
        sums: &Sums<B>,
        dy: MatRef<'_, T, B>,
    ) -> Result<Option<Tensor<T, B>>> {
        if self.moved == 0 {
            return Ok(None);
        }
        let device = sums.group.device();
        let sum = sums.total([dy.rows(), self.moved], |leaf, term: &mut Tensor<T::Acc, B>| {
            device.fill(0.0, term.mat_mut()?)?;
            for Held { holders, at, .. } in &self.held {
                let own = holders.iter().find(|(holder, _)| *holder == leaf);
                if let (Some((_, columns)), Some(at)) = (own, at) {
                    device.copy(dy.columns(columns.clone()), term.mat_mut()?.columns(at.clone()))?;
                }
            }
            Ok(())
        });
        sum.map(Some)
    }
}

/// The sum over the holders of a head that no other rank holds: what [`Holders::moved`] gives, were
/// they on several.
fn sum<T: Element, B: Backend>(
    sums: &Sums<B>,
    dy: MatRef<'_, T, B>,
    holders: &[(usize, Range<usize>)],
) -> Result<Tensor<T::Acc, B>> {
    let (device, count, first) = (sums.group.device(), sums.count(), sums.own().start);
    let shape = [dy.rows(), holders[0].1.len()].into();
    let term = |leaf: usize, term: &mut Tensor<T::Acc, B>| match holders
        .iter()
        .find(|(holder, _)| first + holder == leaf)
    {
        Some((_, columns)) => device.copy(dy.columns(columns.clone()), term.mat_mut()?),
        None => device.fill(0.0, term.mat_mut()?),
    };
    Ok(nodes(device, count, 0..count, shape, term)?.swap_remove(0))
}
