#!/usr/bin/env python3
"""The shapes of benches/gpu.rs in PyTorch, on one GPU: pip install torch, then run it in turn with the bench."""

import statistics
import time

import torch


def timed(call, rounds=7, calls=10):
    call()
    torch.cuda.synchronize()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def line(name, took):
    print(f"{name:<44} {took * 1e6:>10.1f} us", flush=True)


def block(x, w, heads, kv_heads):
    tokens, hidden = x.shape
    dim = hidden // heads
    normed = torch.nn.functional.rms_norm(x, (hidden,), w["norm1"])
    q, k, v = (normed @ w["qkv"].t()).split([hidden, kv_heads * dim, kv_heads * dim], 1)
    q, k, v = (t.view(1, tokens, -1, dim).transpose(1, 2) for t in (q, k, v))
    a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + a.transpose(1, 2).reshape(tokens, hidden) @ w["o"].t()
    gate, up = (torch.nn.functional.rms_norm(x, (hidden,), w["norm2"]) @ w["up"].t()).chunk(2, 1)
    return x + (torch.nn.functional.silu(gate) * up) @ w["down"].t()


def main():
    print(torch.__version__, torch.cuda.get_device_name())
    half = {"device": "cuda", "dtype": torch.bfloat16}
    for m in (4096, 1, 16, 64):
        for tp in (1, 2, 4, 8):
            n, k = 28672 // tp, 8192
            x, w = torch.full((m, k), 0.5, **half), torch.full((n, k), 0.25, **half)
            line(f"gemm bf16 {m} x {k} x {n} (tp {tp})", timed(lambda: x @ w.t()))
    x = torch.full((8192, 8192), 0.5, **half)
    y, gamma = torch.empty_like(x), torch.ones(8192, **half)
    line("copy bf16", timed(lambda: y.copy_(x)))
    line("silu bf16", timed(lambda: torch.nn.functional.silu(x)))
    line("gate bf16", timed(lambda: torch.nn.functional.silu(x) * x))
    line("RMSNorm bf16", timed(lambda: torch.nn.functional.rms_norm(x, (8192,), gamma)))
    line("softmax bf16", timed(lambda: torch.softmax(x, 1)))
    hidden, heads, kv_heads, ffn = 4096, 32, 8, 14336
    shapes = {
        "norm1": (hidden,), "qkv": (hidden + 2 * kv_heads * hidden // heads, hidden), "o": (hidden, hidden),
        "norm2": (hidden,), "up": (2 * ffn, hidden), "down": (hidden, ffn),
    }
    w = {name: (0.02 * torch.randn(shape, **half)).requires_grad_() for name, shape in shapes.items()}
    x = torch.full((4096, hidden), 0.5, **half).requires_grad_()
    with torch.no_grad():
        line("block forward bf16", timed(lambda: block(x, w, heads, kv_heads), calls=1))

    def step():
        y = block(x, w, heads, kv_heads)
        y.backward(y.detach())

    line("block forward and backward bf16", timed(step, calls=1))


if __name__ == "__main__":
    main()
