//! The file operations by which a save replaces the checkpoint of a folder. A reader finds the
//! complete old checkpoint or the complete new one, even if an operation fails or the process is
//! killed between two operations. This file does not depend on ranks.
//!
//! A checkpoint is `model.safetensors`, or the files that `model.safetensors.index.json` names, and
//! `config.json`. A save draws a random id and makes these steps. Each step is on the disk before
//! the next one begins:
//!
//! 1. Write the tensors to `model-<id>-00001-of-00003.safetensors` and so on, or to one file with a
//!    temporary name. Write the configuration to `config-<id>.json`. No reader opens files with
//!    these names yet.
//! 2. Rename the single file to `model.safetensors`. With several files, write an index under a
//!    temporary name and rename it to `model.safetensors.index.json`. The metadata of an index has
//!    the id. The metadata of a single file has the id only if there is a configuration. The rename
//!    replaces the old checkpoint, except in the case of step 3.
//! 3. If the old checkpoint was a single file and the new one has an index, remove
//!    `model.safetensors`. Until then this crate and transformers open `model.safetensors`, so in
//!    this case step 3 replaces the old checkpoint.
//! 4. Rename `config-<id>.json` to `config.json`. Until then [`super::config`] finds the
//!    configuration by the id. So for this crate the weights and the configuration change at once.
//! 5. Remove the files that no checkpoint names any more: [`Folder::sweep`].
//!
//! Other readers open only `config.json`. If the process is killed between the step that replaces
//! the weights and step 4, other readers find new weights with the old configuration until the next
//! save. The next save first completes step 4. An exchange of the whole folder would be atomic for
//! other readers too. But a mount point and the current directory cannot be exchanged, not every
//! system can exchange folders, and an exchange would move the user's own files and subfolders.
//!
//! A file lock excludes concurrent saves. The system releases the lock when the process ends.

use super::{
    disk::Disk,
    file::DataFile,
    header, index,
    layout::{CONFIG, INDEX, Location, SINGLE, SaveFile, config_name, locate, pending_config},
    save_id,
    write::{Content, write_tensors},
};
use crate::{
    error::{Error, Result},
    shard::Shape,
};
use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

const LOCK: &str = ".save.lock";

/// A save in progress. A drop before the commit removes the files that the save has written.
pub(super) struct Folder {
    path: PathBuf,
    id: String,
    disk: Disk,
    state: State,
    _lock: File,
}

#[derive(PartialEq)]
enum State {
    /// No reader opens a file of this save.
    Hidden,
    /// Step 2 was attempted.
    Renamed,
    Committed,
}

impl Folder {
    /// Makes the folder if it does not exist, locks it, and completes step 4 of an earlier save.
    pub(super) fn begin(path: &Path, disk: Disk) -> Result<Self> {
        if !path.exists() {
            disk.make_folder(path)?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            disk.sync_folder(parent.unwrap_or(Path::new(".")))?;
        }
        let lock = lock(path)?;
        let id = save_id::random()?;
        let folder = Self { path: path.into(), id, disk, state: State::Hidden, _lock: lock };
        if let Some(pending) = pending_config(path) {
            folder.disk.rename(&pending, &path.join(CONFIG))?;
            folder.disk.sync_folder(path)?;
        }
        Ok(folder)
    }

    /// Returns the name of data file `at`, counted from 0, of `count` data files.
    pub(super) fn data_name(&self, at: usize, count: usize) -> String {
        format!("model-{}-{:05}-of-{count:05}.safetensors", self.id, at + 1)
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.path.join(format!(".save-{}-{name}", self.id))
    }

    /// Writes the tensors of the whole model to a single file. The file has the id only if there is
    /// a configuration. So without a configuration, equal tensors give equal files.
    pub(super) fn write_single<'a>(
        &self,
        has_config: bool,
        tensors: impl IntoIterator<Item = (String, Shape, Content<'a>)>,
    ) -> Result<()> {
        let id = has_config.then_some(self.id.as_str());
        write_tensors(&self.disk, &self.temporary(SINGLE), id, tensors)
    }

