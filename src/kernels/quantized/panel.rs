//! Quantized weights in memory: panels of 16 rows, which a product reads from the first byte to the
//! last.
//!
//! A panel has two streams, of codes and of scales, in the order of the columns:
//!
//! * codes, for each chunk of 32 columns: lines of 64 bytes, where byte 4 r + c of line i belongs
//!   to row r and column 4 i + c. Codes of 8 bits have 8 lines. Shorter codes have 4 lines: the low
//!   4 bits of a byte are those of its column, and the high 4 bits those of 16 columns further.
//!   Each of the bits 4 and 5 that a code has is in one more line: bit 4 r + c of the line's 64-bit
//!   word i belongs to row r and column 4 i + c.
//! * scales, for each block: d of 16 rows, then m of 16 rows if the format has minima. Formats with
//!   blocks of 256 weights have the factors of d and m after them, for each chunk of the block.
//!
//! A shard holds whole chunks of codes and whole blocks of scales, also where a cut divides them.

use super::{
    Format, QuantizedShape,
    format::{CHUNK, Chunk},
};
use crate::{device::zeroed, error::Result};
use half::f16;
use std::ops::Range;

/// The rows of a panel.
pub(super) const ROWS: usize = 16;

/// The bytes of blocks that are read at a time, unless a row has more. A source that is stored
/// transposed, or in another order of rows, reads a strip in one pass.
const STRIP: usize = 1 << 20;

/// A cache line.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

impl Line {
    /// The bytes of a row.
    #[inline(always)]
    fn row(&self, row: usize) -> &[u8; 4] {
        &self.0.as_chunks().0[row]
    }

    #[inline(always)]
    fn row_mut(&mut self, row: usize) -> &mut [u8; 4] {
        &mut self.0.as_chunks_mut().0[row]
    }
}

impl Default for Line {
    fn default() -> Self {
        Self([0; 64])
    }
}

/// How the panels of a format are laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// The bits of a code.
    pub(super) bits: usize,
    /// The number that is subtracted from a code.
    pub(super) offset: i32,
    /// Whether weights have a minimum.
    pub(super) minimum: bool,
    /// The number of factors of d for each chunk.
    pub(super) factors: usize,
    /// The chunks of a block.
    pub(super) span: usize,
}

impl Layout {
    #[inline(always)]
    pub(super) const fn of(format: Format) -> Self {
        let (bits, offset) = match format {
            Format::Q4_0 => (4, 8),
            Format::Q4_1 | Format::Q4K => (4, 0),
            Format::Q5_0 => (5, 16),
            Format::Q5_1 | Format::Q5K => (5, 0),
            Format::Q8_0 => (8, 128),
            Format::Q6K => (6, 32),
        };
        let factors = match format {
            Format::Q4K | Format::Q5K => 1,
            Format::Q6K => 2,
            _ => 0,
        };
        Self { bits, offset, minimum: format.has_minimum(), factors, span: format.weights() / CHUNK }
    }

    /// The lines of a chunk's codes.
    #[inline(always)]
    pub(super) const fn lines(self) -> usize {
        if self.bits == 8 { 8 } else { self.bits }
    }

    /// The bytes of d, or of d and m, of a block.
    #[inline(always)]
    pub(super) const fn halves(self) -> usize {
        2 * ROWS * (1 + self.minimum as usize)
    }

    /// The bytes of a chunk's factors.
    #[inline(always)]
    pub(super) const fn chunk_factors(self) -> usize {
        if self.factors == 0 { 0 } else { ROWS * (self.factors + self.minimum as usize) }
    }

    /// The bytes of a block's scales.
    #[inline(always)]
    pub(super) const fn scales(self) -> usize {
        self.halves() + self.span * self.chunk_factors()
    }
}

