//! The norm of a sharded gradient.

use crate::{
    comm::{Group, hash},
    device::Element,
    error::{Error, Result},
    kernels::{Backend, MatRef},
    shard::{Node, Partition, Reduction, Tree, TreeSum},
    tensor::{Param, Tensor, check_once},
};
use std::ops::Range;

const OP: &str = "gradient norm";

/// √ Σ g² over the gradient of the whole model, wherever its parts are: what one device would find.
///
/// Every element counts once: it is owned by one rank ([`crate::tensor::ParamRegion::owned`]), however many hold a copy
/// (norms' scales, key/value heads that ranks share). `groups` are those over which the model is spread: tensor and
/// pipeline parallel; not the data-parallel one, over which gradients are equal by now. Sums are made in f64.
///
/// Collectives: an all-gather of three numbers over each group; over the group with
/// [`Reduction::Invariant`] also of one number a canonical block. Only one group of several ranks
/// may have it, the tensor-parallel one.
///
/// Not finite if any gradient is not, so that it also says whether a scaled loss overflowed.
///
/// # Errors
/// When the ranks of the groups do not own every element of the given tensors exactly once: a
/// group over which tensors are cut is missing, or there is one whose ranks own the same parts.
/// Not seen are stages of a pipeline that are missing, tensors that no rank owns, and whole tensors
/// that several own beside others of their own; a save ([`crate::weights::save`]) finds the last two.
/// When a collective fails, or sums that are to be invariant cannot be.
#[track_caller]
pub fn grad_norm<T: Element, B: Backend>(params: &[Param<T, B>], groups: &[&Group<B>]) -> Result<f64> {
    let unsupported = |reason: String| Error::Unsupported { op: OP, reason };
    let fixed = groups.iter().copied().filter(|group| group.reduction() != Reduction::Fast);
    let ordered = fixed.clone().find(|group| group.size() > 1).or(fixed.clone().next());
    let others = groups.iter().copied().filter(|other| !ordered.is_some_and(|group| other.is_same(group)));
    let depends = |other: &&Group<B>| other.size() > 1 && other.reduction() != Reduction::Fast;
    if let Some(other) = others.clone().find(depends) {
        return Err(unsupported(format!(
            "the sum over {other:?} depends on its number of ranks: give that group `Reduction::Fast`"
        )));
    }
    let (tree, own) = match ordered {
        None => (None, 0),
        Some(group) => {
            let tree = group.tree()?.ok_or_else(|| unsupported(format!("{group:?} has no blocks")))?;
            let own = tree.owned(group.rank()).len();
            (Some(tree), own)
        }
    };
    // The sum over each of this rank's leaves, and over what belongs to none.
    let (mut terms, mut shares) = (Terms::default(), Shares::default());
    check_once(OP, params)?;
    for param in params {
        param.check_complete(OP)?;
        shares.count(param);
        let Some(grad) = &param.grad() else { continue };
        let name = param.name();
        let blocks = match (&tree, param.blocks()) {
            (None, _) => None,
            (Some(_), Some(blocks)) => blocks,
            (Some(_), None) => {
                return Err(unsupported(format!(
                    "{name} was not loaded by canonical blocks: on another group, or by a layer that knows none"
                )));
            }
        };
        let (rows, width) = (grad.shape().dims()[0], grad.shape().split_at(0).1);
        let Some(blocks) = blocks else {
            terms.push(param, grad, 0..rows, 0..width, own)?;
            continue;
        };
        if blocks.len() != own {
            let count = blocks.len();
            let reason = format!("{name} has {count} canonical blocks on this rank, its group {own}");
            return Err(unsupported(reason));
        }
        for (block, regions) in blocks.iter().enumerate() {
            for region in regions {
                terms.push(param, grad, region.rows.clone(), region.cols.clone(), block)?;
            }
        }
    }
    let mut sums = terms.into_sums(own + 1)?;
    for group in ordered.into_iter().chain(others) {
        let tree = tree.as_ref().filter(|_| ordered.is_some_and(|ordered| group.is_same(ordered)));
        sums = vec![shares.total(group, tree, &sums)?];
    }
    shares.are_whole()?;
    Ok(sums[0].sqrt())
}

