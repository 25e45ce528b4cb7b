//! Dropout on a device without memory.

use super::{Dropout, DropoutMask, check};
use crate::{
    device::{Element, Meta, WorkKind},
    error::Result,
    kernels::{MatMut, MatRef},
};

impl Dropout for Meta {
    fn dropout<T: Element>(
        &self,
        mask: &DropoutMask,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(mask, x.dims(), y.dims())?;
        self.record_elementwise::<T>(WorkKind::Dropout, x.bytes(), &[y.bytes()]);
        Ok(())
    }
}
