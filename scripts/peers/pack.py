"""Writes a GGUF model of the architecture llama as a quantized folder in Hugging Face's format.

    pack.py MODEL.gguf FOLDER KIND        Needs the Python packages gguf and numpy.

KIND is the format of the layers' matrices; the embedding and the head stay in f16. Codes are rounded to nearest:

  f32       not quantized
  ct4       compressed-tensors, 4 bits in groups of 64, with zero points
  ct8       compressed-tensors, 8 bits, a scale for each row
  gptq      GPTQ, 4 bits in groups of 64 columns in a random order (desc_act)
  awq       AWQ, 4 bits in groups of 64
  fp8       FP8 in tiles of 128 x 128
"""
import json
import struct
import sys
from pathlib import Path

import gguf
import numpy as np

GROUP, TILE = 64, 128
NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
DTYPES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "int8": "I8"}


def packed(codes, axis):
    """Packs codes of 4 bits along an axis, the first in the low bits of a word."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint32)
    codes = codes.reshape(*codes.shape[:-1], -1, 8)
    words = np.zeros(codes.shape[:-1], np.uint32)
    for at in range(8):
        words |= codes[..., at] << np.uint32(4 * at)
    return np.moveaxis(words, -1, axis).view(np.int32)


def four_bits(weights):
    """Returns codes [out, in], and scales and zero points [out, groups]."""
    groups = weights.reshape(len(weights), -1, GROUP)
    least, most = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = ((most - least) / 15).astype(np.float16)
    scales[scales == 0] = 1
    wide = scales.astype(np.float32)
    zeros = np.clip(np.round(-least / wide), 0, 15)
    codes = np.clip(np.round(groups / wide[..., None]) + zeros[..., None], 0, 15)
    return codes.reshape(weights.shape).astype(np.uint8), scales, zeros.astype(np.uint8)


def e4m3(numbers):
    table = np.array([(1 + code % 8 / 8) * 2.0 ** (code // 8 - 7) if code > 7 else code * 2.0**-9 for code in range(127)])
    sizes = np.abs(numbers)
    above = np.clip(np.searchsorted(table, sizes), 1, 126)
    codes = np.where(sizes - table[above - 1] < table[above] - sizes, above - 1, above).astype(np.uint8)
    return codes | np.signbit(numbers).astype(np.uint8) << 7


def quantized(kind, weights, random):
    """Returns the tensors that stand for a matrix: part -> array, or (type, array)."""
    rows, columns = weights.shape
    if kind == "ct8":
        scales = (np.abs(weights).max(1, keepdims=True) / 127).astype(np.float32)
        return {"weight": np.round(weights / scales).astype(np.int8), "weight_scale": scales}
    if kind == "fp8":
        tiles = [[weights[row:row + TILE, column:column + TILE] for column in range(0, columns, TILE)]
                 for row in range(0, rows, TILE)]
        scales = np.array([[np.abs(tile).max() / 448 for tile in row] for row in tiles], np.float32)
        each = np.repeat(np.repeat(scales, TILE, 0)[:rows], TILE, 1)[:, :columns]
        return {"weight": ("F8_E4M3", e4m3(weights / each)), "weight_scale_inv": scales}
    if kind == "gptq":
        order = random.permutation(columns)
        codes, scales, zeros = four_bits(weights[:, order])
        groups = np.empty(columns, np.int32)
        groups[order] = np.arange(columns) // GROUP
        return {"qweight": packed(codes[:, np.argsort(order)].T, 0), "scales": scales.T,
                "qzeros": packed((zeros.T.astype(int) - 1) & 15, 1), "g_idx": groups}
    codes, scales, zeros = four_bits(weights)
    if kind == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        mixed = lambda numbers: numbers.reshape(len(numbers), -1, 8)[..., order].reshape(numbers.shape)
        return {"qweight": packed(mixed(codes.T), 1), "scales": scales.T, "qzeros": packed(mixed(zeros.T), 1)}
    return {"weight_packed": packed(codes, 1), "weight_scale": scales, "weight_zero_point": packed(zeros, 0),
            "weight_shape": np.array(weights.shape)}


def configuration(kind):
    compressed = lambda of, weights: {
        "quant_method": "compressed-tensors", "format": of, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return {
        "ct4": compressed("pack-quantized", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP}),
        "ct8": compressed("int-quantized", {"num_bits": 8, "symmetric": True, "strategy": "channel"}),
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
        "fp8": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [TILE, TILE]},
    }.get(kind)


def main(model, folder, kind):
    reader = gguf.GGUFReader(model)
    value = lambda key: reader.fields[key].contents()
    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def read(name):
        tensor = stored[name]
        shape = [int(size) for size in reversed(tensor.shape)]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)

    def unpermuted(weights, heads):
        """Undoes the order of rows that llama.cpp's converter gives q and k."""
        return weights.reshape(heads, -1, 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)

    random = np.random.default_rng(1)
    tensors = {"model.embed_tokens.weight": read("token_embd.weight").astype(np.float16),
               "model.norm.weight": read("output_norm.weight")}
    for layer in range(value("llama.block_count")):
        for part, name in NAMES.items():
            weights, name = read(f"blk.{layer}.{part}.weight"), f"model.layers.{layer}.{name}"
            if part in ("attn_q", "attn_k"):
                weights = unpermuted(weights, heads if part == "attn_q" else kv_heads)
            if weights.ndim == 1 or kind == "f32":
                tensors[f"{name}.weight"] = weights
            else:
                tensors.update((f"{name}.{part}", array) for part, array in quantized(kind, weights, random).items())
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "tie_word_embeddings": True,
        "hidden_size": value("llama.embedding_length"), "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "rms_norm_eps": float(value("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": float(value("llama.rope.freq_base")), "max_position_embeddings": value("llama.context_length"),
        "vocab_size": len(value("tokenizer.ggml.tokens")), "eos_token_id": value("tokenizer.ggml.eos_token_id"),
    }
    if configuration(kind):
        config["quantization_config"] = configuration(kind)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    header, offset, data = {}, 0, []
    for name, array in sorted(tensors.items()):
        dtype, array = array if isinstance(array, tuple) else (DTYPES[str(array.dtype)], array)
        data.append(np.ascontiguousarray(array).tobytes())
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [offset, offset + len(data[-1])]}
        offset += len(data[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(b"".join([struct.pack("<Q", len(text)), text, *data]))
    tokens, kinds = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    control = 3
    special = [{"id": at, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for at, token in enumerate(tokens) if kinds[at] == control]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0", "added_tokens": special, "decoder": level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level]},
        "model": {"type": "BPE", "vocab": {token: at for at, token in enumerate(tokens)}, "merges": value("tokenizer.ggml.merges")},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
