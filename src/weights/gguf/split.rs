//! The files of a model that is split into several.

use super::super::file::DataFile;
use super::{
    cursor::Cursor,
    header::{self, Header},
    metadata,
};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// Opens a file, or all files of a split model in order, and reads their headers.
pub(super) fn open(path: &Path) -> Result<Vec<(DataFile, Header)>> {
    let Some((stem, count)) = split_name(path) else {
        let opened = open_one(path)?;
        return match number(&opened, "split.count")? {
            None | Some(0 | 1) => Ok(vec![opened]),
            Some(count) => Err(opened.0.bad(format!(
                "this is one of {count} files of a model, whose names have to end with -00001-of-{count:05}.gguf"
            ))),
        };
    };
    let mut files = Vec::new();
    let mut tensors = 0;
    for at in 0..count {
        let opened = open_one(&file_name(path, stem, at, count))?;
        for (key, found) in [("split.no", at), ("split.count", count)] {
            match number(&opened, key)? {
                Some(value) if value == found as i128 => {}
                // A whole file may have the name of an only part.
                None if count == 1 => {}
                value => {
                    let value = value.map_or("missing".into(), |value| value.to_string());
                    let reason = format!("`{key}` is {value}, but by its name the file has {found}");
                    return Err(opened.0.bad(reason));
                }
            }
        }
        tensors += opened.1.tensors.len();
        files.push(opened);
    }
    if let Some(said) = number(&files[0], "split.tensors.count")?
        && said != tensors as i128
    {
        let reason = format!("`split.tensors.count` is {said}, but the {count} files have {tensors} tensors");
        return Err(files[0].0.bad(reason));
    }
    Ok(files)
}

fn open_one(path: &Path) -> Result<(DataFile, Header)> {
    let file = DataFile::open(path)?;
    let header = header::read(&file)?;
    Ok((file, header))
}

/// Parses `STEM-00001-of-00003.gguf` into the stem and the number of files.
fn split_name(path: &Path) -> Option<(&str, usize)> {
    let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
    let (front, count) = name.rsplit_once("-of-")?;
    let (stem, at) = front.rsplit_once('-')?;
    let number = |digits: &str| {
        let five = digits.len() == 5 && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<usize>().ok().filter(|_| five)
    };
    let (at, count) = (number(at)?, number(count)?);
    (1..=count).contains(&at).then_some((stem, count))
}

fn file_name(path: &Path, stem: &str, at: usize, count: usize) -> PathBuf {
    path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", at + 1))
}

fn number((file, header): &(DataFile, Header), key: &str) -> Result<Option<i128>> {
    let Some(&at) = header.values.get(key) else { return Ok(None) };
    match metadata::value(&mut Cursor::new(file, at))?.integer() {
        None => {
            Err(Error::Checkpoint { path: file.path().into(), reason: format!("`{key}` is not an integer") })
        }
        number => Ok(number),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_split_files() {
        let path = Path::new("a/tiny-q4-00002-of-00012.gguf");
        assert_eq!(split_name(path), Some(("tiny-q4", 12)));
        assert_eq!(file_name(path, "tiny-q4", 11, 12), Path::new("a/tiny-q4-00012-of-00012.gguf"));
        for name in [
            "a.gguf",
            "a-1-of-2.gguf",
            "a-00003-of-00002.gguf",
            "a-00000-of-00002.gguf",
            "00001-of-00002.gguf",
        ] {
            assert_eq!(split_name(Path::new(name)), None, "{name}");
        }
    }
}
