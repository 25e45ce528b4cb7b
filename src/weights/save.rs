//! Saving a sharded model: the ranks' parts go to the first rank, which writes them to a
//! [`Folder`]. The only file of this module that knows of ranks.

use super::{disk::Disk, folder::Folder};
use crate::{
    comm::{Group, ReduceOp},
    device::{Cpu, Element},
    error::{Error, Result, Site, same_shape, same_size},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, Region, Tensor},
};
use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

/// The most elements of a tensor that pass between the ranks at once, and the most bytes of them on
/// all ranks together.
const CHUNK: usize = 1 << 22;
const CHUNK_BYTES: usize = 1 << 27;

/// The most bytes of tensors in one file by default.
const MAX_SHARD: usize = 4 << 30;

/// How often the first rank shows that it is alive while it writes.
const PULSE: Duration = Duration::from_millis(50);

/// Saves parameters to a folder: [`Save`] with its defaults, and without a
/// configuration.
///
/// ```
/// use shardwise::{
///     launch,
///     parallel::{Bias, ColumnLinear, Columns, Layer},
///     tensor::{Random, Weights},
///     weights::{self, Checkpoint},
/// };
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path().join("layer");
/// launch::threads(2, |world| {
///     let (source, columns) = (Random::normal(1, 0.02), Columns::even(&world, 6)?);
///     let weights = Weights::new(&source);
///     let fc = weights.at("fc");
///     let layer = ColumnLinear::<f32, _>::load(&world, &fc, 4, &columns, Bias::None)?;
///     weights::save(&world, &layer.params(), &folder)
/// })?;
/// assert_eq!(Checkpoint::open(&folder)?.shape("fc.weight")?, [6, 4]);
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// # Errors
/// As [`Save::write`].
#[track_caller]
pub fn save<T: Element, B: Backend>(
    group: &Group<B>,
    params: &[Param<T, B>],
    folder: impl AsRef<Path>,
) -> Result<()> {
    Save::new(folder).write(group, params)
}

/// Saves a sharded model as one checkpoint, which any number of ranks can read.
///
/// The folder, which is made if it is not there, gets `model.safetensors`; where the tensors are
/// more than [`Save::max_shard`] bytes, files `model-<id>-00001-of-00003.safetensors`, …, with an
/// id of the save's own, and `model.safetensors.index.json`; and `config.json`, if one is given.
/// Transformers reads them as well.
///
/// **Old or new.** A checkpoint that is there stays until the new one is complete on the disk, and
/// is then replaced at once. If the save fails, for example because the disk is full, or if its
/// process is killed, [`Checkpoint::open`] and [`ModelConfig::read`] find the whole old checkpoint
/// or the whole new one, tensors and configuration. The next save removes what a killed one has
/// left. Other readers than this crate look for `config.json` only: if the process is killed
/// between two renames, they find the new weights and the old configuration until the next save.
///
/// The files of the older checkpoint are removed, also files `model-00001-of-00003.safetensors`
/// that another program made. Files of other names stay.
///
/// While one save writes to a folder, another save into it fails. The lock is one of the operating
/// system; on a file system without locks, saves into one folder must not overlap.
///
/// [`Checkpoint::open`]: super::Checkpoint::open
/// [`ModelConfig::read`]: crate::models::ModelConfig::read
pub struct Save<'a> {
    folder: PathBuf,
    config: Option<String>,
    transposed: Box<dyn Fn(&str) -> bool + 'a>,
    max_shard: usize,
    disk: Disk,
}

impl<'a> Save<'a> {
    /// Into a folder.
    pub fn new(folder: impl AsRef<Path>) -> Self {
        Self {
            folder: folder.as_ref().into(),
            config: None,
            transposed: Box::new(|_| false),
            max_shard: MAX_SHARD,
            disk: Disk::default(),
        }
    }

    /// The text of `config.json`. Without one, a `config.json` that is there stays.
    pub fn config(self, json: impl Into<String>) -> Self {
        Self { config: Some(json.into()), ..self }
    }

    /// Which matrices are to be stored as `[in, out]`, by name.
    pub fn transposed(self, names: impl Fn(&str) -> bool + 'a) -> Self {
        Self { transposed: Box::new(names), ..self }
    }

    /// The most bytes of tensors in a file, by default 4 GiB; a larger tensor has a file of its
    /// own.
    pub fn max_shard(self, bytes: usize) -> Self {
        Self { max_shard: bytes, ..self }
    }

