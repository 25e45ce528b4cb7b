//! Finds the tensors of the quantized matrices of a checkpoint, and checks their shapes.

use super::{
    Packing, PackingMethod, Tile,
    module::{Codes, Minus, Module, Words, Zeros},
};
use crate::{
    error::{Error, Result},
    kernels::{ColumnGroups, Format, GroupSize},
    shard::Shape,
    tensor::Region,
    weights::Checkpoint,
};
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// The tensors of a checkpoint that belong to one matrix.
struct Finder<'a> {
    checkpoint: &'a Checkpoint,
    module: &'a str,
    parts: BTreeSet<String>,
}

impl Finder<'_> {
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.module)
    }

    fn bad(&self, part: &str, reason: String) -> Error {
        let name = self.name(part);
        self.checkpoint.bad(&name, format!("tensor `{}`: {reason}", name.escape_debug()))
    }

    /// Returns the element type and the shape of a tensor, which becomes a part of the matrix.
    fn optional(&mut self, part: &str) -> Option<(Dtype, Vec<usize>)> {
        let name = self.name(part);
        let (dtype, shape) = self.checkpoint.stored(&name)?;
        let shape = shape.to_vec();
        self.parts.insert(name);
        Some((dtype, shape))
    }

    fn part(&mut self, part: &str) -> Result<(Dtype, Vec<usize>)> {
        // The error of a missing tensor.
        self.checkpoint.shape(&self.name(part))?;
        self.optional(part).ok_or_else(|| self.bad(part, "is missing".into()))
    }

    /// Returns the shape of a matrix of integers of 32 bits.
    fn words(&mut self, part: &str) -> Result<[usize; 2]> {
        match self.part(part)? {
            (Dtype::I32, shape) => match shape[..] {
                [rows, columns] => Ok([rows, columns]),
                _ => Err(self.bad(part, format!("shape {shape:?} is not that of a matrix"))),
            },
            (dtype, _) => Err(self.bad(part, format!("packed codes are {dtype:?}, and not I32"))),
        }
    }

    /// Reads the groups of the columns, if there is a tensor of them. Returns `None` if they are
    /// consecutive columns.
    fn order(
        &mut self,
        part: &str,
        columns: usize,
        groups: usize,
        tile: usize,
    ) -> Result<Option<ColumnGroups>> {
        let Some((dtype, shape)) = self.optional(part) else { return Ok(None) };
        if dtype != Dtype::I32 || shape != [columns] {
            let reason =
                format!("is {dtype:?} of shape {shape:?}, and the groups of {columns} columns are I32");
            return Err(self.bad(part, reason));
        }
        let mut bytes = vec![0; 4 * columns];
        self.checkpoint.read_bytes(&self.name(part), &Region::whole([columns]), &mut bytes)?;
        let of: Vec<i32> = bytes.as_chunks().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
        // compressed-tensors writes −1 for all columns where the order of the groups was not
        // determined.
        if part == "weight_g_idx" && of.iter().all(|group| *group == -1) {
            return Ok(None);
        }
        let mut own = Vec::with_capacity(columns);
        for (column, group) in of.into_iter().enumerate() {
            match u32::try_from(group) {
                Ok(group) if (group as usize) < groups => own.push(group),
                _ => {
                    let reason =
                        format!("column {column} is of group {group}, but there are {groups} groups");
                    return Err(self.bad(part, reason));
                }
            }
        }
        let consecutive = own.iter().enumerate().all(|(column, group)| column / tile == *group as usize);
        Ok((!consecutive).then(|| ColumnGroups { groups, of: Arc::from(own) }))
    }

    /// Returns what fits one of the tiles. `codes` is the name of the codes.
    fn select<'t, R: PartialEq>(
        &self,
        codes: &str,
        tiles: impl Iterator<Item = &'t Tile>,
        fits: impl Fn(&Tile) -> Result<R, Misfit>,
    ) -> Result<R> {
        let (mut found, mut misfits) = (None, Vec::new());
        for tile in tiles {
            match (fits(tile), &found) {
                (Err((part, reason)), _) => misfits.push((part, format!("{reason} ({tile})"))),
                (Ok(fit), Some(other)) if *other != fit => {
                    return Err(self.bad(codes, "fits several of the configured precisions".into()));
                }
                (Ok(fit), _) => found = Some(fit),
            }
        }
        found.ok_or_else(|| match misfits.first() {
            None => self.bad(codes, "`quantization_config` has no precision for it".into()),
            Some((part, _)) => {
                let reasons: Vec<_> = misfits.iter().map(|(_, reason)| reason.as_str()).collect();
                self.bad(part, reasons.join(", or "))
            }
        })
    }

    /// Checks that there is a tensor of the groups of the columns, if the tile needs one.
    fn check_order(&self, part: &'static str, tile: &Tile) -> Result<(), Misfit> {
        if !tile.any_order || self.checkpoint.stored(&self.name(part)).is_some() {
            return Ok(());
        }
        Err((part, "is missing, and has the order of the columns".into()))
    }
}

