//! A tensor spread over the ranks of a group.

use super::{Fits, overlap::take_rows, partial::Addends};
use crate::{
    comm::Group,
    device::{Cpu, Device, Element},
    error::{Error, Result, same_shape, same_size},
    kernels::Backend,
    ops,
    shard::{Copied, Partial, Partition, Placement, Replicated, Sequences, Shape, Shard},
    tensor::Tensor,
};
use std::{fmt, marker::PhantomData, ops::Range};

/// A tensor spread over the ranks of a group as placement `P` says: what this rank holds, and what the whole is.
///
/// The whole has rows (tokens) in dimension 0 and features in dimension 1. Layers refuse a third
/// dimension: a batch is more rows. Which rows make up a sequence travels with it
/// ([`DTensor::with_sequences`]), so that attention finds it wherever the tensor went; unless it is
/// said, all rows are one sequence.
///
/// A layer, its input and its gradient belong to the same ranks: [`DTensor::check`].
pub struct DTensor<P: Placement, T: Element = f32, B: Device = Cpu> {
    pub(super) local: Tensor<T, B>,
    pub(super) group: Group<B>,
    pub(super) layout: Layout,
    /// What a `Partial` tensor is the sum of.
    pub(super) addends: Addends<T::Acc, B>,
    placement: PhantomData<P>,
}

/// Where in a training run a tensor stands: what dropout draws its masks by.
///
/// Masks are functions of this and of global indices. So they are the same at every tensor-parallel size, in a backward
/// that computes the forward anew, and, where `row` and `sequence` count from the start of the
/// global batch, on every data-parallel mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DropoutState {
    /// The number of the training step.
    pub step: u64,
    /// The tensor's first row, counted from the start of the step's batch; the rows are all
    /// dimensions but the last.
    pub row: u64,
    /// The tensor's first sequence, counted likewise. [`MeanPool`](super::MeanPool) makes it the row
    /// of its output.
    pub sequence: u64,
}

/// What a rank knows of the whole tensor.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) shape: Shape,
    /// How the cut dimension is cut, under `Shard`.
    pub(super) cut: Option<Partition>,
    /// How tokens are cut where this tensor came from or goes to with sequence parallelism.
    pub(super) tokens: Option<Partition>,
    pub(super) sequences: Sequences,
    pub(super) dropout: Option<DropoutState>,
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
        let (name, cut) = (P::NAME, P::SHARD_DIM.map_or(String::new(), |dim| format!("<{dim}>")));
        write!(f, "DTensor<{name}{cut}, {}>({} in {:?})", T::DTYPE, self.layout.shape, self.group)
    }
}

impl<P: Placement, T: Element, B: Device> DTensor<P, T, B> {
    /// What this rank holds; of a `Partial` sum, this rank's term.
    pub fn local(&self) -> &Tensor<T, B> {
        &self.local
    }

    /// What this rank holds, by itself.
    pub fn into_local(self) -> Tensor<T, B> {
        self.local
    }

    /// The ranks that hold the tensor.
    pub fn group(&self) -> &Group<B> {
        &self.group
    }

    /// What a layer asks of its input, and of its gradient, before anything else: `[tokens,
    /// features]`, over the ranks that share the layer, with its reduction.
    ///
    /// # Errors
    /// When it has another number of dimensions, or belongs to another group.
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

    /// That the tensor is `[tokens, features]`.
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

    /// The shape of the whole.
    pub fn shape(&self) -> Shape {
        self.layout.shape
    }

    /// How the cut dimension is cut; none unless the placement is `Shard`.
    pub fn partition(&self) -> Option<&Partition> {
        self.layout.cut.as_ref()
    }

    pub(super) fn shard_cut(&self) -> Result<&Partition> {
        let missing = || Error::internal("shard", "a sharded tensor without its cut");
        self.layout.cut.as_ref().ok_or_else(missing)
    }

    /// Which rows of the whole belong together; all of them, unless said otherwise.
    pub fn sequences(&self) -> &Sequences {
        &self.layout.sequences
    }

    /// The same tensor, whose rows make up these sequences.
    ///
    /// # Errors
    /// When they have another number of rows.
    pub fn with_sequences(mut self, sequences: Sequences) -> Result<Self> {
        let rows = self.layout.shape.rows();
        same_size("sequences", "rows of the sequences", sequences.rows(), "rows of the tensor", rows)?;
        self.layout.sequences = sequences;
        Ok(self)
    }

    /// Where in a training run the tensor stands; none outside of training, where dropout does nothing.
    pub fn dropout_state(&self) -> Option<DropoutState> {
        self.layout.dropout
    }

    /// The same tensor in training, whose dropout masks are those of this draw.
    pub fn with_dropout_state(mut self, dropout: DropoutState) -> Self {
        self.layout.dropout = Some(dropout);
        self
    }

    /// The indices of the whole's dimension `dim` that this rank holds.
    pub fn local_range(&self, dim: usize) -> Range<usize> {
        match &self.layout.cut {
            Some(cut) if P::SHARD_DIM == Some(dim) => cut.range(self.group.rank()),
            _ => 0..self.layout.shape.dims()[dim],
        }
    }

