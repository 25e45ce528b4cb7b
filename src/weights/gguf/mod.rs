//! GGUF files as a source of weights.

mod cursor;
mod header;
mod metadata;
mod names;
mod source;
mod split;
mod types;

pub use metadata::GgufValue;
pub(crate) use names::ROPE_DIVISORS;

use super::{file::DataFile, logged};
use crate::{error::Result, kernels::Activations, tensor::missing};
use cursor::Cursor;
use header::{Entry, Header};
use names::Heads;
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};
use types::Type;

/// The largest number of elements of a list with one element for each layer.
const MAX_LAYERS: u64 = 1 << 16;

/// The key of the architecture.
const ARCHITECTURE: &str = "general.architecture";

/// A GGUF file, or all files of a split model, as a [`WeightSource`] under Hugging Face's names.
///
/// * Tensors of `F64`, `F32`, `BF16` and `F16` are read as in a [`Checkpoint`](super::Checkpoint).
/// * Matrices in a [`Format`](crate::kernels::Format) stay quantized, unless
///   [`Gguf::dequantized`] is set. [`WeightSource::read`] dequantizes them.
/// * Tensors of other types do not prevent opening the file, but cannot be read.
/// * Names are translated for the architectures `llama`, `qwen2`, `qwen3` and `gpt2`. Files of
///   other architectures keep their names.
/// * Files of the architecture `llama` have the rows of q and k in the order of
///   [`RopePairs::Interleaved`](crate::kernels::RopePairs::Interleaved). The rows are read in the
///   order of Hugging Face.
///
/// A rank reads the blocks of its rows and columns, and the gaps of less than 4096 bytes between
/// them. The metadata stay in the file until [`Gguf::get`] reads them.
/// [`ModelConfig::of_gguf`](crate::models::ModelConfig::of_gguf) reads the model's configuration.
/// Ranks on several threads can share one `Gguf` by reference.
///
/// Source: `docs/gguf.md` of ggml.
///
/// ```
/// use shardwise::{prelude::*, weights::Gguf};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("tiny.gguf");
/// // One tensor `w` of 2 rows of 32 weights, in `Q8_0`.
/// let mut file = b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec();
/// file.extend(b"\x01\0\0\0\0\0\0\0w\x02\0\0\0\x20\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x08\0\0\0");
/// file.resize(96, 0);
/// for (scale, code) in [(0x3c_u8, 3), (0x40, 5)] {
///     file.extend([0, scale]); // 1 and 2 as f16
///     file.extend([code; 32]);
/// }
/// std::fs::write(&path, file).unwrap();
///
/// let gguf = Gguf::open(&path)?;
/// assert_eq!(gguf.shape("w")?, [2, 32]);
/// let mut weight = [0.0_f32];
/// let region = Region::whole([2, 32]).narrow(0, 1..2).narrow(1, 7..8);
/// gguf.read("w", Role::Weight, &region, AnyMut::F32(weight.as_mut_slice()))?;
/// assert_eq!((weight, gguf.bytes_read()), ([10.0], 34));
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// [`WeightSource`]: crate::tensor::WeightSource
/// [`WeightSource::read`]: crate::tensor::WeightSource::read
pub struct Gguf {
    path: PathBuf,
    files: Vec<DataFile>,
    tensors: BTreeMap<String, Tensor>,
    /// The offsets of the metadata values in the first file.
    values: BTreeMap<String, u64>,
    architecture: String,
    activations: Activations,
    dequantized: bool,
    bytes_read: AtomicU64,
}

/// A tensor of one of the files.
struct Tensor {
    file: usize,
    entry: Entry,
    /// The rows of a head, if they are in the order of interleaved pairs.
    head: Option<usize>,
}

impl Gguf {
    /// Opens a file, and reads its header, but no tensors. If the name of the file ends with
    /// `-00001-of-00005.gguf` or another number of the five, opens all files of the split model.
    ///
    /// # Errors
    /// * [`Error::Io`]: a file is missing or cannot be read.
    /// * [`Error::Checkpoint`]: a file is damaged, has a version other than 2 and 3, or is
    ///   big-endian. A count or a length exceeds the file; a name or a key occurs twice, is too
    ///   long or is not UTF-8; a list has lists as elements; the alignment is not a power of two;
    ///   a tensor is not aligned, overlaps another one, or ends after the file; a row is not a
    ///   whole number of blocks; the heads of `llama` do not divide the rows of q or k. The files
    ///   of a split model do not belong together.
    ///
    /// [`Error::Checkpoint`]: crate::Error::Checkpoint
    /// [`Error::Io`]: crate::Error::Io
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut gguf = Self {
            path: path.into(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            values: BTreeMap::new(),
            architecture: String::new(),
            activations: Activations::default(),
            dequantized: false,
            bytes_read: AtomicU64::new(0),
        };
        let mut headers = Vec::new();
        for (file, Header { tensors, values }) in split::open(path)? {
            if gguf.files.is_empty() {
                gguf.values = values;
            }
            gguf.files.push(file);
            headers.push(tensors);
        }
        gguf.architecture = match gguf.get(ARCHITECTURE)? {
            None => String::new(),
            Some(GgufValue::String(name)) => name,
            Some(_) => return Err(gguf.files[0].bad(format!("`{ARCHITECTURE}` is not a text"))),
        };
        let heads = if gguf.architecture == "llama" { gguf.llama_heads()? } else { [None; 2] };
        for (file, tensors) in headers.into_iter().enumerate() {
            for (name, entry) in tensors {
                let head = gguf.head(&gguf.files[file], &name, &entry, heads)?;
                let new = names::hugging_face(&gguf.architecture, &name);
                if gguf.tensors.insert(new, Tensor { file, entry, head }).is_some() {
                    let reason = format!("tensor `{}` is there twice", name.escape_debug());
                    return Err(gguf.files[file].bad(reason));
                }
            }
        }
        logged::opened(path, &gguf.files)?;
        Ok(gguf)
    }

