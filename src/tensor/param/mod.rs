//! Parameters: a rank's part of a weight, its gradient, and what part that is.

mod grad;
mod store;

pub use grad::{Accumulate, GradSink, GradSum, GradTerm};
pub use store::Store;

use super::{Region, Role, Tensor, Weights};
use crate::{
    device::{AnyMut, Cpu, Device, Element, zeroed},
    error::{Error, Result, Site, layer_of, same_shape, same_size},
    kernels::{Backend, MatMut},
    shard::Shape,
};
use std::{
    cell::{Cell, OnceCell, RefCell, RefMut},
    collections::HashSet,
    fmt,
    ops::Range,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

/// A part of a parameter that comes from one region of one tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamRegion {
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

/// A part of a parameter that belongs to a canonical block: some rows, and of those some columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockRegion {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

/// A rank's part of a trainable tensor, and the gradient that has been summed for it.
///
/// A handle: its clones are the same parameter. Layers, optimizers and data parallelism each hold
/// one, so that [`Layer::params`](crate::parallel::Layer::params) is a list of handles.
///
/// * The elements are in a [`Store`]: a dense tensor, unless [`Param::set_store`] gives another.
/// * The gradient goes into a [`GradSink`], in the element's accumulator: those of bf16 parameters
///   are f32.
/// * [`Param::tie`] makes a handle for another layer that uses the same weight.
pub struct Param<T: Element, B: Device>(Rc<Use<T, B>>);

/// One layer's use of a parameter: they are counted while they live.
struct Use<T: Element, B: Device>(Rc<Shared<T, B>>);

struct Shared<T: Element, B: Device> {
    name: String,
    /// The path of its layer: empty where it has none.
    layer: &'static str,
    device: B,
    shape: Shape,
    regions: RefCell<Rc<[ParamRegion]>>,
    store: RefCell<Box<dyn Store<T, B>>>,
    /// Which of all values of the process this is; an optimizer's step changes the value and keeps
    /// the number.
    revision: Cell<u64>,
    grad: RefCell<Gradient<T::Acc, B>>,
    /// What of it belongs to each of this rank's canonical blocks: set where sums have a fixed
    /// order; none where every rank holds all of it.
    blocks: OnceCell<Option<Vec<Vec<BlockRegion>>>>,
}

struct Gradient<A: Element, B: Device> {
    sum: GradSum<A, B>,
    sink: Box<dyn GradSink<A, B>>,
    microbatches: usize,
    /// How many uses of this step have been added.
    added: usize,
}

impl<T: Element, B: Device> Clone for Param<T, B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: Element, B: Device> fmt::Debug for Param<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Param<{}>({}, {})", T::DTYPE, self.0.0.name, self.0.0.shape)
    }
}

/// What messages call the loading of a parameter.
const OP: &str = "parameter";

