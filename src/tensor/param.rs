//! Parameters: a rank's part of a weight, its gradient, and what part that is.

use super::{Region, Role, Tensor, Weights};
use crate::{
    device::{AnyMut, Cpu, Device, Element, zeroed},
    error::{Error, Result, Site, layer_of, same_shape},
    kernels::{Backend, MatMut},
    shard::{Node, Shape, TreeSum},
};
use std::{
    fmt,
    ops::Range,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

/// A part of a parameter that comes from one region of one tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The tensor's name, as in a checkpoint.
    pub tensor: String,
    /// Which part of it.
    pub region: Region,
    /// The first row of the parameter that it fills.
    pub row: usize,
    /// Whether this rank is the one that counts it: each element of the model is owned by exactly
    /// one rank, however many hold a copy.
    pub owned: bool,
}

/// The way to a model's parameters, `|f| model.visit(f)`: calls what it is given on every
/// parameter, in the same order on every rank and at every call.
pub trait Visit<T: Element, B: Device>:
    FnMut(&mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()>
{
}

impl<T, B, V> Visit<T, B> for V
where
    T: Element,
    B: Device,
    V: FnMut(&mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()>,
{
}

/// Who is told when the gradient of a parameter is complete: data parallelism, which then reduces
/// it.
pub(crate) trait Watch<T: Element, B: Device> {
    /// The gradient of the parameter of this number has got all it gets from this backward.
    fn ready(&self, number: usize, grad: &Tensor<T::Acc, B>) -> Result<()>;
}

/// A part of a parameter that belongs to a canonical block: some rows, and of those some columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Patch {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

/// A gradient whose terms, one a use, are added along a tree rather than in turn.
struct TreeGrad<A: Element, B: Device> {
    /// Of how many replicas of the model this is which: the leaves of all of them are in one tree.
    replica: usize,
    replicas: usize,
    sum: Option<TreeSum<Tensor<A, B>>>,
    /// The sums of this replica's sub-trees, where it needs more than one.
    terms: Vec<Tensor<A, B>>,
}

/// A rank's part of a trainable tensor, and the gradient that has been summed for it.
///
/// The gradient is kept in the element's accumulator: those of bf16 parameters are f32.
pub struct Param<T: Element, B: Device> {
    name: String,
    /// The path of its layer: empty where it has none.
    layer: &'static str,
    value: Tensor<T, B>,
    /// Which of all values of the process this is; an optimizer's step changes the value and keeps
    /// the number.
    revision: u64,
    grad: Option<Tensor<T::Acc, B>>,
    pieces: Vec<Piece>,
    /// How often a backward adds to the gradient, and how often this one has.
    uses: usize,
    used: usize,
    watch: Option<(Rc<dyn Watch<T, B>>, usize)>,
    tree: Option<TreeGrad<T::Acc, B>>,
    /// What of it belongs to each of this rank's canonical blocks; none where every rank holds all
    /// of it.
    blocks: Option<Vec<Vec<Patch>>>,
}

impl<T: Element, B: Device> fmt::Debug for Param<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Param<{}>({}, {})", T::DTYPE, self.name, self.value.shape())
    }
}

/// What messages call the loading of a parameter.
const OP: &str = "parameter";

