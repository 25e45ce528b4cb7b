//! Saving a sharded model: one rank receives the shards and writes them to a [`Folder`]. Of this
//! module, only this folder uses groups.

mod gather;
mod owners;
mod tensors;
mod writer;

use super::{
    Packed,
    disk::Disk,
    folder::Folder,
    layout::{CONFIG, INDEX, SINGLE},
    logged,
};
use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result, Site},
    kernels::Backend,
    security::audit,
    tensor::Param,
};
use gather::{CHUNK, Gather};
use owners::all_tensors;
use std::path::{Path, PathBuf};
use tensors::{allocate, assign_files, check_formats, copied, write_file, written};
use writer::on_writer;

/// The default of [`Save::max_shard`].
const MAX_SHARD: usize = 4 << 30;

/// Saves parameters to a folder with the defaults of [`Save`] and without a configuration.
///
/// ```
/// use shardwise::{
///     launch,
///     parallel::{Bias, ColumnLinear, Columns, Layer},
///     tensor::{Random, Region, Role, WeightSource, Weights},
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
/// Creates the folder if it does not exist. Writes `model.safetensors` if one file can hold all
/// tensors ([`Save::max_shard`]). Otherwise writes files `model-<id>-00001-of-00003.safetensors`, …
/// and `model.safetensors.index.json`, where `<id>` is unique to the save. Writes `config.json` if
/// a configuration is given. Transformers can read these files too.
///
/// **Atomicity.** An existing checkpoint stays until the new one is complete on the disk, and is
/// then replaced at once. If the save fails, for example because the disk is full, or if the
/// process is killed, [`Checkpoint::open`] and [`ModelConfig::read`] find the tensors and the
/// configuration of the old checkpoint, or those of the new one, but never a mixture. The next save
/// removes the files of a killed save. Other readers open only `config.json`. If the process is
/// killed between two renames, other readers find new weights with the old configuration until the
/// next save.
///
/// The files of the old checkpoint are removed, including files `model-00001-of-00003.safetensors`
/// of other programs. Files with other names stay.
///
/// A save to a folder fails while another save holds the folder's file lock. On a file system
/// without locks, saves to one folder must not overlap, because no save detects the other.
///
/// [`Checkpoint::open`]: super::Checkpoint::open
/// [`ModelConfig::read`]: crate::models::ModelConfig::read
pub struct Save<'a> {
    folder: PathBuf,
    config: Option<String>,
    transposed: Box<dyn Fn(&str) -> bool + 'a>,
    packed: Option<&'a Packed>,
    max_shard: usize,
    /// The maximal number of bytes in transit: see [`CHUNK`].
    chunk: usize,
    disk: Disk,
}

impl<'a> Save<'a> {
    /// Starts a save to a folder.
    pub fn new(folder: impl AsRef<Path>) -> Self {
        Self {
            folder: folder.as_ref().into(),
            config: None,
            transposed: Box::new(|_| false),
            packed: None,
            max_shard: MAX_SHARD,
            chunk: CHUNK,
            disk: Disk::default(),
        }
    }

    /// Sets the text of `config.json`. Without it, an existing `config.json` stays.
    pub fn config(self, json: impl Into<String>) -> Self {
        Self { config: Some(json.into()), ..self }
    }

    /// Sets which matrices are stored as `[in, out]`. `names` returns true for the name of such a
    /// matrix.
    pub fn transposed(self, names: impl Fn(&str) -> bool + 'a) -> Self {
        Self { transposed: Box::new(names), ..self }
    }

    /// Copies the quantized matrices from the checkpoint that they were loaded from, byte by byte:
    /// quantized weights are frozen. The checkpoint has to be the one that was loaded: only formats
    /// and shapes are compared. Every rank has to set the same checkpoint, whose files only
    /// the writer reads.
    pub fn packed(self, source: &'a Packed) -> Self {
        Self { packed: Some(source), ..self }
    }

    /// Sets the maximal size of a file in bytes of tensors, by default 4 GiB. A tensor larger than
    /// `bytes` has a file of its own.
    pub fn max_shard(self, bytes: usize) -> Self {
        Self { max_shard: bytes, ..self }
    }

