//! The planner: plans against training, the search, published measurements, and
//! timed steps.

mod published;
mod search;
mod training;
mod trial;

use shardwise::{
    device::DType,
    kernels::{Activation, AttentionChoices, NormKind, RopePairs},
    models::{DecoderConfig, LayerChoices},
    ops::{RopeConfig, RopeScaling},
    parallel::{AttentionConfig, BlockConfig},
};

/// The number of tokens of a sequence.
const TOKENS: usize = 48;

/// The families of models: a Llama with grouped key/value heads, a Llama in which every other block
/// has a window, and a GPT-2 with a tied head. The vocabulary of 211 tokens does not divide.
fn models() -> [(&'static str, DType, DecoderConfig); 3] {
    let attention = AttentionConfig::new(128, 8).with_choices(AttentionChoices::CAUSAL);
    let rope = RopeConfig { dim: 16, base: 1e4, pairs: RopePairs::Halves, scaling: RopeScaling::None };
    let norm = NormKind::RmsNorm { eps: 1e-5 };
    let grouped = attention.clone().with_kv_heads(2).with_rope(rope);
    let block = BlockConfig::new(grouped.clone(), 350, Activation::Silu, norm).with_gate(true);
    let mut llama = DecoderConfig::new(211, block, 5);
    llama.tied = false;
    let mut windows = llama.clone();
    for layer in [1, 3] {
        let window = AttentionChoices { window: Some(9), ..AttentionChoices::CAUSAL };
        windows.layers[layer] = LayerChoices::new(window, grouped.rope.clone());
    }
    let attention = attention.with_qkv_bias(true).with_out_bias(true);
    let norm = NormKind::LayerNorm { eps: 1e-5 };
    let block = BlockConfig::new(attention, 512, Activation::GeluTanh, norm).with_mlp_bias(true);
    let mut gpt = DecoderConfig::new(211, block, 4);
    gpt.positions = Some(64);
    [("llama", DType::F32, llama), ("windows", DType::BF16, windows), ("gpt", DType::F32, gpt)]
}
