//! Operators on the tensors of one rank, forward and backward. They call kernels and allocate the
//! results. They make no collectives. The layers in [`crate::parallel`] call these operators.

mod activation;
mod attention;
mod dropout;
mod head_norm;
mod linear;
mod mean;
mod norm;
mod rope;
mod rows;
mod slice;
mod squared_error;

pub use activation::{activate, activate_backward, add, gate, gate_backward};
pub use attention::{
    AttentionContext, CachedKeys, append_to_cache, attention, attention_backward, attention_cached,
};
pub use dropout::dropout;
pub use head_norm::{normalize_heads, normalize_heads_backward};
pub use linear::{bias_grad, linear, linear_dw, linear_dx, products};
pub use mean::{mean_sequences, mean_sequences_backward};
pub use norm::{NormContext, NormGrads, normalize, normalize_backward, normalize_backward_rows};
pub use rope::{RopeConfig, RopeScaling, Rotary};
pub use rows::{dot_rows, mul, scale_rows, scatter_rows, top_k};
pub use slice::{concat, slice};
pub use squared_error::{squared_error, squared_error_backward};
