#!/usr/bin/env python3
"""Generates the small random models in tests/data and the results of transformers for them.

    pip install torch transformers safetensors
    scripts/make_hf_references.py tests/data

Each folder holds a Hugging Face checkpoint, and next to it
  reference.json         prompts of several lengths, and the tokens that greedy decoding appends to each
  reference.safetensors  for each prompt the logits (or BERT's hidden states) of all its tokens, f32

rope.json holds transformers' frequencies of rotary embeddings for every kind of scaling.
"""
import json, math, os, shutil, sys
import torch
from safetensors.torch import save_file
from transformers import (BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig,
                          MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCABULARY = 591
PROMPTS, NEW = (7, 1, 4), 8
common = dict(vocab_size=VOCABULARY, num_hidden_layers=2, hidden_size=24, intermediate_size=41, max_position_embeddings=64,
              bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)


def rope(**kwargs):
    return {"rope_theta": 10000.0, "rope_type": "default", **kwargs}


MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(
        **{**common, "hidden_size": 36}, num_attention_heads=9, num_key_value_heads=3, head_dim=8, tie_word_embeddings=False,
        rope_parameters=rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=16))),
    "mistral": (MistralForCausalLM, MistralConfig(
        **common, num_attention_heads=8, num_key_value_heads=2, head_dim=6, sliding_window=4, tie_word_embeddings=False,
        rope_parameters=rope())),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(
        **{**common, "hidden_size": 32}, num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True,
        use_sliding_window=True, sliding_window=3, max_window_layers=1, rope_parameters=rope(rope_theta=1e6))),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(
        **common, num_attention_heads=9, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True,
        rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16))),
    "gpt2": (GPT2LMHeadModel, GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=8, bos_token_id=1, eos_token_id=2)),
    "bert": (BertModel, BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=48,
        max_position_embeddings=32)),
}


def randomize(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2:
            noise *= 0.6 if "embed" in name or "wte" in name or "wpe" in name else 1.5 / math.sqrt(parameter.shape[-1])
        elif "norm" in name.lower() or "ln_" in name:
            noise = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
        else:
            noise *= 0.3
        parameter.data.copy_(noise)


@torch.no_grad()
def references(model, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in PROMPTS]
    outputs, greedy, gap = {}, [], math.inf
    for at, ids in enumerate(prompts):
        if isinstance(model, BertModel):
            outputs[f"hidden.{at}"] = model(ids[None]).last_hidden_state[0]
            continue
        outputs[f"logits.{at}"] = model(ids[None]).logits[0]
        appended = []
        for _ in range(NEW):
            best = model(ids[None]).logits[0, -1].topk(2)
            gap = min(gap, (best.values[0] - best.values[1]).item())
            appended.append(best.indices[0].item())
            ids = torch.cat([ids, best.indices[:1]])
        greedy.append(appended)
    return [ids.tolist() for ids in prompts], outputs, greedy, gap


def main(folder):
    for name, (kind, config) in MODELS.items():
        config._attn_implementation = "eager"
        for seed in range(100):
            model = kind(config).float().eval()
            randomize(model, seed)
            prompts, outputs, greedy, gap = references(model, seed)
            if gap > 1e-2:  # greedy decoding must not depend on rounding
                break
        target = os.path.join(folder, name)
        shutil.rmtree(target, ignore_errors=True)
        # One of the checkpoints is split, with an index.
        model.save_pretrained(target, max_shard_size="60KB" if name == "mistral" else "1GB")
        for extra in ("generation_config.json",):
            if os.path.exists(os.path.join(target, extra)):
                os.remove(os.path.join(target, extra))
        save_file({key: value.contiguous() for key, value in outputs.items()}, os.path.join(target, "reference.safetensors"))
        with open(os.path.join(target, "reference.json"), "w") as file:
            json.dump({"prompts": prompts, "greedy": greedy}, file)
        size = sum(os.path.getsize(os.path.join(target, entry)) for entry in os.listdir(target))
        print(f"{name}: seed {seed}, gap {gap:.3g}, {size} bytes")
    cases = []
    for parameters in (
        rope(), rope(rope_theta=5e5), rope(partial_rotary_factor=0.5), rope(rope_type="linear", factor=3.0),
        rope(rope_type="dynamic", factor=2.0),
        rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        rope(rope_type="yarn", factor=40.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=2.0, truncate=False,
             mscale=1.0, mscale_all_dim=0.7),
        rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=32, attention_factor=1.25),
    ):
        for length in (20, 150):
            config = LlamaConfig(**common, num_attention_heads=2, head_dim=16, rope_parameters=dict(parameters))
            kind = parameters["rope_type"]
            if kind == "default":
                dim = int(16 * parameters.get("partial_rotary_factor", 1.0))
                frequencies = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
                factor = 1.0
            else:
                frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
            cases.append({"config": config.to_dict(), "length": length, "frequencies": frequencies.tolist(), "factor": factor})
    keep = ("model_type", "hidden_size", "num_attention_heads", "head_dim", "max_position_embeddings", "rope_parameters")
    for case in cases:
        case["config"] = {key: value for key, value in case["config"].items() if key in keep}
    with open(os.path.join(folder, "rope.json"), "w") as file:
        json.dump(cases, file)


main(sys.argv[1])
