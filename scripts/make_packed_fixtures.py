#!/usr/bin/env python3
"""Generates tests/data/packed, which checks the reader of quantized safetensors.

    pip install torch numpy safetensors compressed-tensors==0.12.2
    pip download --no-deps --no-build-isolation --no-binary :all: gptqmodel==7.7.0 autoawq==0.2.9
    # unpack both archives in a folder SOURCES
    scripts/make_packed_fixtures.py tests/data/packed SOURCES

  matrices.safetensors           for each case the tensors `<case>.<suffix>` as checkpoints name them
  matrices_expected.safetensors  for each case its dequantized weights, [out, in] in f32
  matrices.json                  for each case its shape and such a checkpoint's `quantization_config`
  tiny_*/                        models of one layer: config.json, model.safetensors, and
                                 expected.json with, for each tensor in Hugging Face's name, its
                                 shape and the FNV-1a hash of its weights as f32

The expected weights are `scale * (q - zero)`, with the scale converted to f32 first. They equal
those of the producers' code on scales in f32, bit by bit:
  GPTQ                `convert_gptq_v1_to_v2_format_module`, `dequantize_weight` of GPTQModel 7.7.0
  AWQ                 `dequantize_gemm` of AutoAWQ 0.2.9
  compressed-tensors  `pack_to_int32`, `unpack_from_int32`, `dequantize` of 0.12.2, which knows
                      `weight_g_idx` (0.20.1 does not)
  weight_scale_inv    torch's conversion of float8_e4m3fn, times the scale of the tile
"""
from __future__ import annotations
import ast, json, os, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
from compressed_tensors.compressors.quantized_compressors import pack_quantized
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import save_file

# Zeros, subnormal, smallest normal and largest numbers.
F16_EXTREME = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 65504.0, -65504.0, 3e-6]
BF16_EXTREME = [0.0, -0.0, 1e-30, -1e30, 1e30, 1e-39, 65536.0, 2.0**-126]
HIDDEN, FFN, HEADS, KV_HEADS, HEAD, WORDS = 64, 160, 4, 2, 16, 80


def load(path, names, space):
    """Loads single functions of a module, without the imports of its package."""
    tree = ast.parse(open(path).read())
    name = lambda node: getattr(node, "name", None) or getattr(node.targets[0], "id", None)
    kinds = (ast.FunctionDef, ast.Assign)
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and name(node) in names]
    assert len(found) == len(names), (path, names)
    # Annotations name classes that are not loaded: do not evaluate them.
    exec(compile(ast.Module(found, []), path, "exec", annotations.compiler_flag), space)
    return space


