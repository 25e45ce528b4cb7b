//! Storage of a parameter's elements.

use super::QuantizedRows;
use crate::{device::Element, error::Result, kernels::Backend, tensor::Tensor};
use std::rc::Rc;

/// The storage of a parameter's elements.
///
/// Layers call [`Store::value`] for products and [`Store::rows`] for lookups, so they do not depend
/// on the storage format. [`Param::load`](super::Param::load) makes a dense [`Tensor`], the only
/// store that can be trained. [`Param::set_store`](super::Param::set_store) sets another store, for
/// example of quantized integers and scales. A store must not read or set its own parameter.
pub trait Store<T: Element, B: Backend> {
    /// Returns all elements, in the parameter's shape. A layer drops the tensor after its matrix
    /// product. So a tensor that the store computes, for example from quantized integers, needs
    /// memory only during the product.
    ///
    /// # Errors
    /// When the device fails or is out of memory.
    fn value(&self) -> Result<Tensor<T, B>>;

    /// `y[i] = value[ids[i]]`, and 0 where `ids[i]` is [`NO_ROW`](crate::kernels::NO_ROW), the id
    /// for a row that another rank holds. `y: [ids.len(), cols]`.
    ///
    /// # Errors
    /// When an id other than [`NO_ROW`](crate::kernels::NO_ROW) is not a row of the table; when the
    /// device fails or is out of memory.
    fn rows(&self, ids: &[u32]) -> Result<Tensor<T, B>>;

    /// Returns the elements for writing if the store is a dense tensor.
    fn value_mut(&mut self) -> Option<&mut Tensor<T, B>> {
        None
    }

    /// Returns the quantized rows if the store has some. Such a store is frozen.
    fn quantized(&self) -> Option<Rc<QuantizedRows<T, B>>> {
        None
    }
}

/// Dense storage.
impl<T: Element, B: Backend> Store<T, B> for Tensor<T, B> {
    fn value(&self) -> Result<Tensor<T, B>> {
        Ok(self.clone())
    }

    fn rows(&self, ids: &[u32]) -> Result<Tensor<T, B>> {
        Tensor::rows(self, ids)
    }

    fn value_mut(&mut self) -> Option<&mut Tensor<T, B>> {
        Some(self)
    }
}

/// Quantized storage.
impl<T: Element, B: Backend> Store<T, B> for Rc<QuantizedRows<T, B>> {
    fn value(&self) -> Result<Tensor<T, B>> {
        QuantizedRows::value(self)
    }

    fn rows(&self, ids: &[u32]) -> Result<Tensor<T, B>> {
        self.some_rows(ids)
    }

    fn quantized(&self) -> Option<Rc<QuantizedRows<T, B>>> {
        Some(Rc::clone(self))
    }
}
