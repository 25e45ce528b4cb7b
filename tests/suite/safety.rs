//! What the sources say about themselves.

use crate::imports::sources;
use shardwise::Error;
use std::{collections::HashSet, fs};

/// All sources of the library in one text.
fn library() -> String {
    let mut files = Vec::new();
    sources(&shardwise_tests::root().join("src"), &mut files);
    files.into_iter().map(|file| fs::read_to_string(file).unwrap()).collect()
}

/// `Error::Invalid` blames the caller, so that a fault of the library has a variant of its own.
#[test]
fn a_fault_of_the_library_is_not_told_as_misuse() {
    assert_eq!(library().matches("please report").count(), 1);
    let error = Error::Internal { op: "gemm", reason: "a thread panicked".into() };
    assert_eq!(error.to_string(), "gemm: a thread panicked: this is a bug in shardwise, please report it");
}

/// An argument for safety that cites what is gone argues nothing: every name in it stands in the
/// code.
#[test]
fn arguments_for_safety_cite_what_exists() {
    let text = library();
    let word = |letter: char| letter.is_alphanumeric() || letter == '_';
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let known: HashSet<&str> = code.flat_map(|line| line.split(|letter| !word(letter))).collect();
    let mut safety = false;
    let comments = text.lines().map(str::trim_start).filter(|line| {
        let begins = line.contains("SAFETY:") || line.contains("# Safety");
        safety = line.starts_with("//") && (safety || begins);
        safety
    });
    let comments: Vec<_> = comments.map(|line| line.trim_start_matches('/')).collect();
    let comments = comments.join(" ");
    let cited: Vec<&str> = comments.split('`').skip(1).step_by(2).collect();
    assert!(cited.len() > 50, "{cited:?}");
    for name in cited {
        assert!(name.split(|letter| !word(letter)).all(|word| known.contains(word)), "`{name}`");
    }
}
