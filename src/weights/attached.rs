//! Files of other modules in the folder of a checkpoint. They name the save that they belong to.

use super::{disk::Disk, file::DataFile, layout, save_id};
use crate::error::{Error, Result};
use std::path::Path;

/// Returns the id of the save that wrote the checkpoint of a folder.
///
/// # Errors
/// When the folder has no checkpoint of this crate, or the checkpoint has no id.
pub(crate) fn save_of(folder: &Path) -> Result<String> {
    layout::id(folder)?.filter(|id| save_id::is_valid(id)).ok_or_else(|| {
        let reason = "the folder has no checkpoint with the id of a save: write one with a configuration \
                      (`weights::Save::config`), or in several files";
        Error::Checkpoint { path: folder.into(), reason: reason.into() }
    })
}

/// Writes a file of a folder. A file of this name is replaced at once, when the new one is complete
/// on the disk.
pub(crate) fn replace(folder: &Path, name: &str, content: &[u8]) -> Result<()> {
    replace_on(&Disk::default(), folder, name, content)
}

fn replace_on(disk: &Disk, folder: &Path, name: &str, content: &[u8]) -> Result<()> {
    // If the process is killed, the next save removes files with such a name.
    let temporary = folder.join(format!(".save-{}-{name}", save_id::random()?));
    let written = disk
        .write(&temporary, |out| out.write_all(content))
        .and_then(|()| disk.rename(&temporary, &folder.join(name)));
    if written.is_err() {
        // Ignore the error: the first one says what is wrong.
        let _ = disk.remove(&temporary);
    }
    written?;
    disk.sync_folder(folder)
}

/// Reads a file of a folder. Returns `None` if it does not exist.
///
/// # Errors
/// When the file has more bytes than `most`, is no regular file, or cannot be read.
pub(crate) fn read(folder: &Path, name: &str, most: usize) -> Result<Option<Vec<u8>>> {
    let path = folder.join(name);
    if !path.try_exists().map_err(|error| Error::io(&path, &error))? {
        return Ok(None);
    }
    let file = DataFile::open(&path)?;
    let len = usize::try_from(file.len()).ok().filter(|&len| len <= most);
    let len = len.ok_or_else(|| file.bad(format!("it has {} bytes, but the most is {most}", file.len())))?;
    let mut content = vec![0; len];
    file.read_at(&mut content, 0)?;
    Ok(Some(content))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{
        disk::fault::{Fault, Kind},
        layout::SaveFile,
    };
    use std::{fs, sync::atomic::Ordering};

    #[test]
    fn a_reader_finds_the_old_or_the_new_file() {
        for kind in [Kind::Fails, Kind::Killed] {
            let (mut at, mut new) = (0, 0);
            loop {
                let folder = tempfile::tempdir().unwrap();
                replace(folder.path(), "a.json", b"old").unwrap();
                let fault = Fault::new(kind, at);
                let outcome = replace_on(&Disk { fault: fault.clone() }, folder.path(), "a.json", b"new");
                let found = read(folder.path(), "a.json", 3).unwrap().unwrap();
                assert!(found == b"new" || (outcome.is_err() && found == b"old"), "{found:?}");
                new += usize::from(outcome.is_err() && found == b"new");
                for entry in fs::read_dir(folder.path()).unwrap() {
                    let name = entry.unwrap().file_name().into_string().unwrap();
                    let is_swept = matches!(SaveFile::parse(&name), Some(SaveFile::Temporary(_)));
                    assert!(name == "a.json" || (kind == Kind::Killed && is_swept), "{name}");
                }
                if outcome.is_ok() {
                    assert!(at >= 5 && fault.steps.load(Ordering::Relaxed) == at, "{at}");
                    break;
                }
                at += 1;
            }
            assert_eq!(new, 1, "only the sync of the folder follows the rename");
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path(), "a", 3), Ok(None));
        replace(folder.path(), "a", b"four").unwrap();
        let error = read(folder.path(), "a", 3).unwrap_err().to_string();
        assert!(error.contains("4 bytes, but the most is 3"), "{error}");
        fs::create_dir(folder.path().join("b")).unwrap();
        assert!(matches!(read(folder.path(), "b", 3), Err(Error::Io { .. })));
        let error = save_of(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no checkpoint with the id of a save"), "{error}");
    }
}