/// The name of a parameter with rows of these tensors: their common name, with the parts that
/// differ side by side, as in `attention.q|k|v.weight`. None without tensors.
fn joined<'a>(tensors: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut names: Vec<Vec<&str>> = Vec::new();
    for tensor in tensors {
        let name: Vec<&str> = tensor.split('.').collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let shortest = names.iter().map(Vec::len).min()?;
    if names.len() == 1 {
        return Some(names[0].join("."));
    }
    let first = names[0].clone();
    let before = (0..shortest).take_while(|&at| names.iter().all(|name| name[at] == first[at])).count();
    let last = |name: &[&'a str], at: usize| name[name.len() - 1 - at];
    let alike = |&at: &usize| names.iter().all(|name| last(name, at) == last(&first, at));
    let behind = (0..shortest - before).take_while(alike).count();
    let between: Vec<String> = names.iter().map(|name| name[before..name.len() - behind].join(".")).collect();
    let between = between.join("|");
    let ends = [&first[..before], &[&between], &first[first.len() - behind..]];
    Some(ends.concat().join("."))
}

/// A number that no value of a parameter has had so far.
fn next_revision() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<T: Element, B: Backend> Param<T, B> {
    /// A parameter of this value, whose rows are these regions.
    pub(crate) fn new(name: String, value: Tensor<T, B>, regions: Vec<ParamRegion>) -> Self {
        let tensors = regions.iter().map(|part| part.tensor.as_str());
        let layer = if regions.is_empty() { layer_of([&*name].into_iter()) } else { layer_of(tensors) };
        let (sum, sink) = (GradSum::of(None), Box::new(Accumulate));
        let grad = Gradient { sum, sink, microbatches: 1, added: 0 };
        Self(Rc::new(Use(Rc::new(Shared {
            name,
            layer,
            device: value.device().clone(),
            shape: value.shape(),
            regions: RefCell::new(regions.into()),
            store: RefCell::new(Box::new(value)),
            revision: Cell::new(next_revision()),
            grad: RefCell::new(grad),
            blocks: OnceCell::new(),
        }))))
    }

    /// Reads a parameter whose regions lie one below the other in its rows; on a device without
    /// values ([`Device::HAS_VALUES`]), only checks them.
    ///
    /// # Errors
    /// When the source lacks one of the tensors, or it has another shape; when a part lies beyond
    /// the parameter, or there is no memory left.
    pub fn load(
        device: &B,
        weights: &Weights<'_>,
        name: &str,
        role: Role,
        shape: impl Into<Shape>,
        regions: Vec<ParamRegion>,
    ) -> Result<Self> {
        let shape = shape.into();
        if shape.rank() == 0 {
            return Err(Error::invalid(OP, format!("`{name}` has no dimension: give it one of size 1")));
        }
        for part in &regions {
            weights.source().check(&part.tensor, &part.region)?;
        }
        let (len, width) = (shape.checked_len(OP)?, shape.split_at(0).1);
        let mut host = zeroed::<T>(if B::HAS_VALUES { len } else { 0 })?;
        for part in &regions {
            let own = part.region.extent().split_at(0).1;
            let what = format!("the width of the part of `{}`", part.tensor);
            same_size(OP, &what, own, "that of the parameter", width)?;
            let start = part.row.saturating_mul(width);
            let end = start.saturating_add(part.region.extent().len());
            if end > len {
                let what = format!("the end of the part of `{}`", part.tensor);
                return Err(Error::sizes(OP, what, end, "the elements of the parameter", len));
            }
            if B::HAS_VALUES {
                let out: AnyMut<'_, Cpu> = T::any_mut(&mut host[start..end]);
                weights.source().read(&part.tensor, role, &part.region, out)?;
            }
        }
        let value = match B::HAS_VALUES {
            true => Tensor::from_slice(device, shape, &host)?,
            false => Tensor::empty(device, shape)?,
        };
        let tensors = regions.iter().map(|part| part.tensor.as_str());
        Ok(Self::new(joined(tensors).unwrap_or_else(|| weights.name(name)), value, regions))
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
        let part = ParamRegion { tensor: weights.name(name), region, row: 0, owned };
        Self::load(device, weights, name, role, shape, vec![part])
    }

    /// The parameter's name.
    pub fn name(&self) -> &str {
        &self.0.0.name
    }

    /// The shape of the value, and of the gradient.
    pub fn shape(&self) -> Shape {
        self.0.0.shape
    }

    /// The device that holds the value.
    pub fn device(&self) -> &B {
        &self.0.0.device
    }

    /// Whether this is a handle to the same parameter.
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0.0, &other.0.0)
    }

    /// Whether there are other handles of it.
    pub(crate) fn is_shared(&self) -> bool {
        Rc::strong_count(&self.0) > 1
    }

    /// A handle for another layer that uses the same weight, such as the output head of an
    /// embedding. As long as there is that handle, or a clone of it, a backward adds to the
    /// gradient once more. A clone does not count as another use.
    ///
    /// Tie before [`DataParallel`](crate::train::DataParallel) with an invariant reduction is made,
    /// which counts the uses.
    pub fn tie(&self) -> Self {
        Self(Rc::new(Use(self.0.0.clone())))
    }

    /// Where the calls of groups are made that concern this parameter's layer: its path, which is
    /// the parameter's name without the last part, or what the names of its regions have in common.
    /// The caller's line where that is empty.
    #[track_caller]
    pub fn site(&self) -> Site {
        if self.0.0.layer.is_empty() { Site::here() } else { Site::InLayer(self.0.0.layer) }
    }

    /// The value as it is now. It shares the memory of a dense store: the next step copies the
    /// value if this tensor is still there.
    ///
    /// # Errors
    /// Those of [`Store::value`].
    pub fn value(&self) -> Result<Tensor<T, B>> {
        let value = self.0.0.store.borrow().value()?;
        same_shape(OP, self.name(), self.shape().dims(), "its store's value", value.shape().dims())?;
        Ok(value)
    }

    /// The rows of a table by index, as [`Tensor::rows`].
    ///
    /// # Errors
    /// Those of [`Store::rows`].
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor<T, B>> {
        self.0.0.store.borrow().rows(ids)
    }

    /// Replaces the value. Optimizers notice a new value at their next step, and take their master
    /// weights from it unless they still round to it.
    ///
    /// # Errors
    /// When the shape is another, or the store cannot be written.
    pub fn set(&self, value: Tensor<T, B>) -> Result<()> {
        same_shape(OP, self.name(), self.0.0.shape.dims(), "its new value", value.shape().dims())?;
        *self.value_mut()? = value;
        self.renew();
        Ok(())
    }

    /// Says that the value is a new one.
    pub(crate) fn renew(&self) {
        self.0.0.revision.set(next_revision());
    }

    /// The dense value, to be written in place. The revision stays: [`Param::renew`] says that the
    /// value is a new one.
    pub(crate) fn value_mut(&self) -> Result<RefMut<'_, Tensor<T, B>>> {
        RefMut::filter_map(self.0.0.store.borrow_mut(), |store| store.value_mut()).map_err(|_| {
            let reason = format!("{} is not kept as a dense tensor: it is read, not written", self.name());
            Error::Unsupported { op: OP, reason }
        })
    }

    /// Keeps the elements in another store from now on, such as one of integers and scales. What
    /// it gives has to have the parameter's shape.
    ///
    /// # Errors
    /// When it has not.
    pub fn set_store(&self, store: impl Store<T, B> + 'static) -> Result<()> {
        let shape = store.value()?.shape();
        same_shape(OP, self.name(), self.0.0.shape.dims(), "its new store", shape.dims())?;
        self.renew();
        *self.0.0.store.borrow_mut() = Box::new(store);
        Ok(())
    }

    /// Which value this is: another number after [`Param::set`], and in another parameter.
    pub(crate) fn revision(&self) -> u64 {
        self.0.0.revision.get()
    }

    /// Which parts of which tensors this parameter holds.
    pub fn regions(&self) -> Rc<[ParamRegion]> {
        self.0.0.regions.borrow().clone()
    }

    /// Says that this rank's copy does not count: another one, on another pipeline stage, owns the
    /// tensor.
    pub fn disown(&self) {
        let disowned = |part: &ParamRegion| ParamRegion { owned: false, ..part.clone() };
        let regions = self.regions().iter().map(disowned).collect();
        *self.0.0.regions.borrow_mut() = regions;
    }

    /// Says which parts of the parameter belong to canonical blocks, if it is cut, and that its
    /// gradient is summed along a tree.
    pub(crate) fn sum_in_tree(&self, blocks: Option<Vec<Vec<BlockRegion>>>) {
        self.0.0.grad.borrow_mut().sink = Box::new(grad::Tree::new(self.name(), 0, 1));
        self.0.0.blocks.get_or_init(|| blocks);
    }

    /// What of it belongs to each of this rank's canonical blocks, if it was loaded on a group that
    /// has such.
    pub(crate) fn blocks(&self) -> Option<Option<&[Vec<BlockRegion>]>> {
        self.0.0.blocks.get().map(Option::as_deref)
    }

    /// Sends the gradient elsewhere from now on, and gives back where it went until now: a sink of
    /// your own may pass on to that one. A step that is under way is ended ([`Param::settle`]).
    ///
    /// # Errors
    /// As [`Param::settle`]; the sink is the old one then.
    pub fn set_sink(&self, sink: Box<dyn GradSink<T::Acc, B>>) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.settle()?;
        Ok(std::mem::replace(&mut self.0.0.grad.borrow_mut().sink, sink))
    }

    /// [`GradSink::replicated`].
    pub(crate) fn replicated_sink(
        &self,
        replica: usize,
        replicas: usize,
    ) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.0.0.grad.borrow().sink.replicated(self.name(), replica, replicas)
    }

    /// Says how many microbatches, each with its backward, add to the gradient in a step: 1 at
    /// least. With [`crate::shard::Reduction::Invariant`] their gradients are summed along one
    /// tree; [`DataParallel`](crate::train::DataParallel), which has to be made after this, reduces
    /// the gradient behind the last.
    pub fn set_microbatches(&self, count: usize) {
        self.0.0.grad.borrow_mut().microbatches = count;
    }

    /// How many terms are added to the gradient in a step.
    pub(crate) fn uses(&self) -> usize {
        let ties = Rc::strong_count(&self.0.0);
        ties.saturating_mul(self.0.0.grad.borrow().microbatches.max(1))
    }

    /// The sum of the gradients since the last [`Param::zero_grad`]; none before the first
    /// backward. The next backward copies the sum if this tensor is still there. With
    /// [`crate::shard::Reduction::Invariant`] none before the last microbatch of a step
    /// ([`Param::set_microbatches`]), or before [`Param::settle`].
    pub fn grad(&self) -> Option<Tensor<T::Acc, B>> {
        self.0.0.grad.borrow().sum.total.clone()
    }

    /// The gradient, which is forgotten, to be changed and set again.
    pub(crate) fn take_grad(&self) -> Option<Tensor<T::Acc, B>> {
        self.0.0.grad.borrow_mut().sum.total.take()
    }

    /// Replaces the gradient.
    ///
    /// # Errors
    /// When the shape is another than the parameter's.
    pub fn set_grad(&self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.check_grad(&grad)?;
        self.0.0.grad.borrow_mut().sum = GradSum::of(Some(grad));
        Ok(())
    }

    /// Forgets the gradient.
    pub fn zero_grad(&self) {
        let mut grad = self.0.0.grad.borrow_mut();
        (grad.sum, grad.added) = (GradSum::of(None), 0);
        grad.sink.clear();
    }

    /// Adds to the gradient.
    ///
    /// # Errors
    /// When the shape is another than the parameter's, or the sink refuses it.
    pub fn add_grad(&self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.check_grad(&grad)?;
        let mut grad = Some(grad);
        self.add(None, &mut |_, sum| grad.take().map_or(Ok(()), |grad| grad::add_term(sum, grad)))
    }

    /// Adds a gradient that is a sum over so many tokens. `grad` gives it over some of them.
    ///
    /// # Errors
    /// Those of `grad`, and when the sink refuses it.
    pub(crate) fn add_grad_over(
        &self,
        tokens: usize,
        mut grad: impl FnMut(Range<usize>) -> Result<Tensor<T::Acc, B>>,
    ) -> Result<()> {
        self.add(Some(tokens), &mut |tokens, sum| {
            let grad = grad(tokens)?;
            self.check_grad(&grad)?;
            grad::add_term(sum, grad)
        })
    }

    /// Adds a gradient that is a product over so many tokens. `write` adds it over some of them in
    /// place, with the β with which to keep what is there: 0 where there is nothing yet.
    ///
    /// # Errors
    /// Those of `write`, and when the sink refuses it.
    pub(crate) fn add_product_over(
        &self,
        tokens: usize,
        mut write: impl FnMut(Range<usize>, f64, MatMut<'_, T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        let of = (&self.0.0.device, self.0.0.shape);
        self.add(Some(tokens), &mut |tokens, sum| {
            grad::add_product(sum, of, |beta, dw| write(tokens, beta, dw))
        })
    }

    fn check_grad(&self, grad: &Tensor<T::Acc, B>) -> Result<()> {
        same_shape("gradient", self.name(), self.0.0.shape.dims(), "its gradient", grad.shape().dims())
    }

    fn add(&self, tokens: Option<usize>, add: grad::AddTokens<'_, T::Acc, B>) -> Result<()> {
        let uses = self.uses();
        let grad = &mut *self.0.0.grad.borrow_mut();
        let term = GradTerm { name: self.name(), index: grad.added, uses, tokens, add };
        grad.sink.add(term, &mut grad.sum)?;
        self.check_sum(&mut grad.sum)?;
        grad.added += 1;
        if grad.added < uses { Ok(()) } else { self.end_step(grad) }
    }

    /// The sink has got all of a step.
    fn end_step(&self, grad: &mut Gradient<T::Acc, B>) -> Result<()> {
        grad.sink.finish(&mut grad.sum)?;
        grad.added = 0;
        self.check_sum(&mut grad.sum)
    }

    /// That what a sink has made has the parameter's shape; else it is forgotten.
    fn check_sum(&self, sum: &mut GradSum<T::Acc, B>) -> Result<()> {
        let checked = sum.total.as_ref().map_or(Ok(()), |sum| self.check_grad(sum));
        if checked.is_err() {
            sum.total = None;
        }
        checked
    }

    /// PipelineEnds a step that has had fewer backwards than [`Param::set_microbatches`] says. Optimizers
    /// and norms do so.
    ///
    /// # Errors
    /// When the terms of other replicas would be missing, and as [`GradSink::finish`].
    pub fn settle(&self) -> Result<()> {
        let grad = &mut *self.0.0.grad.borrow_mut();
        if grad.added == 0 { Ok(()) } else { self.end_step(grad) }
    }

    /// That the gradient is complete: [`Param::settle`], and nothing awaits other replicas.
    ///
    /// # Errors
    /// As [`Param::settle`], and when sums of sub-trees are not reduced over the replicas yet.
    pub(crate) fn check_complete(&self, op: &'static str) -> Result<()> {
        self.settle()?;
        if !self.0.0.grad.borrow().sum.open.is_empty() {
            let reason = format!("terms of {} are not summed over its replicas yet", self.name());
            return Err(Error::invalid(op, reason));
        }
        Ok(())
    }

    /// The sums of this replica's sub-trees of the gradient, which are forgotten; none before the
    /// first backward.
    pub(crate) fn take_terms(&self) -> Vec<Tensor<T::Acc, B>> {
        let sum = &mut self.0.0.grad.borrow_mut().sum;
        let open = std::mem::take(&mut sum.open);
        if open.is_empty() { sum.total.take().into_iter().collect() } else { open }
    }
}

/// That no parameter is listed twice.
///
/// # Errors
/// When one is.
pub(crate) fn check_once<T: Element, B: Backend>(op: &'static str, params: &[Param<T, B>]) -> Result<()> {
    let mut seen = HashSet::new();
    match params.iter().find(|param| !seen.insert(Rc::as_ptr(&param.0.0).cast::<()>())) {
        None => Ok(()),
        Some(param) => {
            let reason = format!(
                "{} is listed twice: of layers that share a parameter, list that of one",
                param.name()
            );
            Err(Error::invalid(op, reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::joined;

    #[test]
    fn merged_parameters_have_the_names_of_all_their_tensors() {
        let of = |tensors: &[&str]| joined(tensors.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["h.0.attn.c_attn.weight"; 3]).unwrap(), "h.0.attn.c_attn.weight");
        assert_eq!(of(&["a.0.q.weight", "a.0.k.weight", "a.0.k.weight"]).unwrap(), "a.0.q|k.weight");
        assert_eq!(of(&["gate", "up"]).unwrap(), "gate|up");
        assert_eq!(of(&["x.weight", "x.y.weight"]).unwrap(), "x.|y.weight");
    }
}
