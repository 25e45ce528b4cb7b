#!/usr/bin/env python3
"""Generates the files in tests/data/gguf, which check the reader of GGUF files against ggml's own code.

    pip install gguf libgguf numpy safetensors
    scripts/make_gguf_fixtures.py tests/data/gguf

  decode.safetensors   for each format blocks of random and extreme bytes, and the weights by gguf-py's `dequantize`
  encode.safetensors   rows of 32 numbers, and their blocks by ggml's quantizers (libgguf)
  tiny.gguf            a random llama of mixed types, whose rows of q and k are permuted as llama.cpp's converter does
  tiny-0000?-of-00002.gguf  the same model, split
  tiny.json            for each tensor Hugging Face's name and shape, the type and offset in tiny.gguf, and the FNV-1a
                       hash of its weights as f32 in Hugging Face's order
"""
import json, os, shutil, sys
from pathlib import Path
import gguf, libgguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type, GGML_QUANT_SIZES
from gguf.quants import dequantize
from safetensors.numpy import save_file

FORMATS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
# The offsets of the f16 numbers in a block.
SCALES = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0], Type.Q4_K: [0, 2],
          Type.Q5_K: [0, 2], Type.Q6_K: [208]}
EXTREME = np.array([0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 1.0], np.float16)
HIDDEN, FFN, HEADS, KV_HEADS, WORDS = 64, 256, 4, 2, 80