/// A number that no value of a parameter has had so far.
fn next_revision() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<T: Element, B: Backend> Param<T, B> {
    /// A parameter of this value, whose rows are these pieces.
    pub(crate) fn new(name: String, value: Tensor<T, B>, pieces: Vec<Piece>) -> Self {
        let tensors = pieces.iter().map(|piece| piece.tensor.as_str());
        Self {
            layer: if pieces.is_empty() { layer_of([&*name].into_iter()) } else { layer_of(tensors) },
            name,
            value,
            revision: next_revision(),
            grad: None,
            pieces,
            uses: 1,
            used: 0,
            watch: None,
            tree: None,
            blocks: None,
        }
    }

    /// Reads a parameter whose pieces lie one below the other in its rows.
    ///
    /// # Errors
    /// When the source lacks one of the tensors, or it has another shape; when a piece lies beyond
    /// the parameter, or there is no memory left.
    pub fn load(
        device: &B,
        weights: &Weights<'_>,
        name: &str,
        role: Role,
        shape: impl Into<Shape>,
        pieces: Vec<Piece>,
    ) -> Result<Self> {
        let shape = shape.into();
        for piece in &pieces {
            weights.source().check(&piece.tensor, &piece.region)?;
        }
        let mut host = zeroed::<T>(shape.checked_len(OP)?)?;
        let width = shape.split_at(0).1;
        for piece in &pieces {
            let (start, len) = (piece.row.saturating_mul(width), host.len());
            let end = start.saturating_add(piece.region.extent().len());
            let beyond = || {
                let what = format!("the end of the piece of `{}`", piece.tensor);
                Error::sizes(OP, what, end, "the elements of the parameter", len)
            };
            let out = host.get_mut(start..end).ok_or_else(beyond)?;
            let out: AnyMut<'_, Cpu> = T::any_mut(out);
            weights.source().read(&piece.tensor, role, &piece.region, out)?;
        }
        Ok(Self::new(weights.name(name), Tensor::from_slice(device, shape, &host)?, pieces))
    }

    /// Reads a parameter that is one region of one tensor, called the same.
    ///
    /// # Errors
    /// As [`Param::load`].
    pub fn load_region(
        device: &B,
        weights: &Weights<'_>,
        name: &str,
        role: Role,
        region: Region,
        owned: bool,
    ) -> Result<Self> {
        let shape = region.extent();
        let piece = Piece { tensor: weights.name(name), region, row: 0, owned };
        Self::load(device, weights, name, role, shape, vec![piece])
    }

    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the calls of groups are made that concern this parameter's layer: its path, which is
    /// the parameter's name without the last part, or what the names of its pieces have in common.
    /// The caller's line where that is empty.
    #[track_caller]
    pub fn site(&self) -> Site {
        if self.layer.is_empty() { Site::here() } else { Site::InLayer(self.layer) }
    }

    /// The value.
    pub fn value(&self) -> &Tensor<T, B> {
        &self.value
    }

    /// The value, to be replaced or written. Optimizers notice a new value at their next step, and
    /// take their master weights from it unless they still round to it.
    pub fn value_mut(&mut self) -> &mut Tensor<T, B> {
        self.revision = next_revision();
        &mut self.value
    }

    /// The value, for whoever keeps what belongs to it: an optimizer's step, the sender of a
    /// broadcast.
    pub(crate) fn update_mut(&mut self) -> &mut Tensor<T, B> {
        &mut self.value
    }

    /// Which value this is: another number after [`Param::value_mut`], and in another parameter.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// Says that the terms of the gradient, one a use ([`Param::set_uses`]), are added along the
    /// tree over all uses of all replicas, and which parts of the parameter belong to canonical
    /// blocks, if it is cut.
    pub(crate) fn sum_in_tree(&mut self, blocks: Option<Vec<Vec<Patch>>>) {
        self.tree.get_or_insert(TreeGrad { replica: 0, replicas: 1, sum: None, terms: Vec::new() });
        if blocks.is_some() {
            self.blocks = blocks;
        }
    }

    /// Says that this is one of several replicas whose gradients' terms are in one tree.
    pub(crate) fn replicate(&mut self, replica: usize, replicas: usize) {
        self.sum_in_tree(None);
        if let Some(tree) = &mut self.tree {
            (tree.replica, tree.replicas) = (replica, replicas);
        }
    }

    /// Whether the terms of the gradient are added along a tree.
    pub(crate) fn is_in_tree(&self) -> bool {
        self.tree.is_some()
    }

    /// What of it belongs to each of this rank's canonical blocks.
    pub(crate) fn blocks(&self) -> Option<&[Vec<Patch>]> {
        self.blocks.as_deref()
    }

    /// Whether there are sums of sub-trees of the gradient, which await those of other replicas.
    pub(crate) fn has_terms(&self) -> bool {
        self.tree.as_ref().is_some_and(|tree| !tree.terms.is_empty())
    }

    /// How often a backward adds to the gradient.
    pub(crate) fn uses(&self) -> usize {
        self.uses
    }

    /// The sums of this replica's sub-trees of the gradient, which are forgotten; none before the
    /// first backward.
    pub(crate) fn take_terms(&mut self) -> Vec<Tensor<T::Acc, B>> {
        let terms = self.tree.as_mut().map_or(Vec::new(), |tree| std::mem::take(&mut tree.terms));
        if terms.is_empty() { self.grad.take().into_iter().collect() } else { terms }
    }

    /// The sum of the gradients since the last [`Param::zero_grad`]; none before the first
    /// backward. With [`crate::shard::Reduction::Invariant`] none before as many backwards as
    /// [`Param::set_uses`] says, or before [`Param::settle`].
    pub fn grad(&self) -> Option<&Tensor<T::Acc, B>> {
        self.grad.as_ref()
    }

    /// Which parts of which tensors this parameter holds.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Says that this rank's copy does not count: another one, on another pipeline stage, owns the
    /// tensor.
    pub fn disown(&mut self) {
        self.pieces.iter_mut().for_each(|piece| piece.owned = false);
    }

    /// Says that a backward adds to the gradient this often: twice for a table that is also the
    /// output head.
    pub fn set_uses(&mut self, uses: usize) {
        self.uses = uses;
    }

    /// Forgets the gradient.
    pub fn zero_grad(&mut self) {
        self.grad = None;
        self.used = 0;
        if let Some(tree) = &mut self.tree {
            (tree.sum, tree.terms) = (None, Vec::new());
        }
    }

    /// The sum of the gradients, to be reduced; none before the first backward.
    pub fn grad_mut(&mut self) -> Option<&mut Tensor<T::Acc, B>> {
        self.grad.as_mut()
    }

    /// Replaces the gradient.
    ///
    /// # Errors
    /// When the shape is another than the parameter's.
    pub(crate) fn set_grad(&mut self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.grad = None;
        self.add_to_grad(grad)
    }

    /// Tells `watch`, under this number, from now on whenever a backward has completed the
    /// gradient.
    pub(crate) fn watch(&mut self, watch: Rc<dyn Watch<T, B>>, number: usize) {
        self.watch = Some((watch, number));
    }

    /// A backward has added to the gradient.
    fn used(&mut self) -> Result<()> {
        self.used += 1;
        if self.used < self.uses {
            return Ok(());
        }
        self.used = 0;
        self.ready()
    }

    fn ready(&self) -> Result<()> {
        match (&self.watch, &self.grad) {
            (Some((watch, number)), Some(grad)) => watch.ready(*number, grad),
            _ => Ok(()),
        }
    }

    /// Adds to the gradient.
    ///
    /// # Errors
    /// When the shape is another than the parameter's.
    pub fn add_grad(&mut self, grad: Tensor<T::Acc, B>) -> Result<()> {
        if self.tree.is_some() {
            return self.add_leaf(grad);
        }
        self.add_to_grad(grad)?;
        self.used()
    }

    /// Adds the next term of a gradient that is summed along a tree.
    fn add_leaf(&mut self, term: Tensor<T::Acc, B>) -> Result<()> {
        let (shape, uses) = (self.value.shape(), self.uses);
        same_shape("gradient", &self.name, shape.dims(), "its gradient", term.shape().dims())?;
        let Some(tree) = &mut self.tree else { return self.add_to_grad(term) };
        if self.used == 0 && tree.replicas > 1 && (self.grad.is_some() || !tree.terms.is_empty()) {
            let reason = format!(
                "an invariant reduction adds {uses} terms to {} a step, as `set_uses` says, and a replica has added more",
                self.name
            );
            return Err(Error::Unsupported { op: "gradient", reason });
        }
        let index = tree.replica * uses + self.used;
        let sum = tree.sum.get_or_insert_with(|| TreeSum::new(tree.replicas * uses));
        sum.push(Node::leaf(index), term, |sum, term| sum.accumulate(&term))?;
        self.used += 1;
        if self.used < uses { Ok(()) } else { self.finish_round() }
    }

    /// The terms so far are all: they become the gradient, or where other replicas have the rest,
    /// this replica's sub-trees.
    fn finish_round(&mut self) -> Result<()> {
        self.used = 0;
        let Some(tree) = &mut self.tree else { return Ok(()) };
        let Some(sum) = tree.sum.take() else { return Ok(()) };
        let mut terms = sum.values();
        if tree.replicas > 1 && terms.len() > 1 {
            tree.terms = terms;
            return Ok(());
        }
        let Some(mut round) = terms.pop() else { return Ok(()) };
        // More than one where a round ends early: as if the tree had no further leaves.
        while let Some(mut left) = terms.pop() {
            left.accumulate(&round)?;
            round = left;
        }
        self.add_to_grad(round)?;
        self.ready()
    }

    /// Adds up the terms of the gradient, where fewer backwards than [`Param::set_uses`] says have
    /// added to it. Optimizers and norms do so.
    ///
    /// # Errors
    /// When the terms of other replicas would be missing.
    pub fn settle(&mut self) -> Result<()> {
        match &self.tree {
            Some(tree) if tree.sum.is_some() && tree.replicas > 1 => {
                let (used, uses) = (self.used, self.uses);
                let reason =
                    format!("{} has got {used} of {uses} terms of an invariant reduction", self.name);
                Err(Error::Unsupported { op: "gradient", reason })
            }
            Some(tree) if tree.sum.is_some() => self.finish_round(),
            _ => Ok(()),
        }
    }

    fn add_to_grad(&mut self, grad: Tensor<T::Acc, B>) -> Result<()> {
        let shape = self.value.shape();
        same_shape("gradient", &self.name, shape.dims(), "its gradient", grad.shape().dims())?;
        match &mut self.grad {
            Some(sum) => {
                let device = sum.device().clone();
                device.accumulate(grad.mat(), sum.mat_mut()?)
            }
            none => {
                *none = Some(grad);
                Ok(())
            }
        }
    }

    /// Lets `write` add to the gradient in place: it gets the gradient as a matrix and the β with
    /// which to keep what is there, which is 0 the first time, when there is nothing yet.
    pub(crate) fn accumulate_grad(
        &mut self,
        write: impl FnOnce(f64, MatMut<'_, T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        if self.tree.is_some() {
            let mut term = Tensor::empty(self.value.device(), self.value.shape())?;
            write(0.0, term.mat_mut()?)?;
            return self.add_leaf(term);
        }
        match &mut self.grad {
            Some(sum) => write(1.0, sum.mat_mut()?),
            none => {
                let mut first = Tensor::empty(self.value.device(), self.value.shape())?;
                write(0.0, first.mat_mut()?)?;
                *none = Some(first);
                Ok(())
            }
        }?;
        self.used()
    }
}
