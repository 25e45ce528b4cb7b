//! Quantizes weights, and checks the scales of blocks.

use super::{Format, format::CHUNK};
use crate::error::{Error, Result};
use half::f16;

impl Format {
    /// Returns [`Error::Unsupported`] unless [`Format::encode`] has this format.
    pub(crate) fn check_encode(self) -> Result<()> {
        if matches!(self, Self::Q8_0 | Self::Q4_0 | Self::Q4_1) {
            return Ok(());
        }
        let reason = format!("weights cannot be quantized to {self}, only to Q8_0, Q4_0 and Q4_1");
        Err(Error::Unsupported { op: "quantize", reason })
    }

    /// Quantizes the weights of a block.
    ///
    /// | format | scale d | minimum m | code |
    /// |---|---|---|---|
    /// | `Q8_0` | max \|x\| / 127 | | round(x / d), half away from zero |
    /// | `Q4_0` | (the x of the largest \|x\|) / −8 | | min(15, ⌊x / d + 8.5⌋) |
    /// | `Q4_1` | (max x − min x) / 15 | min x | min(15, ⌊(x − m) / d + 0.5⌋) |
    ///
    /// Codes are computed with d and m in f32. The block has d and m in f16.
    ///
    /// Source: `quantize_row_*_ref` of ggml.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other formats; [`Error::Sizes`] when the slices are not one
    /// block; [`Error::Invalid`] when a weight is not finite or exceeds the range of f16 scales.
    pub fn encode(self, weights: &[f32], block: &mut [u8]) -> Result<()> {
        self.check_sizes(weights, block)?;
        let largest = weights.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
        match self {
            Self::Q8_0 => q8_0(weights, largest / 127.0, block),
            Self::Q4_0 => {
                let signed = weights.iter().find(|x| x.abs() == largest && **x != 0.0);
                let d = signed.copied().unwrap_or(0.0) / -8.0;
                let inverse = inverse(d);
                block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
                nibbles(weights, &mut block[2..], |x| x * inverse + 8.5);
            }
            _ => {
                // Of 0 and -0, the first counts.
                let least = weights.iter().fold(f32::MAX, |least, &x| if x < least { x } else { least });
                let most = weights.iter().fold(f32::MIN, |most, &x| if x > most { x } else { most });
                let d = (most - least) / 15.0;
                let inverse = inverse(d);
                block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
                block[2..4].copy_from_slice(&f16::from_f32(least).to_le_bytes());
                nibbles(weights, &mut block[4..], |x| (x - least) * inverse + 0.5);
            }
        }
        self.check_scales(block)
    }

    /// Quantizes the weights of a block of `Q8_0` with a given scale, which is at least max |x| /
    /// 127 over the weights that share it.
    pub(crate) fn encode_scaled(self, weights: &[f32], scale: f32, block: &mut [u8]) -> Result<()> {
        self.check_sizes(weights, block)?;
        q8_0(weights, scale, block);
        self.check_scales(block)
    }

    fn check_sizes(self, weights: &[f32], block: &[u8]) -> Result<()> {
        self.check_encode()?;
        for (what, found, needed) in
            [("weights", weights.len(), self.weights()), ("bytes", block.len(), self.bytes())]
        {
            if found != needed {
                let of = format!("the {what} of a block of {self}");
                return Err(Error::sizes("quantize", format!("the number of {what}"), found, of, needed));
            }
        }
        match weights.iter().position(|weight| !weight.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::invalid("quantize", format!("weight {at} is {}", weights[at]))),
        }
    }

    fn check_scales(self, block: &[u8]) -> Result<()> {
        if self.is_finite(block) {
            return Ok(());
        }
        Err(Error::invalid("quantize", "the weights are too large for a scale of f16"))
    }

    /// Whether the scales of a block are finite.
    pub(crate) fn is_finite(self, block: &[u8]) -> bool {
        if self.is_wide() {
            return f32::from_le_bytes([block[0], block[1], block[2], block[3]]).is_finite();
        }
        let at = if self == Self::Q6K { 208 } else { 0 };
        let finite = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).is_finite();
        finite(at) && (!self.has_minimum() || finite(at + 2))
    }
}

/// Returns 1 / d, or 0 if d is 0 or so small that 1 / d overflows. Such a scale is 0 in f16.
fn inverse(d: f32) -> f32 {
    Some(1.0 / d).filter(|inverse| inverse.is_finite()).unwrap_or(0.0)
}

fn q8_0(weights: &[f32], d: f32, block: &mut [u8]) {
    let inverse = inverse(d);
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (code, x) in block[2..].iter_mut().zip(weights) {
        *code = (x * inverse).round() as i8 as u8;
    }
}

/// Writes the codes of 4 bits. Byte i has the codes of weights i and i + 16.
fn nibbles(weights: &[f32], bytes: &mut [u8], scaled: impl Fn(f32) -> f32) {
    let code = |x: f32| (scaled(x) as i8).clamp(0, 15) as u8;
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = code(weights[at]) | code(weights[at + CHUNK / 2]) << 4;
    }
}
