//! Tensors spread over a group of ranks, and the layers that act on them. Only this module calls
//! both operators and communicators.
//!
//! The type of a [`DTensor`] contains its placement. A [`Layer`] maps a tensor of placement `In` to
//! a tensor of placement `Out`. Its backward maps a gradient of placement `Out::Dual` to a gradient
//! of placement `In::Dual`. [`Layer::then`] chains two layers if the output of the first has the
//! placement of the second's input. Otherwise the program does not compile, for example if the
//! first layer gives an unreduced sum or a shard, but the second layer takes the whole tensor. The
//! compiler's message names the missing mapping ([`Fits`]).
//!
//! | folder | holds |
//! |---|---|
//! | `dtensor/` | tensors, and the algebra of their placements |
//! | `sums/` | the order of sums over the ranks |
//! | `layers/` | layers, and their composition |
//! | `vocabulary/` | embeddings and cross entropy, sharded by vocabulary |
//! | `generation/` | the cache of keys and values, and sampling |
//!
//! | layer | placements | collectives, forward / backward |
//! |---|---|---|
//! | [`CopyTo`] | Replicated → Copied | none / all-reduce |
//! | [`ReduceFrom`] | Partial → Replicated | all-reduce / none |
//! | [`ScatterTo<D>`](ScatterTo) | Replicated → Shard\<D\> | none / all-gather |
//! | [`GatherFrom<D>`](GatherFrom) | Shard\<D\> → Replicated | all-gather / none |
//! | [`GatherSequence`] | Shard<0> → Copied | all-gather / reduce-scatter |
//! | [`ReduceScatterSequence`] | Partial → Shard<0> | reduce-scatter / all-gather |
//! | [`ScatterSequence`], which is `ScatterTo<0>` | Replicated → Shard<0> | none / all-gather |
//! | [`ColumnLinear`] | Copied → Shard<1> | none / none, or all-reduce of dY ¹ |
//! | [`RowLinear`] | Shard<1> → Partial | none / none |
//! | [`ColumnParallelLinear<S>`](ColumnParallelLinear) | S → Shard<1> | those of S entering |
//! | [`RowParallelLinear<S>`](RowParallelLinear) | Shard<1> → S | those of S leaving and AddBias |
//! | [`Enter<S, L>`](Enter) of a [`Linear`] layer | S → Shard<1> | those of S entering |
//! | [`Leave<S, L>`](Leave) of a [`Linear`] layer | Shard<1> → S | those of S leaving |
//! | [`ReplicatedLinear`], [`MeanPool`] | Replicated → Replicated | none |
//! | [`Activate<P>`](Activate), [`Gate`] | P → P, Shard<1> → Shard<1> | none |
//! | [`Attention`] | Shard<1> → Shard<1> | none / none, or all-reduce of dγ ² |
//! | [`Normalize<S>`](Normalize) | S → S | none / none, or all-reduce of dγ and dβ ³ |
//! | [`AddBias<S>`](AddBias) | S → S | none / none, or all-reduce of db ³ |
//! | [`Dropout<P>`](Dropout) | P → P | none |
//! | [`VocabParallelEmbedding<S>`](VocabParallelEmbedding) | ids → S | those of S leaving |
//! | [`PositionEmbedding<S>`](PositionEmbedding) | S → S | none / none, or all-reduce of dP ³ |
//! | [`VocabParallelCrossEntropy`] | Shard<1> → losses | two small all-reduces / none |
//! | [`Vec<L>`](Layer), [`BoxLayer`] | those of L | those of L |
//! | [`Recompute<L>`](Recompute) | those of L | L forward / L forward and backward |
//! | [`Residual<L>`](Residual) | S → S | those of L |
//! | [`ParallelMlp`], [`ParallelAttention`] | S → S | those of their layers |
//! | [`TransformerBlock`] | S → S | those of its layers |
//!
//! ¹ All-reduce only if several ranks hold a key/value head. ² All-reduce only with normalized
//! heads ([`QkNorm`]). ³ All-reduce only with sequence parallelism. While a parameter keeps the
//! terms of samples ([`Param::keep_terms`](crate::tensor::Param::keep_terms)), the all-reduce is of
//! the sums of each sample, and that of dP is an all-gather of dY.
//!
//! S is the placement of the residual stream ([`ResidualStream`]):
//!
//! | S | entering, forward / backward | leaving, forward / backward |
//! |---|---|---|
//! | `Replicated` | none / all-reduce | all-reduce / none |
//! | `Shard<0>`, sequence parallelism | all-gather / reduce-scatter | reduce-scatter / all-gather |

mod dtensor;
mod generation;
mod layers;
mod sums;
mod vocabulary;

pub use dtensor::{DTensor, DropoutState, Fits, PendingDTensor, ResidualStream};
pub use generation::{Context, KvCache, Sampler};
pub use layers::{
    Activate, AddBias, Attention, AttentionConfig, AttentionSaved, Bias, BlockConfig, BlockNames, BoxLayer,
    Chain, ColumnLinear, ColumnParallelLinear, Columns, CopyTo, Dropout, Enter, Follows, Gate, GatherFrom,
    GatherSequence, Layer, Leave, Linear, MeanPool, MeasuredOverlap, MlpNames, MlpSaved, NormPlacement,
    Normalize, ParallelAttention, ParallelMlp, QkNorm, QkvLayout, Recompute, RecomputeSaved, ReduceFrom,
    ReduceScatterSequence, ReplicatedLinear, Residual, RowLinear, RowParallelLinear, ScatterSequence,
    ScatterTo, TransformerBlock,
};
pub use vocabulary::{
    CrossEntropySaved, Losses, PositionEmbedding, Smoothing, VocabParallelCrossEntropy,
    VocabParallelEmbedding,
};
