//! Checkpoints with matrices quantized by GPTQ, AWQ or compressed-tensors, or in FP8.
//!
//! `find.rs` finds the tensors of each quantized matrix and checks their shapes, `integers.rs`
//! reads codes, zero points and scales, and `source.rs` makes blocks and weights of them.

mod find;
mod integers;
mod module;
mod source;

use super::Checkpoint;
use crate::{
    error::{Error, Result},
    kernels::Activations,
    shard::Shape,
    tensor::Region,
};
use module::Module;
use safetensors::Dtype;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// How the matrices of a checkpoint are quantized: `quantization_config` of its `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// The tensors that stand for a matrix.
    pub method: PackingMethod,
    /// The precisions and tiles that matrices may have. The shapes of the tensors select one.
    pub tiles: Vec<Tile>,
}

/// The tensors that stand for a matrix `[out, in]` of weights.
///
/// | method | codes | scales | zero points |
/// |---|---|---|---|
/// | GPTQ | `qweight [in / n, out]` | `scales [groups, out]` | `qzeros [groups, out / n]` |
/// | AWQ | `qweight [in, out / n]` | `scales [groups, out]` | `qzeros [groups, out / n]` |
/// | compressed-tensors | `weight_packed` or `weight` | `weight_scale` | `weight_zero_point` |
/// | FP8 | `weight` | `weight_scale_inv` or `weight_scale` | |
///
/// n codes are packed in 32 bits. A weight is (code − zero point) · scale. compressed-tensors has
/// `weight_packed [out, in / n]`, `weight_scale [out, groups]` and
/// `weight_zero_point [out / n, groups]`. With `weight [out, in]`, scales are `[1]`, `[out, 1]`,
/// `[out, groups]`, or `[out / rows, in / columns]` of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PackingMethod {
    /// GPTQ. Each zero point is stored minus 1, modulo 2ᵇ.
    Gptq,
    /// GPTQ as GPTQModel writes it: the zero points of a word are stored minus 1, in one
    /// subtraction with borrows from the next zero point.
    GptqModel,
    /// GPTQ with zero points as they are (`checkpoint_format` is `gptq_v2`).
    GptqV2,
    /// AWQ, version `gemm`. The columns of a word are in the order 0, 2, 4, 6, 1, 3, 5, 7.
    Awq,
    /// compressed-tensors: `pack-quantized`, `int-quantized`, `naive-quantized` and
    /// `float-quantized`.
    CompressedTensors,
    /// FP8 (e4m3) in tiles, or with one scale.
    Fp8,
}

/// The precision of a matrix, and the part of it that shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Tile {
    /// The bits of a code: 4 or 8.
    pub bits: u32,
    /// Whether codes are floating-point numbers (e4m3).
    pub float: bool,
    /// The number of rows that share a scale. `None`: all.
    pub rows: Option<usize>,
    /// The number of columns that share a scale. `None`: all.
    pub columns: Option<usize>,
    /// Whether there have to be zero points. Otherwise there may be.
    pub asymmetric: bool,
    /// Whether there has to be a tensor of the groups of the columns. Otherwise there may be.
    pub any_order: bool,
}

impl Tile {
    /// Makes a tile of integers in which zero points and the groups of the columns are optional.
    pub fn new(bits: u32, rows: Option<usize>, columns: Option<usize>) -> Self {
        Self { bits, float: false, rows, columns, asymmetric: false, any_order: false }
    }

    /// Makes a tile of FP8 codes.
    pub fn fp8(rows: Option<usize>, columns: Option<usize>) -> Self {
        Self { float: true, ..Self::new(8, rows, columns) }
    }
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |count: Option<usize>| count.map_or("all".into(), |count| count.to_string());
        let (rows, columns) = (count(self.rows), count(self.columns));
        let zeros = if self.asymmetric { ", with zero points" } else { "" };
        let order = if self.any_order { ", with columns in any order" } else { "" };
        let kind = if self.float { "floating-point numbers" } else { "integers" };
        write!(f, "{kind} of {} bits, a scale for {rows} rows x {columns} columns{zeros}{order}", self.bits)
    }
}

