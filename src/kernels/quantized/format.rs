//! Formats of quantized weights: blocks of consecutive weights of one row.

use half::f16;
use std::{fmt, ops::Range};

/// The number of weights of a chunk. Weights and activations are quantized in chunks of a row that
/// start at multiples of this number.
pub(crate) const CHUNK: usize = 32;

/// The format of a quantized matrix, as ggml defines it. A row is a sequence of blocks.
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
///
/// d, m and dₘ are f16, and the value is computed in f32.
///
/// Source: `ggml-common.h` and `dequantize_row_*` of ggml.
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
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 8] =
        [Self::Q4_0, Self::Q4_1, Self::Q5_0, Self::Q5_1, Self::Q8_0, Self::Q4K, Self::Q5K, Self::Q6K];

    /// The number of weights of a block.
    pub const fn weights(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => CHUNK,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
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
        }
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
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
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
    pub(super) offset: i32,
    /// The scale d of the block.
    pub(super) d: f16,
    /// The minimum m of the block, if the format has minima.
    pub(super) m: Option<f16>,
    /// Factors of d for each half of the chunk.
    pub(super) factors: Option<[i8; 2]>,
    /// The factor of m.
    pub(super) minimum_factor: Option<u8>,
}

impl Chunk {
    fn new(codes: [u8; CHUNK], offset: i32, d: f16) -> Self {
        Self { codes, offset, d, m: None, factors: None, minimum_factor: None }
    }

    /// Returns the weights.
    #[inline(always)]
    pub(super) fn values(&self) -> [f32; CHUNK] {
        // Loops, because `array::map` is not inlined into code for AVX2.
        let (d, m) = (self.d.to_f32(), self.m.map(f16::to_f32));
        let [left, right] = self.factors.unwrap_or([1; 2]);
        let (left, right) = (d * f32::from(left), d * f32::from(right));
        let mut values = [0.0; CHUNK];
        for (column, (value, code)) in values.iter_mut().zip(&self.codes).enumerate() {
            let scale = if column < CHUNK / 2 { left } else { right };
            *value = scale * (i32::from(*code) - self.offset) as f32;
        }
        if let Some(m) = m {
            let minimum = self.minimum_factor.map_or(m, |factor| -(m * f32::from(factor)));
            values.iter_mut().for_each(|value| *value += minimum);
        }
        values
    }
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
