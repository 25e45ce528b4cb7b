//! Formats of quantized weights: blocks of consecutive weights of one row.

use half::f16;
use std::{fmt, ops::Range};

/// The number of weights of a chunk. Weights and activations are quantized in chunks of a row that
/// start at multiples of this number.
pub(crate) const CHUNK: usize = 32;

/// The format of a quantized matrix. A row is a sequence of blocks of consecutive weights.
///
/// | format | bytes / weights | value of a weight with code q |
/// |---|---|---|
/// | `Q4_0` | 18 / 32 | d (q − 8) |
/// | `Q4_1` | 20 / 32 | d q + m |
/// | `Q5_0` | 22 / 32 | d (q − 16) |
/// | `Q5_1` | 24 / 32 | d q + m |
/// | `Q8_0` | 34 / 32 | d q |
/// | `Q4K` | 144 / 256 | d s q − dₘ m, with s and m for each 32 weights |
/// | `Q5K` | 176 / 256 | d s q − dₘ m, with s and m for each 32 weights |
/// | `Q6K` | 210 / 256 | d s (q − 32), with s for each 16 weights |
/// | `Int4(g)` | (5 + g / 2) / g | d (q − z) |
/// | `Int8(g)` | (5 + g) / g | d (q − z) |
/// | `Fp8(g)` | (4 + g) / g | d q, with q in e4m3 |
///
/// The value is computed in f32. The formats with `Q` are those of ggml: d, m and dₘ are f16. A
/// block of the others has d as f32, then the zero point z as an unsigned byte, then the codes,
/// those of 4 bits in the order of `Q4_0`. A checkpoint whose scales belong to more columns, or to
/// several rows, repeats them in each block.
///
/// Source: `ggml-common.h` and `dequantize_row_*` of ggml; e4m3 is `E4M3` of the Open Compute
/// Project's OFP8: no infinities, and NaN is 0x7f and 0xff.
///
/// ```
/// use shardwise::kernels::Format;
/// assert_eq!((Format::Q4K.weights(), Format::Q4K.bytes()), (256, 144));
/// // d = 0.5 (f16 0x3800); the first weight has the code 15 − 8, the others 0 − 8.
/// let mut block = [0; 18];
/// block[..3].copy_from_slice(&[0x00, 0x38, 15]);
/// let mut weights = [0.0; 32];
/// Format::Q4_0.decode(&block, &mut weights);
/// assert_eq!(weights[..2], [3.5, -4.0]);
/// ```
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Format {
    /// 4 bits, one scale for 32 weights.
    Q4_0,
    /// 4 bits, scale and minimum for 32 weights.
    Q4_1,
    /// 5 bits, one scale for 32 weights.
    Q5_0,
    /// 5 bits, scale and minimum for 32 weights.
    Q5_1,
    /// 8 bits, one scale for 32 weights.
    Q8_0,
    /// 4 bits, scale and minimum of 6 bits for 32 weights.
    Q4K,
    /// 5 bits, scale and minimum of 6 bits for 32 weights.
    Q5K,
    /// 6 bits, scale of 8 bits for 16 weights.
    Q6K,
    /// 4 bits, scale and zero point for a group.
    Int4(GroupSize),
    /// 8 bits, scale and zero point for a group.
    Int8(GroupSize),
    /// 8-bit floating point (e4m3), scale for a group.
    Fp8(GroupSize),
}

/// The number of weights that share a scale in [`Format::Int4`], [`Format::Int8`] and
/// [`Format::Fp8`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GroupSize {
    /// 32 weights.
    G32 = 32,
    /// 64 weights.
    G64 = 64,
    /// 128 weights.
    G128 = 128,
}