    /// Saves these parameters. Every rank of the group has to call this. The writer is rank 0, or
    /// if the ranks have [roles](crate::security::Role), the first that may see the weights of
    /// others.
    ///
    /// Exactly one rank of the group has to own each element of the model. The group may be a
    /// tensor-parallel group or the group of a whole pipeline, but not a data-parallel group.
    ///
    /// **Who receives what.** Only the writer receives elements of other ranks. All ranks receive
    /// the names and shapes of all tensors, and which rank owns which regions.
    ///
    /// **Memory.** The ranks send a few rows of one tensor at a time, at most 16 MiB or one row.
    /// The writer holds the tensors of one file and a few such messages. Every other rank holds its
    /// shards and two messages.
    ///
    /// Collectives: two broadcasts from each rank, of the list of regions that the rank owns.
    /// Messages ([`Group::exchange`]) from the other ranks to the writer: each rank sends each
    /// element that it owns once, and all bits arrive. A barrier at least every 16 MiB or row of a
    /// tensor, so that the writer has received the earlier messages. While the writer writes, an
    /// all-reduce of one number at least every 50 ms, so that the other ranks' deadlines do not
    /// pass on a slow disk. With an [audit log](crate::security::audit) the writer then reads and
    /// hashes the files, and the ranks witness their logs ([`Group::witness`]).
    ///
    /// # Errors
    /// Every rank returns the error:
    /// * [`Error::NotPermitted`]: no rank may see the weights of others, or all messages pass
    ///   through a rank that may not. No element has left its rank.
    /// * [`Error::Io`] with the path of the file: the writer cannot write, or another save is
    ///   writing to the folder. On the other ranks, `kind` is `Other`.
    /// * [`Error::Sizes`]: no rank owns an element.
    /// * [`Error::Invalid`]: several ranks own an element, or the writer fails for another reason.
    /// * [`Error::Memory`]: on the writer, the tensors of a file exceed the memory.
    /// * [`Error::TensorShape`]: the checkpoint of [`Save::packed`] has a matrix in another shape.
    /// * [`Error::Shapes`]: ranks have a tensor in different shapes.
    /// * [`Error::Unsupported`]: the device stores no values, or a parameter is quantized and not
    ///   in the checkpoint of [`Save::packed`].
    /// * The error of a collective that fails.
    #[track_caller]
    pub fn write<T: Element, B: Backend>(self, group: &Group<B>, params: &[Param<T, B>]) -> Result<()> {
        let _site = Site::here().enter();
        if !B::HAS_VALUES {
            let reason = "the device stores no values to save";
            return Err(Error::Unsupported { op: "save", reason: reason.into() });
        }
        let (writer, folder) = (group.receiver_of_weights("save")?, self.folder.clone());
        let files = self.write_on(writer, group, params)?;
        if audit::current().is_some() {
            let files = on_writer(group, writer, || logged::written(&folder, &files))?;
            logged::saved(&folder, writer, files)?;
            group.witness()?;
        }
        Ok(())
    }