/// Which part of the given tensors a rank owns, in numbers that are summed over groups.
#[derive(Debug, Default)]
struct Shares {
    /// Owned elements less those of all tensors whose first element is owned, each tensor's times a
    /// number of its own, modulo 2⁴⁰: 0 where every element is owned once.
    excess: u64,
    /// A hash of the parts that this rank owns; 0 for none.
    parts: u64,
    /// A tensor of which other ranks have the rest.
    cut: Option<String>,
}

/// Sums of so many numbers below this are exact in f64.
const MODULUS: u64 = 1 << 40;

impl Shares {
    fn count<T: Element, B: Backend>(&mut self, param: &Param<T, B>) {
        for part in param.regions().iter().filter(|part| part.owned) {
            let (region, factor) = (&part.region, hash(&part.tensor) >> 44 | 1);
            let (own, whole) = (region.extent().len() as u64, region.shape().len() as u64);
            if own == 0 {
                continue;
            }
            self.parts = hash((self.parts, &part.tensor, region)) >> 24 | 1;
            let first = region.ranges().iter().all(|range| range.start == 0);
            let less = if first { whole } else { 0 };
            self.excess = self.excess.wrapping_add(factor.wrapping_mul(own.wrapping_sub(less))) % MODULUS;
            if own < whole {
                self.cut.get_or_insert_with(|| part.tensor.clone());
            }
        }
    }

    /// The sum over a group of each rank's sums: of its leaves along the tree, and then of the last
    /// of every rank in rank order. The ranks' shares are added up, too.
    #[track_caller]
    fn total<B: Backend>(&mut self, group: &Group<B>, tree: Option<&Tree>, sums: &[f64]) -> Result<f64> {
        let own = [sums, &[self.excess as f64, self.parts as f64]].concat();
        let leaves = |rank: usize| tree.map_or(0, |tree| tree.owned(rank).len());
        let counts = Partition::from_sizes((0..group.size()).map(|rank| leaves(rank) + 3));
        let own = Tensor::<f64, B>::from_slice(group.device(), [own.len()], &own)?;
        let all = group.all_gather(&own, 0, &counts)?.to_vec()?;
        let of = |rank: usize| all[counts.range(rank)].split_at(leaves(rank));
        self.add_up(group, (0..group.size()).map(|rank| [of(rank).1[1] as u64, of(rank).1[2] as u64]))?;
        let (mut sum, mut rest) = (TreeSum::new(tree.map_or(0, Tree::leaves)), 0.0);
        for rank in 0..group.size() {
            let (terms, others) = of(rank);
            for (leaf, term) in tree.map_or(0..0, |tree| tree.owned(rank)).zip(terms) {
                sum.push(Node::leaf(leaf), *term, |left, right| {
                    *left += right;
                    Ok(())
                })?;
            }
            rest += others[0];
        }
        Ok(sum.values().into_iter().sum::<f64>() + rest)
    }

    /// Adds up what the ranks of a group own, each `[excess, parts]`.
    fn add_up<B: Backend>(
        &mut self,
        group: &Group<B>,
        all: impl Iterator<Item = [u64; 2]> + Clone,
    ) -> Result<()> {
        for (rank, [_, parts]) in all.clone().enumerate().filter(|(_, [_, parts])| *parts != 0) {
            if let Some(other) = all.clone().take(rank).position(|[_, earlier]| earlier == parts) {
                let reason = format!(
                    "ranks {other} and {rank} of {group:?} own the same parts of the model: is it the data-parallel group?"
                );
                return Err(Error::invalid(OP, reason));
            }
        }
        // A second group whose ranks have added up the same is found on every one of them.
        let parts: Vec<u64> = all.clone().map(|[_, parts]| parts).filter(|parts| *parts != 0).collect();
        self.parts = if parts.is_empty() { 0 } else { hash(parts) >> 24 | 1 };
        self.excess = all.map(|[excess, _]| excess).sum::<u64>() % MODULUS;
        Ok(())
    }

    fn are_whole(&self) -> Result<()> {
        if self.excess == 0 {
            return Ok(());
        }
        let cut =
            self.cut.as_ref().map_or_else(String::new, |tensor| format!(", such as the rest of `{tensor}`"));
        let reason = format!(
            "the given groups do not hold every element of the model once{cut}: give all groups over which it is spread"
        );
        Err(Error::invalid(OP, reason))
    }
}

