//! ndarray in and out of tensors.

use super::Tensor;
use crate::{
    device::{Cpu, Device, Element},
    error::Result,
};
use ndarray::{Array, ArrayBase, ArrayD, ArrayViewD, Data, Dimension, IxDyn};

impl<T: Element, D: Dimension> From<Array<T, D>> for Tensor<T> {
    /// A tensor on a CPU of its own. Ranks use [`Tensor::from_array`] with their group's device.
    ///
    /// # Panics
    /// When the array has more than four dimensions.
    fn from(array: Array<T, D>) -> Self {
        Self::from_array(&Cpu::new(), &array).expect("an array has as many elements as its shape")
    }
}

impl<T: Element, B: Device> Tensor<T, B> {
    /// A tensor with an array's elements.
    ///
    /// # Errors
    /// When the device has no memory left.
    ///
    /// # Panics
    /// When the array has more than four dimensions.
    pub fn from_array<S: Data<Elem = T>, D: Dimension>(device: &B, array: &ArrayBase<S, D>) -> Result<Self> {
        let standard = array.as_standard_layout();
        let elements = standard.as_slice().expect("an array in standard layout is contiguous");
        Self::from_slice(device, array.shape(), elements)
    }

    /// The elements as an array.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_array(&self) -> Result<ArrayD<T>> {
        let elements = self.to_vec()?;
        Ok(ArrayD::from_shape_vec(IxDyn(self.shape.dims()), elements)
            .expect("a tensor has as many elements as its shape"))
    }
}

impl<T: Element> Tensor<T, Cpu> {
    /// The elements as an array view, without copying.
    pub fn as_array(&self) -> ArrayViewD<'_, T> {
        ArrayViewD::from_shape(IxDyn(self.shape.dims()), self.slice())
            .expect("a tensor has as many elements as its shape")
    }
}