    /// Saves these parameters. Every rank calls it; the first one writes.
    ///
    /// Each element of the model is owned by one rank of the group, which may be a tensor-parallel
    /// group or that of a whole pipeline, but not of several replicas. Elements go by from their
    /// owners, some rows of one tensor at a time, so that no rank but the first holds more of the
    /// model than its part, and that one at most the tensors of a file.
    ///
    /// Collectives: two broadcasts a rank of what it owns; an all-reduce of every element,
    /// which adds −0 to what is there and so keeps every bit; an all-reduce of one number at least
    /// every 50 ms while the first rank writes, so that a slow disk is no missed deadline.
    ///
    /// # Errors
    /// On every rank: [`Error::Io`], which names the file, when the first rank cannot write, or
    /// another save is writing to the folder (its `kind` is `Other` on the others);
    /// [`Error::Sizes`] when an element is owned by no rank, [`Error::Invalid`] when it is owned by
    /// several, [`Error::Shapes`] when ranks have the same tensor in different shapes; and when a
    /// collective fails.
    #[track_caller]
    pub fn write<T: Element, B: Backend>(self, group: &Group<B>, params: &[Param<T, B>]) -> Result<()> {
        let _site = Site::here().enter();
        if !B::HAS_VALUES {
            let reason = "a device without values has nothing to save";
            return Err(Error::Unsupported { op: "save", reason: reason.into() });
        }
        let files = files::<T>(all_tensors(group, params)?, self.max_shard);
        let (path, disk) = (&self.folder, self.disk);
        let mut folder = on_first(group, || Folder::begin(path, disk))?;
        let mut weight_map = serde_json::Map::new();
        let mut bytes = 0;
        for (at, file) in files.iter().enumerate() {
            let mut tensors = Vec::new();
            for (name, shape) in file {
                bytes += shape.len() * size_of::<T>();
                let mut host = Vec::new();
                gather(group, params, name, *shape, folder.is_some().then_some(&mut host))?;
                tensors.push((name.clone(), *shape, host, (self.transposed)(name)));
            }
            let part =
                folder.as_ref().filter(|_| files.len() > 1).map(|folder| folder.data_name(at, files.len()));
            if let Some(part) = &part {
                weight_map.extend(file.iter().map(|(name, _)| (name.clone(), part.clone().into())));
            }
            let (folder, has_config) = (&folder, self.config.is_some());
            on_first(group, || match folder {
                Some(folder) => write_file(folder, part.as_deref(), has_config, tensors),
                None => Ok(()),
            })?;
        }
        let index = (files.len() > 1).then_some((weight_map, bytes));
        let (folder, config) = (&mut folder, self.config.as_deref());
        on_first(group, || match folder {
            Some(folder) => folder.commit(index, config),
            None => Ok(()),
        })?;
        Ok(())
    }
}

/// Writes one of several files, or the only one.
fn write_file<T: Element>(
    folder: &Folder,
    part: Option<&str>,
    has_config: bool,
    mut tensors: Vec<(String, Shape, Vec<T>, bool)>,
) -> Result<()> {
    for (_, shape, elements, transposed) in &mut tensors {
        if let (&[rows, cols], true) = (shape.dims(), *transposed) {
            *elements = transpose(elements, rows, cols);
            *shape = [cols, rows].into();
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, elements, _)| (name.clone(), *shape, T::any_ref::<Cpu>(elements.as_slice())));
    match part {
        Some(part) => folder.write_part(part, views),
        None => folder.write_single(has_config, views),
    }
}

fn transpose<T: Element>(from: &[T], rows: usize, cols: usize) -> Vec<T> {
    (0..cols).flat_map(|col| (0..rows).map(move |row| from[row * cols + col])).collect()
}

/// Which tensors are in which file: one, if all of them are no more than `max` bytes.
fn files<T>(tensors: Vec<(String, Shape)>, max: usize) -> Vec<Vec<(String, Shape)>> {
    let size = |shape: &Shape| shape.len().saturating_mul(size_of::<T>());
    let mut files = vec![Vec::new()];
    let mut bytes = 0_usize;
    for (name, shape) in tensors {
        let more = bytes.saturating_add(size(&shape));
        if more > max && bytes > 0 {
            files.push(Vec::new());
            bytes = 0;
        }
        bytes = bytes.saturating_add(size(&shape));
        files.last_mut().expect("there is always a file").push((name, shape));
    }
    files
}