/// A tensor of a module that does not fit a tile, and why.
type Misfit = (&'static str, String);

fn check_shape(part: &'static str, found: &[usize], needed: [usize; 2]) -> Result<(), Misfit> {
    if found == needed {
        return Ok(());
    }
    Err((part, format!("has the shape {found:?}, and not {needed:?}")))
}

/// Checks the shape of scales.
fn check_grid(part: &'static str, stored: &[usize], needed: [usize; 2]) -> Result<(), Misfit> {
    if is_grid(stored, needed) { Ok(()) } else { check_shape(part, stored, needed) }
}

fn check_bits(part: &'static str, tile: &Tile, float: bool) -> Result<(), Misfit> {
    if tile.float == float {
        return Ok(());
    }
    Err((part, format!("has {}", if float { "floating-point numbers" } else { "integers" })))
}

/// Whether a tensor of scales has this shape. The stored shape may lack dimensions of size 1.
fn is_grid(stored: &[usize], [rows, columns]: [usize; 2]) -> bool {
    match *stored {
        [] => [rows, columns] == [1, 1],
        [size] => [rows, columns] == [size, 1],
        [height, width] => [rows, columns] == [height, width],
        _ => false,
    }
}

/// Finds the quantized matrices of a checkpoint, by the names of their weights, and the names of
/// all their tensors.
pub(super) fn find(
    checkpoint: &Checkpoint,
    packing: &Packing,
) -> Result<(BTreeMap<String, Module>, BTreeSet<String>)> {
    let (mut modules, mut parts) = (BTreeMap::new(), BTreeSet::new());
    for name in checkpoint.names() {
        let Some((module, part)) = name.rsplit_once('.') else { continue };
        let mut finder = Finder { checkpoint, module, parts: BTreeSet::new() };
        let found = match (packing.method, part) {
            (PackingMethod::CompressedTensors | PackingMethod::Fp8, "weight") => finder.bytes(packing)?,
            (PackingMethod::CompressedTensors, "weight_packed") => Some(finder.compressed(packing)?),
            (PackingMethod::CompressedTensors | PackingMethod::Fp8, _) => None,
            (_, "qweight") => Some(finder.transposed(packing)?),
            _ => None,
        };
        if let Some(mut found) = found {
            finder.check(&found)?;
            found.parts = finder.parts;
            parts.extend(found.parts.iter().cloned());
            let weight = format!("{module}.weight");
            if !found.parts.contains(&weight) && checkpoint.stored(&weight).is_some() {
                let (weight, codes) = (weight.escape_debug(), found.codes_name.escape_debug());
                let reason = format!("the matrix `{weight}` is stored twice, also as `{codes}`");
                return Err(checkpoint.bad(&found.codes_name, reason));
            }
            modules.insert(weight, found);
        }
    }
    Ok((modules, parts))
}

impl Finder<'_> {
    /// Checks what is the same for all methods.
    fn check(&self, module: &Module) -> Result<()> {
        let [out, columns] = module.shape;
        if out == 0 || columns == 0 {
            let name = module.codes_name.escape_debug();
            let reason = format!("tensor `{name}`: a matrix of {out} rows and {columns} columns is empty");
            return Err(self.checkpoint.bad(&module.codes_name, reason));
        }
        for name in &self.parts {
            let rank = self.checkpoint.shape(name)?.len();
            if rank > Shape::MAX_RANK {
                let (name, most) = (name.escape_debug(), Shape::MAX_RANK);
                let reason = format!("tensor `{name}` has {rank} dimensions, and at most {most} are known");
                return Err(self.checkpoint.bad(&module.codes_name, reason));
            }
        }
        match self.checkpoint.stored(&module.scales_name) {
            Some((Dtype::F8_E8M0, _)) => Ok(()),
            _ => self.checkpoint.dtype(&module.scales_name).map(drop),
        }
    }

    /// Returns a module whose numbers are packed, and whose columns are quantized in groups.
    fn packed(
        &mut self,
        [codes_name, scales_name, zeros_name, order_name]: [&str; 4],
        (shape, tile): ([usize; 2], usize),
        (codes, zeros): (Words, Zeros),
    ) -> Result<Module> {
        let groups = shape[1].div_ceil(tile);
        let order = self.order(order_name, shape[1], groups, tile)?;
        let group = if order.is_some() { Some(GroupSize::G32) } else { group_size(tile, shape[1]) };
        let int = if codes.bits == 4 { Format::Int4 } else { Format::Int8 };
        let (_, scales_shape) = self.part(scales_name)?;
        Ok(Module {
            shape,
            codes_name: self.name(codes_name),
            codes: Codes::Packed(codes),
            scales_name: self.name(scales_name),
            scales_shape,
            zeros_name: self.name(zeros_name),
            zeros,
            tile: [1, tile],
            order,
            format: group.map(int),
            parts: BTreeSet::new(),
        })
    }

    /// GPTQ and AWQ. All tensors are stored transposed. `qzeros` is packed along the rows, and
    /// `qweight` along the columns or, by AWQ, along the rows.
    fn transposed(&mut self, packing: &Packing) -> Result<Module> {
        let words = self.words("qweight")?;
        let zeros = self.words("qzeros")?;
        let scales = self.part("scales")?.1;
        let awq = packing.method == PackingMethod::Awq;
        let minus = match packing.method {
            PackingMethod::Gptq => Minus::OneOfNumber,
            PackingMethod::GptqModel => Minus::OneOfWord,
            _ => Minus::Nothing,
        };
        let fits = |tile: &Tile| {
            let (bits, along_rows) = (tile.bits, awq);
            let codes = Words { bits, transposed: true, along_rows, awq, minus: Minus::Nothing };
            let of_zeros = Words { along_rows: true, minus, ..codes };
            let [columns, out] = words;
            let shape = match awq {
                true => [out.saturating_mul(codes.per_word()), columns],
                false => [out, columns.saturating_mul(codes.per_word())],
            };
            let [out, columns] = shape;
            let group = size(tile.columns, columns);
            let groups = columns.div_ceil(group);
            check_bits("qweight", tile, false)?;
            if awq && tile.bits != 4 {
                return Err(("qweight", format!("AWQ has no weights of {} bits", tile.bits)));
            }
            check_shape("scales", &scales, [groups, out])?;
            check_shape("qzeros", &zeros, of_zeros.shape([out, groups]))?;
            self.check_order("g_idx", tile)?;
            Ok(((shape, group), (codes, Zeros::Packed(of_zeros))))
        };
        let (shape, words) = self.select("qweight", packing.tiles.iter(), fits)?;
        self.packed(["qweight", "scales", "qzeros", "g_idx"], shape, words)
    }

    /// `weight_packed` is packed along the columns, `weight_zero_point` along the rows.
    fn compressed(&mut self, packing: &Packing) -> Result<Module> {
        let words = self.words("weight_packed")?;
        let shape = self.weight_shape()?;
        let scales = self.part("weight_scale")?.1;
        let zeros = match self.optional("weight_zero_point") {
            Some(_) => Some(self.words("weight_zero_point")?),
            None => None,
        };
        let [out, columns] = shape;
        let fits = |tile: &Tile| {
            let codes = Words {
                bits: tile.bits,
                transposed: false,
                along_rows: false,
                awq: false,
                minus: Minus::Nothing,
            };
            let of_zeros = Words { along_rows: true, ..codes };
            let group = size(tile.columns, columns);
            let grid = [out, columns.div_ceil(group)];
            check_bits("weight_packed", tile, false)?;
            if tile.rows != Some(1) {
                return Err(("weight_packed", "needs a scale for each row".into()));
            }
            check_shape("weight_packed", &words, codes.shape(shape))?;
            check_grid("weight_scale", &scales, grid)?;
            let zeros = match zeros {
                Some(zeros) => {
                    check_shape("weight_zero_point", &zeros, of_zeros.shape(grid))?;
                    Zeros::Packed(of_zeros)
                }
                None if tile.asymmetric => return Err(("weight_zero_point", "is missing".into())),
                None => Zeros::Constant(1 << (tile.bits - 1)),
            };
            self.check_order("weight_g_idx", tile)?;
            Ok(((shape, group), (codes, zeros)))
        };
        let (shape, words) = self.select("weight_packed", packing.tiles.iter(), fits)?;
        let names = ["weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"];
        self.packed(names, shape, words)
    }

    /// Reads the shape of a packed matrix.
    fn weight_shape(&mut self) -> Result<[usize; 2]> {
        let (dtype, shape) = self.part("weight_shape")?;
        let size = match dtype {
            Dtype::I64 => 8,
            Dtype::I32 => 4,
            _ => 0,
        };
        if size == 0 || shape != [2] {
            let reason = format!("is {dtype:?} of shape {shape:?}, and not two integers");
            return Err(self.bad("weight_shape", reason));
        }
        let mut bytes = vec![0; 2 * size];
        self.checkpoint.read_bytes(&self.name("weight_shape"), &Region::whole([2]), &mut bytes)?;
        let mut sizes = [0; 2];
        for (size, bytes) in sizes.iter_mut().zip(bytes.chunks_exact(size)) {
            let mut wide = [0; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            *size = u64::from_le_bytes(wide);
        }
        // A negative number is large.
        let small = |size: u64| usize::try_from(size).ok().filter(|size| *size < 1 << 32);
        match sizes.map(small) {
            [Some(out), Some(columns)] => Ok([out, columns]),
            _ => Err(self.bad("weight_shape", format!("the sizes {sizes:?} are out of range"))),
        }
    }

    /// A matrix of bytes. Returns `None` if the weights are floating-point numbers of another type,
    /// and so not quantized.
    fn bytes(&mut self, packing: &Packing) -> Result<Option<Module>> {
        let Some((dtype, shape)) = self.checkpoint.stored(&self.name("weight")) else { return Ok(None) };
        let codes = match dtype {
            Dtype::I8 if packing.method == PackingMethod::CompressedTensors => Codes::Signed,
            Dtype::F8_E4M3 => Codes::Float,
            _ => return Ok(None),
        };
        let &[out, columns] = shape else { return Ok(None) };
        self.part("weight")?;
        let scales_name: &'static str = match packing.method {
            PackingMethod::Fp8 if self.checkpoint.stored(&self.name("weight_scale_inv")).is_some() => {
                "weight_scale_inv"
            }
            _ => "weight_scale",
        };
        let scales = self.part(scales_name)?.1;
        self.optional("input_scale");
        let zeros = match (self.optional("weight_zero_point"), codes) {
            (None, Codes::Signed) => Zeros::Constant(128),
            (None, _) => Zeros::Constant(0),
            (Some((Dtype::I8, shape)), Codes::Signed) if shape == scales => Zeros::Signed,
            (Some((dtype, shape)), _) => {
                let reason =
                    format!("is {dtype:?} of shape {shape:?}, but the scales have the shape {scales:?}");
                return Err(self.bad("weight_zero_point", reason));
            }
        };
        let has_zeros = zeros == Zeros::Signed;
        let fits = |tile: &Tile| {
            check_bits("weight", tile, codes == Codes::Float)?;
            if tile.bits != 8 {
                return Err(("weight", "has 8 bits".into()));
            }
            if tile.asymmetric && !has_zeros {
                return Err(("weight_zero_point", "is missing".into()));
            }
            self.check_order("weight_g_idx", tile)?;
            let tile = [size(tile.rows, out), size(tile.columns, columns)];
            check_grid(scales_name, &scales, [out.div_ceil(tile[0]), columns.div_ceil(tile[1])])?;
            Ok(tile)
        };
        let tile = self.select("weight", packing.tiles.iter(), fits)?;
        let order = self.order("weight_g_idx", columns, columns.div_ceil(tile[1]), tile[1])?;
        if order.is_some() && codes == Codes::Float {
            return Err(
                self.bad("weight_g_idx", "FP8 weights with columns in another order are not known".into())
            );
        }
        let of = if codes == Codes::Float { Format::Fp8 } else { Format::Int8 };
        let group = if order.is_some() { Some(GroupSize::G32) } else { group_size(tile[1], columns) };
        Ok(Some(Module {
            shape: [out, columns],
            codes_name: self.name("weight"),
            codes,
            scales_name: self.name(scales_name),
            scales_shape: scales,
            zeros_name: self.name("weight_zero_point"),
            zeros,
            tile,
            order,
            format: group.map(of),
            parts: BTreeSet::new(),
        }))
    }
}

/// Returns the rows or columns of a tile of a matrix that has `all` of them.
fn size(tile: Option<usize>, all: usize) -> usize {
    tile.unwrap_or(all).clamp(1, all.max(1))
}

/// Returns the largest group that does not cross tiles of so many columns.
fn group_size(tile: usize, columns: usize) -> Option<GroupSize> {
    if tile >= columns { Some(GroupSize::G128) } else { GroupSize::dividing(tile) }
}
