//! Tensors spread over a group, and the layers that act on them: the one place where operators and communicators meet.
//!
//! A [`DTensor`] carries its placement in its type. A [`Layer`] maps one placement to another, and its backward maps the
//! dual of the second to the dual of the first; layers fit together ([`Layer::then`]) when the placements between them are
//! the same. So a sum that was not reduced, or a part used for a whole, does not compile. The
//! message names the mapping that is missing ([`Fits`]).
//!
//! | layer | placements | collectives, forward / backward |
//! |---|---|---|
//! | [`CopyTo`] | Replicated → Copied | none / all-reduce |
//! | [`ReduceFrom`] | Partial → Replicated | all-reduce / none |
//! | [`ScatterTo<D>`](ScatterTo), made by `::even()` or `::new(cut)` | Replicated → Shard\<D\> | none / all-gather |
//! | [`GatherFrom<D>`](GatherFrom) | Shard\<D\> → Replicated | all-gather / none |
//! | [`GatherSequence`] | Shard<0> → Copied | all-gather / reduce-scatter |
//! | [`ReduceScatterSequence`] | Partial → Shard<0> | reduce-scatter / all-gather |
//! | [`ScatterSequence`], which is `ScatterTo<0>` | Replicated → Shard<0> | none / all-gather |
//! | [`ColumnLinear`] | Copied → Shard<1> | none / none (with key/value heads that several ranks hold: all-reduce of their dY) |
//! | [`RowLinear`] | Shard<1> → Partial | none / none |
//! | [`ColumnParallelLinear<S>`](ColumnParallelLinear) | S → Shard<1> | those of S entering |
//! | [`RowParallelLinear<S>`](RowParallelLinear) | Shard<1> → S | those of S leaving; a bias as [`AddBias`] |
//! | [`Enter<S, L>`](Enter), [`Leave<S, L>`](Leave) of a [`Linear`] layer | S → Shard<1>, Shard<1> → S | those of S entering, leaving |
//! | [`ReplicatedLinear`], [`MeanPool`] | Replicated → Replicated | none |
//! | [`Activate<P>`](Activate), [`Gate`] | P → P, Shard<1> → Shard<1> | none |
//! | [`Attention`] | Shard<1> → Shard<1> | none / none (with normalized heads: all-reduce of their dγ) |
//! | [`Normalize<S>`](Normalize) | S → S | none / none, or all-reduce of dγ and dβ with sequence parallelism |
//! | [`AddBias<S>`](AddBias) | S → S | none / none, or all-reduce of db with sequence parallelism |
//! | [`Dropout<P>`](Dropout) | P → P | none |
//! | [`VocabParallelEmbedding<S>`](VocabParallelEmbedding) | ids → S | those of S leaving |
//! | [`PositionEmbedding<S>`](PositionEmbedding) | S → S | as [`Normalize<S>`](Normalize) |
//! | [`VocabParallelCrossEntropy`] | Shard<1> → losses | two all-reduces of a few numbers a token / none |
//! | [`Vec<L>`](Layer), [`Recompute<L>`](Recompute), [`BoxLayer`] | those of L | those of L; recomputed ones twice |
//! | [`Residual<L>`](Residual) | S → S | those of L |
//! | [`ParallelMlp`], [`ParallelAttention`], [`TransformerBlock`] | S → S | entering and leaving, and those of biases and norms |
//!
//! S is the placement of the residual stream ([`ResidualStream`]): `Replicated` (entering: none / all-reduce; leaving: all-reduce /
//! none), or `Shard<0>` for sequence parallelism (entering: all-gather / reduce-scatter; leaving: reduce-scatter /
//! all-gather).

mod activation;
mod attention;
mod bias;
mod block;
mod column;
mod columns;
mod cross_entropy;
mod dropout;
mod dtensor;
mod embedding;
mod fits;
mod kv_cache;
mod layer;
mod mappings;
mod mean_pool;
mod measured;
mod mlp;
mod norm;
mod overlap;
mod partial;
mod recompute;
mod region;
mod replicated;
mod residual;
mod residual_stream;
mod row;
mod sample;
mod stack;
mod sums;

pub use activation::{Activate, Gate};
pub use attention::{Attention, AttentionConfig, AttentionSaved, ParallelAttention, QkNorm};
pub use bias::AddBias;
pub use block::{BlockConfig, BlockNames, NormPlacement, TransformerBlock};
pub use column::{ColumnLinear, ColumnParallelLinear};
pub use columns::{Bias, Columns, QkvLayout};
pub use cross_entropy::{CrossEntropySaved, Losses, Smoothing, VocabParallelCrossEntropy};
pub use dropout::Dropout;
pub use dtensor::{DTensor, DropoutState};
pub use embedding::{PositionEmbedding, VocabParallelEmbedding};
pub use fits::{Fits, Follows};
pub use kv_cache::{Context, KvCache};
pub use layer::{Chain, Layer};
pub use mappings::{
    CopyTo, GatherFrom, GatherSequence, ReduceFrom, ReduceScatterSequence, ScatterSequence, ScatterTo,
};
pub use mean_pool::MeanPool;
pub use measured::MeasuredOverlap;
pub use mlp::{MlpNames, MlpSaved, ParallelMlp};
pub use norm::Normalize;
pub use partial::PendingDTensor;
pub use recompute::{Recompute, RecomputeSaved};
pub use region::{Enter, Leave, Linear};
pub use replicated::ReplicatedLinear;
pub use residual::Residual;
pub use residual_stream::ResidualStream;
pub use row::{RowLinear, RowParallelLinear};
pub use sample::Sampler;
pub use stack::BoxLayer;
