//! Operators by canonical blocks: what layers compute on a group with [`Reduction::Invariant`], so that the bits do not
//! depend on the number of ranks.
//!
//! * A sum that is split over the ranks (a row linear layer, the gradient of a column linear layer's input) is a term for
//!   each block, added along the group's [`Tree`]: [`product`].
//! * A sum over tokens, which sequence parallelism splits, is a term for each block of tokens: [`token_sum`].
//! * What is not summed but split is computed block by block too, unless the device computes elements that do not depend
//!   on their neighbours ([`crate::kernels::Gemm::splits_exactly`]): [`by_columns`], [`by_rows`]. A key/value head that
//!   several blocks hold is a run by itself.
//!
//! A kernel is called with the same numbers, in the same shapes, whichever rank owns the block, and
//! products are [`crate::kernels::Gemm::gemm_block`], which does not depend on the tensor that the
//! block is a part of. Without blocks ([`Reduction::Fast`]) these functions compute everything at
//! once.

use super::DTensor;
use crate::{
    comm::Group,
    device::{Accumulator, Device, Element},
    error::{Error, Result},
    kernels::{Backend, MatMut, MatRef, Term},
    shard::{Node, Partial, Partition, Placement, Reduction, Shape, Tree, TreeSum},
    tensor::{Param, Patch, Tensor},
    trace,
};
use std::ops::Range;

/// Where the canonical blocks of this rank lie in a dimension of its tensors: a block may have several runs, such as its
/// rows of q, of k and of v.
pub(super) type Blocks = Vec<Vec<Range<usize>>>;

/// This rank's blocks of a cut; none with [`Reduction::Fast`].
pub(super) fn blocks<B: Device>(
    op: &'static str,
    group: &Group<B>,
    cut: &Partition,
) -> Result<Option<Blocks>> {
    let Some(tree) = group.tree()? else { return Ok(None) };
    let own = cut.blocks(group.rank()).filter(|own| own.len() == tree.owned(group.rank()).len());
    let Some(own) = own else {
        let reason = "an invariant reduction needs features that are cut by canonical blocks: take them from `Group::cut`";
        return Err(Error::Unsupported { op, reason: reason.into() });
    };
    Ok(Some(own.into_iter().map(|block| vec![block]).collect()))
}

/// A parameter whose rows are those of the blocks.
pub(super) fn cut_rows<T: Element, B: Backend>(
    param: &mut Param<T, B>,
    group: &Group<B>,
    blocks: Option<&Blocks>,
) {
    let cols = param.value().shape().cols();
    cut(param, group, blocks, |rows| Patch { rows, cols: 0..cols });
}

/// A parameter whose columns are those of the blocks.
pub(super) fn cut_columns<T: Element, B: Backend>(
    param: &mut Param<T, B>,
    group: &Group<B>,
    blocks: Option<&Blocks>,
) {
    let rows = param.value().shape().rows();
    cut(param, group, blocks, |cols| Patch { rows: 0..rows, cols });
}

/// A parameter that every rank holds.
pub(super) fn whole<T: Element, B: Backend>(mut param: Param<T, B>, group: &Group<B>) -> Param<T, B> {
    if group.reduction() != Reduction::Fast {
        param.sum_in_tree(None);
    }
    param
}

fn cut<T: Element, B: Backend>(
    param: &mut Param<T, B>,
    group: &Group<B>,
    blocks: Option<&Blocks>,
    patch: impl Fn(Range<usize>) -> Patch,
) {
    if group.reduction() != Reduction::Fast {
        let patches = |runs: &Vec<Range<usize>>| runs.iter().cloned().map(&patch).collect();
        param.sum_in_tree(blocks.map(|blocks| blocks.iter().map(patches).collect()));
    }
}

/// All runs of the blocks.
pub(super) fn runs(blocks: Option<&Blocks>) -> Option<Vec<Range<usize>>> {
    blocks.map(|blocks| blocks.concat())
}

/// c ← a b + β c by runs of b's and c's columns.
pub(super) fn by_columns<T: Element, C: Element<Acc = T::Acc>, B: Backend>(
    device: &B,
    runs: Option<Vec<Range<usize>>>,
    (a, b): (MatRef<'_, T, B>, MatRef<'_, T, B>),
    beta: f64,
    mut c: MatMut<'_, C, B>,
) -> Result<()> {
    trace::compute("gemm", T::DTYPE, &[a.rows(), a.cols(), b.cols()], || {
        let Some(runs) = runs.filter(|_| !exact(device, a)) else {
            return device.gemm(1.0, a, b, beta, c);
        };
        let rows = c.rows();
        runs.into_iter().try_for_each(|columns| {
            let part = c.reborrow().block(0..rows, columns.clone());
            device.gemm_block(a, b.columns(columns), beta, part)
        })
    })
}

/// c ← a b + β c by runs of a's and c's rows.
pub(super) fn by_rows<T: Element, C: Element<Acc = T::Acc>, B: Backend>(
    device: &B,
    runs: Option<Vec<Range<usize>>>,
    (a, b): (MatRef<'_, T, B>, MatRef<'_, T, B>),
    beta: f64,
    mut c: MatMut<'_, C, B>,
) -> Result<()> {
    trace::compute("gemm", T::DTYPE, &[a.rows(), a.cols(), b.cols()], || {
        let Some(runs) = runs.filter(|_| !exact(device, a)) else {
            return device.gemm(1.0, a, b, beta, c);
        };
        let (depth, cols) = (a.cols(), c.cols());
        runs.into_iter().try_for_each(|rows| {
            let part = c.reborrow().block(rows.clone(), 0..cols);
            device.gemm_block(a.block(rows, 0..depth), b, beta, part)
        })
    })
}

