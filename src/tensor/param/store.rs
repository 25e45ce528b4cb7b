//! What holds a parameter's elements.

use crate::{
    device::{Device, Element},
    error::Result,
    kernels::Backend,
    tensor::Tensor,
};

/// What holds a parameter's elements.
///
/// Layers multiply by [`Store::value`] and look up [`Store::rows`]; they do not know how the
/// elements are kept. A [`Tensor`] is the store that [`Param::load`](super::Param::load) makes, and
/// the only one that can be trained. Another one, such as one of integers and scales, takes its
/// place by [`Param::set_store`](super::Param::set_store). A store must not ask its own
/// parameter for the value, nor set it.
pub trait Store<T: Element, B: Device> {
    /// All elements, in the parameter's shape. What is computed here lives as long as the product
    /// that asked for it.
    ///
    /// # Errors
    /// When the device has no memory left, or fails.
    fn value(&self) -> Result<Tensor<T, B>>;

    /// yᵢ = the row `idsᵢ` of a table: `[ids.len(), cols]`; 0 where `idsᵢ` is
    /// [`NO_ROW`](crate::kernels::NO_ROW): another rank has that row.
    ///
    /// # Errors
    /// When another id is beyond the table, the device has no memory left, or fails.
    fn rows(&self, ids: &[u32]) -> Result<Tensor<T, B>>;

    /// The elements, to be written, if they are kept as a dense tensor.
    fn value_mut(&mut self) -> Option<&mut Tensor<T, B>> {
        None
    }
}

/// The elements themselves.
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