impl GroupSize {
    /// Returns the longest group that divides a tile of so many columns. Returns `None` if no group
    /// does, because the columns are not a multiple of 32.
    pub fn dividing(columns: usize) -> Option<Self> {
        [Self::G128, Self::G64, Self::G32].into_iter().find(|group| columns.is_multiple_of(*group as usize))
    }
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 17] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Int4(GroupSize::G32),
        Self::Int4(GroupSize::G64),
        Self::Int4(GroupSize::G128),
        Self::Int8(GroupSize::G32),
        Self::Int8(GroupSize::G64),
        Self::Int8(GroupSize::G128),
        Self::Fp8(GroupSize::G32),
        Self::Fp8(GroupSize::G64),
        Self::Fp8(GroupSize::G128),
    ];

    /// The number of weights of a block.
    pub const fn weights(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => CHUNK,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
            Self::Int4(group) | Self::Int8(group) | Self::Fp8(group) => group as usize,
        }
    }

    /// The number of bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Int4(group) => 5 + group as usize / 2,
            Self::Int8(group) => 5 + group as usize,
            Self::Fp8(group) => 4 + group as usize,
        }
    }

    /// Returns the number of bytes in which a row with these columns is read: its blocks or, with
    /// groups that are not consecutive columns, the numbers of each group and the codes of each
    /// chunk.
    pub(crate) fn row_bytes(self, columns: Range<usize>, groups: Option<usize>) -> usize {
        let Some(groups) = groups else { return self.blocks(columns).len() * self.bytes() };
        let chunks = columns.end.div_ceil(CHUNK) - columns.start / CHUNK;
        let codes = chunks * CHUNK * (self.bytes() - self.scale_bytes()) / self.weights();
        groups.saturating_mul(self.scale_bytes()).saturating_add(codes)
    }

    /// The bytes before the codes of a block of `Int4`, `Int8` and `Fp8`.
    pub(crate) const fn scale_bytes(self) -> usize {
        if self.is_integer() { 5 } else { 4 }
    }

    /// Whether scales are f32.
    pub(super) const fn is_wide(self) -> bool {
        matches!(self, Self::Int4(_) | Self::Int8(_) | Self::Fp8(_))
    }

    /// Whether codes are integers, so that a product with integers is exact.
    pub(crate) const fn is_integer(self) -> bool {
        !matches!(self, Self::Fp8(_))
    }

    /// Returns the numbers of the blocks of a row that hold these columns.
    ///
    /// ```
    /// use shardwise::kernels::Format;
    /// assert_eq!(Format::Q8_0.blocks(40..64), 1..2);
    /// assert_eq!(Format::Q6K.blocks(192..384), 0..2);
    /// ```
    pub const fn blocks(self, columns: Range<usize>) -> Range<usize> {
        columns.start / self.weights()..columns.end.div_ceil(self.weights())
    }

    /// Computes the weights of a block.
    ///
    /// # Panics
    /// When `block` does not have [`Format::bytes`] bytes, or `out` not [`Format::weights`]
    /// elements.
    pub fn decode(self, block: &[u8], out: &mut [f32]) {
        assert_eq!((block.len(), out.len()), (self.bytes(), self.weights()), "one block of {self}");
        for (at, out) in out.chunks_exact_mut(CHUNK).enumerate() {
            out.copy_from_slice(&self.chunk(block, at).values());
        }
    }

    /// Whether a term is added to the product of scale and code.
    pub(super) const fn has_minimum(self) -> bool {
        matches!(self, Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K)
    }

    /// Returns a chunk of a block.
    pub(super) fn chunk(self, block: &[u8], at: usize) -> Chunk {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]);
        // Bit `bit` of the fifth bits that a block of 32 weights has in four bytes.
        let fifth = |from: usize, bit: usize| (block[from + bit / 8] >> (bit % 8) & 1) << 4;
        // Byte i has the low bits of the weights i and i + 16.
        let nibble = |from: usize, column: usize| block[from + column % 16] >> (4 * (column / 16)) & 15;
        let wide = || f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        match self {
            Self::Q4_0 => Chunk::new(codes(|column| nibble(2, column)), 8, half(0)),
            Self::Q4_1 => {
                Chunk { m: Some(half(2)), ..Chunk::new(codes(|column| nibble(4, column)), 0, half(0)) }
            }
            Self::Q5_0 => Chunk::new(codes(|column| nibble(6, column) | fifth(2, column)), 16, half(0)),
            Self::Q5_1 => {
                let codes = codes(|column| nibble(8, column) | fifth(4, column));
                Chunk { m: Some(half(2)), ..Chunk::new(codes, 0, half(0)) }
            }
            Self::Q8_0 => Chunk::new(codes(|column| block[2 + column] ^ 0x80), 128, half(0)),
            Self::Q4K | Self::Q5K => {
                let (scale, minimum) = six_bit_scales(&block[4..16], at);
                let (high, low) = (&block[16..], if self == Self::Q4K { 16 } else { 48 });
                let codes = codes(|column| {
                    let nibble = block[low + at / 2 * 32 + column] >> (4 * (at % 2)) & 15;
                    if self == Self::Q4K { nibble } else { nibble | (high[column] >> at & 1) << 4 }
                });
                Chunk {
                    m: Some(half(2)),
                    factors: Some([scale as i8; 2]),
                    minimum_factor: Some(minimum),
                    ..Chunk::new(codes, 0, half(0))
                }
            }
            Self::Q6K => {
                // 128 weights have 64 bytes of low bits, 32 bytes of high bits and 8 scales.
                let (of, quarter) = (at / 4, at % 4);
                let codes = codes(|column| {
                    let low = block[of * 64 + quarter % 2 * 32 + column] >> (4 * (quarter / 2)) & 15;
                    low | (block[128 + of * 32 + column] >> (2 * quarter) & 3) << 4
                });
                let scales = [0, 1].map(|part| block[192 + of * 8 + quarter * 2 + part] as i8);
                Chunk { factors: Some(scales), ..Chunk::new(codes, 32, half(208)) }
            }
            Self::Int4(_) => {
                let codes = codes(|column| nibble(5 + at * CHUNK / 2, column));
                Chunk::wide(codes, block[4].into(), wide())
            }
            Self::Int8(_) => {
                let codes = codes(|column| block[5 + at * CHUNK + column]);
                Chunk::wide(codes, block[4].into(), wide())
            }
            Self::Fp8(_) => {
                let codes = codes(|column| block[4 + at * CHUNK + column]);
                Chunk { is_float: true, ..Chunk::wide(codes, 0, wide()) }
            }
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Int4(group) => return write!(f, "int4 in groups of {}", *group as usize),
            Self::Int8(group) => return write!(f, "int8 in groups of {}", *group as usize),
            Self::Fp8(group) => return write!(f, "FP8 in groups of {}", *group as usize),
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q8_0 => "Q8_0",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
        })
    }
}