    /// Writes the tensors of one of several files.
    pub(super) fn write_shard<'a>(
        &self,
        name: &str,
        tensors: impl IntoIterator<Item = (String, Shape, Content<'a>)>,
    ) -> Result<()> {
        write_tensors(&self.disk, &self.path.join(name), None, tensors)
    }

    /// Makes the written files the checkpoint of the folder. With several files, `index` has the
    /// `weight_map` and the size of the tensors in bytes. With a single file, `index` is `None`.
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
                let metadata = serde_json::json!({ "total_size": total, save_id::KEY: self.id });
                let index = serde_json::json!({ "metadata": metadata, "weight_map": weight_map });
                self.write_index(&self.temporary(INDEX), &index)?;
                INDEX
            }
            None => {
                self.set_index_id()?;
                SINGLE
            }
        };
        // Do not replace a checkpoint by a file that this crate cannot read.
        let written = DataFile::open(&self.temporary(name))?;
        match name {
            INDEX => index::read(&written).map(drop)?,
            _ => header::read(&written, &mut 0).map(drop)?,
        }
        self.disk.sync_folder(&self.path)?;
        self.state = State::Renamed;
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

    /// Adds an id to an index of another program. Then readers take a single file next to that
    /// index as the checkpoint ([`locate`]).
    ///
    /// # Errors
    /// When the index cannot be read. The save fails then, so that the files that the index names
    /// are not lost.
    fn set_index_id(&self) -> Result<()> {
        let path = self.path.join(INDEX);
        if !path.exists() {
            return Ok(());
        }
        if index::read(&DataFile::open(&path)?)?.id.is_some() {
            return Ok(());
        }
        let text = fs::read(&path).map_err(|error| Error::io(&path, &error))?;
        let mut index: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|error| Error::Checkpoint { path: path.clone(), reason: error.to_string() })?;
        match index.get_mut("metadata").and_then(serde_json::Value::as_object_mut) {
            Some(metadata) => {
                metadata.insert(save_id::KEY.into(), save_id::random()?.into());
            }
            None => index["metadata"] = serde_json::json!({ save_id::KEY: save_id::random()? }),
        }
        self.write_index(&self.temporary(INDEX), &index)?;
        self.disk.rename(&self.temporary(INDEX), &path)?;
        self.disk.sync_folder(&self.path)
    }

    /// Removes files that the checkpoint does not name. After a failure, removes only files of this
    /// save. After a success, also removes files of the old checkpoint and of killed saves. Files
    /// that cannot be removed stay until the next save. All files stay if the checkpoint's names
    /// cannot be read.
    fn sweep(&self, committed: bool) {
        let Ok((id, named)) = self.named(committed) else { return };
        self.remove_files(|name, file| match file {
            _ if !committed && file.id() != Some(&self.id) => false,
            SaveFile::Data(_) => !named.iter().any(|file| file == name),
            SaveFile::Config(of) => id.as_deref() != Some(*of),
            SaveFile::Temporary(_) => true,
        });
    }

    /// Returns the id and the files of the checkpoint. Removes an obsolete index next to a single
    /// file, because an index must be removed before the files that it names.
    fn named(&self, committed: bool) -> Result<(Option<String>, Vec<String>)> {
        match locate(&self.path)? {
            None => Ok((None, Vec::new())),
            Some(Location::Index(path)) => {
                let index = index::read(&DataFile::open(&path)?)?;
                Ok((index.id, index.files))
            }
            Some(Location::Single(path)) => {
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

    fn remove_files(&self, is_removed: impl Fn(&str, &SaveFile<'_>) -> bool) {
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if SaveFile::parse(name).is_some_and(|file| is_removed(name, &file)) {
                // Ignore the error, because no reader opens the file.
                let _ = self.disk.remove(&entry.path());
            }
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        match self.state {
            State::Hidden => self.remove_files(|_, file| file.id() == Some(&self.id)),
            State::Renamed => self.sweep(false),
            State::Committed => {}
        }
        // Keep the lock file on other systems, because `lock` cannot detect there that another save
        // has removed the file.
        if cfg!(unix) {
            let _ = self.disk.remove(&self.path.join(LOCK));
        }
    }
}

/// Locks a folder until the returned file is closed.
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
            // Continue without a lock if the file system has no locks.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(Error::io(&path, &error)),
        }
        if is_current(&file, &path) {
            return Ok(file);
        }
    }
}

