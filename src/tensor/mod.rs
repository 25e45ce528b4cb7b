//! Tensors and parameters of one rank, and sources of initial values. Operators, communicators and
//! layers use this module.

mod array;
mod param;
mod source;

pub use param::{
    Accumulate, GradSink, GradSum, GradTerm, Param, ParamRegion, QuantizedRows, SampleTerm, Store,
    WriteProduct,
};
pub(crate) use param::{BlockRegion, check_once};
pub(crate) use source::missing;
pub use source::{Arrays, Random, Region, Role, WeightSource, Weights};

use crate::{
    device::{Cpu, Device, Element, zeroed},
    error::{Result, same_size},
    kernels::{Gather, MatMut, MatRef, Pointwise},
    shard::Shape,
};
use std::{fmt, rc::Rc};

#[cfg(test)]
thread_local! {
    /// The number of copies that this thread has made because it wrote to a shared tensor.
    pub(crate) static COPIES: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
}

/// The name of the operator in errors.
const OP: &str = "tensor";

/// A dense row-major tensor of one rank.
///
/// A clone shares the memory. A write to a shared tensor copies the memory first. So a layer saves
/// its input for the backward without a copy, and a later write does not change the saved input.
///
/// ```
/// use shardwise::Tensor;
/// let x = Tensor::from(ndarray::array![[1.0_f32, 2.0], [3.0, 4.0]]);
/// assert_eq!(x.shape().dims(), [2, 2]);
/// assert_eq!(x.to_array()?[[1, 0]], 3.0);
/// # Ok::<(), shardwise::Error>(())
/// ```
pub struct Tensor<T: Element = f32, B: Device = Cpu> {
    buffer: Rc<B::Buffer<T>>,
    shape: Shape,
    device: B,
    /// Whether the elements are copies of a parameter's.
    is_weight: bool,
}

impl<T: Element, B: Device> Clone for Tensor<T, B> {
    fn clone(&self) -> Self {
        Self { buffer: Rc::clone(&self.buffer), device: self.device.clone(), ..*self }
    }
}

impl<T: Element, B: Device> fmt::Debug for Tensor<T, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor<{}>({} on {:?})", T::DTYPE, self.shape, self.device)
    }
}

impl<T: Element, B: Device> Tensor<T, B> {
    /// Allocates a tensor without initializing its elements, as `torch.empty`.
    ///
    /// # Errors
    /// When the device is out of memory ([`crate::Error::Memory`] on the CPU), or the number of
    /// elements overflows.
    pub fn empty(device: &B, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        Self::from_buffer(device, shape, device.empty(shape.checked_len(OP)?)?)
    }

    /// Copies a host slice in row-major order.
    ///
    /// # Errors
    /// When the lengths of the slice and of the shape differ, or the device is out of memory.
    pub fn from_slice(device: &B, shape: impl Into<Shape>, elements: &[T]) -> Result<Self> {
        let shape = shape.into();
        let len = shape.checked_len(OP)?;
        same_size(OP, "the number of elements given", elements.len(), "that of the shape", len)?;
        let mut buffer = device.empty(len)?;
        device.upload(elements, B::slice_mut(&mut buffer))?;
        Self::from_buffer(device, shape, buffer)
    }

    /// Makes a tensor from a vector in row-major order. The CPU reuses the vector's memory.
    ///
    /// # Errors
    /// When the lengths of the vector and of the shape differ, or the device is out of memory.
    pub fn from_vec(device: &B, shape: impl Into<Shape>, elements: Vec<T>) -> Result<Self> {
        let shape = shape.into();
        let len = shape.checked_len(OP)?;
        same_size(OP, "the number of elements given", elements.len(), "that of the shape", len)?;
        Self::from_buffer(device, shape, device.adopt(elements)?)
    }

    /// Makes a tensor from a buffer of the device, without a copy.
    ///
    /// # Errors
    /// When the lengths of the buffer and of the shape differ.
    pub fn from_buffer(device: &B, shape: impl Into<Shape>, buffer: B::Buffer<T>) -> Result<Self> {
        let shape = shape.into();
        let (len, wanted) = (B::len::<T>(B::slice(&buffer)), shape.checked_len(OP)?);
        same_size(OP, "the number of elements of the buffer", len, "that of the shape", wanted)?;
        Ok(Self { buffer: Rc::new(buffer), shape, device: device.clone(), is_weight: false })
    }

    /// Downloads the elements to the host, in row-major order.
    ///
    /// # Errors
    /// When the device fails, or the host is out of memory.
    pub fn to_vec(&self) -> Result<Vec<T>> {
        let mut host = zeroed(self.shape.len())?;
        self.device.download::<T>(self.slice(), &mut host)?;
        Ok(host)
    }