/// The tensors of the model, in the order in which the ranks list them: those of the first rank,
/// then those that only others have. Each element has one owner.
fn all_tensors<T: Element, B: Backend>(
    group: &Group<B>,
    params: &[Param<T, B>],
) -> Result<Vec<(String, Shape)>> {
    /// A tensor, its shape, and the parts that a rank owns.
    type Own = (String, Vec<usize>, Vec<Ranges>);
    let mut own: Vec<Own> = Vec::new();
    let mut places = BTreeMap::new();
    for param in params {
        for part in param.regions().iter() {
            let place = *places.entry(part.tensor.clone()).or_insert_with(|| {
                own.push((part.tensor.clone(), part.region.shape().dims().to_vec(), Vec::new()));
                own.len() - 1
            });
            if part.owned && !part.region.extent().is_empty() {
                own[place].2.push(part.region.ranges().to_vec());
            }
        }
    }
    let bad = |error: serde_json::Error| Error::invalid("save", format!("the names of tensors: {error}"));
    let text = serde_json::to_string(&own).map_err(bad)?;
    let mut all: Vec<(String, Shape, Vec<Ranges>)> = Vec::new();
    let mut places = BTreeMap::new();
    for rank in 0..group.size() {
        for (name, dims, owned) in
            serde_json::from_str::<Vec<Own>>(&broadcast_text(group, rank, &text)?).map_err(bad)?
        {
            let place = *places.entry(name.clone()).or_insert_with(|| {
                all.push((name, Shape::new(&dims), Vec::new()));
                all.len() - 1
            });
            let (name, shape, parts) = &mut all[place];
            same_shape(
                "save",
                &format!("`{name}` of rank {rank}"),
                &dims,
                "that of a rank before it",
                shape.dims(),
            )?;
            let several =
                |new: &&Ranges| parts.iter().any(|part| part.iter().zip(*new).all(|(a, b)| overlap(a, b)));
            if let Some(new) = owned.iter().find(several) {
                let reason = format!("{new:?} of `{name}` is owned by rank {rank} and by another one");
                return Err(Error::invalid("save", reason));
            }
            parts.extend(owned);
        }
    }
    let len = |part: &Ranges| part.iter().map(ExactSizeIterator::len).product::<usize>();
    for (name, shape, parts) in &all {
        same_size(
            "save",
            &format!("the elements of `{name}` that the ranks of the group own"),
            parts.iter().map(len).sum(),
            "those of its shape",
            shape.len(),
        )?;
    }
    Ok(all.into_iter().map(|(name, shape, _)| (name, shape)).collect())
}