/// A quantized checkpoint in the safetensors format as a source of weights: GPTQ, AWQ,
/// compressed-tensors, and FP8.
///
/// w = scale · (code − zero point), computed in f32. The matrix of the module `m` has the name
/// `m.weight`, as in a checkpoint that is not quantized. Its format is [`Int4`], [`Int8`] or
/// [`Fp8`]. Other tensors, such as norms, biases and modules that were not quantized, are read as
/// they are.
///
/// A rank reads the codes, scales and zero points of its rows and columns. A cut may divide a group
/// or a tile: then both neighbours read its scale. If groups are not consecutive columns (GPTQ's
/// `desc_act`), a rank reads the scales of all groups.
///
/// The quantization of *activations* that a configuration describes (`input_activations`,
/// `activation_scheme`, `input_scale`) is not applied: see [`Activations`].
///
/// [`Int4`]: crate::kernels::Format::Int4
/// [`Int8`]: crate::kernels::Format::Int8
/// [`Fp8`]: crate::kernels::Format::Fp8
///
/// ```
/// use shardwise::kernels::{Format, GroupSize};
/// use shardwise::prelude::*;
/// use shardwise::weights::{Checkpoint, Packed, Packing};
/// # use shardwise::weights::{PackingMethod, Tile};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.safetensors");
/// # let header = r#"{"up.weight": {"dtype": "F8_E4M3", "shape": [1, 32], "data_offsets": [0, 32]},
/// #   "up.weight_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [32, 36]}}"#;
/// # let (length, scale) = ((header.len() as u64).to_le_bytes(), 2f32.to_le_bytes());
/// # let file = [&length[..], header.as_bytes(), &[0x38; 32], &scale].concat();
/// # std::fs::write(&path, file).unwrap();
/// # let tile = Tile::fp8(Some(128), Some(128));
///
/// // `DecoderConfig::packing` has this value for a folder of Hugging Face.
/// let packing = Packing { method: PackingMethod::Fp8, tiles: vec![tile] };
/// let source = Packed::new(Checkpoint::open(&path)?, &packing)?;
/// assert_eq!(source.format("up.weight"), Some(Format::Fp8(GroupSize::G128)));
///
/// let (mut row, whole) = ([0.0_f32; 32], Region::whole([1, 32]));
/// source.read("up.weight", Role::Weight, &whole, AnyMut::F32(row.as_mut_slice()))?;
/// // The code 0x38 is 1, and the scale is 2.
/// assert_eq!(row, [2.0; 32]);
/// # Ok::<(), Error>(())
/// ```
pub struct Packed {
    checkpoint: Checkpoint,
    /// The quantized matrices by the names of their weights.
    modules: BTreeMap<String, Module>,
    /// The names of the tensors that belong to quantized matrices.
    parts: BTreeSet<String>,
    dequantized: bool,
    activations: Activations,
}

impl Packed {
    /// Finds the quantized matrices of a checkpoint. Reads the groups of their columns, but no
    /// weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a tile has other bits than 4 or 8; [`Error::Checkpoint`] when a
    /// matrix lacks a tensor or is stored twice, shapes disagree with each other or fit no tile, or
    /// a column is of a group that does not exist; the errors of [`Checkpoint`].
    pub fn new(checkpoint: Checkpoint, packing: &Packing) -> Result<Self> {
        if let Some(tile) = packing.tiles.iter().find(|tile| !matches!(tile.bits, 4 | 8)) {
            let reason = format!("a tile has {} bits, and codes of 4 and 8 bits are known", tile.bits);
            return Err(Error::invalid("quantized weights", reason));
        }
        let (modules, parts) = find::find(&checkpoint, packing)?;
        Ok(Self { checkpoint, modules, parts, dequantized: false, activations: Activations::default() })
    }

    /// Loads the quantized matrices as floating-point numbers.
    pub fn dequantized(self) -> Self {
        Self { dequantized: true, ..self }
    }

    /// Whether the matrices are loaded as floating-point numbers.
    pub fn is_dequantized(&self) -> bool {
        self.dequantized
    }

    /// Sets how products with the quantized weights treat their other factor.
    pub fn with_activations(self, activations: Activations) -> Self {
        Self { activations, ..self }
    }

    /// Returns the names, types and shapes of the tensors that stand for a matrix.
    pub(super) fn parts(&self, name: &str) -> impl Iterator<Item = (String, Dtype, &[usize])> {
        let parts = self.modules.get(name).into_iter().flat_map(|module| &module.parts);
        parts.filter_map(|part| {
            let (dtype, shape) = self.checkpoint.stored(part)?;
            Some((part.clone(), dtype, shape))
        })
    }

    /// Reads a tensor of [`Packed::parts`] as it is stored.
    pub(super) fn read_part(&self, name: &str, shape: Shape, out: &mut [u8]) -> Result<()> {
        self.checkpoint.read_bytes(name, &Region::whole(shape), out)
    }

    /// Returns the number of bytes of tensors that all threads have read so far, as
    /// [`Checkpoint::bytes_read`].
    pub fn bytes_read(&self) -> u64 {
        self.checkpoint.bytes_read()
    }
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Packed({:?}, {} quantized matrices)", self.checkpoint, self.modules.len())
    }
}