    pub(super) fn new(local: Tensor<T, B>, group: &Group<B>, layout: Layout) -> Self {
        Self { local, group: group.clone(), layout, addends: Addends::Ranks, placement: PhantomData }
    }

    /// The same rows with other features, held as `Q` says. The caller vouches for the placement.
    pub(super) fn derive<Q: Placement>(
        &self,
        local: Tensor<T, B>,
        features: usize,
        cut: Option<Partition>,
    ) -> DTensor<Q, T, B> {
        let shape = self.layout.shape.with(self.layout.shape.rank() - 1, features);
        DTensor::new(local, &self.group, Layout { shape, cut, ..self.layout.clone() })
    }

    /// Replaces the local values. Keeps the shape, sequences, draw and cut.
    ///
    /// # Errors
    /// When `local` has another shape than this rank's tensor.
    pub fn with_local(&self, local: Tensor<T, B>) -> Result<Self> {
        same_shape(
            "with local",
            "the new one",
            local.shape().dims(),
            "the old one",
            self.local.shape().dims(),
        )?;
        Ok(Self::new(local, &self.group, self.layout.clone()))
    }

    /// The same tensor as the sum of these terms.
    pub(super) fn with_addends(self, addends: Addends<T::Acc, B>) -> Self {
        Self { addends, ..self }
    }

    /// The same whole, held in the same way, with values made of the old ones. The caller vouches for the shape.
    pub(super) fn map_local(self, f: impl FnOnce(Tensor<T, B>) -> Result<Tensor<T, B>>) -> Result<Self> {
        Ok(Self { local: f(self.local)?, ..self })
    }

    /// Some rows of the whole by themselves, held in the same way. The caller vouches that every rank has all of them.
    pub(super) fn rows(&self, runs: &[Range<usize>]) -> Result<Self>
    where
        B: Backend,
    {
        let local = take_rows(&self.local, runs)?;
        let shape = self.layout.shape.with(0, local.shape().dims()[0]);
        let sequences = Sequences::one(shape.rows());
        let layout = Layout { shape, cut: self.layout.cut.clone(), tokens: None, sequences, dropout: None };
        let addends = self.addends.map(|node| take_rows(node, runs))?;
        Ok(Self { addends, ..Self::new(local, &self.group, layout) })
    }

    pub(super) fn place<Q: Placement>(self, local: Tensor<T, B>, cut: Option<Partition>) -> DTensor<Q, T, B> {
        DTensor::new(local, &self.group, Layout { cut, ..self.layout })
    }

    /// How the tokens are, or will be, cut: as where the tensor came from, or evenly.
    pub(super) fn token_cut(&self) -> Result<Partition> {
        match &self.layout.tokens {
            Some(tokens) => Ok(tokens.clone()),
            None => self.group.even_partition(self.layout.shape.dims()[0]),
        }
    }
}

impl<P: Placement, T: Element, B: Backend> DTensor<P, T, B> {
    /// The sum of two tensors that are held in the same way, in the memory of this one if no other
    /// tensor shares it.
    ///
    /// # Errors
    /// When they have different shapes, belong to different groups, or are cut differently.
    #[expect(clippy::should_implement_trait, reason = "a sum may fail")]
    pub fn add<Q: Fits<P>>(self, other: &DTensor<Q, T, B>) -> Result<Self> {
        same_shape("add", "a", self.shape().dims(), "b", other.shape().dims())?;
        if !self.group.is_same(&other.group) {
            let reason = format!("a is spread over {:?}, but b over {:?}", self.group, other.group);
            return Err(Error::invalid("add", reason));
        }
        if self.layout.cut != other.layout.cut {
            return Err(Error::invalid("add", "the two tensors are cut differently"));
        }
        if P::NAME == Partial::NAME && self.group.tree()?.is_some() {
            // Sub-trees of two sums would be added at a height that depends on the number of ranks.
            let reason = "two sums that are not reduced yet, with an invariant reduction: reduce both first";
            return Err(Error::Unsupported { op: "add", reason: reason.into() });
        }
        self.map_local(|local| ops::add(local, &other.local))
    }
}

/// A tensor of `[tokens, …]` without any cut.
pub(super) fn uncut<T: Element, B: Device>(local: &Tensor<T, B>, op: &'static str) -> Result<Layout> {
    let shape = local.shape();
    if shape.rank() < 2 {
        return Err(Error::invalid(
            op,
            format!("needs tokens and features, but the tensor has shape {shape}"),
        ));
    }
    Ok(Layout { shape, cut: None, tokens: None, sequences: Sequences::one(shape.rows()), dropout: None })
}

impl<T: Element, B: Backend> DTensor<Replicated, T, B> {
    /// A tensor that is equal on every rank. That it is, the caller vouches for; [`DTensor::broadcast`] makes it so.
    ///
    /// # Errors
    /// When it has fewer than two dimensions.
    pub fn replicated(group: &Group<B>, local: Tensor<T, B>) -> Result<Self> {
        let layout = uncut(&local, "replicated")?;
        Ok(Self::new(local, group, layout))
    }

