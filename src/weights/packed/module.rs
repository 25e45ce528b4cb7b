//! The tensors of a quantized matrix.

use crate::kernels::{ColumnGroups, Format};
use std::collections::BTreeSet;

/// The order of the columns of a word of AWQ.
const AWQ_ORDER: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Where the codes of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codes {
    /// Unsigned bits in words of 32 bits.
    Packed(Words),
    /// Signed bytes.
    Signed,
    /// Bytes in e4m3.
    Float,
}

/// A matrix `[out, in]` or `[out, groups]` of small unsigned numbers in words of 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Words {
    /// The bits of a number.
    pub(super) bits: u32,
    /// Whether the tensor is stored as `[in, out]`.
    pub(super) transposed: bool,
    /// Whether a word has several rows of the matrix, and not several columns.
    pub(super) along_rows: bool,
    /// Whether a word has its numbers in the order of AWQ.
    pub(super) awq: bool,
    /// How numbers are stored.
    pub(super) minus: Minus,
}

/// What is subtracted from numbers that are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Minus {
    Nothing,
    /// 1 from each number, modulo 2ᵇ.
    OneOfNumber,
    /// 1 from each number of a word, in one subtraction with borrows.
    OneOfWord,
}

impl Words {
    /// The numbers of a word.
    pub(super) fn per_word(self) -> usize {
        (32 / self.bits) as usize
    }

    /// Returns a number of a word.
    pub(super) fn number(self, word: u32, at: usize) -> u8 {
        let at = if self.awq { AWQ_ORDER[at] } else { at as u32 };
        let mask = (1 << self.bits) - 1;
        let word = match self.minus {
            // Divided by the largest number of b bits, u32::MAX has the bit 0 of each number.
            Minus::OneOfWord => word.wrapping_add(u32::MAX / mask),
            _ => word,
        };
        let number = (word >> (self.bits * at)).wrapping_add(u32::from(self.minus == Minus::OneOfNumber));
        (number & mask) as u8
    }

    /// Returns the shape of the words of a matrix.
    pub(super) fn shape(self, [rows, columns]: [usize; 2]) -> [usize; 2] {
        let n = self.per_word();
        let [rows, columns] =
            if self.along_rows { [rows.div_ceil(n), columns] } else { [rows, columns.div_ceil(n)] };
        if self.transposed { [columns, rows] } else { [rows, columns] }
    }
}

/// Where the zero points of a matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    /// One number for all.
    Constant(u8),
    /// Packed numbers for each row and group.
    Packed(Words),
    /// Signed bytes in the shape of the scales.
    Signed,
}

/// The tensors of a quantized matrix.
#[derive(Debug)]
pub(super) struct Module {
    /// `[out, in]`.
    pub(super) shape: [usize; 2],
    pub(super) codes_name: String,
    pub(super) codes: Codes,
    pub(super) scales_name: String,
    /// The shape in which the scales are stored.
    pub(super) scales_shape: Vec<usize>,
    pub(super) zeros_name: String,
    pub(super) zeros: Zeros,
    /// The rows and columns that share a scale. The columns count in the order of the groups.
    pub(super) tile: [usize; 2],
    pub(super) order: Option<ColumnGroups>,
    /// `None`: the columns of a tile are not a multiple of 32.
    pub(super) format: Option<Format>,
    /// The names of all its tensors.
    pub(super) parts: BTreeSet<String>,
}

impl Module {
    /// Whether the scales are stored as `[groups, out]`, which they are if the codes are
    /// transposed.
    pub(super) fn transposes_scales(&self) -> bool {
        matches!(self.codes, Codes::Packed(Words { transposed: true, .. }))
    }

    /// The numbers of rows and columns of scales.
    pub(super) fn grid(&self) -> [usize; 2] {
        [self.shape[0].div_ceil(self.tile[0]), self.shape[1].div_ceil(self.tile[1])]
    }
}
