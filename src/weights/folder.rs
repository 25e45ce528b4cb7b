//! A folder with a checkpoint, and how a save replaces it. A reader finds the old checkpoint or the
//! new one, whole, whatever operation fails and wherever the process is killed. Knows nothing of
//! ranks.
//!
//! A checkpoint is `model.safetensors`, or the files that `model.safetensors.index.json` names; and
//! `config.json`. A save draws an id, and takes these steps, each of which is on the disk before
//! the next begins:
//!
//! 1. Write the tensors, to `model-<id>-00001-of-00003.safetensors` and so on, or to one file with
//!    a temporary name; and the configuration, to `config-<id>.json`. No reader looks for these
//!    names yet.
//! 2. Rename: the one file to `model.safetensors`, or an index, written under a temporary name, to
//!    its name. Both carry the id, the one file only where there is a configuration. This replaces
//!    the old checkpoint.
//! 3. If the old checkpoint was one file and the new one has an index, remove `model.safetensors`.
//!    While it is there it is the checkpoint, here and in transformers, so that here this step
//!    replaces the old checkpoint.
//! 4. Rename `config-<id>.json` to `config.json`. Until then [`config`] finds it by the id, so that
//!    for this crate weights and configuration change at once.
//! 5. Remove what nothing names any more: [`Folder::sweep`].
//!
//! Other readers look for `config.json` only. If the process is killed between the step that
//! replaces the weights and step 4, they find new weights and the old configuration, until the next
//! save takes step 4 first. To exchange the whole folder would be atomic for them too, but it
//! cannot be done to a mount point or the current directory, nor on every system, and subfolders
//! and files that the user keeps there would have to move.
//!
//! A lock keeps a second save out. The system releases it when the process ends.

use super::{disk::Disk, file::DataFile, header, index, write::write_tensors};
use crate::{
    device::{AnyRef, Cpu},
    error::{Error, Result},
    shard::Shape,
};
use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const LOCK: &str = ".save.lock";

/// The key of a save's id, in the metadata of an index and of a safetensors file.
pub(super) const ID: &str = "shardwise_save";

/// Where the checkpoint of a folder is.
pub(super) enum Form {
    Single(PathBuf),
    Index(PathBuf),
}

/// Finds the checkpoint of a folder, if there is one.
pub(super) fn form(folder: &Path) -> Result<Option<Form>> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    match (single.exists(), index.exists()) {
        (false, false) => Ok(None),
        (true, false) => Ok(Some(Form::Single(single))),
        (false, true) => Ok(Some(Form::Index(index))),
        // A save did not come to step 3, or another program has since written a single file.
        (true, true) if index::read(&DataFile::open(&index)?)?.id.is_some() => Ok(Some(Form::Single(single))),
        (true, true) => {
            let reason = format!(
                "the folder has both {SINGLE} and {INDEX}, which may be of different models; remove one of them"
            );
            Err(Error::Checkpoint { path: folder.into(), reason })
        }
    }
}

/// The path of the configuration that belongs to the checkpoint of a folder.
pub(crate) fn config(folder: &Path) -> PathBuf {
    pending_config(folder).unwrap_or_else(|| folder.join(CONFIG))
}

/// The configuration of a save that did not come to step 4.
fn pending_config(folder: &Path) -> Option<PathBuf> {
    let id = match form(folder).ok()?? {
        Form::Single(path) => header::id(&DataFile::open(&path).ok()?).ok()??,
        Form::Index(path) => index::read(&DataFile::open(&path).ok()?).ok()?.id?,
    };
    let path = folder.join(config_name(&id));
    (is_id(&id) && path.is_file()).then_some(path)
}

/// An id that no other save has.
pub(super) fn new_id() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| Error::invalid("save", error.to_string()))?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

