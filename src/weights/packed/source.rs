//! Reads the tensors of a quantized checkpoint.

use super::super::{
    region::{check_bytes, check_elements},
    stored::convert,
};
use super::{
    Packed,
    integers::Numbers,
    module::{Codes, Module},
};
use crate::{
    device::{AnyMut, Cpu, Element, each_dtype, zeroed},
    error::{Error, Result},
    kernels::{Activations, CHUNK, ColumnGroups, Format, e4m3},
    tensor::{Region, Role, WeightSource},
};
use std::ops::Range;

/// The weights that are dequantized at a time, unless a row has more.
const STRIP: usize = 1 << 18;

/// Some rows of a matrix, and some of its columns and their groups.
struct Part {
    codes: Numbers<u8>,
    scales: Numbers<f32>,
    zeros: Numbers<u8>,
    first_column: usize,
    first_group: usize,
}

impl Part {
    /// Returns the scale and zero point of a column.
    fn group(&self, module: &Module, row: usize, column: usize) -> (f32, u8) {
        let group = match &module.order {
            Some(order) => order.of[column] as usize,
            None => column / module.tile[1],
        };
        let group = group - self.first_group;
        (self.scales.row(row)[group], self.zeros.row(row)[group])
    }
}

impl Packed {
    /// Returns the quantized matrix of a region.
    fn module_of(&self, name: &str, region: &Region) -> Result<Option<&Module>> {
        let Some(module) = self.modules.get(name) else { return Ok(None) };
        if region.shape().dims() == module.shape {
            return Ok(Some(module));
        }
        Err(Error::TensorShape {
            name: name.into(),
            place: self.checkpoint.place(&module.codes_name),
            found: module.shape.to_vec(),
            needed: region.shape().dims().to_vec(),
        })
    }

    fn part(&self, module: &Module, rows: Range<usize>, columns: Range<usize>) -> Result<Part> {
        let groups = match &module.order {
            Some(order) => 0..order.groups,
            None => columns.start / module.tile[1]..columns.end.div_ceil(module.tile[1]),
        };
        let codes = self.codes(module, rows.clone(), columns.clone())?;
        let is_nan = |code: &u8| code & 0x7f == 0x7f;
        if let (Codes::Float, Some(at)) = (module.codes, codes.numbers.iter().position(is_nan)) {
            let (row, column) = (rows.start + at / codes.width, columns.start + at % codes.width);
            let name = module.codes_name.escape_debug();
            let reason = format!("tensor `{name}`: row {row}, column {column} is NaN");
            return Err(self.checkpoint.bad(&module.codes_name, reason));
        }
        Ok(Part {
            codes,
            scales: self.scales(module, rows.clone(), groups.clone())?,
            zeros: self.zeros(module, rows, groups.clone())?,
            first_column: columns.start,
            first_group: groups.start,
        })
    }

    fn read_as<T: Element>(
        &self,
        module: &Module,
        [rows, columns]: [Range<usize>; 2],
        out: &mut [T],
    ) -> Result<()> {
        let width = columns.len();
        if out.is_empty() {
            return Ok(());
        }
        let strip = (STRIP / width).clamp(1, rows.len());
        let mut weights = zeroed::<f32>(width)?;
        for (start, out) in rows.clone().step_by(strip).zip(out.chunks_mut(strip * width)) {
            let own = start..rows.end.min(start + strip);
            let part = self.part(module, own.clone(), columns.clone())?;
            for (row, out) in out.chunks_exact_mut(width).enumerate() {
                let codes = columns.clone().zip(part.codes.row(row));
                for (weight, (column, code)) in weights.iter_mut().zip(codes) {
                    let (scale, zero) = part.group(module, row, column);
                    *weight = scale
                        * match module.codes {
                            Codes::Float => e4m3(*code),
                            _ => (i32::from(*code) - i32::from(zero)) as f32,
                        };
                }
                convert(&weights, out);
            }
        }
        Ok(())
    }

    /// Returns the format of a matrix.
    fn format_of(&self, name: &str, module: &Module) -> Result<Format> {
        module.format.ok_or_else(|| Error::Unsupported {
            op: "quantized weights",
            reason: format!(
                "`{}` has a scale for {} columns, and products are computed for multiples of 32: load it \
                 `Packed::dequantized`",
                name.escape_debug(),
                module.tile[1]
            ),
        })
    }

    /// Writes the blocks of the rows of a part.
    fn encode(&self, module: &Module, format: Format, part: &Part, blocks: Range<usize>, out: &mut [u8]) {
        let (group, size) = (format.weights(), format.bytes());
        let end = part.first_column + part.codes.width;
        for (row, out) in out.chunks_exact_mut((blocks.len() * size).max(1)).enumerate() {
            for (block, out) in blocks.clone().zip(out.chunks_exact_mut(size)) {
                let columns = block * group..end.min((block + 1) * group);
                let (scale, zero) = part.group(module, row, columns.start);
                let of_row = columns.start - part.first_column..columns.end - part.first_column;
                let (head, codes) = out.split_at_mut(format.scale_bytes());
                write_scale(scale, zero, head);
                write_codes(format, &part.codes.row(row)[of_row], zero, codes);
            }
        }
    }

