//! A checkpoint as a source of weights.

use super::{
    file::DataFile,
    header::{self, Entry},
    index,
    layout::{Location, locate},
    logged,
    region::{Items, check_bytes, check_elements, runs},
    stored::decode_as,
};
use crate::{
    device::{AnyMut, Cpu, DType, each_dtype},
    error::{Error, Result},
    tensor::{Region, Role, WeightSource, missing},
};
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// The maximal number of attempts to open a folder.
const TRIES: usize = 4;

/// A checkpoint in the safetensors format: one file, or several with an index.
///
/// [`WeightSource::read`] reads the bytes of a region, and the gaps of less than 4096 bytes between
/// the region's ranges. For a range of rows it reads exactly the region's bytes. For a range of
/// columns it reads, in addition to the region's bytes, at most 4095 bytes for each row.
/// [`Checkpoint::bytes_read`] counts the bytes. Stored f64, f32, bf16 and f16 are converted to the
/// requested element type, rounded to nearest if that type is narrower.
///
/// Ranks on several threads can share one checkpoint by reference.
///
/// ```
/// use shardwise::{device::AnyRef, prelude::*, weights::Checkpoint};
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("model.safetensors");
/// let elements = [0., 1., 2., 3., 4., 5.];
/// weights::write(&path, [("w", [2, 3], AnyRef::F32(elements.as_slice()))])?;
/// let checkpoint = Checkpoint::open(&path)?;
/// let mut row = [0.0; 3];
/// let region = Region::whole([2, 3]).narrow(0, 1..2);
/// checkpoint.read("w", Role::Weight, &region, AnyMut::F64(row.as_mut_slice()))?;
/// assert_eq!((row, checkpoint.bytes_read()), ([3., 4., 5.], 12));
/// # Ok::<(), shardwise::Error>(())
/// ```
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<DataFile>,
    tensors: BTreeMap<String, (usize, Entry)>,
    bytes_read: AtomicU64,
}

