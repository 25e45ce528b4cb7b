//! The mathematics on one device: a folder a kernel family, the trait in `mod.rs`, one file a device beside it.
//!
//! Methods are generic in the element, so that an operator carries one bound, [`Backend`]. Matrices come as views
//! ([`MatRef`], [`MatMut`]) whose extent was checked when they were made; a kernel checks that its operands agree with
//! one another and reports the two sizes that do not.
//!
//! | family | kernels |
//! |---|---|
//! | [`Gemm`] | C ← α A B + β C, any strides, strided batches |
//! | [`Pointwise`] | activations, gates, sums, bias, column sums, copies and conversions |
//! | [`Norm`] | LayerNorm, RMSNorm |
//! | [`Softmax`] | row softmax with causal and padding masks |
//! | [`Attention`] | scaled dot-product attention, memory linear in the sequence length |
//! | [`Gather`] | rows of a table by index, and its transpose |

mod attention;
mod gather;
mod gemm;
mod lanes;
mod norm;
mod pointwise;
mod softmax;
mod view;

pub use attention::{Attention, AttentionSpec};
pub use gather::Gather;
pub use gemm::{Batch, Gemm};
pub use norm::{Norm, NormKind};
pub use pointwise::{Activation, Pointwise};
pub use softmax::{Mask, Softmax};
pub use view::{MatMut, MatRef};

use crate::device::Device;

/// A device with every kernel family: the one bound of operators and layers.
pub trait Backend: Device + Gemm + Pointwise + Norm + Softmax + Attention + Gather {}

impl<B: Device + Gemm + Pointwise + Norm + Softmax + Attention + Gather> Backend for B {}