    /// Saves these parameters on rank `writer`. Returns the names of the files, without those of
    /// several data files on the other ranks.
    fn write_on<T: Element, B: Backend>(
        self,
        writer: usize,
        group: &Group<B>,
        params: &[Param<T, B>],
    ) -> Result<Vec<String>> {
        check_formats(self.packed, params)?;
        let tensors = all_tensors(group, params)?.into_iter();
        let tensors = tensors.flat_map(|tensor| written::<T>(self.packed, tensor)).collect();
        let files = assign_files(tensors, self.max_shard);
        let (path, disk) = (&self.folder, self.disk);
        let mut folder = on_writer(group, writer, || Folder::begin(path, disk))?;
        let mut gather = Gather::new(group, params, writer, self.chunk);
        let (mut names, mut weight_map, mut bytes) = (Vec::new(), serde_json::Map::new(), 0);
        for (at, file) in files.iter().enumerate() {
            bytes += file.iter().map(|of| of.size).sum::<usize>();
            let mut hosts = on_writer(group, writer, || allocate::<T>(file))?;
            for (at, of) in file.iter().enumerate().filter(|(_, of)| of.copied.is_none()) {
                let host = hosts.as_mut().map(|hosts| hosts[at].as_mut_slice());
                gather.tensor(&of.name, of.shape, &of.owned, host)?;
            }
            let shard =
                folder.as_ref().filter(|_| files.len() > 1).map(|folder| folder.data_name(at, files.len()));
            if let Some(shard) = &shard {
                weight_map.extend(file.iter().map(|of| (of.name.clone(), shard.clone().into())));
                names.push(shard.clone());
            }
            let tensors = file.iter().zip(hosts.into_iter().flatten());
            let tensors: Vec<_> = tensors
                .map(|(of, host)| (of.name.clone(), of.shape, host, (self.transposed)(&of.name)))
                .collect();
            let (folder, has_config, packed) = (&folder, self.config.is_some(), self.packed);
            on_writer(group, writer, || match folder {
                Some(folder) => {
                    let copied = copied(packed, file)?;
                    write_file(folder, shard.as_deref(), has_config, (tensors, &copied))
                }
                None => Ok(()),
            })?;
        }
        names.push(if files.len() > 1 { INDEX } else { SINGLE }.into());
        names.extend(self.config.is_some().then(|| CONFIG.into()));
        let index = (files.len() > 1).then_some((weight_map, bytes));
        let (folder, config) = (&mut folder, self.config.as_deref());
        on_writer(group, writer, || match folder {
            Some(folder) => folder.commit(index, config),
            None => Ok(()),
        })?;
        Ok(names)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::{
        device::{AnyMut, Cpu},
        launch::Threads,
        parallel::{Bias, ColumnLinear, Columns, Layer},
        tensor::{Random, Region, Role, WeightSource, Weights},
        weights::{
            Checkpoint,
            disk::fault::{Fault, Kind},
        },
    };
    use std::time::Duration;

    /// Returns the result of a save on every rank, written by rank `writer`.
    fn saved(world: usize, writer: usize, folder: &Path, fault: &Fault) -> Vec<Result<()>> {
        let run = |group: Group<Cpu>| {
            let (source, columns) = (Random::normal(1, 0.5), Columns::even(&group, 6)?);
            let weights = Weights::new(&source);
            let layer = ColumnLinear::<f32, _>::load(&group, &weights.at("fc"), 4, &columns, Bias::Add)?;
            let save = Save { disk: Disk { fault: fault.clone() }, ..Save::new(folder).max_shard(90) };
            save.write_on(writer, &group, &layer.params()).map(drop)
        };
        Threads::new(world).deadline(Duration::from_millis(200)).run_each(run).unwrap()
    }

    #[test]
    fn a_slow_disk_is_no_missed_deadline() {
        for world in [2, 3] {
            // Operation 0 makes the first file, 1 writes to it, 5 syncs the second file, and 9
            // syncs the folder.
            for at in [0, 1, 5, 9] {
                let folder = tempfile::tempdir().unwrap();
                let slow = Fault::new(Kind::Slow(Duration::from_millis(500)), at);
                let outcomes = saved(world, world - 1, folder.path(), &slow);
                assert!(outcomes.iter().all(Result::is_ok), "{world} ranks, slow at {at}: {outcomes:?}");
                assert!(Checkpoint::open(folder.path()).is_ok());
            }
        }
    }

    #[test]
    fn a_failed_save_is_an_error_on_every_rank_that_names_the_file() {
        let folder = tempfile::tempdir().unwrap();
        for (at, file) in [(0, "-00001-of-00002.safetensors"), (5, "-00002-of-00002.safetensors")] {
            for writer in 0..3 {
                let outcomes = saved(3, writer, folder.path(), &Fault::new(Kind::Fails, at));
                for (rank, outcome) in outcomes.into_iter().enumerate() {
                    let Err(Error::Io { path, reason, .. }) = outcome else { panic!("{outcome:?}") };
                    assert!(path.to_string_lossy().ends_with(file), "{}", path.display());
                    assert!(reason.contains("no storage space"), "{reason}");
                    let names_writer = reason.starts_with(&format!("rank {writer} failed: "));
                    assert_eq!(names_writer, rank != writer, "{reason}");
                }
            }
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn any_rank_can_write_the_same_files() {
        let read = |world, writer| {
            let folder = tempfile::tempdir().unwrap();
            let none = Fault::default();
            let outcomes = saved(world, writer, folder.path(), &none);
            assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
            let checkpoint = Checkpoint::open(folder.path()).unwrap();
            let read = |name: &str| {
                let region = Region::whole(checkpoint.shape(name).unwrap());
                let mut all = vec![f32::NAN; region.shape().len()];
                let out: AnyMut<'_, Cpu> = AnyMut::F32(all.as_mut_slice());
                checkpoint.read(name, Role::Weight, &region, out).unwrap();
                (name.to_string(), all)
            };
            checkpoint.names().map(read).collect::<Vec<_>>()
        };
        let one = read(1, 0);
        assert_eq!(one.iter().map(|(_, all)| all.len()).collect::<Vec<_>>(), [6, 24]);
        for (world, writer) in (2..=5).flat_map(|world| (0..world).map(move |writer| (world, writer))) {
            assert_eq!(read(world, writer), one, "{world} ranks, rank {writer} writes");
        }
    }
}