class Official:
    def __init__(self, sources):
        at = lambda path: os.path.join(sources, path)
        log = SimpleNamespace(info=SimpleNamespace(once=lambda _: None))
        self.gptq = load(at("gptqmodel-7.7.0/gptqmodel/nn_modules/qlinear/__init__.py"),
                         ["dequantize_weight", "_dequantize_from_codes", "_torch_right_shift"], {"t": torch})
        self.convert = load(at("gptqmodel-7.7.0/gptqmodel/utils/model.py"),
                            ["convert_gptq_v1_to_v2_format_module", "convert_gptq_v2_to_v1_format_module"],
                            {"torch": torch, "log": log, "BaseQuantLinear": SimpleNamespace})
        self.awq = load(at("autoawq-0.2.9/awq/utils/packing_utils.py"),
                        ["AWQ_REVERSE_ORDER", "unpack_awq", "reverse_awq_order", "dequantize_gemm"],
                        {"torch": torch})

    def to_v1(self, qzeros, bits):
        module = SimpleNamespace(qzeros=qzeros.clone(), bits=bits, pack_dtype=torch.int32)
        module.qzero_format = lambda format: None
        self.convert["convert_gptq_v2_to_v1_format_module"](module, module)
        return module.qzeros

    def dequantize_gptq(self, tensors, bits, version, group):
        columns = tensors["qweight"].shape[0] * (32 // bits)
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        module = SimpleNamespace(
            qweight=tensors["qweight"], qzeros=tensors["qzeros"].clone(), scales=tensors["scales"].float(),
            g_idx=tensors.get("g_idx", torch.arange(columns, dtype=torch.int32) // group), in_features=columns,
            bits=bits, maxq=2**bits - 1, planar=False, pack_factor=32 // bits, pack_dtype=torch.int32,
            dequant_dtype=torch.int16 if bits == 8 else torch.int8, wf_unsqueeze_zero=shifts.view(1, 1, -1),
            wf_unsqueeze_neg_one=shifts.view(1, -1, 1), _init_wf_unsqueeze_buffers=lambda: None)
        module.qzero_format = lambda format: None
        module._dequantize_from_codes = lambda *codes, num_itr: self.gptq["_dequantize_from_codes"](module, *codes)
        if version == 1:
            self.convert["convert_gptq_v1_to_v2_format_module"](module, bits, torch.int32)
        return self.gptq["dequantize_weight"](module).T


def pack(codes, bits, axis):
    """Packs unsigned codes in i32 words along an axis, the first code in the low bits."""
    codes = np.moveaxis(codes.astype(np.uint32), axis, -1)
    words = codes.reshape(*codes.shape[:-1], -1, 32 // bits) << (np.arange(0, 32, bits, dtype=np.uint32))
    words = np.bitwise_or.reduce(words, axis=-1).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def scales(random, shape, dtype):
    """Random scales, of which the first are extreme."""
    values = torch.from_numpy(random.normal(size=shape) * 0.02).to(dtype)
    extreme = torch.tensor(F16_EXTREME if dtype == torch.float16 else BF16_EXTREME, dtype=torch.float64).to(dtype)
    count = min(len(extreme), values.numel() // 2)
    at = torch.from_numpy(random.permutation(values.numel())[:count])
    values.view(-1)[at] = extreme[:count]
    return values


def codes(random, bits, shape):
    """Random codes, among which is every code, or the smallest and the largest at least."""
    values = np.resize(np.roll(np.arange(2**bits), 1), shape).ravel()
    values[2**bits:] = random.integers(0, 2**bits, max(0, values.size - 2**bits))
    return random.permutation(values).reshape(shape).astype(np.int64)


def plain(q, zero, scale, groups=None):
    """`scale * (q - zero)` in f32, where column i has the scale and zero of column groups[i]."""
    if groups is not None:
        zero, scale = zero[:, groups], scale[:, groups]
    return scale.astype(np.float32) * (q.astype(np.int32) - zero.astype(np.int32)).astype(np.float32)


def same(left, right):
    """Demands equal bits, signs of zeros included."""
    left, right = (np.ascontiguousarray(np.asarray(each, np.float32)) for each in (left, right))
    assert left.shape == right.shape and np.isfinite(left).all()
    assert (left.view(np.uint32) == right.view(np.uint32)).all()


def fnv(data):
    result = 0xCBF29CE484222325
    for byte in data:
        result = (result ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{result:016x}"


def act_order(random, width, group):
    g_idx = np.empty(width, np.int32)
    g_idx[random.permutation(width)] = np.arange(width) // group
    return g_idx


def autogptq(bits, group, act=False, sym=False, **more):
    """AutoGPTQ 0.7: without checkpoint_format, which means v1."""
    return {"bits": bits, "group_size": group, "damp_percent": 0.01, "desc_act": act, "static_groups": False,
            "sym": sym, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None,
            "is_marlin_format": False, "quant_method": "gptq", **more}


def gptqmodel(bits, group, form, act=False, sym=False):
    return {"bits": bits, "checkpoint_format": form, "desc_act": act, "format": form, "group_size": group,
            "lm_head": False, "method": "gptq", "pack_dtype": "int32", "quant_method": "gptq", "sym": sym,
            "meta": {"act_group_aware": not act, "damp_auto_increment": 0.01, "damp_percent": 0.05, "mse": 0.0,
                     "quantizer": ["gptqmodel:7.7.0"], "static_groups": False, "true_sequential": True,
                     "uri": "https://github.com/modelcloud/gptqmodel"}}


def optimum(bits, group, act=False, sym=True):
    return {"batch_size": 1, "bits": bits, "block_name_to_quantize": "model.layers", "cache_block_outputs": True,
            "damp_percent": 0.1, "dataset": "c4", "desc_act": act, "exllama_config": {"version": 1},
            "group_size": group, "max_input_length": None, "model_seqlen": 2048,
            "module_name_preceding_first_block": ["model.embed_tokens"], "modules_in_block_to_quantize": None,
            "pad_token_id": None, "quant_method": "gptq", "sym": sym, "tokenizer": None, "true_sequential": True,
            "use_cuda_fp16": False, "use_exllama": True}


def autoawq(group, **more):
    return {"bits": 4, "group_size": group, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
            "zero_point": True, **more}


DYNAMIC8 = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}


def scheme(weights, inputs=None, targets=("Linear",)):
    return QuantizationScheme(targets=list(targets), weights=QuantizationArgs(**weights),
                              input_activations=QuantizationArgs(**inputs) if inputs else None)


def compressed(form, *groups, ignore=("lm_head",)):
    config = QuantizationConfig(config_groups={f"group_{at}": each for at, each in enumerate(groups)}, format=form,
                                quantization_status="compressed", ignore=list(ignore))
    return {"version": "0.12.2", "quant_method": "compressed-tensors", "sparsity_config": {}, "transform_config": {},
            **config.model_dump(exclude=["quant_method"])}


def fp8(block, **more):
    return {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": block,
            **more}


def gptq(official, q, zero, scale, bits, version, group, g_idx=None, name_g_idx=True):
    """q: [out, in], zero and scale: [out, groups]. Returns the tensors and the weights."""
    groups = np.arange(q.shape[1]) // group if g_idx is None else g_idx
    qzeros = pack(zero.T, bits, 1)
    if version == 1:
        # GPTQModel subtracts one from every code as one number, so a zero of 0 borrows from the next code.
        qzeros = official.to_v1(qzeros, bits)
    tensors = {"qweight": pack(q.T, bits, 0), "qzeros": qzeros, "scales": scale.T.contiguous()}
    if name_g_idx:
        tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    weights = plain(q, zero, scale.float().numpy(), groups)
    same(weights, official.dequantize_gptq(tensors, bits, version, group))
    return tensors, weights


def awq(official, q, zero, scale, group):
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    shuffle = lambda rows: rows.reshape(rows.shape[0], -1, 8)[:, :, order].reshape(rows.shape)
    words, zeros = (pack(shuffle(each.T), 4, 1) for each in (q, zero))
    tensors = {"qweight": words, "qzeros": zeros, "scales": scale.T.contiguous()}
    weights = plain(q, zero, scale.float().numpy(), np.arange(q.shape[1]) // group)
    read = official.awq["dequantize_gemm"](tensors["qweight"], tensors["qzeros"], scale.T.float(), 4, group)
    same(weights, read.T)
    return tensors, weights


def ct_packed(q, zero, scale, bits, arguments, g_idx=None):
    """q and zero are signed here, as in the library, which adds 2^(bits-1) to both when it packs them."""
    q8 = torch.from_numpy(q.astype(np.int8))
    tensors = {"weight_packed": pack_quantized.pack_to_int32(q8, bits), "weight_scale": scale,
               "weight_shape": torch.tensor(q8.shape)}
    read_zero = None
    if zero is not None:
        zero8 = torch.from_numpy(zero.astype(np.int8))
        tensors["weight_zero_point"] = pack_quantized.pack_to_int32(zero8, bits, packed_dim=0).contiguous()
        read_zero = pack_quantized.unpack_from_int32(tensors["weight_zero_point"], bits, zero8.shape, packed_dim=0)
    if g_idx is not None:
        tensors["weight_g_idx"] = torch.from_numpy(g_idx)
    read = pack_quantized.unpack_from_int32(tensors["weight_packed"], bits, q8.shape)
    official = dequantize(read, scale.float(), read_zero, QuantizationArgs(**arguments), dtype=torch.float32,
                          g_idx=tensors.get("weight_g_idx"))
    groups = np.arange(q.shape[1]) // arguments.get("group_size", q.shape[1]) if g_idx is None else g_idx
    weights = plain(q, np.zeros(scale.shape) if zero is None else zero, scale.float().numpy(), groups)
    same(weights, official)
    return tensors, weights


def ct_int(q, zero, scale, arguments):
    tensors = {"weight": torch.from_numpy(q.astype(np.int8)), "weight_scale": scale}
    if zero is not None:
        tensors["weight_zero_point"] = torch.from_numpy(zero.astype(np.int8))
    weights = plain(q, np.zeros(1) if zero is None else zero, scale.float().numpy())
    same(weights, dequantize(tensors["weight"], scale.float(), tensors.get("weight_zero_point"),
                             QuantizationArgs(**arguments), dtype=torch.float32))
    return tensors, weights


def float8(random, shape):
    """Random finite codes, among which is every one."""
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    values = np.resize(finite, shape).ravel()
    values[len(finite):] = random.choice(finite, values.size - len(finite))
    return torch.from_numpy(random.permutation(values).reshape(shape)).view(torch.float8_e4m3fn)


def spread(scale, block, shape):
    """Repeats the scales of tiles to the shape of the matrix."""
    return scale.float().repeat_interleave(block[0], 0)[:shape[0]].repeat_interleave(block[1], 1)[:, :shape[1]]


def fp8_block(weight, scale, block):
    return ({"weight": weight, "weight_scale_inv": scale},
            (spread(scale, block, weight.shape) * weight.float()).numpy())


def ct_fp8(weight, scale, arguments):
    weights = scale.float() * weight.float()
    same(weights, dequantize(weight, scale.float(), None, QuantizationArgs(**arguments), dtype=torch.float32))
    return {"weight": weight, "weight_scale": scale}, weights.numpy()


def ct_fp8_block(weight, scale, arguments):
    block = arguments["block_structure"]
    weights = spread(scale, block, weight.shape) * weight.float()
    # The library dequantizes whole tiles only.
    padded = torch.zeros([count * side for count, side in zip(scale.shape, block)], dtype=torch.float32)
    inside = tuple(slice(extent) for extent in weight.shape)
    padded[inside] = weight.float()
    same(weights, dequantize(padded, scale.float(), None, QuantizationArgs(**arguments), dtype=torch.float32)[inside])
    return {"weight": weight, "weight_scale": scale}, weights.numpy()


def gptq_cases(random, official):
    def case(bits, rows, width, group, version, config, dtype=torch.float16, act=False, borrow=False, **more):
        count = -(-width // group)
        zero = codes(random, bits, (rows, count))
        if version == 1 and not borrow:
            # Only the last code of a word wraps: there, adding to the word and to the code give the same number.
            last = np.arange(rows) % (32 // bits) == 32 // bits - 1
            zero[~last] = np.maximum(zero[~last], 1)
            zero[np.flatnonzero(last)[0], 0] = 0
        if borrow:
            zero[:, 0] = np.resize([0, 8, 0, 0, 15, 1, 0, 3], rows)
        g_idx = act_order(random, width, group) if act else None
        return *gptq(official, codes(random, bits, (rows, width)), zero, scales(random, (rows, count), dtype), bits,
                     version, group, g_idx, **more), config

    yield "gptq4_v1", *case(4, 24, 96, 32, 1, autogptq(4, 32))
    yield "gptq4_v1_act", *case(4, 16, 96, 32, 1, autogptq(4, 32, act=True, checkpoint_format="gptq"), act=True)
    yield "gptq4_v1_borrow", *case(4, 16, 64, 32, 1, gptqmodel(4, 32, "gptq"), borrow=True)
    yield "gptq4_v2", *case(4, 8, 128, 64, 2, gptqmodel(4, 64, "gptq_v2"))
    yield "gptq8_v1", *case(8, 4, 256, 128, 1, gptqmodel(8, 128, "gptq"))
    yield "gptq4_row", *case(4, 16, 32, 32, 1, optimum(4, -1, sym=False), dtype=torch.bfloat16)
    yield "gptq4_tail", *case(4, 8, 160, 128, 2, gptqmodel(4, 128, "gptq_v2"))
    yield "gptq4_no_g_idx", *case(4, 8, 64, 32, 1, autogptq(4, 32), name_g_idx=False)


def awq_cases(random, official):
    more = dict.fromkeys(["exllama_config", "fuse_max_seq_len", "modules_to_fuse"])
    for name, rows, width, group, config in [
            ("awq4", 24, 64, 32, autoawq(32)),
            ("awq4_128", 8, 256, 128, autoawq(128, backend="autoawq", do_fuse=False, **more))]:
        count = width // group
        yield name, *awq(official, codes(random, 4, (rows, width)), codes(random, 4, (rows, count)),
                         scales(random, (rows, count), torch.float16), group), config


def ct_cases(random):
    bf16, f32 = torch.bfloat16, torch.float32
    signed = lambda bits, shape: codes(random, bits, shape) - 2**(bits - 1)

    def packed(bits, rows, width, group, symmetric=True, dtype=bf16, act=False):
        strategy = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
        arguments = {"num_bits": bits, "symmetric": symmetric, **strategy, **({"actorder": "group"} if act else {})}
        count = 1 if group is None else width // group
        zero = None if symmetric else signed(bits, (rows, count))
        return *ct_packed(signed(bits, (rows, width)), zero, scales(random, (rows, count), dtype), bits, arguments,
                          act_order(random, width, group) if act else None), \
            compressed("pack-quantized", scheme(arguments))

    yield "ct4_sym", *packed(4, 9, 96, 32)
    yield "ct4_asym", *packed(4, 9, 256, 128, symmetric=False, dtype=torch.float16)
    yield "ct4_row", *packed(4, 9, 104, None)
    yield "ct4_act", *packed(4, 9, 96, 32, act=True, symmetric=False)
    yield "ct8_pack", *packed(8, 3, 256, 128)
    yield "ct4_odd", *packed(4, 11, 100, None, symmetric=False)

    def whole(rows, width, shape, dtype, symmetric=True):
        arguments = {"num_bits": 8, "symmetric": symmetric, "strategy": "tensor" if shape == (1,) else "channel"}
        zero = None if symmetric else signed(8, (rows, 256))[:, :1]
        return *ct_int(signed(8, (rows, width)), zero, scales(random, shape, dtype), arguments), \
            compressed("int-quantized", scheme(arguments, DYNAMIC8))

    yield "ct8_channel", *whole(21, 50, (21, 1), f32)
    yield "ct8_asym_channel", *whole(9, 97, (9, 1), bf16, symmetric=False)
    yield "ct8_tensor", *whole(10, 33, (1,), bf16)

    dynamic = {**DYNAMIC8, "type": "float"}
    channel = {"num_bits": 8, "type": "float", "strategy": "channel"}
    yield "ctfp8_channel", *ct_fp8(float8(random, (23, 33)), scales(random, (23, 1), bf16), channel), \
        compressed("float-quantized", scheme(channel, dynamic))
    tensor = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    tensors, weights = ct_fp8(float8(random, (16, 33)), scales(random, (1,), bf16), tensor)
    # The scale of static activations, which weights do not need.
    tensors["input_scale"] = torch.tensor([0.0173], dtype=bf16)
    yield "ctfp8_tensor", tensors, weights, compressed("float-quantized", scheme(tensor, tensor))
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    inputs = {**dynamic, "strategy": "group", "group_size": 128}
    yield "ctfp8_block", *ct_fp8_block(float8(random, (264, 5)), scales(random, (3, 1), bf16), block), \
        compressed("float-quantized", scheme(block, inputs), ignore=["re:.*lm_head"])


def fp8_cases(random):
    scale = torch.tensor([[0.0123, 1e30, -2.0**-130]], dtype=torch.float32)
    yield "fp8_block", *fp8_block(float8(random, (9, 264)), scale, (128, 128)), fp8([128, 128])
    # Smaller tiles than checkpoints have, so that a small matrix has several of them in both directions.
    scale = scales(random, (2, 3), torch.bfloat16)
    yield "fp8_block32", *fp8_block(float8(random, (40, 70)), scale, (32, 32)), \
        fp8([32, 32], modules_to_not_convert=["lm_head"])


def linears():
    q, kv = HEADS * HEAD, KV_HEADS * HEAD
    shapes = {"self_attn.q": (q, HIDDEN), "self_attn.k": (kv, HIDDEN), "self_attn.v": (kv, HIDDEN),
              "self_attn.o": (HIDDEN, q), "mlp.gate": (FFN, HIDDEN), "mlp.up": (FFN, HIDDEN), "mlp.down": (HIDDEN, FFN)}
    return {f"model.layers.0.{name}_proj": shape for name, shape in shapes.items()}


def quantize(weights, group):
    """Rounds groups of columns to 4 bits. Returns codes, zeros and scales, all of them unsigned."""
    grouped = weights.reshape(weights.shape[0], -1, group)
    low, high = grouped.min(axis=2), grouped.max(axis=2)
    scale = torch.from_numpy((high - low) / 15).half()
    step = scale.float().numpy()
    zero = np.clip(np.round(-low / step), 1, 15).astype(np.int64)
    q = np.clip(np.round(grouped / step[:, :, None]) + zero[:, :, None], 0, 15).astype(np.int64)
    return q.reshape(weights.shape), zero, scale


def model(folder, config, quantization, quantized, random, dtype):
    """Writes a model, where `quantized(name, weights)` returns tensors and weights, or None for a plain matrix."""
    os.makedirs(folder)
    stored, expected = {}, {}

    def put(name, tensors, weights):
        stored.update({f"{name}.{suffix}": each for suffix, each in tensors.items()})
        data = np.ascontiguousarray(weights, dtype="<f4")
        expected[f"{name}.weight"] = {"shape": list(data.shape), "hash": fnv(data.tobytes())}

    def plain_tensor(name, values):
        tensor = torch.from_numpy(values).to(dtype)
        put(name, {"weight": tensor}, tensor.float().numpy())

    matrix = lambda *shape: random.normal(size=shape) / np.sqrt(shape[-1])
    layer_norms = ["input_layernorm", "post_attention_layernorm"]
    norms = {"model.norm": HIDDEN, **{f"model.layers.0.{name}": HIDDEN for name in layer_norms}}
    if config["model_type"] == "qwen3":
        norms |= {f"model.layers.0.self_attn.{name}": HEAD for name in ("q_norm", "k_norm")}
    for name, size in norms.items():
        plain_tensor(name, 1 + 0.2 * random.normal(size=size))
    for name in ("model.embed_tokens", "lm_head"):
        plain_tensor(name, matrix(WORDS, HIDDEN))
    for name, shape in linears().items():
        weights = matrix(*shape)
        result = quantized(name, weights)
        if result is None:
            plain_tensor(name, weights)
        else:
            put(name, *result)
            assert np.abs(result[1] - weights).max() < 0.2 * np.abs(weights).max(), name
    save_file(stored, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    config = {**config, "torch_dtype": str(dtype).removeprefix("torch."), "quantization_config": quantization}
    Path(folder, "config.json").write_text(json.dumps(config, indent=1))
    Path(folder, "expected.json").write_text(json.dumps(expected))


def config(kind, name):
    return {"architectures": [name], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": 2, "head_dim": HEAD, "hidden_act": "silu", "hidden_size": HIDDEN,
            "initializer_range": 0.02, "intermediate_size": FFN, "max_position_embeddings": 128, "mlp_bias": False,
            "model_type": kind, "num_attention_heads": HEADS, "num_hidden_layers": 1,
            "num_key_value_heads": KV_HEADS, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "transformers_version": "4.57.0", "use_cache": True, "vocab_size": WORDS}


def models(folder, official):
    llama = config("llama", "LlamaForCausalLM")
    at = lambda name: os.path.join(folder, name)
    random = np.random.default_rng(11)
    model(at("tiny_gptq"), llama, gptqmodel(4, 32, "gptq", act=True),
          lambda name, weights: gptq_act(official, random, weights), random, torch.float16)
    model(at("tiny_awq"), llama, autoawq(32), lambda name, weights: awq(official, *quantize(weights, 32), 32),
          np.random.default_rng(12), torch.float16)
    arguments = {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}

    def ct(name, weights):
        if name.endswith("v_proj"):
            return None
        q, zero, scale = quantize(weights, 32)
        return ct_packed(q - 8, zero - 8, scale.bfloat16(), 4, arguments)

    ignore = ["lm_head", "re:.*self_attn\\.v_proj$"]
    model(at("tiny_ct"), llama, compressed("pack-quantized", scheme(arguments), ignore=ignore), ct,
          np.random.default_rng(13), torch.bfloat16)
    qwen3 = {key: value for key, value in config("qwen3", "Qwen3ForCausalLM").items() if key != "mlp_bias"}
    qwen3 |= {"max_window_layers": 1, "sliding_window": None, "use_sliding_window": False}
    kept = ["lm_head", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
    model(at("tiny_fp8"), qwen3, fp8([32, 32], modules_to_not_convert=kept),
          lambda name, weights: fp8_round(weights, (32, 32)), np.random.default_rng(14), torch.bfloat16)


def gptq_act(official, random, weights):
    """Quantizes groups of columns that a random order makes."""
    g_idx = act_order(random, weights.shape[1], 32)
    order = np.argsort(g_idx, kind="stable")
    q, zero, scale = quantize(weights[:, order], 32)
    original = np.empty_like(q)
    original[:, order] = q
    return gptq(official, original, zero, scale, 4, 1, 32, g_idx)


def fp8_round(weights, block):
    rows, columns = (extent // side for extent, side in zip(weights.shape, block))
    largest = np.abs(weights).reshape(rows, block[0], columns, block[1]).max(axis=(1, 3))
    # Qwen3 stores the scales of tiles in bf16.
    scale = torch.from_numpy(largest / 400).bfloat16()
    weight = (torch.from_numpy(weights).float() / spread(scale, block, weights.shape)).to(torch.float8_e4m3fn)
    return fp8_block(weight, scale, block)


def main(folder, sources):
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    official = Official(sources)
    random = np.random.default_rng(7)
    stored, expected, described = {}, {}, {}
    for name, tensors, weights, quantization in [*gptq_cases(random, official), *awq_cases(random, official),
                                                 *ct_cases(random), *fp8_cases(random)]:
        expected[name] = torch.from_numpy(np.array(weights, np.float32, order="C"))
        assert expected[name].isfinite().all(), name
        stored.update({f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()})
        described[name] = {"shape": list(weights.shape), "quantization_config": quantization}
    save_file(stored, os.path.join(folder, "matrices.safetensors"))
    save_file(expected, os.path.join(folder, "matrices_expected.safetensors"))
    lines = [f'"{name}": {json.dumps(each)}' for name, each in described.items()]
    Path(folder, "matrices.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    models(folder, official)
    for path in sorted(Path(folder).rglob("*.*")):
        print(path.relative_to(folder), path.stat().st_size)


main(*sys.argv[1:])
