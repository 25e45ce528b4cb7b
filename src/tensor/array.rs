//! Conversions between tensors and ndarray's arrays.

use super::Tensor;
use crate::{
    device::{Cpu, Device, Element},
    error::Result,
    shard::Shape,
};
use ndarray::{Array, ArrayBase, ArrayD, ArrayViewD, Data, Dimension, IxDyn};

impl<T: Element, D: Dimension> From<Array<T, D>> for Tensor<T> {
    /// Makes a tensor on a new [`Cpu`]. Reuses the array's memory if the elements fill it in
    /// row-major order. On a rank, call [`Tensor::from_array`] or [`Tensor::from_vec`] with the
    /// device of the rank's group instead.
    ///
    /// # Panics
    /// When the array has more than four dimensions.
    fn from(array: Array<T, D>) -> Self {
        let (device, shape) = (Cpu::new(), Shape::from(array.shape()));
        let made = if array.is_standard_layout() {
            match array.into_raw_vec_and_offset() {
                (elements, None | Some(0)) if elements.len() == shape.len() => {
                    Self::from_vec(&device, shape, elements)
                }
                (elements, first) => {
                    let first = first.unwrap_or(0);
                    Self::from_slice(&device, shape, &elements[first..first + shape.len()])
                }
            }
        } else {
            Self::from_array(&device, &array)
        };
        made.expect("an array has as many elements as its shape")
    }
}

impl<T: Element, B: Device> Tensor<T, B> {
    /// Copies an array, in any memory order, to a row-major tensor.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let x = ndarray::array![[1.0_f32, 2.0, 3.0], [4.0, 5.0, 6.0]];
    /// let transposed = Tensor::from_array(&Cpu::new(), &x.t())?;
    /// assert_eq!(transposed.shape().dims(), [3, 2]);
    /// assert_eq!(transposed.to_vec()?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// When the device is out of memory.
    ///
    /// # Panics
    /// When the array has more than four dimensions.
    pub fn from_array<S: Data<Elem = T>, D: Dimension>(device: &B, array: &ArrayBase<S, D>) -> Result<Self> {
        let standard = array.as_standard_layout();
        let elements = standard.as_slice().expect("an array in standard layout is contiguous");
        Self::from_slice(device, array.shape(), elements)
    }

    /// Downloads the elements to an array.
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
    /// Returns a view of the elements, without copying.
    pub fn as_array(&self) -> ArrayViewD<'_, T> {
        ArrayViewD::from_shape(IxDyn(self.shape.dims()), self.slice())
            .expect("a tensor has as many elements as its shape")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, s};

    /// Covers arrays that own more memory than they view, and arrays in other memory orders.
    #[test]
    fn arrays_come_in_without_a_copy_if_they_can() {
        let whole = Array2::from_shape_fn((4, 6), |(row, col)| (6 * row + col) as f32);
        let at = whole.as_ptr();
        let tensor = Tensor::from(whole.clone());
        assert_eq!(tensor.as_array(), whole.view().into_dyn());
        let moved = whole.clone();
        let (there, tensor) = (moved.as_ptr(), Tensor::from(moved));
        assert!(std::ptr::eq(there, tensor.slice().as_ptr()) && !std::ptr::eq(there, at));
        for slice in [s![1..3, ..], s![.., 2..5], s![1..1, ..], s![..;-1, ..]] {
            let slice = whole.clone().slice_move(slice);
            assert_eq!(Tensor::from(slice.clone()).as_array(), slice.view().into_dyn());
        }
        assert_eq!(Tensor::from(whole.clone().reversed_axes()).as_array(), whole.t().into_dyn());
    }
}
