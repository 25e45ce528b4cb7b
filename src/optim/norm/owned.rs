//! The regions that ranks own, and sums over the ranks of a group.

use super::OP;
use crate::{
    comm::{Group, hash},
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    shard::{Node, Partition, Tree, TreeSum},
    tensor::{Param, Tensor},
};

/// A summary of the regions that a rank owns. The ranks of each group combine their summaries.
#[derive(Debug, Default)]
pub(super) struct Owned {
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
    pub(super) fn count<T: Element, B: Backend>(&mut self, param: &Param<T, B>) {
        for own in param.regions().iter().filter(|own| own.owned) {
            let (region, factor) = (&own.region, hash(&own.tensor) >> 44 | 1);
            let (len, whole) = (region.extent().len() as u64, region.shape().len() as u64);
            if len == 0 {
                continue;
            }
            self.regions = hash((self.regions, &own.tensor, region)) >> 24 | 1;
            let less = if region.has_first() { whole } else { 0 };
            self.excess = self.excess.wrapping_add(factor.wrapping_mul(len.wrapping_sub(less))) % MODULUS;
            if len < whole {
                self.sharded.get_or_insert_with(|| own.tensor.clone());
            }
        }
    }

    /// Returns sums over the ranks of a group. Each rank's `sums` has, for each of `count` sums,
    /// one term for each of the rank's leaves, and a last one. Adds the terms of leaves along the
    /// tree, then adds the last terms of all ranks in rank order, and adds the two results. Also
    /// combines the ranks' summaries.
    #[track_caller]
    pub(super) fn total<B: Backend>(
        &mut self,
        group: &Group<B>,
        tree: Option<&Tree>,
        (count, sums): (usize, &[f64]),
    ) -> Result<Vec<f64>> {
        let own = [sums, &[self.excess as f64, self.regions as f64]].concat();
        let leaves = |rank: usize| tree.map_or(0, |tree| tree.owned(rank).len());
        let terms = |rank: usize| count * (leaves(rank) + 1);
        let lens = Partition::from_sizes((0..group.size()).map(|rank| terms(rank) + 2));
        let own = Tensor::<f64, B>::from_slice(group.device(), [own.len()], &own)?;
        let all = group.all_gather(&own, 0, &lens)?.to_vec()?;
        let of = |rank: usize| all[lens.range(rank)].split_at(terms(rank));
        self.combine(group, (0..group.size()).map(|rank| [of(rank).1[0] as u64, of(rank).1[1] as u64]))?;
        let sum = |at: usize| -> Result<f64> {
            let (mut sum, mut rest) = (TreeSum::new(tree.map_or(0, Tree::leaves)), 0.0);
            for rank in 0..group.size() {
                let width = leaves(rank) + 1;
                let terms = &of(rank).0[at * width..(at + 1) * width];
                for (leaf, term) in tree.map_or(0..0, |tree| tree.owned(rank)).zip(terms) {
                    sum.push(Node::leaf(leaf), *term, |left, right| {
                        *left += right;
                        Ok(())
                    })?;
                }
                rest += terms[width - 1];
            }
            Ok(sum.values().into_iter().sum::<f64>() + rest)
        };
        (0..count).map(sum).collect()
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
    pub(super) fn check_whole(&self) -> Result<()> {
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