/// The numbers of lines of codes and of bytes of scales of a matrix.
fn lens(shape: &QuantizedShape) -> (usize, usize) {
    let (layout, panels) = (Layout::of(shape.format), shape.rows.div_ceil(ROWS));
    let codes = panels.saturating_mul(shape.chunks().len()).saturating_mul(layout.lines());
    (codes, panels.saturating_mul(shape.blocks().len()).saturating_mul(layout.scales()))
}

/// The bytes of the panels of a matrix.
pub(super) fn bytes(shape: &QuantizedShape) -> usize {
    let (codes, scales) = lens(shape);
    codes.saturating_mul(size_of::<Line>()).saturating_add(scales)
}

/// The panels of a quantized matrix.
pub(super) struct Panels {
    pub(super) shape: QuantizedShape,
    pub(super) layout: Layout,
    pub(super) codes: Vec<Line>,
    pub(super) scales: Vec<u8>,
}

/// One panel.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) codes: &'a [Line],
    pub(super) scales: &'a [u8],
    /// The number of the first chunk of the row that the panel holds.
    pub(super) first_chunk: usize,
}

impl Panels {
    /// Reads the blocks of some rows at a time by `read`, which is given the rows.
    pub(super) fn load(
        shape: QuantizedShape,
        read: &mut dyn FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<Self> {
        let (format, layout) = (shape.format, Layout::of(shape.format));
        let (chunks, blocks, (codes, scales)) = (shape.chunks(), shape.blocks(), lens(&shape));
        let mut panels = Self { shape, layout, codes: zeroed(codes)?, scales: zeroed(scales)? };
        let (rows, row_bytes) = (panels.shape.rows, blocks.len() * format.bytes());
        let strip = (STRIP / row_bytes.max(1)).clamp(1, rows.max(1));
        let mut bytes = zeroed::<u8>(row_bytes.saturating_mul(strip))?;
        for start in (0..rows).step_by(strip) {
            let own = start..rows.min(start + strip);
            let bytes = &mut bytes[..own.len() * row_bytes];
            read(own.clone(), bytes)?;
            for (row, bytes) in own.zip(bytes.chunks_exact(row_bytes.max(1))) {
                for chunk in chunks.clone() {
                    let block =
                        &bytes[(chunk / layout.span - blocks.start) * format.bytes()..][..format.bytes()];
                    panels.set(row, chunk, &format.chunk(block, chunk % layout.span));
                }
            }
        }
        Ok(panels)
    }

    /// The lines of codes of a panel.
    pub(super) fn panel_lines(&self) -> usize {
        self.shape.chunks().len() * self.layout.lines()
    }

    #[inline(always)]
    pub(super) fn panel(&self, panel: usize) -> Panel<'_> {
        let (chunks, codes) = (self.shape.chunks(), self.panel_lines());
        let scales = self.shape.blocks().len() * self.layout.scales();
        Panel {
            codes: &self.codes[panel * codes..][..codes],
            scales: &self.scales[panel * scales..][..scales],
            first_chunk: chunks.start,
        }
    }

    /// Returns where the codes of a chunk and the scales of its block begin.
    fn at(&self, row: usize, chunk: usize) -> (usize, usize) {
        let (chunks, blocks, panel) = (self.shape.chunks(), self.shape.blocks(), row / ROWS);
        let codes = (panel * chunks.len() + chunk - chunks.start) * self.layout.lines();
        let block = panel * blocks.len() + chunk / self.layout.span - blocks.start;
        (codes, block * self.layout.scales())
    }

