//! Quantized weights on a device without memory.

use super::{Quantized, QuantizedShape, ReadBlocks, check, check_rows, panel};
use crate::{
    device::{Device, Element, Meta, MetaBuffer, WorkKind},
    error::Result,
    kernels::{MatMut, MatRef},
};
use half::f16;
use std::ops::Range;

/// The shape of a quantized matrix, and its bytes on a CPU.
#[derive(Debug)]
pub struct MetaQuantized {
    shape: QuantizedShape,
    /// As large as the panels.
    panels: MetaBuffer<f16>,
}

impl MetaQuantized {
    /// The bytes of a part of the matrix.
    fn part(&self, rows: usize, columns: usize) -> u128 {
        let (all, len) = (Meta::slice(&self.panels).bytes(), self.shape.rows * self.shape.columns.len());
        all * rows as u128 * columns as u128 / len.max(1) as u128
    }
}

impl Quantized for Meta {
    type QuantizedMatrix = MetaQuantized;

    fn quantized_matrix(&self, shape: QuantizedShape, _: &mut ReadBlocks<'_>) -> Result<MetaQuantized> {
        let panels = self.empty(panel::bytes(&shape) / size_of::<f16>())?;
        Ok(MetaQuantized { shape, panels })
    }

    fn quantized_shape(w: &MetaQuantized) -> &QuantizedShape {
        &w.shape
    }

    fn quantized_product<T: Element, C: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: &MetaQuantized,
        columns: Range<usize>,
        y: MatMut<'_, C, Self>,
    ) -> Result<()> {
        check(&x, &w.shape, &columns, &y)?;
        let flops = [x.rows(), x.cols(), w.shape.rows]
            .iter()
            .fold(2, |all: u128, size| all.saturating_mul(*size as u128));
        let weights = w.part(w.shape.rows, columns.len());
        self.record(WorkKind::Product, T::DTYPE, flops, weights + x.bytes() + y.bytes());
        Ok(())
    }

    fn dequantize<T: Element>(
        &self,
        w: &MetaQuantized,
        rows: &[u32],
        columns: Range<usize>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check_rows(&w.shape, rows, &columns, &y)?;
        let read = w.part(rows.len(), columns.len());
        self.record_elementwise::<T>(WorkKind::Other, y.bytes(), &[read]);
        Ok(())
    }
}
