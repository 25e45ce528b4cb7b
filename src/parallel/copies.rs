//! Key/value heads that several canonical blocks hold, with [`crate::shard::Reduction::Invariant`].

use super::{Traffic, invariant};
use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result, same_size},
    kernels::{Backend, MatMut, MatRef},
    shard::{Heads, Node, Partition, Tree, TreeSum},
    tensor::Tensor,
};
use std::ops::Range;

/// The columns of a projection to key/value heads that canonical blocks share: the output has a head once for each of the rank's
/// blocks that touches it, the weight once.
///
/// * Forward: a head is multiplied once, and copied ([`Copies::spread`]).
/// * Backward: what the holders send back is summed first, over the blocks of all ranks, along the tree
///   ([`Copies::merge`]). With that sum everything else is as if a head had one holder: the block that owns it multiplies it for
///   dX, and every rank that holds it computes the same gradient of its rows.
///
/// Only heads that several ranks hold are moved. The sum is made in the accumulator, and rounded once to the type of dY.
#[derive(Clone, Debug)]
pub(super) struct Copies {
    /// How the weight's rows are cut over the ranks. A head that several ranks hold counts for each.
    pub(super) rows: Partition,
    /// The rows of heads that a block of another rank owns.
    pub(super) foreign: Vec<Range<usize>>,
    /// The rank's columns: those of q, if it has them, which are one block's as far as this goes, and of each head of k and v.
    held: Vec<Held>,
    /// How many there are.
    columns: usize,
    /// The features of all heads of the layer that several ranks hold.
    moved: usize,
}

/// Rows of the weight, and the columns that are products with them.
#[derive(Clone, Debug)]
struct Held {
    rows: Range<usize>,
    /// The rank's blocks that hold them, and each one's columns.
    holders: Vec<(usize, Range<usize>)>,
    /// Where they stand among all that several ranks hold, if they are such.
    at: Option<Range<usize>>,
}

impl Copies {
    /// The columns of a rank: its query heads, if `query`, then `kv` times (as keys, as values) the key/value heads that its
    /// blocks hold. None if no head of the layer has several holders.
    pub(super) fn of(heads: &Heads, rank: usize, query: bool, kv: usize) -> Option<Self> {
        if heads.shared().is_empty() {
            return None;
        }
        let dim = heads.head_dim();
        let queries = |rank| if query { heads.query_range(rank).len() } else { 0 };
        let size = |rank| (queries(rank) + kv * heads.kv_range(rank).len()) * dim;
        let across = |head: &usize| heads.holders(*head).len() > 1;
        let moved: Vec<usize> = (0..heads.kv_heads()).filter(across).collect();

        let (first, blocks) = (queries(rank) * dim, heads.kv_ranges(rank));
        let (mut column, mut row) = (first, first);
        let (mut held, mut foreign) = (Vec::new(), Vec::new());
        if query {
            held.push(Held { rows: 0..row, holders: vec![(0, 0..column)], at: None });
        }
        for part in 0..kv {
            for head in heads.kv_range(rank) {
                let mut holders = Vec::new();
                // Blocks that hold a head follow each other, and so do its copies.
                for (block, _) in blocks.iter().enumerate().filter(|(_, held)| held.contains(&head)) {
                    holders.push((block, column..column + dim));
                    column += dim;
                }
                let at = moved.binary_search(&head).ok().map(|at| (part * moved.len() + at) * dim);
                let rows = row..row + dim;
                row += dim;
                if heads.owner(head) != rank {
                    foreign.push(rows.clone());
                }
                held.push(Held { rows, holders, at: at.map(|at| at..at + dim) });
            }
        }
        let rows = Partition::from_sizes((0..heads.ranks()).map(size));
        Some(Self { rows, foreign, held, columns: column, moved: kv * moved.len() * dim })
    }

    /// The output, given the product with the weight's rows: each column is copied to all its holders.
    pub(super) fn spread<T: Element, B: Backend>(&self, y: &Tensor<T, B>) -> Result<Tensor<T, B>> {
        let device = y.device();
        let mut spread = Tensor::empty(device, y.shape().with(y.shape().rank() - 1, self.columns))?;
        for Held { rows, holders, .. } in &self.held {
            for (_, columns) in holders {
                device.copy(y.mat().columns(rows.clone()), spread.mat_mut()?.columns(columns.clone()))?;
            }
        }
        Ok(spread)
    }

