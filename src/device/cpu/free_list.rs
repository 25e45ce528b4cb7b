//! The free lists of the CPU's pool: one list for each element type, sorted by size class.

use half::{bf16, f16};
use std::{cell::RefCell, collections::BTreeMap, sync::Arc};

/// The free lists of one rank.
#[derive(Default)]
pub struct FreeLists {
    pub(in super::super) f64: RefCell<FreeList<f64>>,
    pub(in super::super) f32: RefCell<FreeList<f32>>,
    pub(in super::super) bf16: RefCell<FreeList<bf16>>,
    pub(in super::super) f16: RefCell<FreeList<f16>>,
}

/// The vectors of one element type that no tensor of the rank uses.
#[derive(Debug)]
pub struct FreeList<T> {
    /// Vectors that can be reused, by capacity.
    pub(super) idle: BTreeMap<usize, Vec<Vec<T>>>,
    /// Vectors that other ranks may still read.
    pub(super) lent: Vec<Arc<Vec<T>>>,
}

impl<T> Default for FreeList<T> {
    fn default() -> Self {
        Self { idle: BTreeMap::new(), lent: Vec::new() }
    }
}
