//! y = x wᵀ with quantized x and w, in integers within a chunk and in f32 over the chunks. With FP8
//! weights, x is not quantized, and a chunk is a sum in f32 too.
//!
//! y = Σ over chunks, in ascending order, of d_w d_x S + m d_x Σ q_x. S = Σ (q_w − offset) q_x is
//! exact. Each chunk is added by fused multiply-adds, so the bits of an element of y are the same
//! for any number of rows, any range of weight rows, and all instructions.

use super::{
    Format, GroupSize,
    format::CHUNK,
    lanes::Lanes,
    panel::{Layout, Panels, ROWS},
    rows::{Rows, XChunk},
};
use crate::{device::Kernel, kernels::gemm::prefetch};
use std::ops::Range;

/// The bytes by which a product of few rows prefetches codes.
const AHEAD: usize = 8 << 10;

/// The lines of codes of a group of panels: 256 KiB.
const GROUP: usize = 4 << 10;

/// The tokens for which a group of panels is computed at a time.
const TOKENS: usize = 16;

/// The product of x with some panels, as a kernel that is compiled for the instructions of `lanes`.
pub(super) struct Product<'a, L, F> {
    pub(super) lanes: L,
    pub(super) weights: &'a Panels,
    pub(super) x: &'a Rows,
    pub(super) panels: Range<usize>,
    /// Takes 16 columns of a row of y: the row, the panel, and the elements.
    pub(super) store: F,
}

impl<L: Lanes, F: FnMut(usize, usize, &[f32; ROWS])> Kernel for Product<'_, L, F> {
    type Output = ();

    #[inline(always)]
    fn compute(self) {
        // With a constant format, the compiler makes a loop for each format.
        match self.weights.shape.format {
            Format::Q4_0 => self.all(const { Layout::of(Format::Q4_0) }),
            Format::Q4_1 => self.all(const { Layout::of(Format::Q4_1) }),
            Format::Q5_0 => self.all(const { Layout::of(Format::Q5_0) }),
            Format::Q5_1 => self.all(const { Layout::of(Format::Q5_1) }),
            Format::Q8_0 => self.all(const { Layout::of(Format::Q8_0) }),
            Format::Q4K => self.all(const { Layout::of(Format::Q4K) }),
            Format::Q5K => self.all(const { Layout::of(Format::Q5K) }),
            Format::Q6K => self.all(const { Layout::of(Format::Q6K) }),
            // One loop for all groups, because `span` is used only once for each chunk.
            Format::Int4(_) => {
                let span = self.weights.layout.span;
                self.all(Layout { span, ..const { Layout::of(Format::Int4(GroupSize::G32)) } })
            }
            Format::Int8(_) => {
                let span = self.weights.layout.span;
                self.all(Layout { span, ..const { Layout::of(Format::Int8(GroupSize::G32)) } })
            }
            Format::Fp8(_) => {
                let span = self.weights.layout.span;
                self.all(Layout { span, ..const { Layout::of(Format::Fp8(GroupSize::G32)) } })
            }
        }
    }
}

