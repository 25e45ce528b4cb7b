//! SentencePiece's BPE (`tokenizer.ggml.model` is `llama`).
//!
//! SentencePiece merges the two adjacent tokens whose concatenation is a token with the best score,
//! the leftmost if scores are equal. As a list of merges, these are all ways to cut a token into
//! two tokens, in the order of the scores.

use super::{GgufTokenizer, TokenType};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Returns what is particular to SentencePiece's BPE in the JSON of a tokenizer.
pub(super) fn json(
    tokenizer: &GgufTokenizer,
    scores: &[f32],
    space: bool,
    ids: &BTreeMap<&str, usize>,
) -> Result<Value, String> {
    tokenizer.check_length("scores", scores.len())?;
    let bytes = (0..=255).map(|byte| format!("<0x{byte:02X}>"));
    if let Some(byte) = bytes.into_iter().find(|byte| !ids.contains_key(byte.as_str())) {
        return Err(format!("tokenizer.ggml.tokens: there is no token {byte}"));
    }
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space {
        normalizers.push(json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}));
    Ok(json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"merges": merges(tokenizer, scores, ids)?, "byte_fallback": true},
    }))
}

/// Returns the merges in their order.
fn merges<'a>(
    GgufTokenizer { tokens, types, .. }: &'a GgufTokenizer,
    scores: &[f32],
    ids: &BTreeMap<&str, usize>,
) -> Result<Vec<[&'a str; 2]>, String> {
    let mut merges = Vec::new();
    // The merged token of each score.
    let mut merged = BTreeMap::new();
    for ((token, kind), score) in tokens.iter().zip(types).zip(scores) {
        if kind.is_added() {
            continue;
        }
        // A merge of a character without a token cannot be in the list.
        let absent = |c: &char| !ids.contains_key(c.encode_utf8(&mut [0; 4]) as &str);
        if let (false, Some(c)) = (*kind == TokenType::Byte, token.chars().find(absent)) {
            return Err(format!(
                "tokenizer.ggml.tokens: {token:?} has the character {c:?}, which is no token"
            ));
        }
        let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let before = merges.len();
        merges.extend(
            cuts.filter_map(|(left, right)| Some((*score, *ids.get(left)?, *ids.get(right)?, [left, right]))),
        );
        if merges.len() == before {
            continue;
        }
        if score.is_nan() {
            return Err(format!("tokenizer.ggml.scores: that of {token:?} is not a number"));
        }
        // The list cannot say that the leftmost of several merges comes first. Adding 0 makes -0
        // equal to 0.
        if let Some(other) = merged.insert((score + 0.0).to_bits(), token) {
            return Err(format!(
                "tokenizer.ggml.scores: {other:?} and {token:?} both have {score}, so their merges have no \
                 order"
            ));
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(merges.into_iter().map(|(.., pair)| pair).collect())
}
