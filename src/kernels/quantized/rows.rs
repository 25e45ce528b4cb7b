//! Activations, quantized to 8 bits in chunks of 32 columns.

use super::format::CHUNK;
use crate::{
    device::{Cpu, Element, vectorized, zeroed},
    error::Result,
    kernels::MatRef,
};
use std::ops::Range;

/// Rows of activations. Number i of a chunk is d · code\[i\], where d is the largest absolute
/// value of the chunk / 127. A chunk with a number that is not finite has d = NaN.
///
/// Chunks start at multiples of 32 columns of the *whole* tensor. The columns that a rank, or a
/// leaf of a sum, does not hold have the code 0.
///
/// For products with FP8 weights, rows have the numbers themselves as f32.
pub(super) struct Rows {
    codes: Vec<XChunk>,
    numbers: Vec<[f32; CHUNK]>,
    /// The chunks of a row.
    pub(super) chunks: Range<usize>,
    pub(super) tokens: usize,
}

/// A chunk of a row of activations.
#[derive(Clone, Copy, Default)]
pub(super) struct XChunk {
    pub(super) d: f32,
    /// The sums of the codes of both halves.
    pub(super) sums: [i32; 2],
    codes: [i8; CHUNK],
}

impl XChunk {
    /// The codes of columns 4 `at` .. 4 `at` + 4, the first of them in the low bits.
    #[inline(always)]
    pub(super) fn quad(&self, at: usize) -> i32 {
        // Without `array::map`, which is a call in builds without link-time optimization.
        let [a, b, c, d] = self.codes.as_chunks().0[at];
        i32::from_le_bytes([a as u8, b as u8, c as u8, d as u8])
    }
}

impl Rows {
    /// Quantizes rows whose columns are `columns` of the whole tensor.
    ///
    /// # Errors
    /// When memory runs out.
    pub(super) fn quantize<T: Element>(x: MatRef<'_, T, Cpu>, columns: &Range<usize>) -> Result<Self> {
        let chunks = columns.start / CHUNK..columns.end.div_ceil(CHUNK);
        let codes = of_chunks(x, columns, quantize)?;
        Ok(Self { codes, numbers: Vec::new(), chunks, tokens: x.rows() })
    }

    /// Widens rows whose columns are `columns` of the whole tensor to f32.
    ///
    /// # Errors
    /// When memory runs out.
    pub(super) fn widen<T: Element>(x: MatRef<'_, T, Cpu>, columns: &Range<usize>) -> Result<Self> {
        let chunks = columns.start / CHUNK..columns.end.div_ceil(CHUNK);
        let numbers = of_chunks(x, columns, |numbers| *numbers)?;
        Ok(Self { codes: Vec::new(), numbers, chunks, tokens: x.rows() })
    }

    /// The chunks of a quantized row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &[XChunk] {
        &self.codes[row * self.chunks.len()..][..self.chunks.len()]
    }

    /// The chunks of a row of f32.
    #[inline(always)]
    pub(super) fn numbers(&self, row: usize) -> &[[f32; CHUNK]] {
        &self.numbers[row * self.chunks.len()..][..self.chunks.len()]
    }
}

/// Computes a function of each chunk of rows whose columns are `columns` of the whole tensor. The
/// numbers of other columns are 0.
fn of_chunks<T: Element, C: Copy + Default>(
    x: MatRef<'_, T, Cpu>,
    columns: &Range<usize>,
    f: impl Fn(&[f32; CHUNK]) -> C,
) -> Result<Vec<C>> {
    let chunks = columns.start / CHUNK..columns.end.div_ceil(CHUNK);
    let mut all = zeroed::<C>(x.rows().saturating_mul(chunks.len()))?;
    // The columns of the first chunk that come before those of x.
    let skipped = columns.start - chunks.start * CHUNK;
    vectorized(|| {
        for (row, of_row) in all.chunks_exact_mut(chunks.len().max(1)).enumerate() {
            let x = x.row(row);
            for (at, chunk) in of_row.iter_mut().enumerate() {
                let start = at * CHUNK;
                let own = start.max(skipped)..(start + CHUNK).min(skipped + x.len());
                let mut padded = [0.0; CHUNK];
                let from = &x[own.start - skipped..own.end - skipped];
                if let Ok(from) = <&[T; CHUNK]>::try_from(from) {
                    padded = from.map(|x| x.to_f64() as f32);
                } else {
                    let to = &mut padded[own.start - start..own.end - start];
                    to.iter_mut().zip(from).for_each(|(to, x)| *to = x.to_f64() as f32);
                }
                *chunk = f(&padded);
            }
        }
    });
    Ok(all)
}

#[inline(always)]
fn quantize(x: &[f32; CHUNK]) -> XChunk {
    // Added to a number below 2²², this rounds the number to an integer, which is then in the low
    // bits.
    const ROUND: f32 = (3 << 22) as f32;
    let d = largest(x) / 127.0;
    let inverse = 1.0 / d;
    if !(d.is_finite() && inverse.is_finite()) {
        // Numbers that are too small to be divided by count as 0.
        return XChunk { d: if d.is_finite() { 0.0 } else { f32::NAN }, ..XChunk::default() };
    }
    let codes = x.map(|x| (x * inverse + ROUND).to_bits() as i8);
    let sum = |codes: &[i8]| codes.iter().map(|code| i32::from(*code)).sum();
    let (left, right) = codes.split_at(CHUNK / 2);
    XChunk { d, sums: [sum(left), sum(right)], codes }
}

/// The largest absolute value: NaN if a value is NaN.
#[inline(always)]
fn largest(x: &[f32; CHUNK]) -> f32 {
    // The bits of absolute values are ordered as the values are, and those of NaN are the largest.
    f32::from_bits(x.iter().map(|x| x.to_bits() & i32::MAX as u32).fold(0, u32::max))
}
