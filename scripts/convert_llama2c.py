#!/usr/bin/env python3
"""Converts a model and a tokenizer of llama2.c (version 0) to a Hugging Face folder. Needs nothing but Python.

    scripts/convert_llama2c.py stories260K.bin tok512.bin folder
"""
import array, json, os, struct, sys


def floats(file, count):
    values = array.array("f")
    values.fromfile(file, count)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def halves(weight, heads, dim, inputs):
    """llama2.c rotates features 2 i and 2 i + 1 of a head as a pair, Hugging Face i and i + dim / 2."""
    rows = array.array("f")
    for head in range(heads):
        for parity in range(2):
            for pair in range(dim // 2):
                row = head * dim + 2 * pair + parity
                rows.extend(weight[row * inputs : (row + 1) * inputs])
    return rows


def read_model(path):
    with open(path, "rb") as file:
        dim, ffn, layers, heads, kv_heads, vocabulary, length = struct.unpack("<7i", file.read(28))
        tied, vocabulary = vocabulary > 0, abs(vocabulary)
        size = dim // heads
        kv = kv_heads * size
        tensors = {"model.embed_tokens.weight": ([vocabulary, dim], floats(file, vocabulary * dim))}

        def each(name, shape, change=lambda weight: weight):
            count = shape[0] * (shape[1] if len(shape) > 1 else 1)
            for layer in range(layers):
                tensors[f"model.layers.{layer}.{name}.weight"] = (shape, change(floats(file, count)))

        each("input_layernorm", [dim])
        each("self_attn.q_proj", [dim, dim], lambda weight: halves(weight, heads, size, dim))
        each("self_attn.k_proj", [kv, dim], lambda weight: halves(weight, kv_heads, size, dim))
        each("self_attn.v_proj", [kv, dim])
        each("self_attn.o_proj", [dim, dim])
        each("post_attention_layernorm", [dim])
        each("mlp.gate_proj", [ffn, dim])
        each("mlp.down_proj", [dim, ffn])
        each("mlp.up_proj", [ffn, dim])
        tensors["model.norm.weight"] = ([dim], floats(file, dim))
        if not tied:
            file.seek(4 * 2 * length * (size // 2), os.SEEK_CUR)  # tables of cosines and sines
            tensors["lm_head.weight"] = ([vocabulary, dim], floats(file, vocabulary * dim))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": dim, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary, "max_position_embeddings": length, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": tied, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }
    return config, tensors


def write_safetensors(path, tensors):
    header, start = {}, 0
    for name, (shape, values) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + 4 * len(values)]}
        start += 4 * len(values)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, values in tensors.values():
            if sys.byteorder == "big":
                values.byteswap()
            values.tofile(file)


def read_tokenizer(path, vocabulary):
    pieces = []
    with open(path, "rb") as file:
        file.read(4)
        for _ in range(vocabulary):
            score, length = struct.unpack("<fi", file.read(8))
            pieces.append((file.read(length).decode(), score))
    names = ["<unk>", "<s>", "</s>"] + [piece.replace(" ", "\u2581") for piece, _ in pieces[3:]]
    ids = {name: at for at, name in enumerate(names)}
    # llama2.c merges the pair whose result has the best score.
    merges = []
    for at, name in enumerate(names):
        for cut in range(1, len(name)) if at > 258 else ():
            if name[:cut] in ids and name[cut:] in ids:
                merges.append((-pieces[at][1], ids[name[:cut]], ids[name[cut:]], f"{name[:cut]} {name[cut:]}"))
    special = [{"id": at, "content": names[at], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for at in range(3)]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": ids,
                  "merges": [text for *_, text in sorted(merges)]},
    }


def main(model, tokenizer, folder):
    config, tensors = read_model(model)
    os.makedirs(folder, exist_ok=True)
    write_safetensors(os.path.join(folder, "model.safetensors"), tensors)
    for name, content in (("config.json", config), ("tokenizer.json", read_tokenizer(tokenizer, config["vocab_size"]))):
        with open(os.path.join(folder, name), "w") as file:
            json.dump(content, file)


main(*sys.argv[1:])
