//! Updates on a device without memory.

use super::{AdamWStep, SgdStep, Update, check, check_square_sums};
use crate::{
    device::{Device, Element, Meta, MetaSlice, MetaSliceMut, WorkKind},
    error::Result,
    kernels::MatRef,
};

/// The bytes that the update of a weight reads and writes. With a master weight, the weight is only
/// written.
fn updated<T: Element>(weight: &MetaSliceMut<'_, T>, master: Option<MetaSliceMut<'_, T::Acc>>) -> u128 {
    master.map_or(2 * weight.bytes(), |master| weight.bytes() + 2 * master.bytes())
}

impl Update for Meta {
    fn sgd<T: Element>(
        &self,
        _: &SgdStep,
        grad: MetaSlice<'_, T::Acc>,
        weight: MetaSliceMut<'_, T>,
        master: Option<MetaSliceMut<'_, T::Acc>>,
        velocity: Option<MetaSliceMut<'_, T::Acc>>,
    ) -> Result<()> {
        let lens = [
            ("the gradient", Some(Self::len(grad))),
            ("the master weights", master.as_ref().map(Self::len_mut)),
            ("the velocity", velocity.as_ref().map(Self::len_mut)),
        ];
        check("sgd", Self::len_mut(&weight), &lens)?;
        let velocity = velocity.map_or(0, |velocity| velocity.bytes());
        self.record_elementwise::<T>(
            WorkKind::Update,
            grad.bytes(),
            &[updated(&weight, master), 2 * velocity],
        );
        Ok(())
    }

    fn adamw<T: Element>(
        &self,
        _: &AdamWStep,
        grad: MetaSlice<'_, T::Acc>,
        weight: MetaSliceMut<'_, T>,
        master: Option<MetaSliceMut<'_, T::Acc>>,
        [first, second]: [MetaSliceMut<'_, T::Acc>; 2],
    ) -> Result<()> {
        let lens = [
            ("the gradient", Some(Self::len(grad))),
            ("the master weights", master.as_ref().map(Self::len_mut)),
            ("the first moment", Some(Self::len_mut(&first))),
            ("the second moment", Some(Self::len_mut(&second))),
        ];
        check("adamw", Self::len_mut(&weight), &lens)?;
        let moments = first.bytes() + second.bytes();
        self.record_elementwise::<T>(
            WorkKind::Update,
            grad.bytes(),
            &[updated(&weight, master), 2 * moments],
        );
        Ok(())
    }

    fn square_sums<T: Element>(&self, x: MatRef<'_, T, Self>, sums: MetaSliceMut<'_, f64>) -> Result<()> {
        check_square_sums(x.dims(), Self::len_mut(&sums))?;
        self.record_elementwise::<T>(WorkKind::Update, x.bytes(), &[sums.bytes()]);
        Ok(())
    }
}