    /// Returns the dimensions.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Returns the device that holds the elements.
    pub fn device(&self) -> &B {
        &self.device
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Whether the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether another tensor shares the memory. If so, a write copies the memory first.
    pub fn is_shared(&self) -> bool {
        Rc::strong_count(&self.buffer) > 1
    }

    /// Whether this tensor is the value of a [`Param`], or a clone, reshape, conversion, slice,
    /// concatenation or selection of rows of one, or the result of a collective on one. Collectives
    /// check the [roles](crate::security::Role) of the ranks that would receive it. What operators
    /// compute, what [`Param::rows`] looks up, and what another rank has sent is no weight.
    pub fn is_weight(&self) -> bool {
        self.is_weight
    }

    /// The same tensor, which is a weight from now on if `is_weight` holds, and no other one.
    pub(crate) fn marked(self, is_weight: bool) -> Self {
        Self { is_weight, ..self }
    }

    /// Returns the same elements in another shape, without a copy.
    ///
    /// # Errors
    /// When the number of elements differs.
    pub fn reshape(self, shape: impl Into<Shape>) -> Result<Self> {
        const OP: &str = "reshape";
        let shape = shape.into();
        same_size(OP, "the number of elements", self.len(), "that of the new shape", shape.checked_len(OP)?)?;
        Ok(Self { shape, ..self })
    }

    /// Returns a view of the elements on the device.
    pub fn slice(&self) -> B::Slice<'_, T> {
        B::slice(&self.buffer)
    }

    /// Views the tensor as a matrix. The last dimension gives the columns, and the product of the
    /// other dimensions gives the number of rows.
    pub fn mat(&self) -> MatRef<'_, T, B> {
        MatRef::new(self.slice(), self.shape.rows(), self.shape.cols())
            .expect("a tensor's buffer has as many elements as its shape")
    }
}

impl<T: Element, B: Pointwise> Tensor<T, B> {
    /// Makes a tensor filled with one value.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn full(device: &B, shape: impl Into<Shape>, value: f64) -> Result<Self> {
        let mut tensor = Self::empty(device, shape)?;
        device.fill(value, tensor.mat_mut()?)?;
        Ok(tensor)
    }

    /// Makes a tensor of zeros.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn zeros(device: &B, shape: impl Into<Shape>) -> Result<Self> {
        Self::full(device, shape, 0.0)
    }

    /// Converts the values to another element type.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn convert<U: Element>(&self) -> Result<Tensor<U, B>> {
        let mut to = Tensor::empty(&self.device, self.shape)?;
        self.device.copy(self.mat(), to.mat_mut()?)?;
        Ok(to.marked(self.is_weight))
    }

    /// Returns this tensor if its element type is `U`, and otherwise converts the values to `U`.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn into_element<U: Element>(self) -> Result<Tensor<U, B>> {
        if U::DTYPE != T::DTYPE {
            return self.convert();
        }
        let (shape, device, is_weight) = (self.shape, self.device.clone(), self.is_weight);
        let buffer = T::any_buffer::<B>(self.into_buffer()?).of::<U>();
        let tensor = Tensor::from_buffer(&device, shape, buffer.expect("both element types are the same"))?;
        Ok(tensor.marked(is_weight))
    }

    /// `y[i] = self[ids[i]]`, and 0 where `ids[i]` is [`NO_ROW`](crate::kernels::NO_ROW).
    ///
    /// `self: [rows, cols]`, `y: [ids.len(), cols]`.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let table = Tensor::from(ndarray::array![[1.0_f32, 2.0], [3.0, 4.0]]);
    /// assert_eq!(table.rows(&[1, NO_ROW, 0])?.to_vec()?, [3.0, 4.0, 0.0, 0.0, 1.0, 2.0]);
    /// assert!(table.rows(&[2]).is_err());
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// When an id other than [`NO_ROW`](crate::kernels::NO_ROW) is not below `rows`, or the device
    /// is out of memory.
    pub fn rows(&self, ids: &[u32]) -> Result<Self>
    where
        B: Gather,
    {
        let mut y = Self::empty(&self.device, [ids.len(), self.shape.cols()])?;
        self.device.gather(self.mat(), ids, y.mat_mut()?)?;
        Ok(y.marked(self.is_weight))
    }

    /// `self += term`, both of the same shape.
    pub(crate) fn accumulate(&mut self, term: &Self) -> Result<()> {
        let device = self.device.clone();
        device.accumulate(term.mat(), self.mat_mut()?)
    }

    /// Returns the elements for writing. Copies them first if another tensor shares them.
    ///
    /// # Errors
    /// When the device is out of memory for the copy.
    pub fn slice_mut(&mut self) -> Result<B::SliceMut<'_, T>> {
        if Rc::get_mut(&mut self.buffer).is_none() {
            #[cfg(test)]
            COPIES.set(COPIES.get() + 1);
            self.buffer = self.convert::<T>()?.buffer;
        }
        let buffer = Rc::get_mut(&mut self.buffer).expect("a shared buffer was copied above");
        Ok(B::slice_mut(buffer))
    }

    /// Views the tensor as a writable matrix, with the dimensions of [`Tensor::mat`]. Copies the
    /// elements first if another tensor shares them.
    ///
    /// # Errors
    /// When the device is out of memory for the copy.
    pub fn mat_mut(&mut self) -> Result<MatMut<'_, T, B>> {
        let (rows, cols) = (self.shape.rows(), self.shape.cols());
        MatMut::new(self.slice_mut()?, rows, cols)
    }

    /// Returns the buffer, or a copy of it if another tensor shares it.
    ///
    /// # Errors
    /// When the device is out of memory for the copy.
    pub fn into_buffer(mut self) -> Result<B::Buffer<T>> {
        self.slice_mut()?;
        Ok(Rc::into_inner(self.buffer).expect("`slice_mut` has copied a shared buffer"))
    }
}