    /// Writes rows whose groups are not consecutive columns: all scales, then the codes.
    fn encode_ordered(&self, format: Format, part: &Part, row_bytes: usize, out: &mut [u8]) {
        let codes_bytes = (format.bytes() - format.scale_bytes()) * CHUNK / format.weights();
        for (row, out) in out.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            let (scales, zeros) = (part.scales.row(row), part.zeros.row(row));
            let (heads, chunks) = out.split_at_mut(scales.len() * format.scale_bytes());
            for (head, (scale, zero)) in
                heads.chunks_exact_mut(format.scale_bytes()).zip(scales.iter().zip(zeros))
            {
                write_scale(*scale, *zero, head);
            }
            let codes = part.codes.row(row).chunks(CHUNK);
            for (codes, out) in codes.zip(chunks.chunks_exact_mut(codes_bytes)) {
                write_codes(format, codes, 0, out);
            }
        }
    }
}

/// Writes what a block has before its codes.
fn write_scale(scale: f32, zero: u8, head: &mut [u8]) {
    head[..4].copy_from_slice(&scale.to_le_bytes());
    if let Some(to) = head.get_mut(4) {
        *to = zero;
    }
}

/// Writes the codes of a block. Columns after the last of the matrix have the code `pad`.
fn write_codes(format: Format, codes: &[u8], pad: u8, out: &mut [u8]) {
    let code = |at: usize| codes.get(at).copied().unwrap_or(pad);
    match format {
        Format::Int4(_) => {
            for (chunk, out) in out.chunks_exact_mut(CHUNK / 2).enumerate() {
                for (at, out) in (chunk * CHUNK..).zip(out) {
                    *out = code(at) | code(at + CHUNK / 2) << 4;
                }
            }
        }
        _ => out.iter_mut().enumerate().for_each(|(at, out)| *out = code(at)),
    }
}

impl WeightSource for Packed {
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorElement`]; [`Error::Sizes`]
    /// when the lengths of `out` and of the region differ; [`Error::Io`] when reading fails;
    /// [`Error::Checkpoint`] when a scale or a weight is not finite.
    fn read(&self, name: &str, role: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        let Some(module) = self.module_of(name, region)? else {
            return self.checkpoint.read(name, role, region, out);
        };
        check_elements(region.extent().len(), out.len())?;
        let ranges = [0, 1].map(|dim| region.ranges()[dim].clone());
        each_dtype!(AnyMut, out, out => self.read_as(module, ranges, out))
    }

    fn contains(&self, name: &str) -> bool {
        self.modules.contains_key(name) || !self.parts.contains(name) && self.checkpoint.contains(name)
    }

    /// Lists the matrices, and not the tensors that stand for them.
    fn names(&self) -> Option<Vec<String>> {
        let others = self.checkpoint.names().filter(|name| !self.parts.contains(*name));
        Some(self.modules.keys().cloned().chain(others.map(String::from)).collect())
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        match self.module_of(name, region)? {
            Some(module) if !self.dequantized => self.format_of(name, module).map(drop),
            Some(_) => Ok(()),
            None => self.checkpoint.check(name, region),
        }
    }

    fn format(&self, name: &str) -> Option<Format> {
        self.modules.get(name).filter(|_| !self.dequantized)?.format
    }

    fn read_blocks(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        let Some(module) = self.module_of(name, region)? else {
            let reason = format!("tensor `{}` is not quantized", name.escape_debug());
            return Err(Error::invalid("weights", reason));
        };
        let format = self.format_of(name, module)?;
        let [rows, columns] = [0, 1].map(|dim| region.ranges()[dim].clone());
        let groups = module.order.as_ref().map(|order| order.groups);
        let row_bytes = format.row_bytes(columns.clone(), groups);
        check_bytes(rows.len().saturating_mul(row_bytes), out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        if module.order.is_some() {
            let chunks =
                columns.start / CHUNK * CHUNK..columns.end.next_multiple_of(CHUNK).min(module.shape[1]);
            let part = self.part(module, rows, chunks)?;
            self.encode_ordered(format, &part, row_bytes, out);
        } else {
            let (blocks, group) = (format.blocks(columns), format.weights());
            let whole = blocks.start * group..module.shape[1].min(blocks.end * group);
            let part = self.part(module, rows, whole)?;
            self.encode(module, format, &part, blocks, out);
        }
        Ok(())
    }

    fn column_groups(&self, name: &str, columns: Range<usize>) -> Result<Option<ColumnGroups>> {
        let Some(order) = self.modules.get(name).and_then(|module| module.order.as_ref()) else {
            return Ok(None);
        };
        match order.of.get(columns.clone()) {
            Some(of) => Ok(Some(ColumnGroups { groups: order.groups, of: of.into() })),
            None => {
                Err(Error::sizes("weights", "the end of the columns", columns.end, "columns", order.of.len()))
            }
        }
    }

    fn activations(&self) -> Activations {
        self.activations
    }
}
