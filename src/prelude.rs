//! The names that most programs use: `use shardwise::prelude::*`.
//!
//! Contains layers, mappings and placements, and the modules whose functions are called by path
//! (`launch::threads`, `weights::save`).

pub use crate::{
    Error, Result, Tensor,
    comm::{DeviceMesh, Group, Overlap, ReduceOp},
    device::{AnyMut, Cpu, DType, Device, Element, Meta},
    kernels::{Activation, AttentionChoices, Backend, NO_ROW, NormKind},
    launch, models, ops, optim,
    parallel::*,
    shard::{
        Axis, Copied, Elementwise, Mesh, Partial, Partition, Placement, Reduction, Replicated, Sequences,
        Shard,
    },
    tensor::{Arrays, Param, ParamRegion, Random, Region, Role, WeightSource, Weights},
    train, weights,
};