impl<L: Lanes, F: FnMut(usize, usize, &[f32; ROWS])> Product<'_, L, F> {
    /// Computes a group of panels, which stays in the second-level cache, for some tokens at a
    /// time, which stay in the first-level cache.
    #[inline(always)]
    fn all(mut self, layout: Layout) {
        let tokens = self.x.tokens;
        let group = (GROUP / self.weights.panel_lines().max(1)).max(1);
        for start in self.panels.clone().step_by(group) {
            let panels = start..self.panels.end.min(start + group);
            for first in (0..tokens).step_by(TOKENS) {
                for panel in panels.clone() {
                    self.tiles(layout, panel, first..tokens.min(first + TOKENS));
                }
            }
        }
    }

    /// Computes 16 columns of some rows of y.
    #[inline(always)]
    fn tiles(&mut self, layout: Layout, panel: usize, tokens: Range<usize>) {
        let mut token = tokens.start;
        // Q6_K has twice as many sums, so eight tokens do not fit into the registers.
        if L::TOKENS >= 8 && layout.factors < 2 {
            while tokens.end - token >= 8 {
                self.tile::<8>(layout, panel, token);
                token += 8;
            }
        }
        if L::TOKENS >= 4 {
            while tokens.end - token >= 4 {
                self.tile::<4>(layout, panel, token);
                token += 4;
            }
        }
        if L::TOKENS >= 2 {
            while tokens.end - token >= 2 {
                self.tile::<2>(layout, panel, token);
                token += 2;
            }
        }
        while tokens.end > token {
            self.tile::<1>(layout, panel, token);
            token += 1;
        }
    }

    /// Computes 16 columns of N rows of y.
    #[inline(always)]
    fn tile<const N: usize>(&mut self, layout: Layout, at: usize, first: usize) {
        if layout.is_float {
            self.float_tile::<N>(layout, at, first);
        } else {
            self.integer_tile::<N>(layout, at, first);
        }
    }

    /// Each chunk is a sum in ascending order of its columns, then multiplied by d and added.
    #[inline(always)]
    fn float_tile<const N: usize>(&mut self, layout: Layout, at: usize, first: usize) {
        let (lanes, panel) = (self.lanes, self.weights.panel(at));
        let mut rows = [self.x.numbers(first); N];
        for (token, row) in rows.iter_mut().enumerate() {
            *row = self.x.numbers(first + token);
        }
        let mut sums = [lanes.float(0.0); N];
        for (index, chunk) in self.x.chunks.clone().enumerate() {
            let (codes, scales) = panel.chunk(layout, chunk);
            if N <= 2 {
                prefetch(codes.as_ptr().cast::<u8>().wrapping_add(AHEAD));
            }
            let mut x = [&rows[0][index]; N];
            for (x, row) in x.iter_mut().zip(rows) {
                *x = &row[index];
            }
            let mut dots = [lanes.float(0.0); N];
            for (at, line) in codes.iter().enumerate() {
                for column in 0..4 {
                    let w = lanes.e4m3(line, column);
                    for token in 0..N {
                        let x = lanes.float(x[token][4 * at + column]);
                        dots[token] = lanes.multiply_add(w, x, dots[token]);
                    }
                }
            }
            let scale = lanes.floats(scales.first_chunk().expect("16 numbers of four bytes"));
            for token in 0..N {
                sums[token] = lanes.multiply_add(scale, dots[token], sums[token]);
            }
        }
        for (token, sum) in sums.iter().enumerate() {
            (self.store)(first + token, at, &lanes.store(*sum));
        }
    }

    #[inline(always)]
    fn integer_tile<const N: usize>(&mut self, layout: Layout, at: usize, first: usize) {
        let (lanes, panel) = (self.lanes, self.weights.panel(at));
        // Loops, because `array::from_fn` is a call in builds without link-time optimization.
        let mut rows = [self.x.row(first); N];
        for (token, row) in rows.iter_mut().enumerate() {
            *row = self.x.row(first + token);
        }
        let mut sums = [lanes.float(0.0); N];
        for (index, chunk) in self.x.chunks.clone().enumerate() {
            let (codes, scales) = panel.chunk(layout, chunk);
            if N <= 2 {
                prefetch(codes.as_ptr().cast::<u8>().wrapping_add(AHEAD));
            }
            let half = |at: usize| scales[at..].first_chunk().expect("16 numbers of two bytes");
            let factors = layout.numbers() + chunk % layout.span * layout.chunk_factors();
            let factor = |at: usize| scales[factors + at * ROWS..].first_chunk().expect("16 factors");
            let mut scale = if layout.wide {
                lanes.floats(scales.first_chunk().expect("16 numbers of four bytes"))
            } else {
                lanes.halves(half(0))
            };
            if layout.factors == 1 {
                scale = lanes.multiply(scale, lanes.to_floats(lanes.widen(factor(0))));
            }
            let mut x = [&rows[0][index]; N];
            for (x, row) in x.iter_mut().zip(rows) {
                *x = &row[index];
            }
            let mut dots = [[lanes.int(0); N]; 2];
            let of_dot = if layout.bits == 8 && L::BYTES_ARE_SIGNED { 128 } else { 0 };
            let offset = of_dot - layout.offset;
            let mut offsets = lanes.int(offset);
            if layout.zeros {
                let zeros = scales[layout.d()..].first_chunk().expect("16 zero points");
                offsets = lanes.subtract_ints(offsets, lanes.widen_unsigned(zeros));
            }
            for token in 0..N {
                let [left, right] = x[token].sums;
                if layout.zeros {
                    dots[0][token] = lanes.multiply_ints(offsets, lanes.int(left + right));
                    continue;
                }
                if layout.factors == 2 {
                    dots[0][token] = lanes.int(offset * left);
                    dots[1][token] = lanes.int(offset * right);
                } else if offset != 0 {
                    dots[0][token] = lanes.int(offset * (left + right));
                }
            }
            for line in 0..CHUNK / 4 {
                // Q6_K has a factor for each half of the chunk.
                let part = if layout.factors == 2 { line / 4 } else { 0 };
                let mut code = if layout.bits == 8 {
                    lanes.bytes(&codes[line])
                } else {
                    lanes.nibbles(&codes[line % 4], line >= 4)
                };
                if layout.bits < 8 {
                    for (bit, plane) in codes.iter().enumerate().skip(4) {
                        let mask = plane.0[8 * line..].first_chunk().expect("8 bytes");
                        code = lanes.with_bit(code, u64::from_le_bytes(*mask), 1 << bit);
                    }
                }
                for token in 0..N {
                    let (sum, x) = (dots[part][token], x[token].quad(line));
                    dots[part][token] = if layout.bits == 8 {
                        lanes.dot_bytes(sum, code, x)
                    } else {
                        lanes.dot(sum, code, x)
                    };
                }
            }
            for token in 0..N {
                let XChunk { d, sums: [left, right], .. } = *x[token];
                let mut dot = dots[0][token];
                if layout.factors == 2 {
                    // The sum is at most 2 · 128 · 16 · 32 · 127 < 2²⁴, so it is exact in f32.
                    dot = lanes.add_ints(
                        lanes.multiply_ints(dot, lanes.widen(factor(0))),
                        lanes.multiply_ints(dots[1][token], lanes.widen(factor(1))),
                    );
                }
                let by = lanes.multiply(scale, lanes.float(d));
                sums[token] = lanes.multiply_add(by, lanes.to_floats(dot), sums[token]);
                if layout.minimum {
                    let of_x = d * (left + right) as f32;
                    let mut minimum = lanes.halves(half(layout.d()));
                    if layout.factors > 0 {
                        let factor = lanes.to_floats(lanes.widen(factor(layout.factors)));
                        minimum = lanes.multiply(lanes.multiply(minimum, factor), lanes.float(-1.0));
                    }
                    sums[token] = lanes.multiply_add(minimum, lanes.float(of_x), sums[token]);
                }
            }
        }
        for (token, sum) in sums.iter().enumerate() {
            (self.store)(first + token, at, &lanes.store(*sum));
        }
    }
}
