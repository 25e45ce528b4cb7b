//! Partitions, placements and meshes: arithmetic on sizes and ranks, without tensors. Every module
//! of the crate may use this module.
//!
//! * [`Shape`]: the dimensions of a tensor.
//! * [`Partition`]: a dimension divided into one contiguous range per rank, evenly or not.
//! * [`Placement`] and its markers: how the ranks of a group hold one tensor.
//! * [`Heads`]: the query heads that a rank computes, and the key/value heads that these query
//!   heads use.
//! * [`Reduction`], [`Tree`]: the order in which the results of the ranks are added. With
//!   [`Reduction::Invariant`], the order does not depend on the number of ranks.
//! * [`Mesh`]: ranks as points of a grid with named axes.
//! * [`Sequences`]: the sequences in the rows of a `[tokens, features]` tensor.

mod blocks;
mod deal;
mod heads;
mod mesh;
mod partition;
mod placement;
mod sequences;
mod shape;

pub use blocks::{Node, Reduction, Tree, TreeSum, blocks};
pub(crate) use deal::deal;
pub use heads::Heads;
pub use mesh::{Axis, Mesh};
pub use partition::Partition;
pub use placement::{Copied, Elementwise, Partial, Placement, Replicated, Shard};
pub use sequences::Sequences;
pub use shape::Shape;
