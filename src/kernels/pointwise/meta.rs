//! Element-wise kernels on a device without memory: recorded with the bytes of their operands.

use super::{Activation, Pointwise, check, check_dot_rows, check_gate_backward, check_row, check_scale_rows};
use crate::{
    device::{Device, Element, Meta, MetaSlice, MetaSliceMut, WorkKind},
    error::Result,
    kernels::{MatMut, MatRef, view::unit_columns},
};

impl Pointwise for Meta {
    fn activate<T: Element>(
        &self,
        _: Activation,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("activation", &[("x", x.dims())], ("y", y.dims()))?;
        self.record_elementwise::<T>(WorkKind::Activation, x.bytes(), &[y.bytes()]);
        Ok(())
    }

    fn activate_backward<T: Element>(
        &self,
        _: Activation,
        x: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("activation backward", &[("x", x.dims()), ("dy", dy.dims())], ("dx", dx.dims()))?;
        self.record_elementwise::<T>(WorkKind::Activation, x.bytes(), &[dy.bytes(), dx.bytes()]);
        Ok(())
    }

    fn gate<T: Element>(
        &self,
        _: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("gate", &[("gate", gate.dims()), ("up", up.dims())], ("y", y.dims()))?;
        self.record_elementwise::<T>(WorkKind::Activation, gate.bytes(), &[up.bytes(), y.bytes()]);
        Ok(())
    }

    fn gate_backward<T: Element>(
        &self,
        _: Activation,
        gate: MatRef<'_, T, Self>,
        up: MatRef<'_, T, Self>,
        dy: MatRef<'_, T, Self>,
        d: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_gate_backward(gate.dims(), up.dims(), dy.dims(), d.dims())?;
        self.record_elementwise::<T>(
            WorkKind::Activation,
            gate.bytes(),
            &[up.bytes(), dy.bytes(), d.bytes()],
        );
        Ok(())
    }

    fn add<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("add", &[("a", a.dims()), ("b", b.dims())], ("y", y.dims()))?;
        self.record_elementwise::<T>(WorkKind::Other, a.bytes(), &[b.bytes(), y.bytes()]);
        Ok(())
    }

    fn mul<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check("mul", &[("a", a.dims()), ("b", b.dims())], ("y", y.dims()))?;
        self.record_elementwise::<T>(WorkKind::Other, a.bytes(), &[b.bytes(), y.bytes()]);
        Ok(())
    }

    fn scale_rows<T: Element>(
        &self,
        s: MetaSlice<'_, T>,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_scale_rows(Self::len(s), x.dims(), y.dims())?;
        self.record_elementwise::<T>(WorkKind::Other, x.bytes(), &[s.bytes(), y.bytes()]);
        Ok(())
    }

    fn dot_rows<T: Element>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        s: MetaSliceMut<'_, T>,
    ) -> Result<()> {
        check_dot_rows(a.dims(), b.dims(), Self::len_mut(&s))?;
        self.record_elementwise::<T>(WorkKind::Other, a.bytes(), &[b.bytes(), s.bytes()]);
        Ok(())
    }

    fn accumulate<T: Element, Y: Element<Acc = T::Acc>>(
        &self,
        x: MatRef<'_, T, Self>,
        y: MatMut<'_, Y, Self>,
    ) -> Result<()> {
        check("accumulate", &[("x", x.dims())], ("y", y.dims()))?;
        self.record_elementwise::<T>(WorkKind::Other, x.bytes(), &[2 * y.bytes()]);
        Ok(())
    }

    fn add_bias<T: Element>(&self, bias: MetaSlice<'_, T>, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("bias", y.dims())?;
        check_row("bias", "the bias", Self::len(bias), y.cols())?;
        self.record_elementwise::<T>(WorkKind::Other, 2 * y.bytes(), &[bias.bytes()]);
        Ok(())
    }

    fn sum_rows<T: Element>(&self, x: MatRef<'_, T, Self>, sums: MetaSliceMut<'_, T::Acc>) -> Result<()> {
        unit_columns("bias gradient", x.dims())?;
        check_row("bias gradient", "the gradient", Self::len_mut(&sums), x.cols())?;
        self.record_elementwise::<T>(WorkKind::Other, x.bytes(), &[sums.bytes()]);
        Ok(())
    }

    fn copy<T: Element, Y: Element>(&self, x: MatRef<'_, T, Self>, y: MatMut<'_, Y, Self>) -> Result<()> {
        check("copy", &[("x", x.dims())], ("y", y.dims()))?;
        self.record_elementwise::<T>(WorkKind::Other, x.bytes(), &[y.bytes()]);
        Ok(())
    }

    fn scale<T: Element>(&self, _: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("scale", y.dims())?;
        self.record_elementwise::<T>(WorkKind::Other, 2 * y.bytes(), &[]);
        Ok(())
    }

    fn fill<T: Element>(&self, _: f64, y: MatMut<'_, T, Self>) -> Result<()> {
        unit_columns("fill", y.dims())?;
        self.record_elementwise::<T>(WorkKind::Other, y.bytes(), &[]);
        Ok(())
    }
}