fn is_id(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn config_name(id: &str) -> String {
    format!("config-{id}.json")
}

/// The files that saves make beside those that readers look for.
#[derive(Debug, PartialEq)]
enum Made<'a> {
    /// Tensors. Without an id another program made it.
    Data(Option<&'a str>),
    Config(&'a str),
    Temporary(&'a str),
}

impl<'a> Made<'a> {
    fn parse(name: &'a str) -> Option<Self> {
        let id = |text: &'a str| is_id(text).then_some(text);
        if let Some(rest) = name.strip_prefix(".save-") {
            return Some(Self::Temporary(id(rest.split_once('-')?.0)?));
        }
        if let Some(rest) = name.strip_prefix("config-") {
            return Some(Self::Config(id(rest.strip_suffix(".json")?)?));
        }
        let rest = name.strip_prefix("model-")?.strip_suffix(".safetensors")?;
        let (front, count) = rest.split_once("-of-")?;
        let (save, at) = match front.split_once('-') {
            Some((save, at)) => (Some(id(save)?), at),
            None => (None, front),
        };
        let is_number = |text: &str| text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        (is_number(at) && is_number(count)).then_some(Self::Data(save))
    }

    fn id(&self) -> Option<&'a str> {
        match self {
            Self::Data(id) => *id,
            Self::Config(id) | Self::Temporary(id) => Some(id),
        }
    }
}

/// A save in progress. If it is dropped before it is committed, it removes what it has written.
pub(super) struct Folder {
    path: PathBuf,
    id: String,
    disk: Disk,
    state: State,
    _lock: File,
}

#[derive(PartialEq)]
enum State {
    /// No reader finds a file of this save.
    Hidden,
    /// Step 2 was tried.
    Tried,
    Committed,
}

impl Folder {
    /// Makes the folder, if it is not there, and locks it.
    pub(super) fn begin(path: &Path, disk: Disk) -> Result<Self> {
        if !path.exists() {
            disk.make_folder(path)?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            disk.sync_folder(parent.unwrap_or(Path::new(".")))?;
        }
        let lock = lock(path)?;
        let folder = Self { path: path.into(), id: new_id()?, disk, state: State::Hidden, _lock: lock };
        if let Some(pending) = pending_config(path) {
            folder.disk.rename(&pending, &path.join(CONFIG))?;
            folder.disk.sync_folder(path)?;
        }
        Ok(folder)
    }

    /// The name of one of `count` files of tensors.
    pub(super) fn data_name(&self, at: usize, count: usize) -> String {
        format!("model-{}-{:05}-of-{count:05}.safetensors", self.id, at + 1)
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!(".save-{}-{name}", self.id))
    }

    /// Writes the tensors of the whole model. The file carries the id where a configuration has to be
    /// found by it; else the same tensors are the same bytes.
    pub(super) fn write_single<'a>(
        &self,
        has_config: bool,
        tensors: impl IntoIterator<Item = (String, Shape, AnyRef<'a, Cpu>)>,
    ) -> Result<()> {
        let id = has_config.then_some(self.id.as_str());
        write_tensors(&self.disk, &self.temporary(SINGLE), id, tensors)
    }

    /// Writes the tensors of one of several files.
    pub(super) fn write_part<'a>(
        &self,
        name: &str,
        tensors: impl IntoIterator<Item = (String, Shape, AnyRef<'a, Cpu>)>,
    ) -> Result<()> {
        write_tensors(&self.disk, &self.path.join(name), None, tensors)
    }

    /// Makes what was written the checkpoint of the folder: several files with an index, whose
    /// `weight_map` and size of the tensors are given, or else the single file.
    pub(super) fn commit(
        &mut self,
        index: Option<(serde_json::Map<String, serde_json::Value>, usize)>,
        config: Option<&str>,
    ) -> Result<()> {
        let pending = self.path.join(config_name(&self.id));
        if let Some(config) = config {
            self.disk.write(&pending, |out| out.write_all(config.as_bytes()))?;
        }
        let single = self.path.join(SINGLE);
        let name = match &index {
            Some((weight_map, total)) => {
                let metadata = serde_json::json!({ "total_size": total, ID: self.id });
                let index = serde_json::json!({ "metadata": metadata, "weight_map": weight_map });
                self.write_index(&self.temporary(INDEX), &index)?;
                INDEX
            }
            None => {
                self.mark_index()?;
                SINGLE
            }
        };
        // What this crate would refuse does not take the place of anything.
        let written = DataFile::open(&self.temporary(name))?;
        match name {
            INDEX => index::read(&written).map(drop)?,
            _ => header::read(&written, &mut 0).map(drop)?,
        }
        self.disk.sync_folder(&self.path)?;
        self.state = State::Tried;
        self.disk.rename(&self.temporary(name), &self.path.join(name))?;
        self.disk.sync_folder(&self.path)?;
        if index.is_some() && single.exists() {
            self.disk.remove(&single)?;
            self.disk.sync_folder(&self.path)?;
        }
        self.state = State::Committed;
        if config.is_some() {
            self.disk.rename(&pending, &self.path.join(CONFIG))?;
            self.disk.sync_folder(&self.path)?;
        }
        self.sweep(true);
        Ok(())
    }

    fn write_index(&self, path: &Path, index: &serde_json::Value) -> Result<()> {
        self.disk.write(path, |out| out.write_all(index.to_string().as_bytes()))
    }

    /// Gives an index of another program an id, so that a single file beside it is the checkpoint.
    ///
    /// # Errors
    /// Where it cannot be read: what it names is not to be lost.
    fn mark_index(&self) -> Result<()> {
        let path = self.path.join(INDEX);
        if !path.exists() {
            return Ok(());
        }
        if index::read(&DataFile::open(&path)?)?.id.is_some() {
            return Ok(());
        }
        let text = fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        let mut marked: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| Error::Checkpoint { path: path.clone(), reason: error.to_string() })?;
        match marked.get_mut("metadata").and_then(serde_json::Value::as_object_mut) {
            Some(metadata) => {
                metadata.insert(ID.into(), new_id()?.into());
            }
            None => marked["metadata"] = serde_json::json!({ ID: new_id()? }),
        }
        self.write_index(&self.temporary(INDEX), &marked)?;
        self.disk.rename(&self.temporary(INDEX), &path)?;
        self.disk.sync_folder(&self.path)
    }

    /// Removes what the checkpoint does not name: after a failure the files of this save; after a
    /// success the older checkpoint, and what other saves have left. What cannot be removed stays
    /// until the next save; so does everything if the names cannot be read.
    fn sweep(&self, committed: bool) {
        let Ok((id, named)) = self.named(committed) else { return };
        self.remove_made(|name, made| match made {
            _ if !committed && made.id() != Some(&self.id) => false,
            Made::Data(_) => !named.iter().any(|file| file == name),
            Made::Config(of) => id.as_deref() != Some(*of),
            Made::Temporary(_) => true,
        });
    }

    /// The id and the files of the checkpoint. An index beside a single file is removed first,
    /// before the files that it names.
    fn named(&self, committed: bool) -> Result<(Option<String>, Vec<String>)> {
        match form(&self.path)? {
            None => Ok((None, Vec::new())),
            Some(Form::Index(path)) => {
                let index = index::read(&DataFile::open(&path)?)?;
                Ok((index.id, index.files))
            }
            Some(Form::Single(path)) => {
                let index = self.path.join(INDEX);
                if index.exists() {
                    let is_own = index::read(&DataFile::open(&index)?)?.id.as_ref() == Some(&self.id);
                    if committed || is_own {
                        self.disk.remove(&index)?;
                    }
                }
                Ok((header::id(&DataFile::open(&path)?)?, Vec::new()))
            }
        }
    }

    fn remove_made(&self, goes: impl Fn(&str, &Made<'_>) -> bool) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if Made::parse(name).is_some_and(|made| goes(name, &made)) {
                // If it stays, nothing reads it.
                let _ = self.disk.remove(&entry.path());
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        match self.state {
            State::Hidden => self.remove_made(|_, made| made.id() == Some(&self.id)),
            State::Tried => self.sweep(false),
            State::Committed => {}
        }
        // On other systems `lock` could not see that the file it has locked was removed.
        if cfg!(unix) {
            let _ = self.disk.remove(&self.path.join(LOCK));
        }
    }
}

/// Locks a folder until the file is closed.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    loop {
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|error| Error::io(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let busy = "another save is writing to this folder";
                return Err(Error::io(folder, &io::Error::new(io::ErrorKind::ResourceBusy, busy)));
            }
            // A file system without locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(Error::io(&path, &error)),
        }
        if is_current(&file, &path) {
            return Ok(file);
        }
    }
}

