//! The names of tensors in GGUF files, and those of Hugging Face.

/// The names of an architecture's tensors.
struct Family {
    /// The prefix of all names except the head's.
    prefix: &'static str,
    /// The blocks, numbered from 0 under this name.
    blocks: &'static str,
    /// Names outside the blocks without `.weight` and `.bias`: in GGUF, and behind the prefix.
    ends: &'static [(&'static str, &'static str)],
    /// Names in a block.
    block: &'static [(&'static str, &'static str)],
}

const LLAMA: Family = Family {
    prefix: "model",
    blocks: "layers",
    ends: &[("token_embd", "embed_tokens"), ("output_norm", "norm")],
    block: &[
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("attn_q_norm", "self_attn.q_norm"),
        ("attn_k_norm", "self_attn.k_norm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ],
};

const GPT2: Family = Family {
    prefix: "transformer",
    blocks: "h",
    ends: &[("token_embd", "wte"), ("position_embd", "wpe"), ("output_norm", "ln_f")],
    block: &[
        ("attn_norm", "ln_1"),
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_norm", "ln_2"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
};

/// The divisors of rotary frequencies. They are no parameters, and the configuration has them.
pub(crate) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// Returns Hugging Face's name of a tensor. A tensor that the architecture does not have gets the
/// prefix of the model, so that loading the model fails because no parameter reads the tensor.
/// Names of unknown architectures are unchanged.
pub(super) fn hugging_face(architecture: &str, name: &str) -> String {
    let family = match architecture {
        "llama" | "qwen2" | "qwen3" => &LLAMA,
        "gpt2" => &GPT2,
        _ => return name.into(),
    };
    if name == ROPE_DIVISORS {
        return name.into();
    }
    let prefix = family.prefix;
    let (layer, part) = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => (Some(layer), part),
        None => (None, name),
    };
    let (stem, suffix) = part.rsplit_once('.').unwrap_or((part, ""));
    let find =
        |names: &[(&str, &'static str)]| names.iter().find(|(gguf, _)| *gguf == stem).map(|(_, name)| *name);
    match layer {
        None if stem == "output" => format!("lm_head.{suffix}"),
        None => match find(family.ends) {
            Some(found) => format!("{prefix}.{found}.{suffix}"),
            None => format!("{prefix}.{name}"),
        },
        Some(layer) => {
            let blocks = family.blocks;
            match find(family.block) {
                Some(found) => format!("{prefix}.{blocks}.{layer}.{found}.{suffix}"),
                None => format!("{prefix}.{blocks}.{layer}.{part}"),
            }
        }
    }
}

/// The heads whose rows are in another order in GGUF files.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Heads {
    Query,
    KeyValue,
}

/// Returns the heads whose rows the file has in the order of interleaved pairs. Architectures other
/// than `llama` keep Hugging Face's order.
pub(super) fn interleaved(architecture: &str, name: &str) -> Option<Heads> {
    let part = name.strip_prefix("blk.").filter(|_| architecture == "llama")?.split_once('.')?.1;
    match part {
        "attn_q.weight" | "attn_q.bias" => Some(Heads::Query),
        "attn_k.weight" | "attn_k.bias" => Some(Heads::KeyValue),
        _ => None,
    }
}

/// Returns the row of the file that has row `row` of Hugging Face's tensor, whose heads have
/// `head` rows. Row i of the first half of a head is row 2 i of the file's head, and row i of the
/// second half is row 2 i + 1.
pub(super) fn stored_row(row: usize, head: usize) -> usize {
    let (start, row, half) = (row - row % head, row % head, head / 2);
    start + 2 * (row % half) + row / half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_hugging_face() {
        for (architecture, name, found) in [
            ("llama", "token_embd.weight", "model.embed_tokens.weight"),
            ("llama", "output.weight", "lm_head.weight"),
            ("llama", "output_norm.weight", "model.norm.weight"),
            ("llama", "rope_freqs.weight", "rope_freqs.weight"),
            ("llama", "rope_factors_long.weight", "model.rope_factors_long.weight"),
            ("llama", "blk.12.ffn_gate_inp.weight", "model.layers.12.ffn_gate_inp.weight"),
            ("llama", "blk.12.attn_output.weight", "model.layers.12.self_attn.o_proj.weight"),
            ("qwen2", "blk.0.attn_q.bias", "model.layers.0.self_attn.q_proj.bias"),
            ("qwen3", "blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
            ("gpt2", "position_embd.weight", "transformer.wpe.weight"),
            ("gpt2", "blk.3.attn_qkv.bias", "transformer.h.3.attn.c_attn.bias"),
            ("gpt2", "blk.3.attn_q.bias", "transformer.h.3.attn_q.bias"),
            ("gemma", "token_embd.weight", "token_embd.weight"),
        ] {
            assert_eq!(hugging_face(architecture, name), found);
        }
    }

    #[test]
    fn rows_are_those_of_the_converter() {
        // numpy: arange(16).reshape(2, 2, 4).swapaxes(1, 2).ravel() has, for each row of the file,
        // the row of Hugging Face.
        let converted = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15];
        for (stored, row) in converted.into_iter().enumerate() {
            assert_eq!(stored_row(row, 8), stored);
        }
        assert_eq!(interleaved("llama", "blk.0.attn_k.weight"), Some(Heads::KeyValue));
        assert_eq!(interleaved("llama", "blk.0.attn_v.weight"), None);
        assert_eq!(interleaved("qwen2", "blk.0.attn_q.weight"), None);
    }
}
