"""The model of benches/training.rs in PyTorch: one thread, two threads, and two ranks with DDP over gloo.

python3 scripts/peers/gpt_ddp.py [rounds]     (needs torch)
"""

import os
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

VOCABULARY, CONTEXT, HIDDEN, HEADS, FFN, LAYERS, SEQUENCES, STEPS = 65, 128, 384, 6, 1536, 4, 8, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)

    def forward(self, x):
        shape = x.shape[0], x.shape[1], HEADS, HIDDEN // HEADS
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(HIDDEN)

    def forward(self, tokens, targets):
        x = self.blocks(self.table(tokens) + self.positions.weight)
        logits = F.linear(self.norm(x), self.table.weight)
        return F.cross_entropy(logits.view(-1, VOCABULARY), targets.view(-1))


def measure(model, sequences, rounds):
    adamw = torch.optim.AdamW(model.parameters(), 1e-4)
    tokens = torch.randint(VOCABULARY, (sequences, CONTEXT))
    targets = torch.randint(VOCABULARY, (sequences, CONTEXT))

    def step():
        adamw.zero_grad()
        model(tokens, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()

    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        times.append((time.perf_counter() - start) / STEPS)
    return f"median {statistics.median(times) * 1e3:.1f} ms, min {min(times) * 1e3:.1f} ms"


def rank(number, rounds):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=number, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Gpt())
    result = measure(model, SEQUENCES // 2, rounds)
    if number == 0:
        print("DDP over gloo, 2 ranks:", result, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"{threads} threads:", measure(Gpt(), SEQUENCES, rounds), flush=True)
    mp.spawn(rank, (rounds,), nprocs=2)
