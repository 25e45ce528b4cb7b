//! The index of a checkpoint with several files. The index maps tensors to files.
//!
//! ```text
//! {"metadata": {"total_size": 123}, "weight_map": {"w": "model-00001-of-00002.safetensors", …}}
//! ```

use super::{
    file::DataFile,
    json::{LIMIT, duplicate, object, value, whole_object},
    save_id,
};
use crate::error::Result;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Component, Path},
};

/// The maximal length of an index in bytes, enough for some hundred thousand tensors.
const MAX_INDEX: u64 = 32_000_000;

/// The maximal length in bytes of a value other than `weight_map`. Such values are free text, such
/// as the recipe of a model merge.
const MAX_OTHER_VALUE: usize = 1 << 20;

/// The maximal number of files of a checkpoint. All files are open at the same time.
const MAX_FILES: usize = 10_000;

/// The file of each tensor.
#[derive(Default)]
pub(super) struct Index {
    /// The paths of the files, relative to the folder of the index. Each path occurs once.
    pub(super) files: Vec<String>,
    /// The index in `files` of each tensor's file, by the tensor's name.
    pub(super) tensors: BTreeMap<String, usize>,
    /// The id of the save if this crate wrote the index; see [`super::folder`].
    pub(super) id: Option<String>,
}

/// Reads an index.
pub(super) fn read(file: &DataFile) -> Result<Index> {
    if file.len() > MAX_INDEX {
        return Err(file.bad(format!("the index has {} bytes, but at most {MAX_INDEX} are read", file.len())));
    }
    let mut text = vec![0; file.len() as usize];
    file.read_at(&mut text, 0)?;
    parse(&text).map_err(|reason| file.bad(format!("index: {reason}")))
}

fn parse(text: &[u8]) -> Result<Index, String> {
    let mut index: Option<Index> = None;
    let mut config = "";
    let mut id = None;
    whole_object(text, |key, text| {
        if key == "model_type" {
            config = ": this is a model's configuration; open the checkpoint by its folder";
        }
        if key != "weight_map" {
            return match value!(serde_json::Value, text, MAX_OTHER_VALUE) {
                Ok((value, len)) => {
                    if key == "metadata" {
                        id = value.get(save_id::KEY).and_then(serde_json::Value::as_str).map(String::from);
                    }
                    Ok(len)
                }
                Err(reason) => Err(format!("`{}`: {reason}", key.escape_debug())),
            };
        }
        if index.is_some() {
            return Err(duplicate(&key));
        }
        weight_map(text, index.insert(Index::default()))
    })?;
    index.map(|index| Index { id, ..index }).ok_or_else(|| format!("it has no `weight_map`{config}"))
}

fn weight_map(text: &[u8], index: &mut Index) -> Result<usize, String> {
    let mut positions = HashMap::new();
    object(text, |name, text| {
        let (file, len) = value!(String, text, LIMIT)
            .map_err(|reason| format!("the file of tensor `{}`: {reason}", name.escape_debug()))?;
        let position = match positions.get(&file) {
            Some(&position) => position,
            None if index.files.len() == MAX_FILES => {
                return Err(format!("more than {MAX_FILES} files"));
            }
            None => {
                check(&file).map_err(|reason| {
                    let (name, file) = (name.escape_debug(), file.escape_debug());
                    format!("tensor `{name}` is mapped to `{file}`, which {reason}")
                })?;
                index.files.push(file.clone());
                positions.insert(file, index.files.len() - 1);
                index.files.len() - 1
            }
        };
        if index.tensors.contains_key(&name) {
            return Err(duplicate(&name));
        }
        index.tensors.insert(name, position);
        Ok(len)
    })
}

/// Checks that a path stays below the folder of the index. Also checks that the path is in its
/// shortest form, so that a file has only one name. Symbolic links may lead out of the folder,
/// because the caches of model hubs use such links, and because only a program with access to the
/// file system can make a link.
fn check(path: &str) -> Result<(), String> {
    let components = Path::new(path).components().filter(|component| *component != Component::CurDir);
    let names = components.map(|component| match component {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    match names.collect::<Option<Vec<_>>>() {
        Some(names) if !names.is_empty() => match names.join("/") {
            shortest if shortest == path => Ok(()),
            shortest => Err(format!("has to be written `{}`", shortest.escape_debug())),
        },
        _ => Err("is not a path below the index's folder".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_each_file_once() {
        let index =
            parse(br#"{"metadata":{"total_size":8},"weight_map":{"b":"1","a":"sub/2","c":"1"}}"#).unwrap();
        assert_eq!(index.files, ["1", "sub/2"]);
        assert_eq!(
            index.tensors.into_iter().collect::<Vec<_>>(),
            [("a".into(), 1), ("b".into(), 0), ("c".into(), 0)]
        );
    }

    #[test]
    fn paths_stay_below_the_folder_and_are_written_in_one_way() {
        assert!(["a", "a/b", "a..b", "..."].iter().all(|path| check(path).is_ok()));
        for (paths, reason) in [
            (
                &["", "/a", "..", "../a", "a/../../b", "a/..", "."][..],
                "is not a path below the index's folder",
            ),
            (&["./a/b", "a//b", "a/./b", "a/b/", "a/b/."], "has to be written `a/b`"),
        ] {
            paths.iter().for_each(|path| assert_eq!(check(path).unwrap_err(), reason, "{path}"));
        }
    }
}
