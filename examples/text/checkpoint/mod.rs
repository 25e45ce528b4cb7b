//! What the examples that run a checkpoint share.

use shardwise::{Error, Result};
use std::path::Path;
use tokenizers::Tokenizer;

/// Refuses more ranks than heads. Before there are groups: their size grows with the square of
/// the ranks.
pub(crate) fn check_ranks(op: &'static str, ranks: usize, heads: usize) -> Result<()> {
    match ranks > heads {
        true => Err(Error::TooManyRanks { op, ranks, units: heads, unit: "query heads" }),
        false => Ok(()),
    }
}

/// The tokenizer of a checkpoint's folder, or why there is none.
pub(crate) fn tokenizer(folder: &Path) -> std::result::Result<Tokenizer, String> {
    let path = folder.join("tokenizer.json");
    let other =
        ["tokenizer.model", "vocab.json", "vocab.txt"].into_iter().find(|other| folder.join(other).exists());
    match other.filter(|_| !path.exists()) {
        Some(other) => Err(format!(
            "{}: there is no tokenizer.json, but {other}: transformers' AutoTokenizer can convert it",
            folder.display()
        )),
        None => Tokenizer::from_file(&path).map_err(|error| format!("{}: {error}", path.display())),
    }
}
