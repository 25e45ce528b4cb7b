//! Reads the codes, zero points and scales of a part of a quantized matrix.

use super::{
    Packed,
    module::{Codes, Module, Words, Zeros},
};
use crate::{
    device::{AnyMut, zeroed},
    error::Result,
    tensor::{Region, Role, WeightSource},
};
use safetensors::Dtype;
use std::ops::Range;

/// The numbers of a part of a matrix, row by row.
pub(super) struct Numbers<T> {
    pub(super) width: usize,
    pub(super) numbers: Vec<T>,
}

impl<T> Numbers<T> {
    pub(super) fn row(&self, row: usize) -> &[T] {
        &self.numbers[row * self.width..][..self.width]
    }
}

impl Packed {
    /// Reads codes. Those of signed bytes are 128 larger than the bytes.
    pub(super) fn codes(
        &self,
        module: &Module,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Numbers<u8>> {
        match module.codes {
            Codes::Packed(words) => self.words(&module.codes_name, words, module.shape, [rows, columns]),
            Codes::Signed | Codes::Float => {
                let part = Region::whole(module.shape).narrow(0, rows.clone()).narrow(1, columns.clone());
                let mut numbers = zeroed::<u8>(rows.len().saturating_mul(columns.len()))?;
                self.checkpoint.read_bytes(&module.codes_name, &part, &mut numbers)?;
                if module.codes == Codes::Signed {
                    numbers.iter_mut().for_each(|code| *code ^= 0x80);
                }
                Ok(Numbers { width: columns.len(), numbers })
            }
        }
    }

    /// Reads packed numbers of a matrix.
    fn words(
        &self,
        name: &str,
        words: Words,
        shape: [usize; 2],
        [rows, columns]: [Range<usize>; 2],
    ) -> Result<Numbers<u8>> {
        let n = words.per_word();
        let of_words = |range: &Range<usize>, packed: bool| {
            if packed { range.start / n..range.end.div_ceil(n) } else { range.clone() }
        };
        let [height, width] = [of_words(&rows, words.along_rows), of_words(&columns, !words.along_rows)];
        let (first, second) =
            if words.transposed { (width.clone(), height.clone()) } else { (height.clone(), width.clone()) };
        let stride = second.len();
        let mut bytes = zeroed::<u8>(first.len().saturating_mul(stride).saturating_mul(4))?;
        let part = Region::whole(words.shape(shape)).narrow(0, first).narrow(1, second);
        self.checkpoint.read_bytes(name, &part, &mut bytes)?;
        let bytes = bytes.as_chunks::<4>().0;
        let mut numbers = zeroed::<u8>(rows.len().saturating_mul(columns.len()))?;
        for (row, out) in rows.zip(numbers.chunks_exact_mut(columns.len().max(1))) {
            for (column, out) in columns.clone().zip(out) {
                let (word_row, word_column, at) =
                    if words.along_rows { (row / n, column, row % n) } else { (row, column / n, column % n) };
                let [y, x] = [word_row - height.start, word_column - width.start];
                let at_word = if words.transposed { x * stride + y } else { y * stride + x };
                *out = words.number(u32::from_le_bytes(bytes[at_word]), at);
            }
        }
        Ok(Numbers { width: columns.len(), numbers })
    }

    /// Reads zero points of groups of columns, one for each row.
    pub(super) fn zeros(
        &self,
        module: &Module,
        rows: Range<usize>,
        groups: Range<usize>,
    ) -> Result<Numbers<u8>> {
        let (name, grid) = (&module.zeros_name, module.grid());
        match module.zeros {
            Zeros::Constant(zero) => {
                Ok(Numbers { width: groups.len(), numbers: vec![zero; rows.len() * groups.len()] })
            }
            Zeros::Packed(words) => self.words(name, words, grid, [rows, groups]),
            Zeros::Signed => {
                let read = |region: &Region, out: &mut [u8]| self.checkpoint.read_bytes(name, region, out);
                let mut zeros = of_tiles(module, rows, groups, read)?;
                zeros.numbers.iter_mut().for_each(|zero| *zero ^= 0x80);
                Ok(zeros)
            }
        }
    }

    /// Reads scales of groups of columns, one for each row.
    pub(super) fn scales(
        &self,
        module: &Module,
        rows: Range<usize>,
        groups: Range<usize>,
    ) -> Result<Numbers<f32>> {
        let name = &module.scales_name;
        let read = |region: &Region, out: &mut [f32]| match self.checkpoint.stored(name) {
            Some((Dtype::F8_E8M0, _)) => {
                let mut exponents = zeroed::<u8>(out.len())?;
                self.checkpoint.read_bytes(name, region, &mut exponents)?;
                out.iter_mut().zip(exponents).for_each(|(scale, exponent)| *scale = e8m0(exponent));
                Ok(())
            }
            _ => self.checkpoint.read(name, Role::Weight, region, AnyMut::F32(out)),
        };
        let scales = of_tiles(module, rows.clone(), groups.clone(), read)?;
        if let Some(at) = scales.numbers.iter().position(|scale| !scale.is_finite()) {
            let (row, group) = (rows.start + at / groups.len(), groups.start + at % groups.len());
            let reason = format!(
                "tensor `{}`: row {row}, group {group}: the scale is not finite",
                name.escape_debug()
            );
            return Err(self.checkpoint.bad(name, reason));
        }
        Ok(scales)
    }
}

/// Returns the power of two of an exponent with bias 127.
fn e8m0(exponent: u8) -> f32 {
    match exponent {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// Reads the numbers of the tiles that hold the rows and groups, and repeats them for each row.
fn of_tiles<T: Copy + Default>(
    module: &Module,
    rows: Range<usize>,
    groups: Range<usize>,
    read: impl FnOnce(&Region, &mut [T]) -> Result<()>,
) -> Result<Numbers<T>> {
    let of_tile = rows.start / module.tile[0]..rows.end.div_ceil(module.tile[0]);
    let stored = &module.scales_shape[..];
    let mut region = Region::whole(stored);
    let ranges = match (stored.len(), module.transposes_scales()) {
        (2, true) => vec![groups.clone(), of_tile.clone()],
        (2, false) => vec![of_tile.clone(), groups.clone()],
        (dims, _) => vec![of_tile.clone(); dims],
    };
    for (dim, range) in ranges.into_iter().enumerate() {
        region = region.narrow(dim, range);
    }
    let mut tiles = vec![T::default(); of_tile.len() * groups.len()];
    read(&region, &mut tiles)?;
    let at = |row: usize, group: usize| {
        let row = row / module.tile[0] - of_tile.start;
        if module.transposes_scales() { group * of_tile.len() + row } else { row * groups.len() + group }
    };
    let of_row = |row: usize| (0..groups.len()).map(move |group| (row, group));
    let numbers = rows.flat_map(of_row).map(|(row, group)| tiles[at(row, group)]).collect();
    Ok(Numbers { width: groups.len(), numbers })
}
