//! The mathematics on one device: a folder per kernel family, with the trait in `mod.rs` and one
//! file per device.
//!
//! Methods are generic in the element type, so that an operator needs a single bound, [`Backend`].
//! Matrices are passed as views ([`MatRef`], [`MatMut`]). A view checks its extent when it is
//! created. A kernel checks that its operands agree. If two sizes differ, the error names both.
//!
//! | family | kernels |
//! |---|---|
//! | [`Gemm`] | C ← α A B + β C, any strides, strided batches |
//! | [`Pointwise`] | activations, gates, sums, bias, column sums, copies and conversions |
//! | [`Norm`] | LayerNorm, RMSNorm |
//! | [`Attention`] | scaled dot-product attention, memory linear in the sequence length |
//! | [`Quantized`] | products with quantized weights |
//! | [`Rope`] | rotary position embedding |
//! | [`Gather`] | rows of a table by index, and its transpose |
//! | [`Loss`] | cross entropy over all classes or a range of them, squared error |
//! | [`Dropout`] | dropout whose mask is a function of global indices |
//! | [`Update`] | steps of SGD and AdamW, sums of squares |

mod attention;
mod compiled;
mod dropout;
mod gather;
mod gemm;
mod lanes;
mod loss;
mod norm;
#[cfg(feature = "cuda")]
mod packs;
mod pointwise;
mod quantized;
mod rope;
mod update;
mod view;

pub use attention::{Attention, AttentionChoices, AttentionSpec, CacheSpec, QkvHeads};
#[doc(hidden)]
pub use compiled::compiled;
pub use dropout::{Dropout, DropoutMask};
pub use gather::{Gather, NO_ROW};
pub use gemm::{Batch, Epilogue, Gemm, GemmTerm, Product};
pub(crate) use loss::check_targets;
pub use loss::{Loss, Targets};
pub use norm::{Norm, NormKind};
pub use pointwise::{Activation, Pointwise};
pub use quantized::{Activations, ColumnGroups, Format, GroupSize, Quantized, QuantizedShape, ReadBlocks};
pub(crate) use quantized::{CHUNK, e4m3};
pub use rope::{Rope, RopePairs, RopeSpec};
pub use update::{AdamWStep, SgdStep, Update};
pub use view::{MatMut, MatRef};

use crate::device::Device;

/// A device that implements every kernel family: the single bound of operators and layers.
pub trait Backend:
    Device + Gemm + Pointwise + Norm + Attention + Rope + Gather + Loss + Dropout + Update + Quantized
{
}

impl<B: Device + Gemm + Pointwise + Norm + Attention + Rope + Gather + Loss + Dropout + Update + Quantized>
    Backend for B
{
}