/// A rectangular part of a tensor.
type Ranges = Vec<Range<usize>>;

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// One tensor, some rows at a time, to the rank that gives a host vector.
fn gather<T: Element, B: Backend>(
    group: &Group<B>,
    params: &[Param<T, B>],
    name: &str,
    shape: Shape,
    mut host: Option<&mut Vec<T>>,
) -> Result<()> {
    let mut own: Vec<(Region, Vec<T>)> = Vec::new();
    for param in params {
        let regions = param.regions();
        let regions: Vec<_> = regions.iter().filter(|part| part.owned && part.tensor == *name).collect();
        if regions.is_empty() {
            continue;
        }
        let (all, width) = (param.value()?.to_vec()?, param.shape().split_at(0).1);
        for part in regions {
            let start = part.row * width;
            own.push((part.region.clone(), all[start..start + part.region.extent().len()].to_vec()));
        }
    }
    let rows = shape.dims().first().copied().unwrap_or(1);
    let width = shape.len().checked_div(rows).unwrap_or(0);
    let chunk = CHUNK.min(CHUNK_BYTES / size_of::<T>() / group.size());
    let at_a_time = (chunk / width.max(1)).max(1);
    let nothing = T::from_f64(-0.0);
    for first in (0..rows).step_by(at_a_time) {
        let range = first * width..rows.min(first + at_a_time) * width;
        let mut chunk = vec![nothing; range.len()];
        for (region, elements) in &own {
            let mut from = elements.as_slice();
            for run in region.runs() {
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

/// Runs `work` on the first rank, which gets the result, while the others wait, for as long as it
/// takes. If it fails, all ranks get its error.
///
/// Collectives: an all-reduce of one number, and another one whenever the work has gone on for
/// [`PULSE`]; after a failure two broadcasts.
fn on_first<R: Send, B: Backend>(
    group: &Group<B>,
    work: impl FnOnce() -> Result<R> + Send,
) -> Result<Option<R>> {
    const DONE: f64 = 0.0;
    const BUSY: f64 = 1.0;
    const FAILED: f64 = 2.0;
    let meet = |state: f64| -> Result<f64> {
        let mut state = Tensor::<f64, B>::full(group.device(), [1], state)?;
        group.all_reduce(ReduceOp::Max, &mut state)?;
        Ok(state.to_vec()?[0])
    };
    let result = match group.rank() {
        0 => Some(thread::scope(|scope| -> Result<Result<R>> {
            let (send, finished) = channel();
            let work = move || {
                // The receiver is gone if a rank was lost meanwhile.
                let _ = send.send(work());
            };
            let writer = match thread::Builder::new().name("save".into()).spawn_scoped(scope, work) {
                Ok(writer) => writer,
                Err(error) => {
                    return Ok(Err(Error::invalid("save", format!("cannot start a thread: {error}"))));
                }
            };
            loop {
                match finished.recv_timeout(PULSE) {
                    Ok(result) => return Ok(result),
                    Err(RecvTimeoutError::Timeout) => meet(BUSY)?,
                    Err(RecvTimeoutError::Disconnected) => break,
                };
            }
            let _ = writer.join();
            Ok(Err(Error::internal("save", "the thread that writes panicked")))
        })?),
        _ => None,
    };
    let mut state = meet(if matches!(result, Some(Err(_))) { FAILED } else { DONE })?;
    while state == BUSY {
        state = meet(DONE)?;
    }
    if state != FAILED {
        return result.transpose();
    }
    let text = match &result {
        Some(Err(Error::Io { path, reason, .. })) => format!("{}\0{reason}", path.display()),
        Some(Err(error)) => format!("\0{error}"),
        _ => String::new(),
    };
    let text = broadcast_text(group, 0, &text)?;
    result.transpose()?;
    let (path, reason) = text.split_once('\0').unwrap_or(("", &text));
    Err(match path {
        "" => Error::invalid("save", format!("rank 0 failed: {reason}")),
        path => Error::io(path, &std::io::Error::other(format!("rank 0 failed: {reason}"))),
    })
}

/// A text of one rank, on all.
fn broadcast_text<B: Backend>(group: &Group<B>, root: usize, text: &str) -> Result<String> {
    let mut len = Tensor::<f64, B>::full(group.device(), [1], text.len() as f64)?;
    group.broadcast(root, &mut len)?;
    let mut bytes = vec![0.0_f32; len.to_vec()?[0] as usize];
    if bytes.is_empty() {
        return Ok(String::new());
    }
    if group.rank() == root {
        bytes.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = f32::from(from));
    }
    let mut bytes = Tensor::<f32, B>::from_slice(group.device(), [bytes.len()], &bytes)?;
    group.broadcast(root, &mut bytes)?;
    let bytes = bytes.to_vec()?.into_iter().map(|byte| byte as u8).collect();
    String::from_utf8(bytes).map_err(|error| Error::invalid("save", error.to_string()))
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{
        launch::Threads,
        parallel::{Bias, ColumnLinear, Columns, Layer},
        tensor::{Random, Weights},
        weights::{
            Checkpoint,
            disk::fault::{Fault, Kind},
        },
    };

    /// What becomes of a save on every rank.
    fn saved(world: usize, folder: &Path, fault: &Fault) -> Vec<Result<()>> {
        let run = |group: Group<Cpu>| {
            let (source, columns) = (Random::normal(1, 0.5), Columns::even(&group, 6)?);
            let weights = Weights::new(&source);
            let layer = ColumnLinear::<f32, _>::load(&group, &weights.at("fc"), 4, &columns, Bias::Add)?;
            let save = Save { disk: Disk { fault: fault.clone() }, ..Save::new(folder).max_shard(90) };
            save.write(&group, &layer.params())
        };
        Threads::new(world).deadline(Duration::from_millis(200)).run_each(run).unwrap()
    }

    #[test]
    fn a_slow_disk_is_no_missed_deadline() {
        for world in [2, 3] {
            // The making of the first file, its content, the second file's, the folder's names.
            for at in [0, 1, 5, 9] {
                let folder = tempfile::tempdir().unwrap();
                let slow = Fault::new(Kind::Slow(Duration::from_millis(500)), at);
                let outcomes = saved(world, folder.path(), &slow);
                assert!(outcomes.iter().all(Result::is_ok), "{world} ranks, slow at {at}: {outcomes:?}");
                assert!(Checkpoint::open(folder.path()).is_ok());
            }
        }
    }

    #[test]
    fn a_failed_save_is_an_error_on_every_rank_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        for (at, file) in [(0, "-00001-of-00002.safetensors"), (5, "-00002-of-00002.safetensors")] {
            for outcome in saved(3, folder.path(), &Fault::new(Kind::Fails, at)) {
                let Err(Error::Io { path, reason, .. }) = outcome else { panic!("{outcome:?}") };
                assert!(path.to_string_lossy().ends_with(file), "{}", path.display());
                assert!(reason.contains("no storage space"), "{reason}");
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