    /// The root's tensor on every rank. Collective: broadcast.
    ///
    /// # Errors
    /// When shapes differ between ranks, or a rank is lost.
    #[track_caller]
    pub fn broadcast(group: &Group<B>, root: usize, mut local: Tensor<T, B>) -> Result<Self> {
        group.broadcast(root, &mut local)?;
        Self::replicated(group, local)
    }

    /// The same tensor, about to be used differently by each rank. No communication.
    pub fn copy_to(self) -> DTensor<Copied, T, B> {
        DTensor::new(self.local, &self.group, self.layout)
    }

    /// Each rank's part of dimension `D`. No communication.
    ///
    /// # Errors
    /// When the cut is not one of that dimension over this group.
    pub fn scatter<const D: usize>(self, cut: &Partition) -> Result<DTensor<Shard<D>, T, B>> {
        check_cut("scatter", self.shape(), D, cut, self.group.size())?;
        let cut = &canonical("scatter", &self.group, D, cut)?;
        let part = ops::slice(&self.local, D, cut.range(self.group.rank()))?;
        let tokens = (D == 0).then(|| cut.clone()).or(self.layout.tokens.clone());
        let mut sharded = self.place(part, Some(cut.clone()));
        sharded.layout.tokens = tokens;
        Ok(sharded)
    }
}

impl<T: Element, B: Backend> DTensor<Copied, T, B> {
    /// A tensor that is equal on every rank, about to be used differently by each.
    ///
    /// # Errors
    /// When it has fewer than two dimensions.
    pub fn copied(group: &Group<B>, local: Tensor<T, B>) -> Result<Self> {
        Ok(DTensor::replicated(group, local)?.copy_to())
    }
}

impl<const D: usize, T: Element, B: Backend> DTensor<Shard<D>, T, B> {
    /// A tensor of which this rank holds its part of dimension `D`.
    ///
    /// # Errors
    /// When the local tensor has not the size that the cut says.
    pub fn shard(group: &Group<B>, local: Tensor<T, B>, cut: &Partition) -> Result<Self> {
        const OP: &str = "shard";
        let mut layout = uncut(&local, OP)?;
        if D >= layout.shape.rank() {
            return Err(Error::invalid(OP, format!("dimension {D} of a tensor of shape {}", layout.shape)));
        }
        layout.shape = layout.shape.with(D, cut.total());
        check_cut(OP, layout.shape, D, cut, group.size())?;
        let cut = &canonical(OP, group, D, cut)?;
        let (have, want) = (local.shape().dims()[D], cut.size(group.rank()));
        same_size(OP, "the size of this rank's part", have, "its size in the cut", want)?;
        layout.sequences = Sequences::one(layout.shape.rows());
        layout.tokens = (D == 0).then(|| cut.clone());
        layout.cut = Some(cut.clone());
        Ok(Self::new(local, group, layout))
    }

    /// The whole on every rank. Collective: all-gather.
    ///
    /// # Errors
    /// When the ranks disagree, or one is lost.
    #[track_caller]
    pub fn all_gather(self) -> Result<DTensor<Replicated, T, B>> {
        let whole = self.group.all_gather(&self.local, D, self.shard_cut()?)?;
        Ok(self.place(whole, None))
    }
}

/// The cut itself, or for tokens under an invariant reduction, the same one by canonical blocks.
pub(super) fn canonical<B: Device>(
    op: &'static str,
    group: &Group<B>,
    dim: usize,
    cut: &Partition,
) -> Result<Partition> {
    if dim != 0 || group.tree()?.is_none() {
        return Ok(cut.clone());
    }
    let canonical = group.even_partition(cut.total())?;
    if !canonical.sizes().eq(cut.sizes()) {
        let sizes = |cut: &Partition| cut.sizes().collect::<Vec<_>>();
        let reason = format!(
            "an invariant reduction cuts tokens into {:?}, by canonical blocks, not into {:?}",
            sizes(&canonical),
            sizes(cut)
        );
        return Err(Error::Unsupported { op, reason });
    }
    Ok(canonical)
}

/// The error of two cuts that should be the same.
pub(super) fn other_cut(
    op: &'static str,
    (what, cut): (&str, Option<&Partition>),
    (than, expected): (&str, &Partition),
) -> Error {
    let have: Vec<usize> = cut.into_iter().flat_map(Partition::sizes).collect();
    let want: Vec<usize> = expected.sizes().collect();
    Error::invalid(op, format!("the {what} are cut into {have:?}, but the {than} into {want:?}"))
}

fn check_cut(op: &'static str, shape: Shape, dim: usize, cut: &Partition, ranks: usize) -> Result<()> {
    if dim >= shape.rank() {
        return Err(Error::invalid(op, format!("dimension {dim} of a tensor of shape {shape}")));
    }
    same_size(op, "the number of shards", cut.shards(), "the number of ranks", ranks)?;
    same_size(op, "the size that is cut", cut.total(), "that of the dimension", shape.dims()[dim])
}
