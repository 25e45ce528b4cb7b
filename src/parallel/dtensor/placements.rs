//! `Replicated`, `Copied` and `Shard` tensors, and the mappings between them.

use super::{
    DTensor, Layout,
    partition::{canonical, check},
};
use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result, same_size},
    kernels::Backend,
    ops,
    shard::{Copied, Partition, Replicated, Sequences, Shard},
    tensor::Tensor,
};

impl<T: Element, B: Backend> DTensor<Replicated, T, B> {
    /// Makes a tensor from values that are equal on every rank. The caller guarantees that they are
    /// equal. If they may differ, use [`DTensor::broadcast`]. No communication.
    ///
    /// # Errors
    /// When `local` has fewer than two dimensions.
    pub fn replicated(group: &Group<B>, local: Tensor<T, B>) -> Result<Self> {
        let layout = Layout::whole(&local, "replicated")?;
        Ok(Self::new(local, group, layout))
    }

    /// Sends the root's values to every rank, and makes a tensor from them. Collective: broadcast.
    ///
    /// # Errors
    /// When shapes differ between ranks, or a rank is lost.
    #[track_caller]
    pub fn broadcast(group: &Group<B>, root: usize, mut local: Tensor<T, B>) -> Result<Self> {
        group.broadcast(root, &mut local)?;
        Self::replicated(group, local)
    }

    /// Replicated → Copied: declares that each rank will use the tensor differently. No
    /// communication.
    pub fn copy_to(self) -> DTensor<Copied, T, B> {
        DTensor::new(self.local, &self.group, self.layout)
    }

    /// Replicated → Shard\<D\>: takes this rank's shard of dimension `D`. No communication.
    ///
    /// # Errors
    /// When the partition does not divide dimension `D` over the ranks of the group. For tokens
    /// under an invariant reduction, also when the partition is not the one by canonical blocks.
    pub fn scatter<const D: usize>(self, partition: &Partition) -> Result<DTensor<Shard<D>, T, B>> {
        check("scatter", self.shape(), D, partition, self.group.size())?;
        let partition = &canonical("scatter", &self.group, D, partition)?;
        let local = ops::slice(&self.local, D, partition.range(self.group.rank()))?;
        let tokens = (D == 0).then(|| partition.clone()).or(self.layout.token_partition.clone());
        let mut shard = self.with_placement(local, Some(partition.clone()));
        shard.layout.token_partition = tokens;
        Ok(shard)
    }
}

impl<T: Element, B: Backend> DTensor<Copied, T, B> {
    /// Makes a tensor from values that are equal on every rank. Each rank will use the tensor
    /// differently. No communication.
    ///
    /// # Errors
    /// When `local` has fewer than two dimensions.
    pub fn copied(group: &Group<B>, local: Tensor<T, B>) -> Result<Self> {
        Ok(DTensor::replicated(group, local)?.copy_to())
    }
}

impl<const D: usize, T: Element, B: Backend> DTensor<Shard<D>, T, B> {
    /// Makes a tensor from this rank's shard of dimension `D`. No communication.
    ///
    /// ```
    /// use shardwise::prelude::*;
    ///
    /// launch::threads(2, |world| {
    ///     let (rank, partition) = (world.rank(), Partition::from_sizes([1, 3]));
    ///     let local = Tensor::full(world.device(), [1, partition.size(rank)], rank as f64)?;
    ///     let x = DTensor::<Shard<1>, f32>::shard(&world, local, &partition)?;
    ///     assert_eq!(x.shape().dims(), [1, 4]);
    ///     assert_eq!(x.all_gather()?.local().to_vec()?, [0.0, 1.0, 1.0, 1.0]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the partition does not have one shard per rank, or `local` does not have the size of
    /// this rank's shard. For tokens under an invariant reduction, also when the partition is not
    /// the one by canonical blocks.
    pub fn shard(group: &Group<B>, local: Tensor<T, B>, partition: &Partition) -> Result<Self> {
        const OP: &str = "shard";
        let mut layout = Layout::whole(&local, OP)?;
        if D >= layout.shape.rank() {
            return Err(Error::invalid(
                OP,
                format!("there is no dimension {D} in a tensor of shape {}", layout.shape),
            ));
        }
        layout.shape = layout.shape.with(D, partition.total());
        check(OP, layout.shape, D, partition, group.size())?;
        let partition = &canonical(OP, group, D, partition)?;
        let (have, want) = (local.shape().dims()[D], partition.size(group.rank()));
        same_size(OP, "the size of this rank's shard", have, "its size in the partition", want)?;
        layout.sequences = Sequences::one(layout.shape.rows());
        layout.token_partition = (D == 0).then(|| partition.clone());
        layout.partition = Some(partition.clone());
        Ok(Self::new(local, group, layout))
    }

    /// Shard\<D\> → Replicated. Collective: all-gather.
    ///
    /// # Errors
    /// When the ranks disagree, or a rank is lost.
    #[track_caller]
    pub fn all_gather(self) -> Result<DTensor<Replicated, T, B>> {
        let whole = self.group.all_gather(&self.local, D, self.shard_partition()?)?;
        Ok(self.with_placement(whole, None))
    }
}