    /// Returns the numbers of query heads and of key/value heads of `llama`.
    fn llama_heads(&self) -> Result<[Option<i128>; 2]> {
        let query = self.layer_number("llama.attention.head_count")?;
        Ok([query, self.layer_number("llama.attention.head_count_kv")?.or(query)])
    }

    /// Returns the rows of a head, if they are in the order of interleaved pairs.
    fn head(
        &self,
        file: &DataFile,
        name: &str,
        entry: &Entry,
        [query, key_value]: [Option<i128>; 2],
    ) -> Result<Option<usize>> {
        let heads = match names::interleaved(&self.architecture, name) {
            None => return Ok(None),
            Some(Heads::Query) => query,
            Some(Heads::KeyValue) => key_value,
        };
        let bad = |reason: &str| Err(file.bad(format!("tensor `{}`: {reason}", name.escape_debug())));
        let &[rows, ..] = entry.shape.as_slice() else { return bad("it has no rows") };
        let heads = heads.and_then(|heads| usize::try_from(heads).ok()).filter(|heads| *heads > 0);
        let Some(heads) = heads else {
            return bad(
                "its rows cannot be ordered without a number of heads in `llama.attention.head_count`",
            );
        };
        if !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
            return bad(&format!("its {rows} rows are not {heads} heads of an even number of rows"));
        }
        if entry.shape.len() > 2 {
            return bad(&format!("it has {} dimensions; at most 2 are allowed", entry.shape.len()));
        }
        if entry.shape.len() == 1 && Type::of(entry.number).is_some_and(|of| of.weights > 1) {
            return bad("its rows cannot be ordered, because its blocks have several rows");
        }
        Ok(Some(rows / heads))
    }

    /// Returns an integer of the metadata, also if the file has it as a list with the same number
    /// for each layer.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when the layers have different numbers, or the value is no integer.
    ///
    /// [`Error::Checkpoint`]: crate::Error::Checkpoint
    pub(crate) fn layer_number(&self, key: &str) -> Result<Option<i128>> {
        let bad = |reason: &str| Err(self.files[0].bad(format!("`{key}` {reason}")));
        let Some(&at) = self.values.get(key) else { return Ok(None) };
        match metadata::short_value(&mut Cursor::new(&self.files[0], at), MAX_LAYERS)? {
            GgufValue::Integer(number) => Ok(Some(number)),
            GgufValue::Array(numbers) => match numbers.first() {
                Some(GgufValue::Integer(first)) if numbers.iter().all(|number| *number == numbers[0]) => {
                    Ok(Some(*first))
                }
                Some(GgufValue::Integer(_)) => bad("differs between layers, which is not known"),
                _ => bad("has no integers"),
            },
            _ => bad("is not an integer"),
        }
    }

    /// Sets how products with the quantized weights treat their other factor.
    pub fn with_activations(self, activations: Activations) -> Self {
        Self { activations, ..self }
    }

    /// Loads quantized matrices as floating-point numbers, like all other tensors.
    pub fn dequantized(self) -> Self {
        Self { dequantized: true, ..self }
    }

    /// Returns the path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a value of the metadata, from the first file of a split model. Returns `None` if the
    /// file does not have the key.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Checkpoint`] when a text is not UTF-8, a truth value is neither 0
    /// nor 1, or a list has more than 2²² elements.
    ///
    /// [`Error::Checkpoint`]: crate::Error::Checkpoint
    /// [`Error::Io`]: crate::Error::Io
    pub fn get(&self, key: &str) -> Result<Option<GgufValue>> {
        let Some(&at) = self.values.get(key) else { return Ok(None) };
        metadata::value(&mut Cursor::new(&self.files[0], at)).map(Some)
    }

    /// Lists the keys of the metadata in alphabetical order.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Returns `general.architecture`, or an empty text if the file does not have it.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// Lists the names of the tensors in alphabetical order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the shape of a tensor, slowest dimension first: `[out, in]`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    ///
    /// [`Error::MissingTensor`]: crate::Error::MissingTensor
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.tensor(name)?.entry.shape)
    }

    /// Returns the number of bytes of tensors that all threads have read so far, including gaps but
    /// not headers.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        let place = || self.path.display().to_string();
        self.tensors.get(name).ok_or_else(|| missing(name, place(), self.tensors.keys()))
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gguf({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}