/// Whether a product whose depth is cut into these blocks, or has `depth` if there are none, has the same bits row by row.
pub(super) fn splits<B: Backend>(device: &B, blocks: Option<&Blocks>, depth: usize) -> bool {
    let deep = |depth: usize| depth != 1;
    let all = blocks.map_or(deep(depth), |blocks| blocks.iter().flatten().all(|run| deep(run.len())));
    device.splits_exactly() && all
}

/// Whether a product with `a` is what its blocks would be. A depth of 1 leaves room for another sign of a zero.
fn exact<T: Element, B: Backend>(device: &B, a: MatRef<'_, T, B>) -> bool {
    device.splits_exactly() && a.cols() > 1
}

/// The sums of this rank's sub-trees, of the terms that `term` writes for each of some leaves.
pub(super) fn tree_terms<A: Element<Acc = A>, B: Backend>(
    device: &B,
    leaves: usize,
    own: Range<usize>,
    shape: impl Into<Shape>,
    mut term: impl FnMut(usize, &mut Tensor<A, B>) -> Result<()>,
) -> Result<Vec<Tensor<A, B>>> {
    let (shape, mut sum) = (shape.into(), TreeSum::new(leaves));
    for leaf in own {
        let mut next = Tensor::empty(device, shape)?;
        term(leaf, &mut next)?;
        sum.push(Node::leaf(leaf), next, |left, right| left.accumulate(&right))?;
    }
    Ok(sum.values())
}

/// As [`tree_terms`], for the leaves that this rank of a group owns: `term` gets the number of the rank's block.
pub(super) fn own_terms<A: Element<Acc = A>, B: Backend>(
    group: &Group<B>,
    tree: &Tree,
    shape: impl Into<Shape>,
    mut term: impl FnMut(usize, &mut Tensor<A, B>) -> Result<()>,
) -> Result<Vec<Tensor<A, B>>> {
    let own = tree.owned(group.rank());
    tree_terms(group.device(), tree.leaves(), own.clone(), shape, |leaf, out| term(leaf - own.start, out))
}

/// One factor pair of a sum of products whose depth is cut into blocks.
pub(super) struct Factors<'a, T: Element, B: Device> {
    pub(super) a: MatRef<'a, T, B>,
    pub(super) b: MatRef<'a, T, B>,
    pub(super) blocks: &'a Blocks,
}

/// Σ a b over all ranks, with the rows of `x`: for each block the products of its columns of a and rows of b.
pub(super) fn product<P: Placement, T: Element, B: Backend>(
    x: &DTensor<P, T, B>,
    features: usize,
    factors: &[Factors<'_, T, B>],
) -> Result<DTensor<Partial, T, B>> {
    let group = x.group();
    let Some(tree) = group.tree()? else {
        return Err(Error::internal("invariant product", "the group has no blocks"));
    };
    let (device, rows, own) = (group.device(), x.local().shape().rows(), tree.owned(group.rank()));
    let mut sums = TreeSum::new(tree.leaves());
    for leaf in own.clone() {
        let mut products = Vec::new();
        for Factors { a, b, blocks } in factors {
            for depth in blocks[leaf - own.start].iter().filter(|depth| !depth.is_empty()) {
                products.push((a.columns(depth.clone()), b.block(depth.clone(), 0..features)));
            }
        }
        sums.push(Node::leaf(leaf), vec![Term { products, merges: 0 }], |left, right| {
            left.extend(right);
            left.last_mut().expect("there are two").merges += 1;
            Ok(())
        })?;
    }
    let sum = |terms: Vec<Term<'_, T, B>>| {
        let mut sum = Tensor::empty(device, [rows, features])?;
        device.gemm_tree(&terms, sum.mat_mut()?)?;
        Ok(sum)
    };
    let depth = factors.iter().map(|factors| factors.a.cols()).sum();
    let sums = || sums.values().into_iter().map(sum).collect::<Result<_>>();
    x.derive_sum(trace::compute("gemm", T::DTYPE, &[rows, depth, features], sums)?, features)
}

/// What [`token_sum`] has of a group's blocks of tokens.
pub(super) enum Tokens {
    /// All tokens of the whole, by blocks.
    All,
    /// Those of this rank's blocks.
    Own,
}

/// The sums of sub-trees over blocks of tokens: `term` writes that of some of this rank's rows.
pub(super) fn token_terms<A: Accumulator, B: Backend>(
    group: &Group<B>,
    tree: &Tree,
    (which, tokens): (Tokens, usize),
    shape: Shape,
    term: &mut dyn FnMut(Range<usize>, &mut Tensor<A, B>) -> Result<()>,
) -> Result<Vec<Tensor<A, B>>> {
    let blocks = crate::shard::blocks(tokens, 1, tree.leaves());
    let own = match which {
        Tokens::All => 0..tree.leaves(),
        Tokens::Own => tree.owned(group.rank()),
    };
    let first = blocks.range(own.start).start;
    tree_terms(group.device(), tree.leaves(), own, shape, |block, out: &mut Tensor<A, B>| {
        let rows = blocks.range(block);
        match rows.is_empty() {
            true => group.device().fill(0.0, out.mat_mut()?),
            false => term(rows.start - first..rows.end - first, out),
        }
    })
}
