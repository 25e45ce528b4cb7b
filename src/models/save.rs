//! Writing a sharded model as one checkpoint.

use crate::{
    comm::{Group, ReduceOp},
    device::{Cpu, Element},
    error::{Error, Result},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, Piece, Tensor},
    weights,
};
use std::{collections::BTreeMap, fs, path::Path};

/// The most elements of a tensor that pass between the ranks at once.
const CHUNK: usize = 1 << 22;

/// The most bytes of tensors in one file, where nobody says otherwise.
pub(super) const MAX_SHARD: usize = 4 << 30;

/// Writes `config.json` and the tensors of the parameters that `visit` visits to a folder, which is made if it is not there:
/// `model.safetensors`, or numbered files and an index where that would be larger than `max_shard` bytes.
///
/// Every rank calls it; rank 0 writes. Each element goes by from the rank that owns it, some rows of one tensor at a time,
/// so that no rank but the first holds more of the model than its part, and that one at most the tensors of a file. So a
/// model that was sharded over a ranks is read over b ranks from here. `transposed` names matrices that are to be stored
/// as `[in, out]`.
///
/// Collectives: an all-reduce of every element; it adds −0 to what is there, which keeps every bit.
///
/// # Errors
/// When a file cannot be written, or a collective fails. Every rank gets an error if the first one cannot write.
pub fn save<T: Element, B: Backend>(
    group: &Group<B>,
    mut visit: impl FnMut(&mut dyn FnMut(&mut Param<T, B>) -> Result<()>) -> Result<()>,
    folder: &Path,
    config: &str,
    transposed: impl Fn(&str) -> bool,
    max_shard: usize,
) -> Result<()> {
    let writes = group.rank() == 0;
    let mut written = Ok(());
    let mut bytes = 0;
    visit(&mut |param| {
        bytes += whole_tensors(param).values().map(|shape| shape.len() * size_of::<T>()).sum::<usize>();
        Ok(())
    })?;
    let mut files = Files::<T>::new(folder, bytes <= max_shard, max_shard);
    if writes {
        written = files.begin(config);
    }
    visit(&mut |param| {
        for (name, shape) in whole_tensors(param) {
            let mut host = Vec::new();
            gather(group, param, &name, shape, writes.then_some(&mut host))?;
            if writes && written.is_ok() {
                let (shape, host) = match shape.dims() {
                    &[rows, cols] if transposed(&name) => ([cols, rows].into(), transpose(&host, rows, cols)),
                    _ => (shape, host),
                };
                written = files.add(name, shape, host);
            }
        }
        Ok(())
    })?;
    if writes && written.is_ok() {
        written = files.finish();
    }
    // What the first rank's disk says, all ranks hear.
    let mut failed = Tensor::<f64, B>::full(group.device(), [1], f64::from(u8::from(written.is_err())))?;
    group.all_reduce(ReduceOp::Max, &mut failed)?;
    written?;
    if failed.to_vec()?[0] > 0.0 {
        return Err(Error::invalid("save", "rank 0 could not write the checkpoint"));
    }
    Ok(())
}

/// The tensors that a parameter is made of. A rank holds a part of each, so that all ranks know the same names.
fn whole_tensors<T: Element, B: Backend>(param: &Param<T, B>) -> BTreeMap<String, Shape> {
    param.pieces().iter().map(|piece| (piece.tensor.clone(), piece.region.shape())).collect()
}

