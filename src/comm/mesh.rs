//! The groups of a mesh.

use super::Group;
use crate::{
    device::Device,
    error::{Result, Site, same_size},
    kernels::Pointwise,
    shard::{Axis, Mesh, Reduction},
};

/// A rank's groups along the axes of a [`Mesh`].
///
/// The ranks along [`Axis::Tensor`] share each operator with this rank. The ranks along
/// [`Axis::Data`] hold the same parameters as this rank, and the ranks along [`Axis::Pipeline`]
/// hold the other layers.
///
/// ```
/// use shardwise::prelude::*;
/// let sums = launch::threads(4, |world| {
///     let mesh = DeviceMesh::new(&world, Mesh::new(2, 1, 2)?)?;
///     let sum = |axis| mesh.group(axis).all_reduce_host(ReduceOp::Sum, &[world.rank() as f32]);
///     Ok((sum(Axis::Tensor)?[0], sum(Axis::Data)?[0]))
/// })?;
/// // Ranks {0, 1} and {2, 3} are tensor parallel, {0, 2} and {1, 3} data parallel.
/// assert_eq!(sums, [(1.0, 2.0), (1.0, 4.0), (5.0, 2.0), (5.0, 4.0)]);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct DeviceMesh<B: Device> {
    mesh: Mesh,
    world: Group<B>,
    axes: [Group<B>; 3],
}

impl<B: Pointwise> DeviceMesh<B> {
    /// Splits a group into the lines of a mesh. A line's name has the axis and the line's index
    /// ([`Mesh::line`]), such as `world/dp0`, `world/pp0` or `world/tp0`. Call it on every rank.
    ///
    /// # Errors
    /// When the group does not have as many ranks as the mesh.
    #[track_caller]
    pub fn new(world: &Group<B>, mesh: Mesh) -> Result<Self> {
        same_size("mesh", "the ranks of the mesh", mesh.len(), "the ranks of the group", world.size())?;
        let _site = Site::here().enter();
        let line = |axis| {
            let line = mesh.line(world.rank(), axis);
            world.split_all_named(line as u64, &format!("{axis}{line}"))
        };
        let axes = [line(Axis::Data)?, line(Axis::Pipeline)?, line(Axis::Tensor)?];
        Ok(Self { mesh, world: world.clone(), axes })
    }
}

impl<B: Device> DeviceMesh<B> {
    /// The mesh.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// The group of all ranks.
    pub fn world(&self) -> &Group<B> {
        &self.world
    }

    /// Returns a mesh whose handle of the group along `axis` has another reduction
    /// ([`Group::with_reduction`]).
    pub fn with_reduction(mut self, axis: Axis, reduction: Reduction) -> Self {
        let group = &mut self.axes[axis as usize];
        *group = group.with_reduction(reduction);
        self
    }

    /// The group of the ranks whose coordinates differ from this rank's only along `axis`.
    pub fn group(&self, axis: Axis) -> &Group<B> {
        &self.axes[axis as usize]
    }
}
