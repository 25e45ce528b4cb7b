//! Enforces the limits of CONTRIBUTING.md: the length of comments and files, and words that
//! comments may not use.

use crate::imports::sources;
use std::{fs, path::PathBuf};

/// The longest line of a comment, in characters.
const COLUMNS: usize = 100;

/// Words that comments may not use. DESIGN.md's glossary has the words that replace them.
const WORDS: [&str; 27] = [
    "beside",
    "fork",
    "forked",
    "forks",
    "kin",
    "letter",
    "letters",
    "manieth",
    "patch",
    "patches",
    "piece",
    "pieces",
    "presence",
    "seat",
    "seats",
    "spoil",
    "spoiled",
    "stranger",
    "strangers",
    "tear",
    "tears",
    "tell",
    "tells",
    "told",
    "whoever",
    "whomever",
    "underway",
];

/// The files in which a word of the list is a term of the field.
const EXCEPTIONS: [(&str, &str); 1] = [("examples/vit.rs", "patch")];

/// Returns the name and the text of every source file below some folders.
fn files(folders: &[&str]) -> Vec<(String, String)> {
    let root = shardwise_tests::root();
    let mut found: Vec<PathBuf> = Vec::new();
    folders.iter().for_each(|folder| sources(&root.join(folder), &mut found));
    let read = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
        (name, fs::read_to_string(path).unwrap())
    };
    found.into_iter().map(read).collect()
}

/// Returns a line's comment from its `//` on, unless the `//` is within a string or a URL.
fn comment(line: &str) -> Option<&str> {
    let at = line.find("//")?;
    (line[..at].matches('"').count().is_multiple_of(2) && !line[..at].ends_with(':')).then(|| &line[at..])
}

#[test]
fn comments_are_short_and_use_the_fields_words() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for (name, text) in files(&["src", "tests", "examples", "benches"]) {
        for (at, line) in text.lines().enumerate() {
            let Some(comment) = comment(line) else { continue };
            seen += 1;
            let whole = line.trim_start().starts_with("//");
            if whole && line.chars().count() > COLUMNS {
                wrong.push(format!("{name}:{}: more than {COLUMNS} columns", at + 1));
            }
            let lower = comment.to_lowercase();
            for word in lower.split(|letter: char| !letter.is_alphanumeric() && letter != '_') {
                let allowed = EXCEPTIONS.iter().any(|(file, stem)| name == *file && word.starts_with(stem));
                if WORDS.contains(&word) && !allowed {
                    wrong.push(format!("{name}:{}: `{word}`", at + 1));
                }
            }
        }
    }
    assert!(seen > 5000, "only {seen} comments were found");
    assert!(wrong.is_empty(), "comments:\n{}", wrong.join("\n"));
}

#[test]
fn files_are_short() {
    let files = files(&["src"]);
    assert!(files.len() > 200, "only {} files were found", files.len());
    for (name, text) in files {
        let most = if name.starts_with("src/parallel/") { 400 } else { 500 };
        let lines = text.lines().count();
        assert!(lines <= most, "{name} has {lines} lines: at most {most}");
    }
    let readme = fs::read_to_string(shardwise_tests::root().join("README.md")).unwrap();
    assert!(readme.lines().count() <= 100, "README.md has more than 100 lines");
}
