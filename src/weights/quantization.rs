//! A source that quantizes the matrices of another source.

use super::region::check_bytes;
use crate::{
    device::{AnyMut, Cpu, zeroed},
    error::{Error, Result},
    kernels::{Activations, Format},
    tensor::{Region, Role, WeightSource},
};
use std::ops::Range;

/// The number of weights that are read at once, unless a row has more.
const STRIP: usize = 1 << 18;

/// A source that quantizes the matrices of another source when they are loaded.
///
/// Weights share a scale in groups of 32 columns that start at multiples of 32 columns of the whole
/// matrix, so the shards of all ranks have the same numbers at every rank count. The last group of
/// a row may have fewer columns, and is filled up with its last weight, which leaves the range of
/// its weights as it is. With [`Quantization::by_row`], a row has one scale.
///
/// Only matrices that are loaded as a [`Param`](crate::tensor::Param) are quantized, not vectors.
/// [`WeightSource::read`] returns the numbers of the other source. Quantize a
/// [`Transposed`](super::Transposed) source, and not the other way round.
///
/// ```
/// use shardwise::{kernels::Format, prelude::*, weights::Quantization};
/// let mut arrays = Arrays::default();
/// arrays.0.insert("w".into(), ndarray::array![[127.0, -127.0, 3.2]].into_dyn());
/// let source = Quantization::new(&arrays, Format::Q8_0)?;
/// let mut block = [0; 34];
/// source.read_blocks("w", &Region::whole([1, 3]), &mut block)?;
/// assert_eq!(block[..5], [0x00, 0x3c, 127, 129, 3]); // the scale 1 as f16, and the codes
/// # Ok::<(), Error>(())
/// ```
pub struct Quantization<'a, S: ?Sized, F = fn(&str) -> bool> {
    source: &'a S,
    format: Format,
    by_row: bool,
    names: F,
    activations: Activations,
}

impl<'a, S: WeightSource + ?Sized> Quantization<'a, S> {
    /// Quantizes the matrices of `source` to `Q8_0`, `Q4_0` or `Q4_1`, by [`Format::encode`].
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other formats.
    pub fn new(source: &'a S, format: Format) -> Result<Self> {
        format.check_encode()?;
        Ok(Self { source, format, by_row: false, names: |_| true, activations: Activations::default() })
    }
}

impl<'a, S: WeightSource + ?Sized, F: Fn(&str) -> bool> Quantization<'a, S, F> {
    /// Quantizes only the matrices for whose names `names` returns true.
    pub fn only<G: Fn(&str) -> bool>(self, names: G) -> Quantization<'a, S, G> {
        let Self { source, format, by_row, activations, .. } = self;
        Quantization { source, format, by_row, names, activations }
    }

    /// Uses the scale max |x| / 127 over a whole row for each of its blocks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for formats other than `Q8_0`.
    pub fn by_row(self) -> Result<Self> {
        if self.format == Format::Q8_0 {
            return Ok(Self { by_row: true, ..self });
        }
        let reason = format!("one scale for a row of {}, only of Q8_0", self.format);
        Err(Error::Unsupported { op: "quantize", reason })
    }

    /// Sets how products with the quantized weights treat their other factor.
    pub fn with_activations(self, activations: Activations) -> Self {
        Self { activations, ..self }
    }

    /// Quantizes blocks of a row to `out`. `weights` are the row's columns from `first` on.
    fn encode(
        &self,
        weights: &[f32],
        first: usize,
        blocks: Range<usize>,
        out: &mut [u8],
    ) -> Result<(), String> {
        if let Some(at) = weights.iter().position(|weight| !weight.is_finite()) {
            return Err(format!("column {} is {}", first + at, weights[at]));
        }
        let width = self.format.weights();
        let largest = weights.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        let mut padded = vec![0.0; width];
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.format.bytes())) {
            let start = block * width;
            let from = &weights[start - first..weights.len().min(start - first + width)];
            padded[..from.len()].copy_from_slice(from);
            padded[from.len()..].fill(from.last().copied().unwrap_or(0.0));
            let encoded = if self.by_row {
                self.format.encode_scaled(&padded, largest / 127.0, out)
            } else {
                self.format.encode(&padded, out)
            };
            // The sizes fit, and the weights are finite.
            encoded.map_err(|_| format!("columns {start} and up are too large for a scale of f16"))?;
        }
        Ok(())
    }
}

impl<S: WeightSource + ?Sized, F: Fn(&str) -> bool> WeightSource for Quantization<'_, S, F> {
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        self.source.read(name, role, region, out)
    }

    fn contains(&self, name: &str) -> bool {
        self.source.contains(name)
    }

    fn names(&self) -> Option<Vec<String>> {
        self.source.names()
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        self.source.check(name, region)
    }

    /// Returns the format for every name that is selected, because the source does not show which
    /// tensors are matrices.
    fn format(&self, name: &str) -> Option<Format> {
        (self.source.contains(name) && (self.names)(name)).then_some(self.format)
    }

    /// # Errors
    /// [`Error::Invalid`] when the tensor is not a matrix, a weight is not finite, or a scale does
    /// not fit f16; [`Error::Sizes`] when `out` does not have the length of the blocks; the errors
    /// of the source.
    fn read_blocks(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        let bad =
            |reason: &str| Error::invalid("quantize", format!("tensor `{}`: {reason}", name.escape_debug()));
        let shape = region.shape();
        let (&[_, width], [rows, columns]) = (shape.dims(), region.ranges()) else {
            return Err(bad(&format!("shape {shape} is not that of a matrix")));
        };
        let (blocks, size) = (self.format.blocks(columns.clone()), self.format.bytes());
        let row_bytes = blocks.len().saturating_mul(size);
        check_bytes(rows.len().saturating_mul(row_bytes), out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        // The scale of a row needs the whole row.
        let group = self.format.weights();
        let read = if self.by_row { 0..width } else { blocks.start * group..width.min(blocks.end * group) };
        let strip = (STRIP / read.len().max(1)).clamp(1, rows.len());
        let mut weights = zeroed::<f32>(strip.saturating_mul(read.len()))?;
        for (rows, out) in rows.clone().step_by(strip).zip(out.chunks_mut(strip * row_bytes)) {
            let rows = rows..rows + out.len() / row_bytes;
            let weights = &mut weights.as_mut_slice()[..rows.len() * read.len()];
            let part = Region::whole(shape).narrow(0, rows.clone()).narrow(1, read.clone());
            self.source.read(name, Role::Weight, &part, AnyMut::F32(&mut *weights))?;
            for ((row, out), weights) in
                rows.zip(out.chunks_exact_mut(row_bytes)).zip(weights.chunks_exact(read.len()))
            {
                self.encode(weights, read.start, blocks.clone(), out)
                    .map_err(|reason| bad(&format!("row {row}: {reason}")))?;
            }
        }
        Ok(())
    }

    fn activations(&self) -> Activations {
        self.activations
    }
}