    /// The gradient of the product, given that of the output: columns that have several holders get the sum over these.
    pub(super) fn merge<T: Element, B: Backend>(
        &self,
        group: &Group<B>,
        dy: MatRef<'_, T, B>,
        mut merged: MatMut<'_, T, B>,
    ) -> Result<()> {
        const OP: &str = "shared key/value heads";
        same_size(OP, "columns of dy", dy.cols(), "features of this rank", self.columns)?;
        let Some(tree) = group.tree()? else {
            return Err(Error::internal(OP, "the group has no blocks"));
        };
        let (device, moved) = (group.device(), self.moved(group, &tree, dy)?);
        for Held { rows, holders, at } in &self.held {
            let to = merged.reborrow().columns(rows.clone());
            match (&moved, at, &holders[..]) {
                (Some(moved), Some(at), _) => device.copy(moved.mat().columns(at.clone()), to)?,
                (_, _, [(_, columns)]) => device.copy(dy.columns(columns.clone()), to)?,
                _ => device.copy(sum(group, &tree, dy, holders)?.mat(), to)?,
            }
        }
        Ok(())
    }

    /// The sums over the holders of all heads that several ranks hold, if there are any.
    fn moved<T: Element, B: Backend>(
        &self,
        group: &Group<B>,
        tree: &Tree,
        dy: MatRef<'_, T, B>,
    ) -> Result<Option<Tensor<T, B>>> {
        if self.moved == 0 {
            return Ok(None);
        }
        let term = |block: usize, term: &mut Tensor<T::Acc, B>| {
            group.device().fill(0.0, term.mat_mut()?)?;
            for Held { holders, at, .. } in &self.held {
                let own = holders.iter().find(|(holder, _)| *holder == block);
                if let (Some((_, columns)), Some(at)) = (own, at) {
                    let to = term.mat_mut()?.columns(at.clone());
                    group.device().copy(dy.columns(columns.clone()), to)?;
                }
            }
            Ok(())
        };
        let terms = invariant::own_terms(group, tree, [dy.rows(), self.moved], term)?;
        group.tree_all_reduce(tree, terms).map(Some)
    }

    /// The traffic of [`Copies::merge`], in the backward.
    pub(super) fn traffic<T: Element, B: Backend>(&self, group: &Group<B>, tokens: usize) -> Traffic {
        match self.moved {
            0 => Traffic::default(),
            moved => Traffic::sum::<T, B>(group, [tokens, moved].into()).in_backward(),
        }
    }
}

/// The sum over the holders of a head that no other rank holds: what [`Copies::moved`] gives, were they on several.
fn sum<T: Element, B: Backend>(
    group: &Group<B>,
    tree: &Tree,
    dy: MatRef<'_, T, B>,
    holders: &[(usize, Range<usize>)],
) -> Result<Tensor<T::Acc, B>> {
    let (device, first, mut sum) =
        (group.device(), tree.owned(group.rank()).start, TreeSum::new(tree.leaves()));
    for leaf in 0..tree.leaves() {
        let mut term: Option<Tensor<T::Acc, B>> = None;
        if let Some((_, columns)) = holders.iter().find(|(block, _)| first + block == leaf) {
            let mut own = Tensor::empty(device, [dy.rows(), columns.len()])?;
            device.copy(dy.columns(columns.clone()), own.mat_mut()?)?;
            term = Some(own);
        }
        sum.push(Node::leaf(leaf), term, |left, right| match (left, right) {
            (Some(left), Some(right)) => left.accumulate(&right),
            (left, Some(right)) => {
                *left = Some(right);
                Ok(())
            }
            (_, None) => Ok(()),
        })?;
    }
    // Were the holders on several ranks, the blocks that do not hold the head would have zeros: with one, −0 is +0.
    let shape = [dy.rows(), holders[0].1.len()];
    let mut total = Tensor::zeros(device, shape)?;
    match sum.values().swap_remove(0) {
        Some(sum) if holders.len() == tree.leaves() => return Ok(sum),
        Some(sum) => total.accumulate(&sum)?,
        None => (),
    }
    Ok(total)
}