/// Whether the file is the one at the path: another save, which had locked it, may have removed it
/// since it was opened.
#[cfg(unix)]
fn is_current(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let of = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().is_ok_and(|own| fs::metadata(path).is_ok_and(|there| of(own) == of(there)))
}

#[cfg(not(unix))]
fn is_current(_: &File, _: &Path) -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::AnyMut,
        tensor::{Region, Role, WeightSource},
        weights::{
            Checkpoint,
            disk::fault::{Fault, Kind},
            write,
        },
    };
    use std::sync::atomic::Ordering;

    const NAMES: [&str; 3] = ["a", "b", "c"];

    /// How a version is stored.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Stored {
        Nothing,
        /// By another program: one file, and two.
        OthersSingle,
        OthersIndex,
        Single,
        Index,
    }

    fn save(path: &Path, version: u8, stored: Stored, fault: Fault) -> Result<()> {
        let values = [f32::from(version); 4];
        let tensor = |name: &str| (name.to_string(), Shape::new(&[4]), AnyRef::<Cpu>::F32(values.as_slice()));
        let config = format!("{{\"version\": {version}}}");
        match stored {
            Stored::Nothing => {}
            Stored::OthersSingle | Stored::OthersIndex => {
                fs::create_dir_all(path).unwrap();
                fs::write(path.join(CONFIG), config).unwrap();
                if stored == Stored::OthersSingle {
                    return write(path.join(SINGLE), NAMES.map(tensor));
                }
                let files = [1, 2].map(|at| format!("model-{at:05}-of-00002.safetensors"));
                write(path.join(&files[0]), [tensor("a")])?;
                write(path.join(&files[1]), ["b", "c"].map(tensor))?;
                let map = serde_json::json!({ "a": files[0], "b": files[1], "c": files[1] });
                fs::write(path.join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
            }
            Stored::Single => {
                let mut folder = Folder::begin(path, Disk { fault })?;
                folder.write_single(true, NAMES.map(tensor))?;
                folder.commit(None, Some(&config))?;
            }
            Stored::Index => {
                let mut folder = Folder::begin(path, Disk { fault })?;
                let mut map = serde_json::Map::new();
                for (at, name) in NAMES.iter().enumerate() {
                    let file = folder.data_name(at, NAMES.len());
                    folder.write_part(&file, [tensor(name)])?;
                    map.insert(name.to_string(), file.into());
                }
                folder.commit(Some((map, 48)), Some(&config))?;
            }
        }
        Ok(())
    }

    /// The version that a reader finds, of weights and configuration; none where there is no
    /// checkpoint.
    fn read(path: &Path) -> Option<u8> {
        let checkpoint = match Checkpoint::open(path) {
            Ok(checkpoint) => checkpoint,
            Err(Error::Checkpoint { reason, .. }) if reason.contains("has neither") => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(checkpoint.names().eq(NAMES));
        let config = fs::read_to_string(super::config(path)).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let version = config["version"].as_u64().unwrap() as u8;
        for name in NAMES {
            let mut values = [f32::NAN; 4];
            let whole = Region::whole([4]);
            checkpoint.read(name, Role::Weight, &whole, AnyMut::F32(values.as_mut_slice())).unwrap();
            assert_eq!(
                values,
                [f32::from(version); 4],
                "`{name}` beside a configuration of version {version}"
            );
        }
        Some(version)
    }

    fn files(path: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut files: Vec<_> = fs::read_dir(path).unwrap().map(name).collect();
        files.sort();
        files
    }

    /// Whether the folder has what its checkpoint needs, and nothing else of a save or a
    /// checkpoint.
    fn is_tidy(path: &Path) -> bool {
        let open = |path: &Path| DataFile::open(path).unwrap();
        let (id, named) = match form(path).unwrap() {
            Some(Form::Single(file)) => (header::id(&open(&file)).unwrap(), Vec::new()),
            Some(Form::Index(file)) => {
                let index = index::read(&open(&file)).unwrap();
                (index.id, index.files)
            }
            None => (None, Vec::new()),
        };
        files(path).iter().all(|name| match Made::parse(name) {
            Some(Made::Data(_)) => named.contains(name),
            Some(Made::Config(of)) => id.as_deref() == Some(of),
            Some(Made::Temporary(_)) => false,
            None => name != LOCK,
        })
    }

    /// One save over another, in which an operation fails, or the process dies before it; then
    /// another that dies somewhere, and one that does not. Whether the new version was found, and
    /// how many operations the save had.
    fn round(old: Stored, new: Stored, kind: Kind, at: usize) -> (bool, usize) {
        // In memory, where that can be, since a disk takes its time to write.
        let memory = Path::new("/dev/shm");
        let root = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
        let path = root.path().join("model");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("model-notes.safetensors"), "mine").unwrap();
        save(&path, 1, old, Fault::default()).unwrap();
        let before = files(&path);
        let fault = Fault::new(kind, at);
        let steps = fault.steps.clone();
        let saved = save(&path, 2, new, fault);
        let steps = steps.load(Ordering::Relaxed);
        let what = format!("{old:?} to {new:?}, {kind:?} at {at}: {saved:?}");
        let found = read(&path);
        let older = (old != Stored::Nothing).then_some(1);
        assert!(found == Some(2) || (saved.is_err() && found == older), "{what}: {found:?}");
        if kind == Kind::Killed {
            let other = if new == Stored::Single { Stored::Index } else { Stored::Single };
            let again = save(&path, 3, other, Fault::new(kind, at * 7 % 31));
            let next = read(&path);
            assert!(next == Some(3) || (again.is_err() && next == found), "{what}, then {again:?}: {next:?}");
        } else if found == older {
            assert_eq!(files(&path), before, "{what}");
        }
        save(&path, 4, new, Fault::default()).unwrap();
        assert_eq!(read(&path), Some(4), "{what}");
        assert!(is_tidy(&path), "{what}: {:?}", files(&path));
        assert_eq!(
            files(&path).len(),
            if new == Stored::Single { 3 } else { 6 },
            "{what}: {:?}",
            files(&path)
        );
        (found == Some(2), steps)
    }

    #[test]
    fn a_save_that_fails_or_dies_anywhere_leaves_the_old_or_the_new() {
        use Stored::{Index, Nothing, OthersIndex, OthersSingle, Single};
        for old in [Nothing, OthersSingle, OthersIndex, Single, Index] {
            for new in [Single, Index] {
                let (_, steps) = round(old, new, Kind::None, 0);
                for kind in [Kind::Fails, Kind::Killed] {
                    let news = (0..steps).filter(|&at| round(old, new, kind, at).0).count();
                    assert!(news > 2 && news + 6 < steps, "{old:?} to {new:?}: {news} of {steps} are new");
                }
            }
        }
    }

    #[test]
    fn names_are_parsed_to_the_end() {
        let id = "0123456789abcdef";
        for (name, made) in [
            ("model-00001-of-00002.safetensors".into(), Made::Data(None)),
            (format!("model-{id}-00001-of-00002.safetensors"), Made::Data(Some(id))),
            (format!("config-{id}.json"), Made::Config(id)),
            (format!(".save-{id}-model.safetensors"), Made::Temporary(id)),
        ] {
            assert_eq!(Made::parse(&name), Some(made), "{name}");
        }
        for name in [
            "model.safetensors",
            "model-1-of-2.safetensors",
            "model-00001-of-00002.safetensors.bak",
            "model-mine-00001-of-00002.safetensors",
            "my-model-00001-of-00002.safetensors",
            "config-mine.json",
            "config-0123456789ABCDEF.json",
            ".save-mine",
            ".save-mine-model",
        ] {
            assert_eq!(Made::parse(name), None, "{name}");
        }
    }
}
