//! Byte-level BPE (`tokenizer.ggml.model` is `gpt2`).

use serde_json::{Value, json};
use std::collections::HashSet;

/// Matches contractions, words, numbers, symbols and white space, as GPT-2 does.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// Contractions in any case, and a mark in front of a word as a part of it.
const WORDS: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+";

/// Symbols with the line ends behind them, and white space up to the last line end.
const SPACES: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Returns the expressions of a value of `tokenizer.ggml.pre`. Each splits what the ones before it
/// leave.
///
/// Source: `llm_tokenizer_bpe` of llama.cpp.
fn expressions(pre: &str) -> Result<Vec<String>, String> {
    let expressions: &[&str] = match pre {
        "default" => &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        "gpt-2" => &[GPT2],
        "llama-bpe" => &[&format!(r"{WORDS}|\p{{N}}{{1,3}}|{SPACES}")],
        "qwen2" => &[&format!(r"{WORDS}|\p{{N}}|{SPACES}")],
        "smollm" => &[r"\p{N}", GPT2],
        other => {
            let known = "default, gpt-2, llama-bpe, qwen2 and smollm";
            return Err(format!("tokenizer.ggml.pre: `{other}` is not known, only {known}"));
        }
    };
    Ok(expressions.iter().map(|expression| expression.to_string()).collect())
}

/// Whether a text begins with a token of its own if the file does not say so.
pub(super) fn begins(pre: &str) -> bool {
    pre == "llama-bpe"
}

/// Returns what is particular to byte-level BPE in the JSON of a tokenizer.
pub(super) fn json(pre: &str, merges: &[String]) -> Result<Value, String> {
    let mut pairs = Vec::with_capacity(merges.len());
    let mut seen = HashSet::with_capacity(merges.len());
    for merge in merges {
        match merge.split_once(' ') {
            Some((left, right)) if !left.is_empty() && !right.is_empty() => pairs.push([left, right]),
            _ => return Err(format!("tokenizer.ggml.merges: {merge:?} is not a pair of tokens")),
        }
        if !seen.insert(merge) {
            return Err(format!("tokenizer.ggml.merges: {merge:?} occurs twice"));
        }
    }
    let split = |expression: String| {
        json!({
            "type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": false})
    };
    let bytes = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let mut steps: Vec<Value> = expressions(pre)?.into_iter().map(split).collect();
    steps.push(bytes.clone());
    Ok(json!({
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": bytes,
        // Llama 3 does not merge a word that is a token.
        "model": {"merges": pairs, "ignore_merges": pre == "llama-bpe"},
    }))
}
