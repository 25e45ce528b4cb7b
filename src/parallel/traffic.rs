//! What a layer says that it will move.

use crate::{
    comm::{Group, Op, Transfer},
    device::Element,
    kernels::Backend,
    shard::Shape,
};

/// The collectives of a layer in the order in which it calls them. What [`crate::comm::Recorded`] writes down is equal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Those of the forward.
    pub forward: Vec<Transfer>,
    /// Those of the backward.
    pub backward: Vec<Transfer>,
}

impl Traffic {
    /// This layer's traffic, then another's: forward in order, backward in reverse.
    pub fn then(mut self, next: Self) -> Self {
        self.forward.extend(next.forward);
        let mut backward = next.backward;
        backward.extend(self.backward);
        Self { forward: self.forward, backward }
    }

    /// A sum over the ranks of a tensor of this shape, in the forward.
    pub(super) fn sum<T: Element, B: Backend>(group: &Group<B>, shape: Shape) -> Self {
        let forward = match group.tree() {
            Ok(Some(tree)) => group.tree_transfers::<T>(&tree, shape, None),
            _ => vec![transfer::<T>(Op::AllReduce, shape.len())],
        };
        Self { forward, backward: Vec::new() }
    }

    /// Each rank's rows of such a sum.
    pub(super) fn sum_rows<T: Element, B: Backend>(group: &Group<B>, shape: Shape) -> Self {
        let forward = match group.tree().and_then(|tree| Ok(tree.zip(Some(group.even_cut(shape.dims()[0])?))))
        {
            Ok(Some((tree, cut))) => group.tree_transfers::<T>(&tree, shape, Some((0, &cut))),
            _ => vec![transfer::<T>(Op::ReduceScatter, shape.len())],
        };
        Self { forward, backward: Vec::new() }
    }

    /// The same in the backward.
    pub(super) fn in_backward(self) -> Self {
        Self { forward: Vec::new(), backward: self.forward }
    }

    /// One collective in the forward.
    pub(super) fn forward<T: Element>(op: Op, elements: usize) -> Self {
        Self { forward: vec![transfer::<T>(op, elements)], backward: Vec::new() }
    }

    /// One collective in the backward.
    pub(super) fn backward<T: Element>(op: Op, elements: usize) -> Self {
        Self { forward: Vec::new(), backward: vec![transfer::<T>(op, elements)] }
    }
}

fn transfer<T: Element>(op: Op, elements: usize) -> Transfer {
    Transfer { op, dtype: T::DTYPE, elements }
}