    fn set(&mut self, row: usize, chunk: usize, from: &Chunk) {
        let (layout, (codes, scales)) = (self.layout, self.at(row, chunk));
        let (row, lines) = (row % ROWS, &mut self.codes[codes..][..layout.lines()]);
        if layout.bits == 8 {
            let quads = from.codes.as_chunks::<4>().0;
            lines.iter_mut().zip(quads).for_each(|(line, quad)| *line.row_mut(row) = *quad);
        } else {
            let (low, high) = from.codes.split_at(CHUNK / 2);
            let low: [u8; CHUNK / 2] = std::array::from_fn(|at| low[at] & 15 | high[at] << 4);
            let quads = low.as_chunks::<4>().0;
            lines.iter_mut().zip(quads).for_each(|(line, quad)| *line.row_mut(row) = *quad);
            for (bit, plane) in lines.iter_mut().enumerate().skip(4) {
                for (word, quad) in from.codes.as_chunks::<4>().0.iter().enumerate() {
                    let bits = (0..4).fold(0, |bits, column| bits | (quad[column] >> bit & 1) << column);
                    plane.0[8 * word + row / 2] |= bits << (4 * (row % 2));
                }
            }
        }
        let scales = &mut self.scales[scales..][..layout.scales()];
        scales[2 * row..][..2].copy_from_slice(&from.d.to_le_bytes());
        if let Some(m) = from.m {
            scales[2 * (ROWS + row)..][..2].copy_from_slice(&m.to_le_bytes());
        }
        let factors = from.factors.iter().flatten().take(layout.factors).map(|scale| *scale as u8);
        let at = layout.halves() + chunk % layout.span * layout.chunk_factors();
        for (at, factor) in (at + row..).step_by(ROWS).zip(factors.chain(from.minimum_factor)) {
            scales[at] = factor;
        }
    }

    /// Returns a chunk of a row.
    #[inline(always)]
    fn get(&self, row: usize, chunk: usize) -> Chunk {
        let (layout, (codes, scales)) = (self.layout, self.at(row, chunk));
        let (row, lines) = (row % ROWS, &self.codes[codes..][..layout.lines()]);
        let mut codes = [0; CHUNK];
        if layout.bits == 8 {
            let quads = codes.as_chunks_mut::<4>().0;
            lines.iter().zip(quads).for_each(|(line, quad)| *quad = *line.row(row));
        } else {
            let (low, high) = codes.split_at_mut(CHUNK / 2);
            for (line, (low, high)) in
                lines.iter().zip(low.as_chunks_mut::<4>().0.iter_mut().zip(high.as_chunks_mut::<4>().0))
            {
                for (byte, (low, high)) in line.row(row).iter().zip(low.iter_mut().zip(high)) {
                    (*low, *high) = (byte & 15, byte >> 4);
                }
            }
            for (bit, plane) in lines.iter().enumerate().skip(4) {
                for (word, quad) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let bits = plane.0[8 * word + row / 2] >> (4 * (row % 2));
                    quad.iter_mut()
                        .enumerate()
                        .for_each(|(column, code)| *code |= (bits >> column & 1) << bit);
                }
            }
        }
        let scales = &self.scales[scales..][..layout.scales()];
        let half = |at: usize| f16::from_le_bytes([scales[2 * at], scales[2 * at + 1]]);
        let at = layout.halves() + chunk % layout.span * layout.chunk_factors() + row;
        Chunk {
            codes,
            offset: layout.offset,
            d: half(row),
            m: layout.minimum.then(|| half(ROWS + row)),
            factors: match layout.factors {
                0 => None,
                factors => Some([scales[at] as i8, scales[at + (factors - 1) * ROWS] as i8]),
            },
            minimum_factor: (layout.factors > 0 && layout.minimum)
                .then(|| scales[at + layout.factors * ROWS]),
        }
    }

    /// Passes the weights of some columns of a row to `visit` in order: the range of their
    /// positions among these columns, and their values. Columns count from the first that the
    /// panels have.
    #[inline(always)]
    pub(super) fn row(
        &self,
        row: usize,
        columns: &Range<usize>,
        mut visit: impl FnMut(Range<usize>, &[f32]),
    ) {
        let first = self.shape.columns.start;
        let (from, to) = (first + columns.start, first + columns.end);
        for chunk in from / CHUNK..to.div_ceil(CHUNK) {
            let values = self.get(row, chunk).values();
            let start = chunk * CHUNK;
            let own = from.max(start)..to.min(start + CHUNK);
            visit(own.start - from..own.end - from, &values[own.start - start..own.end - start]);
        }
    }
}
