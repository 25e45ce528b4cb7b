//! LayerNorm and RMSNorm on a device without memory.

use super::{Norm, NormKind, check};
use crate::{
    device::{Device, Element, Meta, MetaSlice, MetaSliceMut, WorkKind},
    error::Result,
    kernels::{MatMut, MatRef},
};

impl Norm for Meta {
    fn normalize<T: Element>(
        &self,
        _: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: MetaSlice<'_, T>,
        beta: Option<MetaSlice<'_, T>>,
        y: MatMut<'_, T, Self>,
        stats: MetaSliceMut<'_, T::Acc>,
    ) -> Result<()> {
        let vectors = [("gamma", Self::len(gamma)), ("beta", beta.map_or(y.cols(), Self::len))];
        check("norm", &[("x", x.dims())], y.dims(), &vectors, Self::len_mut(&stats))?;
        let beta = beta.map_or(0, |beta| beta.bytes());
        self.record_elementwise::<T>(
            WorkKind::Norm,
            x.bytes(),
            &[gamma.bytes(), beta, y.bytes(), stats.bytes()],
        );
        Ok(())
    }

    fn normalize_backward<T: Element>(
        &self,
        _: NormKind,
        x: MatRef<'_, T, Self>,
        gamma: MetaSlice<'_, T>,
        stats: MetaSlice<'_, T::Acc>,
        dy: MatRef<'_, T, Self>,
        dx: MatMut<'_, T, Self>,
        dgamma: MetaSliceMut<'_, T::Acc>,
        dbeta: Option<MetaSliceMut<'_, T::Acc>>,
    ) -> Result<()> {
        let dbeta_len = dbeta.as_ref().map_or(dx.cols(), Self::len_mut);
        let vectors = [("gamma", Self::len(gamma)), ("dgamma", Self::len_mut(&dgamma)), ("dbeta", dbeta_len)];
        let inputs = [("x", x.dims()), ("dy", dy.dims())];
        check("norm backward", &inputs, dx.dims(), &vectors, Self::len(stats))?;
        let read = [gamma.bytes(), stats.bytes(), dy.bytes()];
        let written = [dx.bytes(), dgamma.bytes(), dbeta.map_or(0, |dbeta| dbeta.bytes())];
        self.record_elementwise::<T>(WorkKind::Norm, x.bytes(), &[read, written].concat());
        Ok(())
    }
}
