//! Parameters: a rank's shard of a weight, its regions, and its gradient.

mod grad;
mod load;
mod quantized;
mod region;
mod samples;
mod sink;
mod store;

pub use quantized::QuantizedRows;
pub(crate) use region::BlockRegion;
pub use region::ParamRegion;
pub use samples::{SampleTerm, WriteProduct};
pub use sink::{Accumulate, GradSink, GradSum, GradTerm};
pub use store::Store;

use super::Tensor;
use crate::{
    device::{Device, Element},
    error::{Error, Result, Site, layer_of, same_shape},
    kernels::Backend,
    shard::Shape,
};
use grad::Gradient;
use std::{
    cell::{Cell, OnceCell, RefCell, RefMut},
    collections::HashSet,
    fmt,
    rc::Rc,
    sync::atomic::{AtomicU64, Ordering},
};

/// A rank's shard of a trainable tensor, and the gradient of that shard.
///
/// A `Param` is a handle, and its clones refer to the same parameter. Layers and data parallelism
/// hold handles. [`Layer::params`](crate::parallel::Layer::params) returns clones of a layer's
/// handles, and optimizers take them.
///
/// * A [`Store`] holds the elements: a dense tensor, unless [`Param::set_store`] replaces it.
/// * A [`GradSink`] sums the gradient in the accumulator type of the element type (f32 for bf16).
/// * [`Param::tie`] makes a handle for another layer that uses the same weight.
pub struct Param<T: Element, B: Device>(Rc<Use<T, B>>);

/// One layer's use of a parameter. Each microbatch adds one gradient term for each live use.
struct Use<T: Element, B: Device>(Rc<Shared<T, B>>);

