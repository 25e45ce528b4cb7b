//! Rotary position embedding on [`Meta`]: checks the arguments and computes nothing.

use super::{Rope, RopeSpec, check};
use crate::{
    device::{Element, Meta},
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
        check(spec, positions.len(), &x)
    }
}
