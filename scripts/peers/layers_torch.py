"""The cases of benches/layers.rs and benches/decode.rs in PyTorch: one process on one and on two threads,
and two processes with hand-written Megatron-style layers over gloo, one thread per rank.

python3 scripts/peers/layers_torch.py --json FILE [--rounds 3] [--filter mlp]      (needs torch)

The modes of a case run in turn, a short batch each; one JSON line a case and mode: the median of the rounds.
"""

import argparse
import json
import os
import random
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

RANKS = 2


class CopyTo(torch.autograd.Function):
    """Identity; all-reduce backward."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, dy):
        dy = dy.contiguous()
        dist.all_reduce(dy)
        return dy


class ReduceFrom(torch.autograd.Function):
    """All-reduce; identity backward."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return dy


class Row(nn.Module):
    """A row-parallel linear layer: the bias is added once, after the sum."""

    def __init__(self, inputs, outputs, tp, bias=True):
        super().__init__()
        self.tp, self.linear = tp, nn.Linear(inputs // tp, outputs, bias=bias and tp == 1)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias and tp > 1 else None

    def forward(self, x):
        y = self.linear(x)
        if self.tp > 1:
            y = ReduceFrom.apply(y)
        return y if self.bias is None else y + self.bias


def enter(x, tp):
    return CopyTo.apply(x) if tp > 1 else x


class Mlp(nn.Module):
    def __init__(self, hidden, ffn, tp, gelu="none"):
        super().__init__()
        self.tp, self.gelu = tp, gelu
        self.up, self.down = nn.Linear(hidden, ffn // tp), Row(ffn, hidden, tp)

    def forward(self, x):
        return self.down(F.gelu(self.up(enter(x, self.tp)), approximate=self.gelu))


class Gated(nn.Module):
    def __init__(self, hidden, ffn, tp):
        super().__init__()
        self.tp = tp
        self.gate = nn.Linear(hidden, ffn // tp, bias=False)
        self.up = nn.Linear(hidden, ffn // tp, bias=False)
        self.down = Row(ffn, hidden, tp, bias=False)

    def forward(self, x):
        x = enter(x, self.tp)
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, hidden, heads, kv_heads, ffn, tp, gated):
        super().__init__()
        self.tp, self.dim, self.heads, self.kv_heads = tp, hidden // heads, heads // tp, kv_heads // tp
        norm = (lambda: nn.RMSNorm(hidden, eps=1e-5)) if gated else (lambda: nn.LayerNorm(hidden, eps=1e-5))
        self.norm1, self.norm2 = norm(), norm()
        self.qkv = nn.Linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim, bias=not gated)
        self.out = Row(hidden, hidden, tp, bias=not gated)
        self.mlp = Gated(hidden, ffn, tp) if gated else Mlp(hidden, ffn, tp, "tanh")

    def attend(self, x, cache=None):
        tokens = x.shape[0]
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        q, k, v = self.qkv(enter(x, self.tp)).split(sizes, -1)
        q, k, v = (t.view(tokens, -1, self.dim).transpose(0, 1)[None] for t in (q, k, v))
        if cache is not None:
            keys, values, at = cache
            keys[:, :, at : at + 1], values[:, :, at : at + 1] = k, v
            k, v = keys[:, :, : at + 1], values[:, :, : at + 1]
        grouped = self.heads != self.kv_heads
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=grouped)
        return self.out(y[0].transpose(0, 1).reshape(tokens, -1))

    def forward(self, x, cache=None):
        x = x + self.attend(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class Decode(nn.Module):
    """GPT-2 small's twelve blocks, one token, 512 tokens in the cache."""

    def __init__(self, tp):
        super().__init__()
        self.blocks = nn.ModuleList(Block(768, 12, 12, 3072, tp, False) for _ in range(12))
        shape = (1, 12 // tp, 520, 64)
        self.caches = [(torch.randn(shape), torch.randn(shape), 512) for _ in self.blocks]

    def forward(self, x):
        for block, cache in zip(self.blocks, self.caches):
            x = block(x, cache)
        return x


CASES = [
    ("mlp 1024-4096-1024 tok=512", lambda tp: Mlp(1024, 4096, tp), (512, 1024), True),
    ("mlp 1024-4096-1024 tok=16", lambda tp: Mlp(1024, 4096, tp), (16, 1024), True),
    ("gpt2 block 1x512", lambda tp: Block(768, 12, 12, 3072, tp, False), (512, 768), True),
    ("llama block 1x512", lambda tp: Block(1024, 16, 4, 2816, tp, True), (512, 1024), True),
    ("gpt2 12 blocks, cache 512, f32", Decode, (1, 768), False),
]


def steps(model, x, backward):
    """The measured functions: forward alone, and with the backward."""

    def forward():
        with torch.no_grad():
            model(x)

    yield ("f" if backward else "", forward)
    if backward:
        input, dy = x.clone().requires_grad_(True), torch.ones_like(x)

        def both():
            model.zero_grad(set_to_none=True)
            input.grad = None
            model(input).backward(dy)

        yield ("f+b", both)


def run(rank, port, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for name, make, shape, backward in CASES:
        if args.filter not in name:
            continue
        torch.manual_seed(0)
        x, whole, part = torch.randn(shape), make(1), make(RANKS)
        for (kind, alone), (_, together) in zip(steps(whole, x, backward), steps(part, x, backward)):
            modes = [("torch, 1 thread", 1, alone), ("torch, 2 threads", 2, alone), ("torch, 2 ranks gloo", 0, together)]
            times = {mode: [] for mode, _, _ in modes}
            batches = {}
            for round in range(args.rounds + 1):
                for mode, threads, step in modes:
                    if threads and rank:
                        dist.barrier()
                        continue
                    torch.set_num_threads(threads or 1)
                    step()
                    batch = torch.tensor([batches.get(mode, 1)])
                    if not threads:
                        dist.broadcast(batch, 0)
                    start = time.perf_counter()
                    for _ in range(int(batch)):
                        step()
                    taken = (time.perf_counter() - start) / int(batch)
                    torch.set_num_threads(1)
                    batches.setdefault(mode, max(1, min(400, int(0.3 / taken))))
                    if round:
                        times[mode].append(taken)
                    if threads:
                        dist.barrier()
            if rank == 0:
                for mode, taken in times.items():
                    median = statistics.median(taken) * 1e3
                    print(f"{name + ' ' + kind:<38} {mode:<22} {median:10.3f} ms", flush=True)
                    line = {"case": f"{name} {kind}".strip(), "mode": mode, "median_ms": median, "min_ms": min(taken) * 1e3}
                    with open(args.json, "a") as file:
                        file.write(json.dumps(line) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--filter", default="")
    options = parser.parse_args()
    mp.spawn(run, (29500 + random.randint(0, 400), options), nprocs=RANKS)