/// 32 weights of a block. Weight i is d · f · (code − offset) + m, where f is the factor of its
/// half. With a factor g of m, −m · g stands for m.
pub(super) struct Chunk {
    pub(super) codes: [u8; CHUNK],
    /// Whether codes are floating-point numbers (e4m3).
    pub(super) is_float: bool,
    pub(super) offset: i32,
    /// The scale d of the block.
    pub(super) d: f32,
    /// The minimum m of the block, if the format has minima.
    pub(super) m: Option<f16>,
    /// Factors of d for each half of the chunk.
    pub(super) factors: Option<[i8; 2]>,
    /// The factor of m.
    pub(super) minimum_factor: Option<u8>,
}

impl Chunk {
    fn new(codes: [u8; CHUNK], offset: i32, d: f16) -> Self {
        Self::wide(codes, offset, d.to_f32())
    }

    pub(super) fn wide(codes: [u8; CHUNK], offset: i32, d: f32) -> Self {
        Self { codes, is_float: false, offset, d, m: None, factors: None, minimum_factor: None }
    }

    /// Returns the weights.
    #[inline(always)]
    pub(super) fn values(&self) -> [f32; CHUNK] {
        // Loops, because `array::map` is not inlined into code for AVX2.
        let (d, m) = (self.d, self.m.map(f16::to_f32));
        let [left, right] = self.factors.unwrap_or([1; 2]);
        let (left, right) = (d * f32::from(left), d * f32::from(right));
        let mut values = [0.0; CHUNK];
        let numbers = values.iter_mut().zip(&self.codes);
        if self.is_float {
            numbers.for_each(|(value, code)| *value = e4m3(*code));
        } else {
            numbers.for_each(|(value, code)| *value = (i32::from(*code) - self.offset) as f32);
        }
        let (first, second) = values.split_at_mut(CHUNK / 2);
        first.iter_mut().for_each(|value| *value *= left);
        second.iter_mut().for_each(|value| *value *= right);
        if let Some(m) = m {
            let minimum = self.minimum_factor.map_or(m, |factor| -(m * f32::from(factor)));
            values.iter_mut().for_each(|value| *value += minimum);
        }
        values
    }
}

/// Returns the number of a code in e4m3: 4 bits of exponent with bias 7, and 3 bits of fraction.
#[inline(always)]
pub(crate) fn e4m3(code: u8) -> f32 {
    let bits = u32::from(code);
    let normal = f32::from_bits(((bits & 0x7f) << 20) + (120 << 23));
    let size = match bits & 0x7f {
        0x7f => f32::NAN,
        // A subnormal code f is 2⁻⁶ f / 8, and `normal` is 2⁻⁷ (1 + f / 8). Not by a subnormal f32,
        // which is slow to multiply.
        ..8 => 2.0 * normal - 0.015625,
        _ => normal,
    };
    f32::from_bits(size.to_bits() | (bits & 0x80) << 24)
}

fn codes(code: impl Fn(usize) -> u8) -> [u8; CHUNK] {
    std::array::from_fn(code)
}

/// Returns the scale and the minimum of one of the eight chunks of a block of `Q4_K` or `Q5_K`.
/// `bytes` has eight pairs of 6 bits (`get_scale_min_k4` of ggml).
fn six_bit_scales(bytes: &[u8], at: usize) -> (u8, u8) {
    if at < 4 {
        return (bytes[at] & 63, bytes[at + 4] & 63);
    }
    let (low, scale, minimum) = (bytes[at + 4], bytes[at - 4], bytes[at]);
    (low & 15 | scale >> 6 << 4, low >> 4 | minimum >> 6 << 4)
}
