//! The groups of a mesh.

use super::Group;
use crate::{
    device::Device,
    error::{Result, Site, same_size},
    kernels::Pointwise,
    shard::{Axis, Mesh},
};

/// A rank's place in a [`Mesh`], with its group along each axis.
///
/// Along [`Axis::Tensor`] stand the ranks that share this rank's operators, along [`Axis::Data`] those that hold the same
/// parameters, along [`Axis::Pipeline`] those that hold the other layers.
#[derive(Clone, Debug)]
pub struct DeviceMesh<B: Device> {
    mesh: Mesh,
    world: Group<B>,
    axes: [Group<B>; 3],
}

impl<B: Pointwise> DeviceMesh<B> {
    /// Divides a group into the lines of a mesh, which are called `world/dp0`, `world/pp0`,
    /// `world/tp0` and so on: the axis and the line's number ([`Mesh::line`]). Every rank of the
    /// group calls it.
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
    /// The grid.
    pub fn mesh(&self) -> Mesh {
        self.mesh
    }

    /// All ranks.
    pub fn world(&self) -> &Group<B> {
        &self.world
    }

    /// The ranks that differ from this one along an axis only.
    pub fn group(&self, axis: Axis) -> &Group<B> {
        &self.axes[axis as usize]
    }
}
