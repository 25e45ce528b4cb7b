//! Linear layers: column-parallel, row-parallel and replicated.

mod column;
mod columns;
mod enter_leave;
mod qkv_layout;
mod replicated;
mod row;

pub use {
    column::{ColumnLinear, ColumnParallelLinear},
    columns::{Bias, Columns},
    enter_leave::{Enter, Leave, Linear},
    qkv_layout::QkvLayout,
    replicated::ReplicatedLinear,
    row::{RowLinear, RowParallelLinear},
};