/// Sums of squares of rows, on the device, each a term of one of several sums. They are downloaded
/// together: a download waits until the device has nothing left to do.
struct Terms<B: Backend> {
    /// The terms, and how many of each tensor's places are taken.
    rows: Vec<(Tensor<f64, B>, usize)>,
    /// The number of terms of each part of a parameter, and the sum that they belong to.
    regions: Vec<(usize, usize)>,
}

impl<B: Backend> Default for Terms<B> {
    fn default() -> Self {
        Self { rows: Vec::new(), regions: Vec::new() }
    }
}

impl<B: Backend> Terms<B> {
    /// Σ g² over `cols` of those of `rows` that this rank counts: terms of sum `sum`.
    fn push<T: Element>(
        &mut self,
        param: &Param<T, B>,
        grad: &Tensor<T::Acc, B>,
        rows: Range<usize>,
        cols: Range<usize>,
        sum: usize,
    ) -> Result<()> {
        let (device, width) = (grad.device(), grad.shape().split_at(0).1);
        for part in param.regions().iter().filter(|part| part.owned) {
            let end = part.row + part.region.extent().len().checked_div(width).unwrap_or(0);
            let rows = rows.start.max(part.row)..rows.end.min(end);
            if rows.is_empty() || cols.is_empty() {
                continue;
            }
            let data = B::narrow(grad.slice(), rows.start * width..rows.end * width);
            // A vector is one row. A matrix of one column is not: the sum over a block of columns
            // must not depend on how many of them this rank has.
            let part = match grad.shape().rank() {
                1 => MatRef::<T::Acc, B>::new(data, 1, rows.len())?,
                _ => MatRef::<T::Acc, B>::new(data, rows.len(), width)?.columns(cols.clone()),
            };
            let count = part.rows();
            let place = self.place(device, count)?;
            device.square_sums(part, place)?;
            self.regions.push((count, sum));
        }
        Ok(())
    }

    /// The next so many places.
    fn place(&mut self, device: &B, count: usize) -> Result<B::SliceMut<'_, f64>> {
        const TOGETHER: usize = 1 << 16;
        let fits = self.rows.last().is_some_and(|(rows, taken)| taken + count <= rows.len());
        if !fits {
            self.rows.push((Tensor::empty(device, [count.max(TOGETHER)])?, 0));
        }
        let last = self.rows.len() - 1;
        let (rows, taken) = &mut self.rows[last];
        *taken += count;
        Ok(B::narrow_mut(rows.slice_mut()?, *taken - count..*taken))
    }

    /// The sums, in order of their terms.
    fn into_sums(self, count: usize) -> Result<Vec<f64>> {
        let mut terms = Vec::new();
        for (rows, taken) in &self.rows {
            let at = terms.len();
            terms.resize(at + taken, 0.0);
            rows.device().download(B::narrow(rows.slice(), 0..*taken), &mut terms[at..])?;
        }
        let (mut sums, mut rest) = (vec![0.0; count], &terms[..]);
        for (count, sum) in self.regions {
            let (own, others) = rest.split_at(count);
            sums[sum] += own.iter().sum::<f64>();
            rest = others;
        }
        Ok(sums)
    }
}

/// The norm itself, if it is a number: training cannot go on from a gradient that is not. Every rank that shares the model
/// has the same norm, and gets the same error.
///
/// # Errors
/// When it is NaN or infinite.
pub fn require_finite(norm: f64) -> Result<f64> {
    match norm.is_finite() {
        true => Ok(norm),
        false => Err(Error::invalid(OP, format!("the gradient is not finite: its norm is {norm}"))),
    }
}

/// min(1, max / (norm + 10⁻⁶)): the factor of a gradient of norm `norm` that makes its norm `max`
/// at most, as in `torch.nn.utils.clip_grad_norm_` with `error_if_nonfinite`. An infinite `max`
/// clips nothing.
///
/// # Errors
/// When the norm is NaN, infinite or negative, or `max` is NaN or negative: no factor makes such a
/// gradient one of norm `max`.
pub fn clip_scale(norm: f64, max: f64) -> Result<f64> {
    if !(0.0..f64::INFINITY).contains(&norm) || !(0.0..=f64::INFINITY).contains(&max) {
        let reason = format!("a gradient of norm {norm} cannot be clipped to a norm of {max}");
        return Err(Error::invalid("clip scale", reason));
    }
    Ok((max / (norm + 1e-6)).min(1.0))
}
