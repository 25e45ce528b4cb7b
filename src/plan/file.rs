//! Reads JSON files of plans and machines.

use crate::error::{Error, Result};
use serde::de::DeserializeOwned;
use std::{
    fs,
    io::{self, Read},
    path::Path,
};

/// The largest size of a file, in bytes.
const MAX_BYTES: u64 = 1 << 22;

/// Reads a value from a JSON file.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let io = |error: io::Error| Error::io(path, &error);
    let bad = |reason: String| Error::Config { path: path.into(), reason };
    // Checks the type before opening the file, because opening a pipe waits for its writer.
    if !fs::metadata(path).map_err(io)?.is_file() {
        return Err(Error::no_file(path));
    }
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(io)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(bad(format!("the file has more than {MAX_BYTES} bytes")));
    }
    serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))
}
