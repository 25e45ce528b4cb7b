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

/// √ Σ g² over the gradient of the whole model: the norm that one device would compute. The norm is
/// not finite if an element of the gradient is not, for example after an overflow of a scaled loss.
///
/// An element counts once, even if several ranks hold a copy (the scales of norms, shared key/value
/// heads). Only the rank that owns the element ([`crate::tensor::ParamRegion::owned`]) adds it.
/// `groups` are the tensor- and pipeline-parallel groups. Do not pass the data-parallel group,
/// because its ranks have equal gradients after the reduction. Sums are in f64.
///
/// Collectives: one all-gather over each group, of three numbers a rank. Over a group with
/// [`Reduction::Invariant`], the all-gather also has one number for each canonical block. A
/// pipeline-parallel group of several ranks must not have an invariant reduction.
///
/// ```
/// use shardwise::{optim::grad_norm, prelude::*};
/// let source = Random::normal(1, 0.02);
/// launch::threads(2, |world| {
///     let rank = world.rank();
///     let own = Region::whole([2]).narrow(0, rank..rank + 1);
///     let (cpu, weights) = (world.device(), Weights::new(&source));
///     let w = Param::<f32, _>::load_region(cpu, &weights, "w", Role::Bias, own, true)?;
///     w.set_grad(Tensor::full(cpu, [1], [3.0, 4.0][rank])?)?;
///     assert_eq!(grad_norm(&[w], &[&world])?, 5.0);
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// When the ranks of the groups do not own every element of the given tensors exactly once:
/// `groups` lacks a group over which tensors are sharded, or ranks of a given group own the same
/// regions. When a collective fails. When the sum cannot be invariant.
///
/// This function does not detect that a pipeline stage is missing, that no rank owns a tensor, or
/// that several ranks own the whole of a tensor and differ in their other tensors.
/// [`crate::weights::save`] detects the last two of these.
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
    // One sum for each of this rank's leaves, and one sum for gradients outside all leaves.
    let (mut terms, mut owned) = (Terms::default(), Owned::default());
    check_once(OP, params)?;
    for param in params {
        param.check_complete(OP)?;
        owned.count(param);
        let Some(grad) = &param.grad() else { continue };
        let name = param.name();
        let blocks = match (&tree, param.blocks()) {
            (None, _) => None,
            (Some(_), Some(blocks)) => blocks,
            (Some(_), None) => {
                return Err(unsupported(format!(
                    "{name} was not loaded by canonical blocks: it was loaded on another group, or its layer has no canonical blocks"
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
            let reason = format!("{name} has {count} canonical blocks on this rank, but its group has {own}");
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
        sums = vec![owned.total(group, tree, &sums)?];
    }
    owned.check_whole()?;
    Ok(sums[0].sqrt())
}

/// A summary of the regions that a rank owns. The ranks of each group combine their summaries.
#[derive(Debug, Default)]
struct Owned {
    /// Σ f · (n − s) over the owned regions, modulo 2⁴⁰. f is a hash of the tensor's name, and n is
    /// the region's number of elements. s is the tensor's number of elements if the region has the
    /// tensor's first element, else 0. The sum over the ranks is 0 if ranks own every element
    /// exactly once.
    excess: u64,
    /// A hash of the owned regions, or 0 without owned regions.
    regions: u64,
    /// The name of a tensor that this rank owns only partly, for the error.
    sharded: Option<String>,
}

/// The modulus of [`Owned::excess`]. f64 holds every remainder exactly, and their sum over ranks
/// fits in u64.
const MODULUS: u64 = 1 << 40;

impl Owned {
    fn count<T: Element, B: Backend>(&mut self, param: &Param<T, B>) {
        for own in param.regions().iter().filter(|own| own.owned) {
            let (region, factor) = (&own.region, hash(&own.tensor) >> 44 | 1);
            let (len, whole) = (region.extent().len() as u64, region.shape().len() as u64);
            if len == 0 {
                continue;
            }
            self.regions = hash((self.regions, &own.tensor, region)) >> 24 | 1;
            let first = region.ranges().iter().all(|range| range.start == 0);
            let less = if first { whole } else { 0 };
            self.excess = self.excess.wrapping_add(factor.wrapping_mul(len.wrapping_sub(less))) % MODULUS;
            if len < whole {
                self.sharded.get_or_insert_with(|| own.tensor.clone());
            }
        }
    }

    /// Returns the sum of `sums` over the ranks of a group. Each rank's `sums` has one sum for each
    /// of the rank's leaves, and a last one. Adds the sums of leaves along the tree, then adds the
    /// last sums of all ranks in rank order, and returns the sum of the two results. Also combines
    /// the ranks' summaries.
    #[track_caller]
    fn total<B: Backend>(&mut self, group: &Group<B>, tree: Option<&Tree>, sums: &[f64]) -> Result<f64> {
        let own = [sums, &[self.excess as f64, self.regions as f64]].concat();
        let leaves = |rank: usize| tree.map_or(0, |tree| tree.owned(rank).len());
        let counts = Partition::from_sizes((0..group.size()).map(|rank| leaves(rank) + 3));
        let own = Tensor::<f64, B>::from_slice(group.device(), [own.len()], &own)?;
        let all = group.all_gather(&own, 0, &counts)?.to_vec()?;
        let of = |rank: usize| all[counts.range(rank)].split_at(leaves(rank));
        self.combine(group, (0..group.size()).map(|rank| [of(rank).1[1] as u64, of(rank).1[2] as u64]))?;
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

    /// Combines the summaries of the ranks of a group, each `[excess, regions]`.
    fn combine<B: Backend>(
        &mut self,
        group: &Group<B>,
        all: impl Iterator<Item = [u64; 2]> + Clone,
    ) -> Result<()> {
        for (rank, [_, regions]) in all.clone().enumerate().filter(|(_, [_, regions])| *regions != 0) {
            if let Some(other) = all.clone().take(rank).position(|[_, earlier]| earlier == regions) {
                let reason = format!(
                    "ranks {other} and {rank} of {group:?} own the same regions of the model: is this the data-parallel group?"
                );
                return Err(Error::invalid(OP, reason));
            }
        }
        // All ranks of this group compute the same combined hash. So if ranks of a later group own
        // the same regions, their combined hashes are equal, and every rank of that group detects
        // this.
        let regions: Vec<u64> =
            all.clone().map(|[_, regions]| regions).filter(|regions| *regions != 0).collect();
        self.regions = if regions.is_empty() { 0 } else { hash(regions) >> 24 | 1 };
        self.excess = all.map(|[excess, _]| excess).sum::<u64>() % MODULUS;
        Ok(())
    }

    /// Checks that ranks own every element exactly once.
    fn check_whole(&self) -> Result<()> {
        if self.excess == 0 {
            return Ok(());
        }
        let rest = self
            .sharded
            .as_ref()
            .map_or_else(String::new, |tensor| format!(", such as the rest of `{tensor}`"));
        let reason = format!(
            "the ranks of the given groups do not own every element of the model once{rest}: pass all groups that shard the model"
        );
        Err(Error::invalid(OP, reason))
    }
}

/// Sums of squares of rows, on the device. Each is a term of one of several sums. All terms are
/// downloaded together, because each download synchronizes with the device.
struct Terms<B: Backend> {
    /// Buffers of terms, and the number of terms in each.
    rows: Vec<(Tensor<f64, B>, usize)>,
    /// The number of terms of each region, and the index of the sum they belong to.
    regions: Vec<(usize, usize)>,
}

impl<B: Backend> Default for Terms<B> {
    fn default() -> Self {
        Self { rows: Vec::new(), regions: Vec::new() }
    }
}

impl<B: Backend> Terms<B> {
    /// Computes Σ g² over `cols` for each row in `rows` that this rank owns. Adds the results as
    /// terms of sum number `sum`.
    fn push<T: Element>(
        &mut self,
        param: &Param<T, B>,
        grad: &Tensor<T::Acc, B>,
        rows: Range<usize>,
        cols: Range<usize>,
        sum: usize,
    ) -> Result<()> {
        let (device, width) = (grad.device(), grad.shape().split_at(0).1);
        for own in param.regions().iter().filter(|own| own.owned) {
            let end = own.row + own.region.extent().len().checked_div(width).unwrap_or(0);
            let rows = rows.start.max(own.row)..rows.end.min(end);
            if rows.is_empty() || cols.is_empty() {
                continue;
            }
            let data = B::narrow(grad.slice(), rows.start * width..rows.end * width);
            // A vector is one row. A matrix of one column keeps its rows, because the sum over a
            // block of columns must not depend on the number of columns of this rank.
            let slice = match grad.shape().rank() {
                1 => MatRef::<T::Acc, B>::new(data, 1, rows.len())?,
                _ => MatRef::<T::Acc, B>::new(data, rows.len(), width)?.columns(cols.clone()),
            };
            let count = slice.rows();
            let place = self.place(device, count)?;
            device.square_sums(slice, place)?;
            self.regions.push((count, sum));
        }
        Ok(())
    }

    /// Reserves `count` adjacent terms.
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

    /// Downloads the terms and returns the sums, each in the order of its terms.
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

/// Returns the norm if it is finite, and otherwise an error that stops the training. The norm is
/// equal on every rank of the model, so every rank returns the same result.
///
/// # Errors
/// When the norm is NaN or infinite.
pub fn require_finite(norm: f64) -> Result<f64> {
    if norm.is_finite() {
        Ok(norm)
    } else {
        Err(Error::invalid(OP, format!("the gradient is not finite: its norm is {norm}")))
    }
}

/// min(1, max / (norm + 10⁻⁶)): the factor that scales a gradient of norm `norm` to at most norm
/// `max`, as `torch.nn.utils.clip_grad_norm_` with `error_if_nonfinite`. An infinite `max` does not
/// clip.
///
/// # Errors
/// When the norm is NaN, infinite or negative, or `max` is NaN or negative.
pub fn clip_scale(norm: f64, max: f64) -> Result<f64> {
    if !(0.0..f64::INFINITY).contains(&norm) || !(0.0..=f64::INFINITY).contains(&max) {
        let reason = format!("a gradient of norm {norm} cannot be clipped to a norm of {max}");
        return Err(Error::invalid("clip scale", reason));
    }
    Ok((max / (norm + 1e-6)).min(1.0))
}
