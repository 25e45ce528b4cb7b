//! Checks of the library's source text.

use crate::imports::sources;
use shardwise::Error;
use std::{collections::HashSet, fs};

/// Returns all sources of the library in one text.
fn library() -> String {
    let mut files = Vec::new();
    sources(&shardwise_tests::root().join("src"), &mut files);
    files.into_iter().map(|file| fs::read_to_string(file).unwrap()).collect()
}

/// `Error::Invalid` reports a mistake of the caller, so a fault of the library has its own variant.
#[test]
fn a_fault_of_the_library_is_not_reported_as_misuse() {
    assert_eq!(library().matches("please report").count(), 1);
    let error = Error::Internal { op: "gemm", reason: "a thread panicked".into() };
    assert_eq!(error.to_string(), "gemm: a thread panicked: this is a bug in shardwise, please report it");
}

/// A SAFETY comment may only name items that still exist, so every name in it must occur in the
/// code.
#[test]
fn arguments_for_safety_cite_what_exists() {
    let text = library();
    let word = |character: char| character.is_alphanumeric() || character == '_';
    let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    let known: HashSet<&str> = code.flat_map(|line| line.split(|character| !word(character))).collect();
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
        assert!(name.split(|character| !word(character)).all(|word| known.contains(word)), "`{name}`");
    }
}
