//! What a layer says that it will move.

use crate::{
    comm::{Op, Transfer},
    device::Element,
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