def decode_cases(random):
    tensors = {}
    for kind in FORMATS:
        size = GGML_QUANT_SIZES[kind][1]
        blocks = random.integers(0, 256, (len(EXTREME) + 4, size), dtype=np.uint8)
        for at, block in enumerate(blocks):
            for nth, offset in enumerate(SCALES[kind]):
                extreme = EXTREME[(at + 3 * nth) % len(EXTREME)]
                scale = extreme if at < len(EXTREME) else np.float16(random.normal() * 0.1)
                block[offset:offset + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        if kind == Type.Q8_0:
            blocks[-1, 2:6] = [0x80, 0x7F, 0x81, 0xFF]
        weights = dequantize(blocks, kind)
        assert np.isfinite(weights).all()
        tensors[f"{kind.name}.blocks"], tensors[f"{kind.name}.weights"] = blocks, weights
    return tensors


def encode_cases(random):
    rows = [random.normal(size=32) * scale for scale in (1, 0.02, 1e-3, 30, 1e-7, 1e4) for _ in range(8)]
    rows += [np.zeros(32), -np.zeros(32), np.full(32, 0.5), np.full(32, -0.5), np.arange(32) - 16, 16 - np.arange(32),
             np.linspace(-127, 127, 32), np.arange(32) % 2 - 0.5, np.where(np.arange(32) == 7, 1, 0),
             np.where(np.arange(32) == 7, -1, 0), np.arange(-127, 128, 8) / 2, np.full(32, 1e-36), random.normal(size=32) * 1e-36,
             np.arange(32) + 0.5, np.tile([0.0, -0.0], 16)]
    rows = np.array(rows, np.float32)
    tensors = {"rows": rows}
    for kind in (Type.Q8_0, Type.Q4_0, Type.Q4_1):
        blocks = libgguf.quantize_rows(rows, kind)
        tensors[f"{kind.name}.blocks"] = np.asarray(blocks, np.uint8).reshape(len(rows), -1)
    return tensors


def permute(rows, heads):
    """Reorders the rows of q or k, as llama.cpp's converter does."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def fnv(data):
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{result:016x}"


def tiny(random):
    """Returns GGUF's name, Hugging Face's name, the type, the heads whose rows are permuted, and the weights."""
    head = HIDDEN // HEADS
    matrix = lambda *shape: (random.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
    norm = lambda: (1 + 0.2 * random.normal(size=HIDDEN)).astype(np.float32)
    yield "token_embd.weight", "model.embed_tokens.weight", Type.Q8_0, None, matrix(WORDS, HIDDEN)
    types = [(Type.Q8_0, Type.Q5_0, Type.BF16, Type.F16, Type.Q4_0, Type.Q5_1, Type.Q6_K)]
    for layer, (q, k, v, o, gate, up, down) in enumerate(types):
        blk, model = f"blk.{layer}", f"model.layers.{layer}"
        yield f"{blk}.attn_norm.weight", f"{model}.input_layernorm.weight", Type.F32, None, norm()
        yield f"{blk}.attn_q.weight", f"{model}.self_attn.q_proj.weight", q, HEADS, matrix(HIDDEN, HIDDEN)
        yield f"{blk}.attn_k.weight", f"{model}.self_attn.k_proj.weight", k, KV_HEADS, matrix(KV_HEADS * head, HIDDEN)
        yield f"{blk}.attn_v.weight", f"{model}.self_attn.v_proj.weight", v, None, matrix(KV_HEADS * head, HIDDEN)
        yield f"{blk}.attn_output.weight", f"{model}.self_attn.o_proj.weight", o, None, matrix(HIDDEN, HIDDEN)
        yield f"{blk}.ffn_norm.weight", f"{model}.post_attention_layernorm.weight", Type.F32, None, norm()
        yield f"{blk}.ffn_gate.weight", f"{model}.mlp.gate_proj.weight", gate, None, matrix(FFN, HIDDEN)
        yield f"{blk}.ffn_up.weight", f"{model}.mlp.up_proj.weight", up, None, matrix(FFN, HIDDEN)
        yield f"{blk}.ffn_down.weight", f"{model}.mlp.down_proj.weight", down, None, matrix(HIDDEN, FFN)
    yield "output_norm.weight", "model.norm.weight", Type.F32, None, norm()
    yield "output.weight", "lm_head.weight", Type.Q4_1, None, matrix(WORDS, HIDDEN)


def write(path, tensors, **split):
    writer = gguf.GGUFWriter(path, "llama", **split)
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{at}>" for at in range(WORDS)])
    writer.add_token_scores([-0.5 * at for at in range(WORDS)])
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(5)
    writer.add_add_bos_token(True)
    for name, _, kind, heads, weights in tensors:
        if kind == Type.BF16:
            # Rounds half to even.
            bits = weights.view(np.uint32)
            data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
        elif kind == Type.F16:
            data = weights.astype(np.float16)
        elif kind == Type.F32:
            data = weights
        else:
            data = np.asarray(libgguf.quantize_rows(weights, kind), np.uint8)
        if heads:
            data = permute(data, heads)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file(Path(path))
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(folder):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    random = np.random.default_rng(7)
    save_file(decode_cases(random), os.path.join(folder, "decode.safetensors"))
    save_file(encode_cases(random), os.path.join(folder, "encode.safetensors"))
    tensors = list(tiny(random))
    path = os.path.join(folder, "tiny.gguf")
    write(path, tensors)
    write(path, tensors, split_max_tensors=6)
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    described = {}
    for name, huggingface, kind, heads, weights in tensors:
        tensor = read[name]
        values = dequantize(np.array(tensor.data), kind).astype(np.float32).reshape(weights.shape)
        if heads:
            # The inverse: from (head, row in a half, half) to (head, half, row in a half).
            half = values.shape[0] // heads // 2
            values = values.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(values.shape)
        assert np.abs(values - weights).max() < 0.3 * np.abs(weights).max(), name
        described[huggingface] = {"shape": list(weights.shape), "type": kind.name, "offset": int(tensor.data_offset),
                                  "hash": fnv(np.ascontiguousarray(values).tobytes())}
    with open(os.path.join(folder, "tiny.json"), "w") as file:
        json.dump(described, file, indent=None)
    for entry in sorted(os.listdir(folder)):
        print(entry, os.path.getsize(os.path.join(folder, entry)))


main(sys.argv[1])
