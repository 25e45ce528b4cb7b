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
//! * scales, for each block: d of 16 rows, then m or the zero points of 16 rows if the format has
//!   them. Formats with blocks of 256 weights have the factors of d and m after them, for each
//!   chunk of the block.
//!
//! A shard holds whole chunks of codes and whole blocks of scales, also where a cut divides them.
//! If the groups of a matrix are not consecutive columns, a shard holds the scales of all groups.

use super::{
    Format, GroupSize, OP, QuantizedShape,
    format::{CHUNK, Chunk},
};
use crate::{
    device::{Element, zeroed},
    error::{Error, Result},
};
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
    /// Whether d is f32, not f16.
    pub(super) wide: bool,
    /// Whether a block has a zero point for each row, which is subtracted from a code.
    pub(super) zeros: bool,
    /// Whether codes are floating-point numbers (e4m3).
    pub(super) is_float: bool,
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
            Format::Int4(_) => (4, 0),
            Format::Int8(_) | Format::Fp8(_) => (8, 0),
        };
        let factors = match format {
            Format::Q4K | Format::Q5K => 1,
            Format::Q6K => 2,
            _ => 0,
        };
        let (wide, is_float) = (format.is_wide(), !format.is_integer());
        let (zeros, span) = (wide && !is_float, format.weights() / CHUNK);
        Self { bits, offset, minimum: format.has_minimum(), factors, span, wide, zeros, is_float }
    }

    /// The lines of a chunk's codes.
    #[inline(always)]
    pub(super) const fn lines(self) -> usize {
        if self.bits == 8 { 8 } else { self.bits }
    }

    /// The bytes of d of a block.
    #[inline(always)]
    pub(super) const fn d(self) -> usize {
        if self.wide { 4 * ROWS } else { 2 * ROWS }
    }

    /// The bytes of d, and of m or the zero points, of a block.
    #[inline(always)]
    pub(super) const fn numbers(self) -> usize {
        self.d() + ROWS * (2 * self.minimum as usize + self.zeros as usize)
    }

    /// The bytes of a chunk's factors.
    #[inline(always)]
    pub(super) const fn chunk_factors(self) -> usize {
        if self.factors == 0 { 0 } else { ROWS * (self.factors + self.minimum as usize) }
    }

    /// The bytes of a block's scales.
    #[inline(always)]
    pub(super) const fn scales(self) -> usize {
        self.numbers() + self.span * self.chunk_factors()
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
    codes: &'a [Line],
    scales: &'a [u8],
    /// The number of the first chunk of the row that the panel holds.
    first_chunk: usize,
}

impl<'a> Panel<'a> {
    /// Returns the codes of a chunk and the scales of its block.
    #[inline(always)]
    pub(super) fn chunk(self, layout: Layout, chunk: usize) -> (&'a [Line], &'a [u8]) {
        let lines = (chunk - self.first_chunk) * layout.lines();
        let block = chunk / layout.span - self.first_chunk / layout.span;
        let scales = block * layout.scales();
        (&self.codes[lines..][..layout.lines()], &self.scales[scales..][..layout.scales()])
    }
}

impl Panels {
    /// Reads the blocks of some rows at a time by `read`, which is given the rows.
    pub(super) fn load(
        shape: QuantizedShape,
        read: &mut dyn FnMut(Range<usize>, &mut [u8]) -> Result<()>,
    ) -> Result<Self> {
        shape.check()?;
        let (layout, (codes, scales)) = (Layout::of(shape.format), lens(&shape));
        let mut panels = Self { shape, layout, codes: zeroed(codes)?, scales: zeroed(scales)? };
        let (rows, row_bytes) = (panels.shape.rows, panels.shape.row_bytes());
        let strip = (STRIP / row_bytes.max(1)).clamp(1, rows.max(1));
        let mut bytes = zeroed::<u8>(row_bytes.saturating_mul(strip))?;
        for start in (0..rows).step_by(strip) {
            let own = start..rows.min(start + strip);
            let bytes = &mut bytes[..own.len() * row_bytes];
            read(own.clone(), bytes)?;
            for (row, bytes) in own.zip(bytes.chunks_exact(row_bytes.max(1))) {
                match panels.shape.order.as_ref().map(|order| order.groups) {
                    None => panels.set_row(row, bytes)?,
                    Some(groups) => panels.set_ordered_row(row, bytes, groups),
                }
            }
        }
        Ok(panels)
    }

