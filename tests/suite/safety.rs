//! What the sources say about themselves.

use shardwise::Error;
use std::{fs, path::Path};

/// All sources of the library in one text.
fn sources(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, text);
        } else if path.extension().is_some_and(|end| end == "rs") {
            *text += &fs::read_to_string(&path).unwrap();
        }
    }
}

fn library() -> String {
    let mut text = String::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut text);
    text
}

/// `Error::Invalid` blames the caller, so that a fault of the library has a variant of its own.
#[test]
fn a_fault_of_the_library_is_not_told_as_misuse() {
    assert_eq!(library().matches("please report").count(), 1);
    let error = Error::Internal { op: "gemm", reason: "a thread panicked".into() };
    assert_eq!(error.to_string(), "gemm: a thread panicked: this is a bug in shardwise, please report it");
}
