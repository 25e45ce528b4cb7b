//! Shared code of the examples that run a checkpoint.

mod gguf_tokenizer;
mod model;
mod precision;

pub use gguf_tokenizer::{GgufTokenizer, Splitting, TokenType};
pub use model::Model;
pub use precision::Precision;

use shardwise::{Error, Result};
use std::path::Path;
use tokenizers::Tokenizer;

/// Returns an error if there are more ranks than heads. Call it before any group is created,
/// because the memory of the groups grows with the square of the number of ranks.
///
/// # Errors
/// [`Error::TooManyRanks`].
pub fn check_ranks(op: &'static str, ranks: usize, heads: usize) -> Result<()> {
    if ranks > heads {
        Err(Error::TooManyRanks { op, ranks, units: heads, unit: "query heads" })
    } else {
        Ok(())
    }
}

/// Loads the tokenizer of a checkpoint's folder.
///
/// # Errors
/// The reason if the file is absent or bad.
pub fn tokenizer(folder: &Path) -> std::result::Result<Tokenizer, String> {
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
