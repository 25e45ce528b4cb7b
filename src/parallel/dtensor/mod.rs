//! Tensors spread over the ranks of a group, and the algebra of their placements.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`DTensor`]: its values, its layout, and changes that keep the placement |
//! | `placements.rs` | `Replicated`, `Copied` and `Shard` tensors, and the mappings between them |
//! | `partial.rs` | `Partial` tensors, their reductions, and started reductions |
//! | `residual_stream.rs` | entering and leaving a tensor-parallel region |
//! | `fits.rs`, `add.rs` | the bound that two placements are equal, and sums of two tensors |
//! | `overlap.rs` | collectives in chunks of tokens, overlapped with products |
//! | `addends.rs`, `partition.rs`, `rows.rs` | helpers of the other files, without `DTensor` |

mod add;
mod addends;
mod fits;
pub(super) mod overlap;
mod partial;
mod partition;
mod placements;
mod residual_stream;
mod rows;

pub(super) use partition::partition_mismatch;
pub use {fits::Fits, partial::PendingDTensor, residual_stream::ResidualStream};

use crate::{
    comm::Group,
    device::{Cpu, Device, Element},
    error::{Error, Result, same_shape, same_size},
    kernels::Backend,
    shard::{Partition, Placement, Sequences, Shape},
    tensor::Tensor,
};
use addends::Addends;
use std::{fmt, marker::PhantomData, ops::Range};

/// A tensor that the ranks of a group hold with placement `P`. Contains this rank's values, the
/// group, and the layout of the whole tensor.
///
/// Dimension 0 of the whole tensor counts rows (tokens), dimension 1 features. Layers reject a
/// third dimension: concatenate the sequences of a batch along dimension 0. The tensor carries the
/// sequences that its rows form ([`DTensor::with_sequences`]), because attention needs them. By
/// default, all rows form one sequence.
///
/// A layer, its input and the gradient of its output must have the same group. Layers check this by
/// [`DTensor::check`].
///
/// ```
/// use shardwise::prelude::*;
///
/// launch::threads(2, |world| {
///     let x = Tensor::<f32, _>::from_slice(world.device(), [1, 3], &[1.0, 2.0, 3.0])?;
///     let x = DTensor::replicated(&world, x)?.scatter::<1>(&world.even_partition(3)?)?;
///     assert_eq!(x.local().to_vec()?, [vec![1.0, 2.0], vec![3.0]][world.rank()]);
///     assert_eq!(x.all_gather()?.local().to_vec()?, [1.0, 2.0, 3.0]);
///     Ok(())
/// })?;
/// # Ok::<(), shardwise::Error>(())
/// ```
pub struct DTensor<P: Placement, T: Element = f32, B: Device = Cpu> {
    local: Tensor<T, B>,
    group: Group<B>,
    layout: Layout,
    /// The terms of a `Partial` tensor.
    addends: Addends<T::Acc, B>,
    placement: PhantomData<P>,
}

/// A tensor's position in a training run, from which dropout draws its masks.
///
/// A mask is a function of the dropout layer, this position and global indices. The mask is
/// therefore the same at every tensor-parallel size, and a backward that recomputes the forward
/// draws the same mask. If `row` and `sequence` count from the start of the global batch, the mask
/// is also the same at every data-parallel size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutState {
    /// The number of the training step.
    pub step: u64,
    /// The tensor's first row, counted from the start of the step's batch. All dimensions but the
    /// last count as rows.
    pub row: u64,
    /// The tensor's first sequence, counted from the start of the step's batch.
    /// [`MeanPool`](super::MeanPool) counts the rows of its output from this number.
    pub sequence: u64,
}

/// The description of the whole tensor, equal on every rank.
#[derive(Clone, Debug)]
struct Layout {
    shape: Shape,
    /// The partition of the sharded dimension; `None` unless the placement is `Shard`.
    partition: Option<Partition>,
    /// The partition of the tokens on a `Shard<0>` residual stream. A tensor keeps this partition
    /// when it enters a tensor-parallel region. A tensor that leaves the region is sharded by it
    /// again.
    token_partition: Option<Partition>,
    sequences: Sequences,
    dropout: Option<DropoutState>,
}