struct Shared<T: Element, B: Device> {
    name: String,
    /// The path of the parameter's layer, or empty.
    layer: &'static str,
    device: B,
    shape: Shape,
    regions: RefCell<Rc<[ParamRegion]>>,
    store: RefCell<Box<dyn Store<T, B>>>,
    /// A number that identifies the current value within the process. An optimizer's step does not
    /// change it, so an optimizer can detect a value that the caller set.
    revision: Cell<u64>,
    grad: RefCell<Gradient<T::Acc, B>>,
    /// The terms that are kept, if terms are kept ([`Param::keep_terms`]).
    terms: RefCell<Option<Vec<SampleTerm<T, B>>>>,
    /// The argument of the first call of [`Param::sum_in_tree`]; unset before that call.
    blocks: OnceCell<Option<Vec<Vec<BlockRegion>>>>,
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

/// The operator that errors name.
const OP: &str = "parameter";

/// Returns a revision that no parameter in this process has had.
fn next_revision() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<T: Element, B: Backend> Param<T, B> {
    /// Makes a parameter with this value. The regions fill its rows.
    pub(crate) fn new(name: String, value: Tensor<T, B>, regions: Vec<ParamRegion>) -> Self {
        let (device, shape) = (value.device().clone(), value.shape());
        Self::with_store(name, (device, shape), Box::new(value), regions)
    }

    /// Makes a parameter with this store, whose value has the given shape.
    fn with_store(
        name: String,
        (device, shape): (B, Shape),
        store: Box<dyn Store<T, B>>,
        regions: Vec<ParamRegion>,
    ) -> Self {
        let tensors = regions.iter().map(|own| own.tensor.as_str());
        let layer = if regions.is_empty() { layer_of([&*name].into_iter()) } else { layer_of(tensors) };
        Self(Rc::new(Use(Rc::new(Shared {
            name,
            layer,
            device,
            shape,
            regions: RefCell::new(regions.into()),
            store: RefCell::new(store),
            revision: Cell::new(next_revision()),
            grad: RefCell::new(Gradient::new()),
            terms: RefCell::new(None),
            blocks: OnceCell::new(),
        }))))
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.0.0.name
    }

    /// Returns the shape of the value and of the gradient.
    pub fn shape(&self) -> Shape {
        self.0.0.shape
    }

    /// Returns the device that holds the value.
    pub fn device(&self) -> &B {
        &self.0.0.device
    }

    /// Whether both handles refer to the same parameter.
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0.0, &other.0.0)
    }

    /// Whether this handle has clones.
    pub(crate) fn is_shared(&self) -> bool {
        Rc::strong_count(&self.0) > 1
    }

    /// Returns a handle for another layer that uses the same weight, such as an output head that
    /// shares the embedding's weight. While that handle or a clone of it exists, each microbatch
    /// adds one more term to the gradient. A clone of a handle is the same use as the handle
    /// itself.
    ///
    /// Call this before the parameter is passed to a [`DataParallel`](crate::train::DataParallel)
    /// with an invariant reduction, because `DataParallel::new` counts the uses.
    pub fn tie(&self) -> Self {
        Self(Rc::new(Use(self.0.0.clone())))
    }

    /// Returns the site that errors of this parameter's collectives name: the path of its layer, or
    /// the caller's line if the path is empty. The path is what the names of the parameter's
    /// tensors, without their last segments, have in common at the start. A parameter without
    /// tensors uses its own name instead of tensor names.
    #[track_caller]
    pub fn site(&self) -> Site {
        if self.0.0.layer.is_empty() { Site::here() } else { Site::InLayer(self.0.0.layer) }
    }

    /// Returns the current value, which is a weight ([`Tensor::is_weight`]). The tensor shares the
    /// memory of a dense store. If the returned tensor still exists at the optimizer's next step,
    /// the step copies the value before it writes.
    ///
    /// # Errors
    /// As [`Store::value`].
    pub fn value(&self) -> Result<Tensor<T, B>> {
        let value = self.0.0.store.borrow().value()?;
        same_shape(OP, self.name(), self.shape().dims(), "its store's value", value.shape().dims())?;
        Ok(value.marked(true))
    }

    /// Looks up rows of a table, as [`Tensor::rows`]. They are activations, and no weight
    /// ([`Tensor::is_weight`]).
    ///
    /// # Errors
    /// As [`Store::rows`].
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor<T, B>> {
        Ok(self.0.0.store.borrow().rows(ids)?.marked(false))
    }

    /// Whether the store is quantized. Such a parameter is frozen: it has no gradient, and
    /// optimizers and data parallelism skip it.
    pub fn is_quantized(&self) -> bool {
        self.quantized().is_some()
    }

    pub(crate) fn quantized(&self) -> Option<Rc<QuantizedRows<T, B>>> {
        self.0.0.store.borrow().quantized()
    }

    /// Replaces the value. An optimizer's next step keeps each master weight that rounds to the new
    /// element, and replaces each master weight that does not by the new element.
    ///
    /// # Errors
    /// When the shape differs, or the store cannot be written.
    pub fn set(&self, value: Tensor<T, B>) -> Result<()> {
        same_shape(OP, self.name(), self.0.0.shape.dims(), "its new value", value.shape().dims())?;
        *self.value_mut()? = value;
        self.renew();
        Ok(())
    }

    /// Gives the value a new revision, which records that the value was replaced.
    pub(crate) fn renew(&self) {
        self.0.0.revision.set(next_revision());
    }

    /// Returns the dense value for writing in place. Does not change the revision; [`Param::renew`]
    /// does.
    pub(crate) fn value_mut(&self) -> Result<RefMut<'_, Tensor<T, B>>> {
        RefMut::filter_map(self.0.0.store.borrow_mut(), |store| store.value_mut()).map_err(|_| {
            let reason = format!("{} has no dense store, so it cannot be written", self.name());
            Error::Unsupported { op: OP, reason }
        })
    }

    /// Replaces the store, for example by a store of quantized integers and scales.
    ///
    /// # Errors
    /// When the store fails, or the shape of its value is not the parameter's.
    pub fn set_store(&self, store: impl Store<T, B> + 'static) -> Result<()> {
        let shape = store.value()?.shape();
        same_shape(OP, self.name(), self.0.0.shape.dims(), "its new store", shape.dims())?;
        self.renew();
        *self.0.0.store.borrow_mut() = Box::new(store);
        Ok(())
    }

    /// Returns the revision of the value. [`Param::set`] changes it, and no other parameter has the
    /// same revision.
    pub(crate) fn revision(&self) -> u64 {
        self.0.0.revision.get()
    }

    /// Returns the regions of the model's tensors that this parameter holds.
    pub fn regions(&self) -> Rc<[ParamRegion]> {
        self.0.0.regions.borrow().clone()
    }

    /// Records that this rank does not own its copy, because another pipeline stage owns the
    /// tensor.
    pub fn disown(&self) {
        let disowned = |own: &ParamRegion| ParamRegion { owned: false, ..own.clone() };
        let regions = self.regions().iter().map(disowned).collect();
        *self.0.0.regions.borrow_mut() = regions;
    }
}

/// Checks that no parameter is listed twice.
///
/// # Errors
/// When a parameter is listed twice.
pub(crate) fn check_once<T: Element, B: Backend>(op: &'static str, params: &[Param<T, B>]) -> Result<()> {
    let mut seen = HashSet::new();
    match params.iter().find(|param| !seen.insert(Rc::as_ptr(&param.0.0).cast::<()>())) {
        None => Ok(()),
        Some(param) => {
            let reason = format!("{} is listed twice: list a shared parameter only once", param.name());
            Err(Error::invalid(op, reason))
        }
    }
}
