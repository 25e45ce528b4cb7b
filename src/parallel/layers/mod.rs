//! Layers: differentiable maps between placements.

mod activation;
mod attention;
mod bias;
mod block;
mod dropout;
mod layer;
mod linear;
mod mappings;
mod mean_pool;
mod measured_overlap;
mod mlp;
mod norm;
mod recompute;
mod residual;
mod stack;

pub use {
    activation::{Activate, Gate},
    attention::{Attention, AttentionConfig, AttentionSaved, ParallelAttention, QkNorm},
    bias::AddBias,
    block::{BlockConfig, BlockNames, NormPlacement, TransformerBlock},
    dropout::Dropout,
    layer::{Chain, Follows, Layer},
    linear::{
        Bias, ColumnLinear, ColumnParallelLinear, Columns, Enter, Leave, Linear, QkvLayout, ReplicatedLinear,
        RowLinear, RowParallelLinear,
    },
    mappings::{
        CopyTo, GatherFrom, GatherSequence, ReduceFrom, ReduceScatterSequence, ScatterSequence, ScatterTo,
    },
    mean_pool::MeanPool,
    measured_overlap::MeasuredOverlap,
    mlp::{MlpNames, MlpSaved, ParallelMlp},
    norm::Normalize,
    recompute::{Recompute, RecomputeSaved},
    residual::Residual,
    stack::BoxLayer,
};