    /// Sets a row from its blocks.
    fn set_row(&mut self, row: usize, bytes: &[u8]) -> Result<()> {
        let (format, span, first) = (self.shape.format, self.layout.span, self.shape.blocks().start);
        for chunk in self.shape.chunks() {
            let block = chunk / span - first;
            let from = format.chunk(&bytes[block * format.bytes()..][..format.bytes()], chunk % span);
            // Products do not look for NaN.
            let is_nan = |code: &u8| code & 0x7f == 0x7f;
            if from.is_float
                && let Some(at) = from.codes.iter().position(is_nan)
            {
                let reason = format!("row {row}, column {} of FP8 weights is NaN", chunk * CHUNK + at);
                return Err(Error::invalid(OP, reason));
            }
            self.set_codes(row, chunk, &from.codes);
            self.set_scales(row, (block, chunk % span), &from);
        }
        Ok(())
    }

    /// Sets a row from the scales of its groups and the codes of its chunks.
    fn set_ordered_row(&mut self, row: usize, bytes: &[u8], groups: usize) {
        // Blocks of one chunk have the same scales and codes.
        let format = match self.shape.format {
            Format::Int8(_) => Format::Int8(GroupSize::G32),
            _ => Format::Int4(GroupSize::G32),
        };
        let mut block = vec![0; format.bytes()];
        let (scales, codes) = bytes.split_at(groups * format.scale_bytes());
        for (group, scales) in scales.chunks_exact(format.scale_bytes()).enumerate() {
            block[..format.scale_bytes()].copy_from_slice(scales);
            self.set_scales(row, (group, 0), &format.chunk(&block, 0));
        }
        let size = format.bytes() - format.scale_bytes();
        for (chunk, codes) in self.shape.chunks().zip(codes.chunks_exact(size)) {
            block[format.scale_bytes()..].copy_from_slice(codes);
            self.set_codes(row, chunk, &format.chunk(&block, 0).codes);
        }
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

    /// Returns the lines of a chunk's codes.
    #[inline(always)]
    fn lines(&self, row: usize, chunk: usize) -> Range<usize> {
        let (chunks, lines) = (self.shape.chunks(), self.layout.lines());
        let start = (row / ROWS * chunks.len() + chunk - chunks.start) * lines;
        start..start + lines
    }

    /// Returns the scales of a block. Blocks count from the first that the panels have.
    #[inline(always)]
    fn scales(&self, row: usize, block: usize) -> Range<usize> {
        let start = (row / ROWS * self.shape.blocks().len() + block) * self.layout.scales();
        start..start + self.layout.scales()
    }

    fn set_codes(&mut self, row: usize, chunk: usize, from: &[u8; CHUNK]) {
        let range = self.lines(row, chunk);
        let (row, lines) = (row % ROWS, &mut self.codes[range]);
        if self.layout.bits == 8 {
            let quads = from.as_chunks::<4>().0;
            lines.iter_mut().zip(quads).for_each(|(line, quad)| *line.row_mut(row) = *quad);
            return;
        }
        let (low, high) = from.split_at(CHUNK / 2);
        let low: [u8; CHUNK / 2] = std::array::from_fn(|at| low[at] & 15 | high[at] << 4);
        let quads = low.as_chunks::<4>().0;
        lines.iter_mut().zip(quads).for_each(|(line, quad)| *line.row_mut(row) = *quad);
        for (bit, plane) in lines.iter_mut().enumerate().skip(4) {
            for (word, quad) in from.as_chunks::<4>().0.iter().enumerate() {
                let bits = (0..4).fold(0, |bits, column| bits | (quad[column] >> bit & 1) << column);
                plane.0[8 * word + row / 2] |= bits << (4 * (row % 2));
            }
        }
    }

    /// Sets the scales of a block, and the factors of one of its chunks.
    fn set_scales(&mut self, row: usize, (block, chunk): (usize, usize), from: &Chunk) {
        let (range, layout) = (self.scales(row, block), self.layout);
        let (row, scales) = (row % ROWS, &mut self.scales[range]);
        if layout.wide {
            scales[4 * row..][..4].copy_from_slice(&from.d.to_le_bytes());
        } else {
            // A number that was f16.
            scales[2 * row..][..2].copy_from_slice(&f16::from_f32(from.d).to_le_bytes());
        }
        if layout.zeros {
            scales[layout.d() + row] = from.offset as u8;
        }
        if let Some(m) = from.m {
            scales[layout.d() + 2 * row..][..2].copy_from_slice(&m.to_le_bytes());
        }
        let factors = from.factors.iter().flatten().take(layout.factors).map(|scale| *scale as u8);
        let at = layout.numbers() + chunk * layout.chunk_factors();
        for (at, factor) in (at + row..).step_by(ROWS).zip(factors.chain(from.minimum_factor)) {
            scales[at] = factor;
        }
    }

    #[inline(always)]
    fn codes(&self, row: usize, chunk: usize) -> [u8; CHUNK] {
        // Words of four codes, because loops over bytes are not vectorized here.
        const LOW: u32 = 0x0f0f_0f0f;
        let (row, lines) = (row % ROWS, &self.codes[self.lines(row, chunk)]);
        let word = |line: &Line| u32::from_le_bytes(*line.row(row));
        let mut words = [0; CHUNK / 4];
        if self.layout.bits == 8 {
            words.iter_mut().zip(lines).for_each(|(codes, line)| *codes = word(line));
        } else {
            let (low, high) = words.split_at_mut(CHUNK / 8);
            for (line, (low, high)) in lines.iter().zip(low.iter_mut().zip(high)) {
                (*low, *high) = (word(line) & LOW, word(line) >> 4 & LOW);
            }
            for (bit, plane) in lines.iter().enumerate().skip(4) {
                for (at, codes) in words.iter_mut().enumerate() {
                    let bits = u32::from(plane.0[8 * at + row / 2] >> (4 * (row % 2)) & 15);
                    // Moves bit i to byte i.
                    *codes |= (bits.wrapping_mul(0x0020_4081) & 0x0101_0101) << bit;
                }
            }
        }
        let mut codes = [0; CHUNK];
        let quads = codes.as_chunks_mut::<4>().0;
        quads.iter_mut().zip(words).for_each(|(quad, word)| *quad = word.to_le_bytes());
        codes
    }

    /// Returns the scale and the zero point of a block with a zero point.
    #[inline(always)]
    fn scale_and_zero(&self, row: usize, block: usize) -> (f32, u8) {
        let (row, scales) = (row % ROWS, &self.scales[self.scales(row, block)]);
        (f32::from_le_bytes(scales.as_chunks().0[row]), scales[self.layout.d() + row])
    }

    /// Returns a chunk of a row.
    #[inline(always)]
    fn get(&self, row: usize, chunk: usize) -> Chunk {
        let (layout, codes) = (self.layout, self.codes(row, chunk));
        let block = chunk / layout.span - self.shape.blocks().start;
        if layout.zeros {
            let (d, zero) = self.scale_and_zero(row, block);
            return Chunk::wide(codes, zero.into(), d);
        }
        let (row, scales) = (row % ROWS, &self.scales[self.scales(row, block)]);
        if layout.wide {
            let d = f32::from_le_bytes(scales.as_chunks().0[row]);
            return Chunk { is_float: layout.is_float, ..Chunk::wide(codes, 0, d) };
        }
        let half = |at: usize| f16::from_le_bytes([scales[2 * at], scales[2 * at + 1]]);
        let at = layout.numbers() + chunk % layout.span * layout.chunk_factors() + row;
        Chunk {
            m: layout.minimum.then(|| half(ROWS + row)),
            factors: match layout.factors {
                0 => None,
                factors => Some([scales[at] as i8, scales[at + (factors - 1) * ROWS] as i8]),
            },
            minimum_factor: (layout.factors > 0 && layout.minimum)
                .then(|| scales[at + layout.factors * ROWS]),
            ..Chunk::wide(codes, layout.offset, half(row).to_f32())
        }
    }

    /// Computes the weights of some columns of a row. Columns count from the first that the panels
    /// have. `groups` is memory for the numbers of the row's groups.
    #[inline(always)]
    pub(super) fn row<T: Element>(
        &self,
        row: usize,
        columns: &Range<usize>,
        groups: &mut Vec<[f32; 2]>,
        y: &mut [T],
    ) {
        let first = self.shape.columns.start;
        let (from, to) = (first + columns.start, first + columns.end);
        groups.clear();
        if let Some(order) = &self.shape.order {
            groups.extend((0..order.groups).map(|group| {
                let (scale, zero) = self.scale_and_zero(row, group);
                [scale, zero.into()]
            }));
        }
        for chunk in from / CHUNK..to.div_ceil(CHUNK) {
            let start = chunk * CHUNK;
            let own = from.max(start)..to.min(start + CHUNK);
            let y = &mut y[own.start - from..own.end - from];
            if let Some(order) = &self.shape.order {
                let codes = &self.codes(row, chunk)[own.start - start..own.end - start];
                let of = &order.of[own.start - first..own.end - first];
                for ((y, code), group) in y.iter_mut().zip(codes).zip(of) {
                    let [scale, zero] = groups[*group as usize];
                    *y = narrow(scale * (f32::from(*code) - zero));
                }
                continue;
            }
            let values = self.get(row, chunk).values();
            if let Ok(y) = <&mut [T; CHUNK]>::try_from(&mut *y) {
                y.iter_mut().zip(values).for_each(|(y, value)| *y = narrow(value));
            } else {
                let values = &values[own.start - start..own.end - start];
                y.iter_mut().zip(values).for_each(|(y, value)| *y = narrow(*value));
            }
        }
    }
}

/// Rounds an f32 to the nearest element.
#[inline(always)]
pub(super) fn narrow<T: Element>(value: f32) -> T {
    T::narrow(T::Acc::from_f64(value.into()))
}