/// One tensor, some rows at a time, to the rank that gives a host vector.
fn gather<T: Element, B: Backend>(
    group: &Group<B>,
    param: &Param<T, B>,
    name: &str,
    shape: Shape,
    mut host: Option<&mut Vec<T>>,
) -> Result<()> {
    let rows = shape.dims().first().copied().unwrap_or(1);
    let width = shape.len().checked_div(rows).unwrap_or(0);
    let pieces: Vec<&Piece> =
        param.pieces().iter().filter(|piece| piece.owned && piece.tensor == name).collect();
    let own = if pieces.is_empty() { Vec::new() } else { param.value().to_vec()? };
    let own_width = param.value().shape().split_at(0).1;
    let at_a_time = (CHUNK / width.max(1)).max(1);
    let nothing = T::from_f64(-0.0);
    for first in (0..rows).step_by(at_a_time) {
        let range = first * width..rows.min(first + at_a_time) * width;
        let mut chunk = vec![nothing; range.len()];
        for piece in &pieces {
            let mut from = &own[piece.row * own_width..];
            for run in piece.region.runs() {
                let (part, rest) = from.split_at(run.len());
                let (start, end) = (run.start.max(range.start), run.end.min(range.end));
                if start < end {
                    chunk[start - range.start..end - range.start]
                        .copy_from_slice(&part[start - run.start..end - run.start]);
                }
                from = rest;
            }
        }
        let mut chunk = Tensor::<T, B>::from_slice(group.device(), [range.len()], &chunk)?;
        group.all_reduce(ReduceOp::Sum, &mut chunk)?;
        if let Some(host) = &mut host {
            host.extend(chunk.to_vec()?);
        }
    }
    Ok(())
}

fn transpose<T: Element>(from: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| from[row * cols + col])).collect()
}

/// The files of a checkpoint on the way.
struct Files<'a, T> {
    folder: &'a Path,
    single: bool,
    max: usize,
    tensors: Vec<(String, Shape, Vec<T>)>,
    bytes: usize,
    files: Vec<Vec<String>>,
    total: usize,
}

impl<'a, T: Element> Files<'a, T> {
    fn new(folder: &'a Path, single: bool, max: usize) -> Self {
        Self { folder, single, max, tensors: Vec::new(), bytes: 0, files: Vec::new(), total: 0 }
    }

    fn io<R>(&self, name: &str, result: std::io::Result<R>) -> Result<R> {
        result.map_err(|error| Error::Io { path: self.folder.join(name), reason: error.to_string() })
    }

    fn begin(&self, config: &str) -> Result<()> {
        self.io("", fs::create_dir_all(self.folder))?;
        self.io("config.json", fs::write(self.folder.join("config.json"), config))
    }

    fn add(&mut self, name: String, shape: Shape, elements: Vec<T>) -> Result<()> {
        let bytes = size_of_val(elements.as_slice());
        if !self.single && self.bytes + bytes > self.max && !self.tensors.is_empty() {
            self.flush()?;
        }
        self.bytes += bytes;
        self.tensors.push((name, shape, elements));
        Ok(())
    }

    /// Writes the tensors at hand. How many files there will be is known at the end only: numbers come then.
    fn flush(&mut self) -> Result<()> {
        let name = match self.single {
            true => "model.safetensors".into(),
            false => format!("model-part-{}.safetensors", self.files.len() + 1),
        };
        let views = self
            .tensors
            .iter()
            .map(|(name, shape, elements)| (name.clone(), *shape, T::any_ref::<Cpu>(elements.as_slice())));
        weights::write(self.folder.join(name), views)?;
        self.total += self.bytes;
        self.bytes = 0;
        self.files.push(self.tensors.drain(..).map(|(name, ..)| name).collect());
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.flush()?;
        if self.single {
            return Ok(());
        }
        let count = self.files.len();
        let mut map = serde_json::Map::new();
        for (at, names) in self.files.iter().enumerate() {
            let (from, to) = (
                format!("model-part-{}.safetensors", at + 1),
                format!("model-{:05}-of-{count:05}.safetensors", at + 1),
            );
            self.io(&to, fs::rename(self.folder.join(from), self.folder.join(&to)))?;
            map.extend(names.iter().map(|name| (name.clone(), to.clone().into())));
        }
        let index = serde_json::json!({ "metadata": { "total_size": self.total }, "weight_map": map });
        let name = "model.safetensors.index.json";
        self.io(name, fs::write(self.folder.join(name), index.to_string()))
    }
}