/// Whether the locked file is still at the path. Another save may have removed it after this save
/// opened it.
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
        device::{AnyMut, AnyRef, Cpu},
        tensor::{Region, Role, WeightSource},
        weights::{
            Checkpoint, config,
            disk::fault::{Fault, Kind},
            write,
        },
    };
    use std::sync::atomic::Ordering;

    const NAMES: [&str; 3] = ["a", "b", "c"];

    /// The form in which a version is stored.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Stored {
        Nothing,
        /// One file, written by another program.
        OthersSingle,
        /// Two files with an index, written by another program.
        OthersIndex,
        Single,
        Index,
    }

    fn save(path: &Path, version: u8, stored: Stored, fault: Fault) -> Result<()> {
        let values = [f32::from(version); 4];
        let tensor = |name: &str| (name.to_string(), Shape::new(&[4]), AnyRef::<Cpu>::F32(values.as_slice()));
        let content = |name: &str| {
            let (name, shape, elements) = tensor(name);
            (name, shape, Content::Elements(elements))
        };
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
                folder.write_single(true, NAMES.map(content))?;
                folder.commit(None, Some(&config))?;
            }
            Stored::Index => {
                let mut folder = Folder::begin(path, Disk { fault })?;
                let mut map = serde_json::Map::new();
                for (at, name) in NAMES.iter().enumerate() {
                    let file = folder.data_name(at, NAMES.len());
                    folder.write_shard(&file, [content(name)])?;
                    map.insert(name.to_string(), file.into());
                }
                folder.commit(Some((map, 48)), Some(&config))?;
            }
        }
        Ok(())
    }

    /// Returns the version of weights and configuration that a reader finds, or `None` without a
    /// checkpoint.
    fn read(path: &Path) -> Option<u8> {
        let checkpoint = match Checkpoint::open(path) {
            Ok(checkpoint) => checkpoint,
            Err(Error::Checkpoint { reason, .. }) if reason.contains("has neither") => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(checkpoint.names().eq(NAMES));
        let config = fs::read_to_string(config(path)).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let version = config["version"].as_u64().unwrap() as u8;
        for name in NAMES {
            let mut values = [f32::NAN; 4];
            let whole = Region::whole([4]);
            checkpoint.read(name, Role::Weight, &whole, AnyMut::F32(values.as_mut_slice())).unwrap();
            assert_eq!(values, [f32::from(version); 4], "`{name}` with a configuration of version {version}");
        }
        Some(version)
    }

    fn files(path: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut files: Vec<_> = fs::read_dir(path).unwrap().map(name).collect();
        files.sort();
        files
    }

    /// Whether all files of saves in the folder belong to its checkpoint.
    fn is_tidy(path: &Path) -> bool {
        let open = |path: &Path| DataFile::open(path).unwrap();
        let (id, named) = match locate(path).unwrap() {
            Some(Location::Single(file)) => (header::id(&open(&file)).unwrap(), Vec::new()),
            Some(Location::Index(file)) => {
                let index = index::read(&open(&file)).unwrap();
                (index.id, index.files)
            }
            None => (None, Vec::new()),
        };
        files(path).iter().all(|name| match SaveFile::parse(name) {
            Some(SaveFile::Data(_)) => named.contains(name),
            Some(SaveFile::Config(of)) => id.as_deref() == Some(of),
            Some(SaveFile::Temporary(_)) => false,
            None => name != LOCK,
        })
    }

    /// Saves over another checkpoint. Operation `at` fails, or the process is killed before it.
    /// After a kill, saves again with another kill. Then saves without a fault. Returns whether a
    /// reader found the new version, and the number of operations of the first save.
    fn round(old: Stored, new: Stored, kind: Kind, at: usize) -> (bool, usize) {
        // Use a folder in memory if possible, because disks are slow.
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
}
