//! The id of a save. The names and the metadata of the save's files contain the id.

use crate::error::{Error, Result};

/// The key of the id in the metadata of an index and of a safetensors file.
pub(super) const KEY: &str = "shardwise_save";

/// Returns a random id of 16 hexadecimal digits.
pub(super) fn random() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| Error::invalid("save", error.to_string()))?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// Whether a text has the form of an id: 16 lower-case hexadecimal digits.
pub(super) fn is_valid(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