impl Checkpoint {
    /// Opens a checkpoint and reads its headers, but no tensors. `path` is a `.safetensors` file,
    /// an index (`….json`), or a folder with `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// The files stay open, so a later save to the folder does not change the tensors that this
    /// checkpoint reads.
    ///
    /// # Errors
    /// * [`Error::Io`]: a file is missing or cannot be read.
    /// * [`Error::Checkpoint`]: a file is damaged or is not a checkpoint. A header is longer than
    ///   its file, or all headers together are longer than 100 MB; a key occurs twice; the size of
    ///   a shape overflows; offsets do not match shape and element type; data overlap, have gaps or
    ///   do not fill the file. An index has a path that leads out of its folder or is not in its
    ///   shortest form. A folder has neither `model.safetensors` nor an index. A folder has both,
    ///   and another program wrote the index, so they may be of different models.
    /// * [`Error::MissingTensor`]: a file lacks a tensor that the index assigns to it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let opened = match path {
            _ if path.is_dir() => {
                // A concurrent save may remove files before this call opens them. The next attempt
                // finds the files of the new checkpoint.
                let again = |opened: &Result<Self>| match opened {
                    Err(Error::Io { .. }) => true,
                    Err(Error::Checkpoint { path: of, .. }) => of == path,
                    _ => false,
                };
                let mut opened = Self::open_folder(path);
                for _ in 1..TRIES {
                    if again(&opened) {
                        opened = Self::open_folder(path);
                    }
                }
                opened
            }
            _ if path.extension().is_some_and(|extension| extension == "json") => Self::open_index(path),
            _ => Self::open_file(path),
        }?;
        logged::opened(path, &opened.files)?;
        Ok(opened)
    }

    fn open_folder(path: &Path) -> Result<Self> {
        match locate(path)? {
            Some(Location::Single(file)) => Self::open_file(&file),
            Some(Location::Index(index)) => Self::open_index(&index),
            None => {
                let neither = "the folder has neither model.safetensors nor model.safetensors.index.json";
                let reason = format!("{neither}{}", hint(path));
                Err(Error::Checkpoint { path: path.into(), reason })
            }
        }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let file = DataFile::open(path)?;
        let tensors =
            header::read(&file, &mut 0)?.into_iter().map(|(name, entry)| (name, (0, entry))).collect();
        Ok(Self { path: path.into(), files: vec![file], tensors, bytes_read: AtomicU64::new(0) })
    }

    fn open_index(path: &Path) -> Result<Self> {
        let index = index::read(&DataFile::open(path)?)?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let mut named = vec![Vec::new(); index.files.len()];
        index.tensors.into_iter().for_each(|(tensor, file)| named[file].push(tensor));
        let (mut files, mut tensors, mut headers) = (Vec::new(), BTreeMap::new(), 0);
        for (at, (name, named)) in index.files.iter().zip(named).enumerate() {
            let file = DataFile::open(&folder.join(name)).map_err(|error| match error {
                Error::Io { path: shard, kind, reason } => {
                    let reason = format!("{reason}, but {} names this file", path.display());
                    Error::Io { path: shard, kind, reason }
                }
                other => other,
            })?;
            let mut header = header::read(&file, &mut headers)?;
            for name in named {
                let Some(entry) = header.remove(&name) else {
                    let place = format!("{}, where {} says it is", file.path().display(), path.display());
                    return Err(missing(&name, place, header.keys()));
                };
                tensors.insert(name, (at, entry));
            }
            files.push(file);
        }
        Ok(Self { path: path.into(), files, tensors, bytes_read: AtomicU64::new(0) })
    }

    /// Lists the names of the tensors in alphabetical order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the shape of a tensor. A tensor with more dimensions than [`crate::shard::Shape`]
    /// supports cannot be read.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.entry(name)?.1.shape)
    }

    /// Returns the element type in which a tensor is stored.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::TensorElement`] when the type is not f64, f32, bf16 or
    /// f16.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        let (file, entry) = self.entry(name)?;
        entry.float().ok_or_else(|| Error::TensorElement {
            name: name.into(),
            place: file.path().display().to_string(),
            found: format!("{:?}", entry.dtype),
        })
    }

    /// Returns the number of bytes of tensors that all threads have read so far, including gaps but
    /// not headers.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Returns the stored element type and the shape of a tensor, if there is one.
    pub(super) fn stored(&self, name: &str) -> Option<(safetensors::Dtype, &[usize])> {
        self.tensors.get(name).map(|(_, entry)| (entry.dtype, &entry.shape[..]))
    }

    /// Reads a region of a tensor of elements of one or several bytes, as they are stored.
    pub(super) fn read_bytes(&self, name: &str, region: &Region, out: &mut [u8]) -> Result<()> {
        self.check_shape(name, region)?;
        let (file, entry) = self.entry(name)?;
        let size = entry.dtype.bitsize() / 8;
        check_bytes(region.extent().len().saturating_mul(size), out.len())?;
        let items = Items { file, start: entry.start, size, bytes_read: &self.bytes_read };
        items.read(runs(region), |to, bytes| {
            out[to * size..to * size + bytes.len()].copy_from_slice(bytes);
            Ok(())
        })
    }

    /// Returns the path of the file that has a tensor.
    pub(super) fn place(&self, name: &str) -> String {
        let path = self.entry(name).map_or(self.path.as_path(), |(file, _)| file.path());
        path.display().to_string()
    }

    /// Returns an error of the file that has a tensor.
    pub(super) fn bad(&self, name: &str, reason: String) -> Error {
        match self.entry(name) {
            Ok((file, _)) => file.bad(reason),
            Err(_) => Error::Checkpoint { path: self.path.clone(), reason },
        }
    }

    fn check_shape(&self, name: &str, region: &Region) -> Result<()> {
        let (file, entry) = self.entry(name)?;
        if entry.shape == region.shape().dims() {
            return Ok(());
        }
        Err(Error::TensorShape {
            name: name.into(),
            place: file.path().display().to_string(),
            found: entry.shape.clone(),
            needed: region.shape().dims().to_vec(),
        })
    }

    fn entry(&self, name: &str) -> Result<(&DataFile, &Entry)> {
        match self.tensors.get(name) {
            Some((file, entry)) => Ok((&self.files[*file], entry)),
            None => Err(missing(name, self.path.display().to_string(), self.tensors.keys())),
        }
    }
}

/// Returns the end of the error text for a folder without a checkpoint. The text names a file of
/// weights in another format or with another name, if the folder has one.
fn hint(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    let ending = |endings: &[&str]| {
        let found = |name: &&String| endings.iter().any(|ending| name.ends_with(ending));
        names.iter().find(found).map(|name| name.escape_debug())
    };
    if let Some(name) = ending(&[".gguf"]) {
        return format!("; it has {name}, which `weights::Gguf` reads");
    }
    match (ending(&[".bin", ".h5", ".msgpack", ".pt", ".pth"]), ending(&[".safetensors"])) {
        (Some(name), _) => format!("; it has {name}, which has to be converted to safetensors first"),
        (None, Some(name)) => format!("; it has {name}, which can be opened by its own path"),
        (None, None) => String::new(),
    }
}

impl WeightSource for Checkpoint {
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorElement`]; [`Error::Sizes`]
    /// when the lengths of `out` and of the region differ; [`Error::Io`] when reading fails or the
    /// file has become shorter.
    fn read(&self, name: &str, _: Role, region: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        self.check(name, region)?;
        let ((file, entry), dtype) = (self.entry(name)?, self.dtype(name)?);
        check_elements(region.extent().len(), out.len())?;
        let items = Items { file, start: entry.start, size: dtype.size(), bytes_read: &self.bytes_read };
        each_dtype!(AnyMut, out, out => items.read(runs(region), |to, bytes| {
            let to = &mut out[to..to + bytes.len() / dtype.size()];
            decode_as(dtype, bytes, to);
            Ok(())
        }))
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn names(&self) -> Option<Vec<String>> {
        Some(self.tensors.keys().cloned().collect())
    }

    fn check(&self, name: &str, region: &Region) -> Result<()> {
        self.check_shape(name, region)?;
        self.dtype(name).map(|_| ())
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}