impl Layout {
    /// The layout of a `[tokens, …]` tensor that is not sharded.
    fn whole<T: Element, B: Device>(local: &Tensor<T, B>, op: &'static str) -> Result<Self> {
        let shape = local.shape();
        if shape.rank() < 2 {
            return Err(Error::invalid(
                op,
                format!("needs tokens and features, but the tensor has shape {shape}"),
            ));
        }
        let sequences = Sequences::one(shape.rows());
        Ok(Self { shape, partition: None, token_partition: None, sequences, dropout: None })
    }
}

impl<P: Placement, T: Element, B: Device> Clone for DTensor<P, T, B> {
    fn clone(&self) -> Self {
        Self {
            local: self.local.clone(),
            group: self.group.clone(),
            layout: self.layout.clone(),
            addends: self.addends.clone(),
            placement: PhantomData,
        }
    }
}

impl<P: Placement, T: Element, B: Device> fmt::Debug for DTensor<P, T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, dim) = (P::NAME, P::SHARD_DIM.map_or(String::new(), |dim| format!("<{dim}>")));
        write!(f, "DTensor<{name}{dim}, {}>({} in {:?})", T::DTYPE, self.layout.shape, self.group)
    }
}

impl<P: Placement, T: Element, B: Device> DTensor<P, T, B> {
    /// Returns this rank's values. For a `Partial` tensor, they are this rank's term of the sum.
    pub fn local(&self) -> &Tensor<T, B> {
        &self.local
    }

    /// Returns this rank's values, and drops the group and the layout.
    pub fn into_local(self) -> Tensor<T, B> {
        self.local
    }

    /// Returns the group over which the tensor is spread.
    pub fn group(&self) -> &Group<B> {
        &self.group
    }

    /// Checks that this tensor, an input or a gradient of a layer over `group`, has the shape
    /// `[tokens, features]`. Also checks that the tensor's group is `group`, with the same
    /// reduction.
    ///
    /// # Errors
    /// When the tensor does not have two dimensions, or its group or reduction differs from
    /// `group`.
    pub fn check(&self, op: &'static str, group: &Group<B>) -> Result<()> {
        self.check_rows(op)?;
        if !self.group.is_same(group) {
            let reason = format!("the tensor is spread over {:?}, but the layer over {group:?}", self.group);
            return Err(Error::invalid(op, reason));
        }
        if self.group.reduction() != group.reduction() {
            let (here, there) = (self.group.reduction(), group.reduction());
            let reason = format!("the tensor's group has reduction {here:?}, but the layer's has {there:?}");
            return Err(Error::invalid(op, reason));
        }
        Ok(())
    }

    /// Checks that the shape is `[tokens, features]`.
    pub(super) fn check_rows(&self, op: &'static str) -> Result<()> {
        let shape = self.layout.shape;
        if shape.rank() == 2 {
            return Ok(());
        }
        let (rows, cols) = (shape.rows(), shape.cols());
        let reason = format!(
            "the tensor has shape {shape}, but layers take [tokens, features]: reshape it to [{rows}, {cols}], and \
             say which rows belong together by `with_sequences`"
        );
        Err(Error::invalid(op, reason))
    }

    /// Returns the shape of the whole tensor.
    pub fn shape(&self) -> Shape {
        self.layout.shape
    }

    /// Returns the partition of the sharded dimension; `None` unless the placement is `Shard`.
    pub fn partition(&self) -> Option<&Partition> {
        self.layout.partition.as_ref()
    }

    /// The partition of a `Shard` tensor.
    pub(super) fn shard_partition(&self) -> Result<&Partition> {
        let missing = || Error::internal("shard", "a sharded tensor without its partition");
        self.layout.partition.as_ref().ok_or_else(missing)
    }

    /// Returns the sequences that the rows of the whole tensor form.
    pub fn sequences(&self) -> &Sequences {
        &self.layout.sequences
    }

    /// Sets the sequences that the rows of the whole tensor form.
    ///
    /// ```
    /// use shardwise::prelude::*;
    ///
    /// let group = Group::solo(&Cpu::new());
    /// let x = Tensor::<f32, _>::from_slice(group.device(), [3, 1], &[1.0, 2.0, 6.0])?;
    /// let x = DTensor::replicated(&group, x)?.with_sequences(Sequences::packed([1, 2]))?;
    /// let (means, _) = MeanPool.forward(x)?;
    /// assert_eq!(means.local().to_vec()?, [1.0, 4.0]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the sequences have another number of rows than the tensor.
    pub fn with_sequences(mut self, sequences: Sequences) -> Result<Self> {
        let rows = self.layout.shape.rows();
        same_size("sequences", "rows of the sequences", sequences.rows(), "rows of the tensor", rows)?;
        self.layout.sequences = sequences;
        Ok(self)
    }

