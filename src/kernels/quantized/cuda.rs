//! Quantized weights on NVIDIA GPUs: there are no kernels yet, and loading one is an error.

use super::{Quantized, QuantizedShape, ReadBlocks};
use crate::{
    device::{Element, cuda::Cuda},
    error::{Error, Result},
    kernels::{MatMut, MatRef},
};
use std::ops::Range;

/// No value: a GPU holds no quantized matrix.
#[derive(Debug)]
pub enum CudaQuantized {}

impl Quantized for Cuda {
    type QuantizedMatrix = CudaQuantized;

    fn quantized_matrix(&self, shape: QuantizedShape, _: &mut ReadBlocks<'_>) -> Result<CudaQuantized> {
        let reason = format!(
            "there are no kernels for {} weights on NVIDIA GPUs yet: dequantize the source (`Gguf::dequantized`)",
            shape.format
        );
        Err(Error::Unsupported { op: "quantized weights", reason })
    }

    fn quantized_shape(w: &CudaQuantized) -> &QuantizedShape {
        match *w {}
    }

    fn quantized_product<T: Element, C: Element>(
        &self,
        _: MatRef<'_, T, Self>,
        w: &CudaQuantized,
        _: Range<usize>,
        _: MatMut<'_, C, Self>,
    ) -> Result<()> {
        match *w {}
    }

    fn dequantize<T: Element>(
        &self,
        w: &CudaQuantized,
        _: &[u32],
        _: Range<usize>,
        _: MatMut<'_, T, Self>,
    ) -> Result<()> {
        match *w {}
    }
}
