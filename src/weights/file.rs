//! An open file that several threads read at independent offsets.

use crate::{
    error::{Error, Result},
    security::audit::{self, Event},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// A regular file and its length when it was opened.
pub(super) struct DataFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl DataFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let io = |error: io::Error| Error::io(path, &error);
        // Check before opening, because opening a pipe waits for its writer.
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(Error::no_file(path));
        }
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(Self { path: path.into(), file, len })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `bytes` from the file, starting at offset `start`.
    pub(super) fn read_at(&self, bytes: &mut [u8], start: u64) -> Result<()> {
        read_exact_at(&self.file, bytes, start).map_err(|error| Error::Io {
            path: self.path.clone(),
            kind: error.kind(),
            reason: format!("reading {} bytes at offset {start}: {error}", bytes.len()),
        })
    }

    /// Returns [`Error::Checkpoint`] for this file.
    pub(super) fn bad(&self, reason: impl Into<String>) -> Error {
        Error::Checkpoint { path: self.path.clone(), reason: reason.into() }
    }
}

/// Writes to the rank's audit log which files of a checkpoint at `path` were opened: for each its
/// name, its length, and the SHA-256 of its first MiB, which has the names and shapes of tensors.
pub(super) fn log_opened(path: &Path, files: &[DataFile]) -> Result<()> {
    let Some(log) = audit::current() else { return Ok(()) };
    let describe = |file: &DataFile| -> Result<Value> {
        let mut head = vec![0; file.len.min(1 << 20) as usize];
        file.read_at(&mut head, 0)?;
        let (name, sha256) = (file.path.display().to_string(), audit::hex(&Sha256::digest(head).into()));
        Ok(json!({ "path": name, "bytes": file.len, "sha256_of_first_mib": sha256 }))
    };
    let files = files.iter().map(describe).collect::<Result<Value>>()?;
    log.write(&Event::new("load").text("path", path.display()).json("files", files))
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], start: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, start)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut start: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, bytes, start) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                bytes = &mut bytes[read..];
                start += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