    /// Returns the tensor's position in a training run; `None` outside of training. Dropout changes
    /// nothing if there is no position.
    pub fn dropout_state(&self) -> Option<DropoutState> {
        self.layout.dropout
    }

    /// Sets the tensor's position in a training run, from which dropout draws its masks.
    pub fn with_dropout_state(mut self, dropout: DropoutState) -> Self {
        self.layout.dropout = Some(dropout);
        self
    }

    /// Returns the indices of the whole tensor's dimension `dim` that this rank holds.
    pub fn local_range(&self, dim: usize) -> Range<usize> {
        match &self.layout.partition {
            Some(partition) if P::SHARD_DIM == Some(dim) => partition.range(self.group.rank()),
            _ => 0..self.layout.shape.dims()[dim],
        }
    }

    fn new(local: Tensor<T, B>, group: &Group<B>, layout: Layout) -> Self {
        Self { local, group: group.clone(), layout, addends: Addends::Ranks, placement: PhantomData }
    }

    /// Makes a tensor of placement `Q` with the rows of `self` and `features` features, sharded by
    /// `partition`. The caller guarantees that `local` has this rank's values of such a tensor.
    pub(super) fn with_features<Q: Placement>(
        &self,
        local: Tensor<T, B>,
        features: usize,
        partition: Option<Partition>,
    ) -> DTensor<Q, T, B> {
        let shape = self.layout.shape.with(self.layout.shape.rank() - 1, features);
        DTensor::new(local, &self.group, Layout { shape, partition, ..self.layout.clone() })
    }

    /// Makes a tensor of placement `Q` with the whole shape of `self`, sharded by `partition`.
    fn with_placement<Q: Placement>(
        self,
        local: Tensor<T, B>,
        partition: Option<Partition>,
    ) -> DTensor<Q, T, B> {
        DTensor::new(local, &self.group, Layout { partition, ..self.layout })
    }

    /// Makes a tensor with the values `local` on this rank. Keeps the shape, the partitions, the
    /// sequences and the dropout state.
    ///
    /// # Errors
    /// When `local` has another shape than the present values.
    pub fn with_local(&self, local: Tensor<T, B>) -> Result<Self> {
        same_shape(
            "with local",
            "the new tensor",
            local.shape().dims(),
            "the present tensor",
            self.local.shape().dims(),
        )?;
        Ok(Self::new(local, &self.group, self.layout.clone()))
    }

    fn with_addends(self, addends: Addends<T::Acc, B>) -> Self {
        Self { addends, ..self }
    }

    /// Replaces this rank's values by the result of `f`, which must have the same shape.
    pub(super) fn map_local(self, f: impl FnOnce(Tensor<T, B>) -> Result<Tensor<T, B>>) -> Result<Self> {
        Ok(Self { local: f(self.local)?, ..self })
    }

    /// Copies the rows in `ranges` to a tensor with the placement of `self`. Every rank must hold
    /// all rows.
    fn rows(&self, ranges: &[Range<usize>]) -> Result<Self>
    where
        B: Backend,
    {
        let local = rows::take(&self.local, ranges)?;
        let shape = self.layout.shape.with(0, local.shape().dims()[0]);
        let sequences = Sequences::one(shape.rows());
        let partition = self.layout.partition.clone();
        let layout = Layout { shape, partition, token_partition: None, sequences, dropout: None };
        let addends = self.addends.map(|node| rows::take(node, ranges))?;
        Ok(Self { addends, ..Self::new(local, &self.group, layout) })
    }

    /// Returns the partition of the tokens on a `Shard<0>` residual stream: the partition that the
    /// tensor had on such a stream, or an even partition if the tensor was never on one.
    fn token_partition(&self) -> Result<Partition> {
        match &self.layout.token_partition {
            Some(tokens) => Ok(tokens.clone()),
            None => self.group.even_partition(self.layout.shape.dims()[0]),
        }
    }
}
