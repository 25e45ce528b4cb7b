//! Operators on one rank's tensors, forward and backward: kernels with memory for their results. Knows no ranks; layers
//! in [`crate::parallel`] are made of them.

mod activation;
mod attention;
mod dropout;
mod embedding;
mod head_norm;
mod linear;
mod norm;
mod rope;
mod squared_error;

pub use activation::{activate, activate_backward, add, gate, gate_backward};
pub use attention::{
    AttentionContext, CachedKeys, append_to_cache, attention, attention_backward, attention_cached,
};
pub use dropout::dropout;
pub use embedding::embedding_backward;
pub use head_norm::{normalize_heads, normalize_heads_backward};
pub use linear::{bias_grad, linear, linear_dw, linear_dx, products};
pub use norm::{NormContext, NormGrads, normalize, normalize_backward, normalize_backward_rows};
pub use rope::{RopeConfig, RopeScaling, Rotary};
pub use squared_error::{squared_error, squared_error_backward};
