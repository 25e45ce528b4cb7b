//! SIMD vectors for products with quantized weights. One vector has a lane for each of the 16 rows
//! of a panel.

use super::{
    format::e4m3,
    panel::{Line, ROWS},
};
use half::f16;

/// Instructions for vectors of 16 lanes.
///
/// A value of a type proves that the processor has the instructions: see `x86.rs`. Integer sums
/// are exact, and each floating-point operation rounds once. So all types compute the same bits.
pub(super) trait Lanes: Copy {
    /// 64 codes: four consecutive columns of each of 16 rows.
    type Codes: Copy;
    /// 16 sums of integers.
    type Ints: Copy;
    /// 16 numbers.
    type Floats: Copy;

    /// The largest number of tokens whose sums fit into the registers.
    const TOKENS: usize;

    /// Whether [`Lanes::dot_bytes`] subtracts 128 from each code.
    const BYTES_ARE_SIGNED: bool;

    /// The low 4 bits of each byte, or the high 4 bits.
    fn nibbles(self, line: &Line, high: bool) -> Self::Codes;

    /// The bytes of a line.
    fn bytes(self, line: &Line) -> Self::Codes;

    /// Sets the bits of `bit` in each code whose bit of `mask` is set.
    fn with_bit(self, codes: Self::Codes, mask: u64, bit: u8) -> Self::Codes;

    /// sums + Σ code · x over four columns. `x` has four signed bytes, the first of them in the low
    /// bits. Codes are below 64.
    fn dot(self, sums: Self::Ints, codes: Self::Codes, x: i32) -> Self::Ints;

    /// As [`Lanes::dot`] for codes of 8 bits. Subtracts 128 from the codes if
    /// [`Lanes::BYTES_ARE_SIGNED`].
    fn dot_bytes(self, sums: Self::Ints, codes: Self::Codes, x: i32) -> Self::Ints;

    /// The numbers (e4m3) of one of the four columns. No code is NaN.
    fn e4m3(self, line: &Line, column: usize) -> Self::Floats;

    /// The same integer in each lane.
    fn int(self, value: i32) -> Self::Ints;

    /// Signed bytes as integers.
    fn widen(self, bytes: &[u8; ROWS]) -> Self::Ints;

    /// Unsigned bytes as integers.
    fn widen_unsigned(self, bytes: &[u8; ROWS]) -> Self::Ints;

    /// a + b.
    fn add_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;

    /// a − b.
    fn subtract_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;

    /// a b.
    fn multiply_ints(self, a: Self::Ints, b: Self::Ints) -> Self::Ints;

    /// Integers as numbers, rounded to nearest.
    fn to_floats(self, ints: Self::Ints) -> Self::Floats;

    /// Half-precision numbers, little endian.
    fn halves(self, bytes: &[u8; 2 * ROWS]) -> Self::Floats;

    /// Numbers, little endian.
    fn floats(self, bytes: &[u8; 4 * ROWS]) -> Self::Floats;

    /// The same number in each lane.
    fn float(self, value: f32) -> Self::Floats;

    /// a b.
    fn multiply(self, a: Self::Floats, b: Self::Floats) -> Self::Floats;

    /// a b + sum, rounded once.
    fn multiply_add(self, a: Self::Floats, b: Self::Floats, sum: Self::Floats) -> Self::Floats;

    /// The numbers of the lanes.
    fn store(self, floats: Self::Floats) -> [f32; ROWS];
}

/// Arrays, for processors without AVX2.
#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Lanes for Portable {
    type Codes = [u8; 64];
    type Ints = [i32; ROWS];
    type Floats = [f32; ROWS];

    const TOKENS: usize = 1;
    const BYTES_ARE_SIGNED: bool = false;

    #[inline(always)]
    fn nibbles(self, line: &Line, high: bool) -> [u8; 64] {
        line.0.map(|byte| if high { byte >> 4 } else { byte & 15 })
    }

    #[inline(always)]
    fn bytes(self, line: &Line) -> [u8; 64] {
        line.0
    }

    #[inline(always)]
    fn with_bit(self, codes: [u8; 64], mask: u64, bit: u8) -> [u8; 64] {
        std::array::from_fn(|at| codes[at] | if mask >> at & 1 == 1 { bit } else { 0 })
    }

    #[inline(always)]
    fn dot(self, sums: [i32; ROWS], codes: [u8; 64], x: i32) -> [i32; ROWS] {
        let x = x.to_le_bytes().map(|byte| i32::from(byte as i8));
        std::array::from_fn(|row| {
            sums[row] + (0..4).map(|column| i32::from(codes[4 * row + column]) * x[column]).sum::<i32>()
        })
    }

    #[inline(always)]
    fn dot_bytes(self, sums: [i32; ROWS], codes: [u8; 64], x: i32) -> [i32; ROWS] {
        self.dot(sums, codes, x)
    }

    #[inline(always)]
    fn e4m3(self, line: &Line, column: usize) -> [f32; ROWS] {
        std::array::from_fn(|row| e4m3(line.0[4 * row + column]))
    }

    #[inline(always)]
    fn int(self, value: i32) -> [i32; ROWS] {
        [value; ROWS]
    }

    #[inline(always)]
    fn widen(self, bytes: &[u8; ROWS]) -> [i32; ROWS] {
        bytes.map(|byte| i32::from(byte as i8))
    }

    #[inline(always)]
    fn widen_unsigned(self, bytes: &[u8; ROWS]) -> [i32; ROWS] {
        bytes.map(i32::from)
    }

    #[inline(always)]
    fn add_ints(self, a: [i32; ROWS], b: [i32; ROWS]) -> [i32; ROWS] {
        std::array::from_fn(|row| a[row] + b[row])
    }

    #[inline(always)]
    fn subtract_ints(self, a: [i32; ROWS], b: [i32; ROWS]) -> [i32; ROWS] {
        std::array::from_fn(|row| a[row] - b[row])
    }

    #[inline(always)]
    fn multiply_ints(self, a: [i32; ROWS], b: [i32; ROWS]) -> [i32; ROWS] {
        std::array::from_fn(|row| a[row] * b[row])
    }

    #[inline(always)]
    fn to_floats(self, ints: [i32; ROWS]) -> [f32; ROWS] {
        ints.map(|int| int as f32)
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 2 * ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|row| f16::from_le_bytes([bytes[2 * row], bytes[2 * row + 1]]).to_f32())
    }

    #[inline(always)]
    fn floats(self, bytes: &[u8; 4 * ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|row| f32::from_le_bytes(bytes.as_chunks().0[row]))
    }

    #[inline(always)]
    fn float(self, value: f32) -> [f32; ROWS] {
        [value; ROWS]
    }

    #[inline(always)]
    fn multiply(self, a: [f32; ROWS], b: [f32; ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|row| a[row] * b[row])
    }

    #[inline(always)]
    fn multiply_add(self, a: [f32; ROWS], b: [f32; ROWS], sum: [f32; ROWS]) -> [f32; ROWS] {
        std::array::from_fn(|row| a[row].mul_add(b[row], sum[row]))
    }

    #[inline(always)]
    fn store(self, floats: [f32; ROWS]) -> [f32; ROWS] {
        floats
    }
}
