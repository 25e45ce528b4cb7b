//! Events of the audit log: which checkpoints a rank has read and written.

use super::file::DataFile;
use crate::{
    error::Result,
    security::audit::{self, Event},
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::path::Path;

/// The number of bytes that are read and hashed at a time.
const CHUNK: usize = 1 << 20;

/// Writes to the rank's audit log which files of a checkpoint at `path` were opened: for each its
/// path, its length, and the SHA-256 of its first MiB, which has the names and shapes of tensors.
/// To hash all of it would take as long as to read it.
pub(super) fn opened(path: &Path, files: &[DataFile]) -> Result<()> {
    let Some(log) = audit::current() else { return Ok(()) };
    let describe = |file: &DataFile| -> Result<Value> {
        let sha256 = sha256(file, CHUNK as u64)?;
        let name = file.path().display().to_string();
        Ok(json!({ "path": name, "bytes": file.len(), "sha256_of_first_mib": sha256 }))
    };
    let files = files.iter().map(describe).collect::<Result<Value>>()?;
    log.write(&Event::new("load").text("path", path.display()).json("files", files))
}

/// Describes the files that a save has written: for each its name, its length, its SHA-256, and
/// that of its first MiB, by which a `load` can be recognized.
pub(super) fn written(folder: &Path, names: &[String]) -> Result<Value> {
    let describe = |name: &String| -> Result<Value> {
        let file = DataFile::open(&folder.join(name))?;
        let [whole, head] = [u64::MAX, CHUNK as u64].map(|limit| sha256(&file, limit));
        Ok(json!({ "name": name, "bytes": file.len(), "sha256": whole?, "sha256_of_first_mib": head? }))
    };
    names.iter().map(describe).collect()
}

/// Writes to the rank's audit log that `writer` has saved the model in a folder. Only that rank
/// knows the files.
pub(super) fn saved(folder: &Path, writer: usize, files: Option<Value>) -> Result<()> {
    let Some(log) = audit::current() else { return Ok(()) };
    let event = Event::new("save").text("path", folder.display()).number("writer", writer as u64);
    log.write(&match files {
        Some(files) => event.json("files", files),
        None => event,
    })
}

/// The SHA-256 of the first bytes of a file, at most `limit`, in hexadecimal digits.
fn sha256(file: &DataFile, limit: u64) -> Result<String> {
    let (mut hash, mut bytes, mut at) = (Sha256::new(), vec![0; CHUNK], 0);
    let end = file.len().min(limit);
    while at < end {
        let chunk = &mut bytes[..CHUNK.min((end - at) as usize)];
        file.read_at(chunk, at)?;
        hash.update(&*chunk);
        at += chunk.len() as u64;
    }
    Ok(audit::hex(&hash.finalize().into()))
}
