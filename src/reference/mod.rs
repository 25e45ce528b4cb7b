//! The single-device reference: every operator of the crate in ndarray `f64`, slow and simple.
//!
//! Tests compare the sharded operators with the reference. So the reference imports nothing from
//! the rest of the crate, and its sums are plain dot products of rows. Tests, examples and users
//! who check their own sharding may call the reference. The crate's operators may not.
//!
//! Activations are `[tokens, features]`, weights `[out, in]`, biases and norm parameters
//! `[features]`. Most functions `f` have an `f_backward`, which takes the inputs of `f` and the
//! gradient `dy` of a loss with respect to the output of `f`. `f_backward` recomputes the forward
//! pass and returns the gradients of the loss with respect to the inputs. If two shapes disagree, a
//! function panics with the operator's name and the two sizes that differ.
//!
//! | file | contents |
//! |---|---|
//! | `linear` | [`linear()`] |
//! | `activation` | [`relu`], [`silu`], [`gelu_erf`], [`gelu_tanh`]; [`Activation`] selects one |
//! | `norm` | [`layer_norm`], [`rms_norm`]; [`Norm`] selects one |
//! | `softmax` | [`softmax()`], [`log_sum_exp`] |
//! | `attention` | [`attention()`]: multi-head, grouped-query, causal, padded, packed sequences |
//! | `rope` | [`rope()`] |
//! | `self_attention` | [`self_attention()`]: attention with its projections |
//! | `embedding` | [`embedding()`] |
//! | `pool` | [`mean_sequences`] |
//! | `mlp` | [`mlp()`], [`gated_mlp`]; [`Mlp`] selects one |
//! | `loss` | [`CrossEntropy`], [`mean_squared_error`] |
//! | `optim` | [`Sgd`], [`AdamW`] on one tensor |
//! | `block` | [`block()`]: the transformer block, and the names of its parameters |
//! | `compare` | [`worst`], [`worst_relative`]: the largest difference of two results |
//!
//! ```
//! use ndarray::array;
//! use shardwise::reference::{linear, linear_backward};
//!
//! let x = array![[1.0, 2.0]];
//! let w = array![[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]];
//! let b = array![0.5, 0.5, 0.5];
//! assert_eq!(linear(&x, &w, Some(&b)), array![[1.5, 2.5, 3.5]]);
//!
//! let grads = linear_backward(&x, &w, &array![[1.0, 0.0, 10.0]]);
//! assert_eq!(grads.dx, array![[11.0, 10.0]]);
//! assert_eq!(grads.db, array![1.0, 0.0, 10.0]);
//! ```

mod activation;
mod attention;
mod block;
mod compare;
mod embedding;
mod linear;
mod loss;
mod mlp;
mod norm;
mod optim;
mod pool;
mod rope;
mod self_attention;
mod softmax;
#[cfg(test)]
mod testing;

pub use activation::{
    Activation, gelu_erf, gelu_erf_backward, gelu_tanh, gelu_tanh_backward, relu, relu_backward, silu,
    silu_backward,
};
pub use attention::{AttentionGrads, AttentionSpec, attention, attention_backward};
pub use block::{BlockGrads, BlockWeights, NormPlacement, block, block_backward};
pub use compare::{worst, worst_relative};
pub use embedding::{embedding, embedding_backward};
pub use linear::{LinearGrads, linear, linear_backward};
pub use loss::{CrossEntropy, mean_squared_error};
pub use mlp::{
    GatedMlpGrads, GatedMlpWeights, Mlp, MlpGrads, MlpWeights, gated_mlp, gated_mlp_backward, mlp,
    mlp_backward,
};
pub use norm::{
    LayerNormGrads, Norm, RmsNormGrads, layer_norm, layer_norm_backward, rms_norm, rms_norm_backward,
};
pub use optim::{AdamW, Sgd};
pub use pool::{mean_sequences, mean_sequences_backward};
pub use rope::{rope, rope_backward};
pub use self_attention::{AttentionWeights, SelfAttentionGrads, self_attention, self_attention_backward};
pub use softmax::{log_sum_exp, log_sum_exp_backward, softmax, softmax_backward};
