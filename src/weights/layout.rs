//! The names of the files in a checkpoint folder. Finds the files that are the folder's checkpoint.

use super::{file::DataFile, header, index, save_id};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
pub(super) const CONFIG: &str = "config.json";

/// The file that a reader of the checkpoint opens first.
pub(super) enum Location {
    Single(PathBuf),
    Index(PathBuf),
}

/// Finds the checkpoint of a folder. Returns `None` if the folder has no checkpoint.
pub(super) fn locate(folder: &Path) -> Result<Option<Location>> {
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    match (single.exists(), index.exists()) {
        (false, false) => Ok(None),
        (true, false) => Ok(Some(Location::Single(single))),
        (false, true) => Ok(Some(Location::Index(index))),
        // Either a save stopped before step 3 (see `super::folder`), or another program has written
        // a single file after the save. The single file is the checkpoint in both cases.
        (true, true) if index::read(&DataFile::open(&index)?)?.id.is_some() => {
            Ok(Some(Location::Single(single)))
        }
        (true, true) => {
            let reason = format!(
                "the folder has both {SINGLE} and {INDEX}, which may be of different models; remove one of them"
            );
            Err(Error::Checkpoint { path: folder.into(), reason })
        }
    }
}

/// Returns the id of the save that wrote the checkpoint of a folder. `None` if there is no
/// checkpoint, or it has no id.
pub(super) fn id(folder: &Path) -> Result<Option<String>> {
    match locate(folder)? {
        None => Ok(None),
        Some(Location::Single(path)) => header::id(&DataFile::open(&path)?),
        Some(Location::Index(path)) => Ok(index::read(&DataFile::open(&path)?)?.id),
    }
}

/// Returns the path of the configuration that belongs to the checkpoint of a folder.
pub(crate) fn config(folder: &Path) -> PathBuf {
    pending_config(folder).unwrap_or_else(|| folder.join(CONFIG))
}

/// Returns the path of the configuration that is not renamed yet, if the save of the folder's
/// checkpoint stopped before step 4 (see [`super::folder`]).
pub(super) fn pending_config(folder: &Path) -> Option<PathBuf> {
    let id = id(folder).ok()??;
    let path = folder.join(config_name(&id));
    (save_id::is_valid(&id) && path.is_file()).then_some(path)
}

/// Returns the name of a save's configuration before step 4.
pub(super) fn config_name(id: &str) -> String {
    format!("config-{id}.json")
}

/// A file of a save whose name readers do not look for.
#[derive(Debug, PartialEq)]
pub(super) enum SaveFile<'a> {
    /// Tensors, with the id of the save, or `None` if another program wrote the file.
    Data(Option<&'a str>),
    Config(&'a str),
    Temporary(&'a str),
}

impl<'a> SaveFile<'a> {
    /// Parses the name of a file. Returns `None` for all other files, which no save may remove.
    pub(super) fn parse(name: &'a str) -> Option<Self> {
        let id = |text: &'a str| save_id::is_valid(text).then_some(text);
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

    /// Returns the id of the save that made the file.
    pub(super) fn id(&self) -> Option<&'a str> {
        match self {
            Self::Data(id) => *id,
            Self::Config(id) | Self::Temporary(id) => Some(id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_to_the_end() {
        let id = "0123456789abcdef";
        for (name, file) in [
            ("model-00001-of-00002.safetensors".into(), SaveFile::Data(None)),
            (format!("model-{id}-00001-of-00002.safetensors"), SaveFile::Data(Some(id))),
            (format!("config-{id}.json"), SaveFile::Config(id)),
            (format!(".save-{id}-model.safetensors"), SaveFile::Temporary(id)),
        ] {
            assert_eq!(SaveFile::parse(&name), Some(file), "{name}");
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
            assert_eq!(SaveFile::parse(name), None, "{name}");
        }
    }
}
