//! Rotary position embedding on [`Meta`]: checks the arguments and records the kernel.

use super::{Rope, RopeSpec, check};
use crate::{
    device::{Element, Meta, WorkKind},
    error::Result,
    kernels::MatMut,
};

impl Rope for Meta {
    fn rope<T: Element>(
        &self,
        spec: &RopeSpec<'_>,
        positions: &[u32],
        _: bool,
        x: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(spec, positions.len(), &x)?;
        self.record_elementwise::<T>(WorkKind::Other, 2 * x.bytes(), &[]);
        Ok(())
    }
}
