#!/usr/bin/env python3
"""The lines of benches/gpu in PyTorch, on one GPU: the same names and shapes, as JSON lines.

    pip install torch
    gpu_torch.py [--only attention,decode] [--json FILE] [--seconds N] [--quick]

Where PyTorch has several ways, the name ends with the way in brackets. What fails leaves a line with
its error, and the next goes on.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time

try:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"not run: {error}")

GROUPS = ("limits", "gemm", "streams", "attention", "decode", "launch", "optim", "nccl", "block")
HALF = torch.bfloat16


def timed(call, quick):
    """Seconds per call, in rounds of at least 2 ms; the call receives its number."""
    number = 0

    def round_of(calls):
        nonlocal number
        begin = time.perf_counter()
        for _ in range(calls):
            call(number)
            number += 1
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    round_of(1)
    calls, took = 1, round_of(1)
    if quick:
        return [took]
    while took < 2e-3:
        calls *= 2
        took = round_of(calls)
    return [round_of(calls) / calls for _ in range(int(min(max(0.06 / took, 5), 21)))]


class Bench:
    def __init__(self, args):
        self.quick = args.quick
        self.file = open(args.json, "a") if args.json else None
        self.end = time.monotonic() + args.seconds if args.seconds is not None else None

    def pick(self, small, usual):
        return small if self.quick else usual

    def copies(self, size):
        """The number of tensors of `size` bytes to alternate, so that no cache holds the next one."""
        return 2 if self.quick else -(-(240 << 20) // size)

    def emit(self, **line):
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def record(self, name, seconds, **more):
        median = statistics.median(seconds)
        print(f"{name:<64} {median * 1e6:>11.2f} us", flush=True)
        spread = (max(seconds) - min(seconds)) / median
        self.emit(name=name, us=median * 1e6, min_us=min(seconds) * 1e6, spread=spread, **more)

    def time(self, name, call, **more):
        self.record(name, timed(call, self.quick), **more)

    def case(self, name, run):
        """Runs a case, which emits lines. An error is emitted as a line, and the next case continues."""
        if self.end is not None and time.monotonic() > self.end:
            print(f"skipped: {name}", flush=True)
            return self.emit(name=name, skipped=True)
        try:
            run()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"{name}: {text}", flush=True)
            self.emit(name=name, error=text)


def rand(*shape, dtype=HALF):
    return torch.randn(shape, device="cuda", dtype=dtype)


def limits(bench):
    def copy():
        rows = bench.pick(64, 1 << 16)
        x, y = rand(rows, 8192), torch.empty((rows, 8192), device="cuda", dtype=HALF)
        bench.time(f"limit copy 2 x {rows >> 6} MiB", lambda _: y.copy_(x))

    def product():
        n = bench.pick(64, 8192)
        a, b, c = rand(n, n), rand(n, n), rand(n, n)
        bench.time(f"limit product bf16 {n} x {n} x {n}", lambda _: torch.mm(a, b.t(), out=c))

    bench.case("limit copy", copy)
    bench.case("limit product", product)


def gemm(bench):
    k, whole = bench.pick((64, 128), (8192, 28672))
    rows = bench.pick([16, 1], [4096, 1, 16, 64])

    def product(m, n, tp):
        x, w = rand(m, k), [rand(n, k) for _ in range(bench.copies(2 * n * k))]
        bench.time(f"gemm bf16 {m} x {k} x {n} (tp {tp})", lambda call: x @ w[call % len(w)].t())

    def weight_gradient(m, n, tp):
        name = f"gemm dW f32 of bf16 {n} x {m} x {k} (tp {tp})"
        x, dy = rand(m, k), rand(m, n)
        try:
            torch.mm(dy.t(), x, out_dtype=torch.float32)
        except (TypeError, RuntimeError):
            return bench.time(name, lambda _: dy.t() @ x, note="the result is bf16")
        return bench.time(name, lambda _: torch.mm(dy.t(), x, out_dtype=torch.float32))

    def input_gradient(m, n, tp):
        w, dy = rand(n, k), rand(m, n)
        bench.time(f"gemm dX bf16 {m} x {n} x {k} (tp {tp})", lambda _: dy @ w)

    for m in rows:
        for tp in (1, 8):
            bench.case(f"gemm {m} tp {tp}", lambda: product(m, whole // tp, tp))
    for tp in (1, 8):
        bench.case(f"gemm dW tp {tp}", lambda: weight_gradient(rows[0], whole // tp, tp))
        bench.case(f"gemm dX tp {tp}", lambda: input_gradient(rows[0], whole // tp, tp))


def streams(bench):
    rows, cols = bench.pick((16, 64), (8192, 8192))
    shape = f"{rows} x {cols}"

    def elementwise():
        x, other, y = rand(rows, cols), rand(rows, cols), rand(rows, cols)
        gate, up = rand(rows, 2 * cols).chunk(2, 1)
        bench.time(f"copy bf16 {shape}", lambda _: y.copy_(x))
        bench.time(f"add bf16 {shape}", lambda _: torch.add(x, other, out=y))
        bench.time(f"silu bf16 {shape}", lambda _: F.silu(x))
        bench.time(f"gate bf16 of [gate | up] {shape}", lambda _: F.silu(gate) * up)

    def norms():
        x, gamma, dy = rand(rows, cols).requires_grad_(), rand(cols).requires_grad_(), rand(rows, cols)
        with torch.no_grad():
            bench.time(f"RMSNorm bf16 {shape}", lambda _: F.rms_norm(x, (cols,), gamma, 1e-5))
        y = F.rms_norm(x, (cols,), gamma, 1e-5)
        back = lambda _: torch.autograd.grad(y, (x, gamma), dy, retain_graph=True)
        bench.time(f"RMSNorm backward bf16 {shape}", back)

    def cross_entropy():
        tokens, classes = bench.pick((16, 64), (4096, 32768))
        logits = rand(tokens, classes).requires_grad_()
        targets = torch.arange(tokens, device="cuda") * 7919 % classes
        loss = lambda: F.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():
            bench.time(f"cross entropy forward bf16 {tokens} x {classes}", lambda _: loss())
        both = lambda _: torch.autograd.grad(loss(), logits)
        bench.time(f"cross entropy forward and backward bf16 {tokens} x {classes}", both)

    for run in (elementwise, norms, cross_entropy):
        bench.case(run.__name__, run)


# The backends of scaled dot-product attention; the default is PyTorch's choice.
WAYS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "default": None}


def through(way):
    return contextlib.nullcontext() if WAYS[way] is None else sdpa_kernel(WAYS[way])


def sdpa(q, k, v, causal):
    """Returns the inputs of a call, the call, and a note.

    A backend without grouped heads gets keys and values that were repeated before.
    """
    grouped = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    try:
        grouped()
        return (q, k, v), grouped, {}
    except RuntimeError:
        sharing = q.shape[1] // k.shape[1]
        wide = [t.detach().repeat_interleave(sharing, 1).requires_grad_(t.requires_grad) for t in (k, v)]
        plain = lambda: F.scaled_dot_product_attention(q, *wide, is_causal=causal)
        plain()
        return (q, *wide), plain, {"note": "keys and values are repeated for each query head"}


def attention(bench):
    heads, kv_heads = bench.pick((4, 2), (32, 8))
    tokens, lengths = bench.pick((128, (32, 64, 128)), (16384, (1024, 4096, 16384)))

    def attend(way, dim, length):
        count = tokens // length
        make = lambda heads: rand(count, length, heads, dim).transpose(1, 2).detach().requires_grad_()
        q, k, v = make(heads), make(kv_heads), make(kv_heads)
        shape = f"D {dim} S {length} x {count} [{way}]"
        with through(way):
            operands, call, note = sdpa(q, k, v, True)
            with torch.no_grad():
                bench.time(f"attention forward bf16 {shape}", lambda _: call(), **note)
            out = call()
            dout = torch.randn_like(out)
            back = lambda _: torch.autograd.grad(out, operands, dout, retain_graph=True)
            bench.time(f"attention backward bf16 {shape}", back, **note)

    for dim in (64, 128):
        for length in lengths:
            for way in WAYS:
                bench.case(f"attention bf16 D {dim} S {length} [{way}]", lambda: attend(way, dim, length))


def rope(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Block:
    """Llama's block, with or without positions."""

    def __init__(self, bench):
        self.hidden, self.heads, self.kv_heads, ffn = bench.pick((64, 4, 2, 96), (4096, 32, 8, 14336))
        self.dim = self.hidden // self.heads
        kv = self.kv_heads * self.dim
        weight = lambda *shape: (0.02 * rand(*shape)).requires_grad_()
        self.qkv, self.o = weight(self.hidden + 2 * kv, self.hidden), weight(self.hidden, self.hidden)
        self.up, self.down = weight(2 * ffn, self.hidden), weight(self.hidden, ffn)
        ones = lambda: torch.ones(self.hidden, device="cuda", dtype=HALF, requires_grad=True)
        self.norm1, self.norm2 = ones(), ones()

    def weights(self):
        return self.qkv, self.o, self.up, self.down, self.norm1, self.norm2

    def parts(self, x):
        """q, k and v of x [sequences, tokens, hidden]: [sequences, heads, tokens, dim]."""
        kv = self.kv_heads * self.dim
        qkv = F.rms_norm(x, (self.hidden,), self.norm1, 1e-5) @ self.qkv.t()
        return [t.unflatten(2, (-1, self.dim)).transpose(1, 2) for t in qkv.split([self.hidden, kv, kv], 2)]

    def rest(self, x, attended):
        x = x + attended.transpose(1, 2).flatten(2) @ self.o.t()
        gate, up = (F.rms_norm(x, (self.hidden,), self.norm2, 1e-5) @ self.up.t()).chunk(2, 2)
        return x + (F.silu(gate) * up) @ self.down.t()

    def forward(self, x):
        q, k, v = self.parts(x)
        return self.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))

    def step(self, x, keys, values, cos, sin):
        """One token per sequence, at the end of the caches [sequences, heads, positions, dim]."""
        q, k, v = self.parts(x)
        keys[:, :, -1:], values[:, :, -1:] = rope(k, cos, sin), v
        q = rope(q, cos, sin)
        return self.rest(x, F.scaled_dot_product_attention(q, keys, values, enable_gqa=True))


def decode(bench):
    heads, kv_heads = bench.pick((4, 2), (32, 8))
    dim = bench.pick(64, 128)

    def attend(way, context, batch):
        count = bench.copies(4 * batch * kv_heads * context * dim)
        cache = [[rand(batch, kv_heads, context, dim) for _ in range(2)] for _ in range(count)]
        q = rand(batch, heads, 1, dim)
        name = f"decode attention bf16 ctx {context} b {batch} [{way}]"
        with through(way):
            ways = [sdpa(q, k, v, False) for k, v in cache]
            bench.time(name, lambda call: ways[call % count][1](), **ways[0][2])

    def layer(batch):
        block, context = Block(bench), bench.pick(16, 1024)
        keys, values = (rand(batch, block.kv_heads, context + 1, block.dim) for _ in range(2))
        pairs = torch.arange(0, block.dim, 2, device="cuda") / block.dim
        angles = (context * 500000.0**-pairs).repeat(2)
        cos, sin = angles.cos().to(HALF), angles.sin().to(HALF)
        x = rand(batch, 1, block.hidden)
        step = lambda: block.step(x, keys, values, cos, sin)
        name = f"decode layer bf16 ctx {context} b {batch}"
        bench.time(f"{name} [eager]", lambda _: step())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        bench.time(f"{name} [graph]", lambda _: graph.replay())

    with torch.no_grad():
        for context in bench.pick((32, 64), (4096, 32768)):
            for batch in bench.pick((1, 2, 4), (1, 16, 64)):
                for way in ("default", "flash"):
                    name = f"decode attention bf16 ctx {context} b {batch} [{way}]"
                    bench.case(name, lambda: attend(way, context, batch))
                torch.cuda.empty_cache()
        for batch in bench.pick((1, 2), (1, 64)):
            bench.case(f"decode layer b {batch}", lambda: layer(batch))


def launch(bench):
    def kernel():
        one, total = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
        rounds, calls = bench.pick((1, 10), (11, 500))
        asked, done = [], []
        for _ in range(rounds + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                total.add_(one)
            asked.append((time.perf_counter() - begin) / calls)
            torch.cuda.synchronize()
            done.append((time.perf_counter() - begin) / calls)
        bench.record("launch of a kernel, until asked for", asked[1:])
        bench.record("launch of a kernel, until done", done[1:])

        def wait(_):
            total.add_(one)
            torch.cuda.synchronize()

        bench.time("launch of a kernel, and wait", wait)

    def transfer():
        host, there = torch.randn(1024), torch.zeros(1024, device="cuda")
        bench.time("upload of 4 KiB", lambda _: there.copy_(host))
        bench.time("download of 4 B", lambda _: there[1].item())

    def allocation():
        bench.time("allocate and free 2 MiB", lambda _: torch.empty(1 << 19, device="cuda"))

    for run in (kernel, transfer, allocation):
        bench.case(run.__name__, run)


def optim(bench):
    def adamw():
        count, side = bench.pick((2, 16), (25, 2048))
        params = [rand(side, side, dtype=torch.float32).requires_grad_() for _ in range(count)]
        for param in params:
            param.grad = torch.randn_like(param)
        step = torch.optim.AdamW(params, lr=1e-3, fused=True).step
        bench.time(f"AdamW f32, {count * side * side} elements", lambda _: step(), note="fused=True")

    def norm():
        count, side = bench.pick((5, 16), (300, 512))
        name = f"gradient norm f32, {count} parameters of {side} x {side}"
        grads = [rand(side, side, dtype=torch.float32) for _ in range(count)]
        total = torch.nn.utils.get_total_norm
        bench.time(name, lambda _: total(grads, foreach=True).item(), note="get_total_norm(foreach=True).item()")

    bench.case("AdamW", adamw)
    bench.case("gradient norm", norm)


def nccl(bench):
    def sums():
        with tempfile.TemporaryDirectory() as folder:
            where = f"file://{pathlib.Path(folder) / 'meeting'}"
            torch.distributed.init_process_group("nccl", init_method=where, rank=0, world_size=1)
            try:
                large = bench.pick(("16 KiB", 1 << 12), ("64 MiB", 1 << 24))
                for name, length in (("4 KiB", 1 << 10), large):
                    x = rand(length, dtype=torch.float32)
                    call = lambda _: torch.distributed.all_reduce(x)
                    bench.time(f"all-reduce f32 {name}, one rank", call)
            finally:
                torch.distributed.destroy_process_group()

    bench.case("nccl", sums)


def block(bench):
    def run():
        layer, tokens = Block(bench), bench.pick(32, 4096)
        x = rand(1, tokens, layer.hidden).requires_grad_()
        dy = torch.randn_like(x)
        with torch.no_grad():
            bench.time(f"block forward bf16 {tokens} tokens", lambda _: layer.forward(x))
        operands = (x, *layer.weights())
        both = lambda _: torch.autograd.grad(layer.forward(x), operands, dy)
        name = f"block forward and backward bf16 {tokens} tokens"
        bench.time(name, both, note="gradients of weights are bf16")

    bench.case("block", run)


def versions(bench):
    """Describes PyTorch's environment, and the attention backends that support these heads."""
    q, k = rand(1, 32, 128, 128), rand(1, 8, 128, 128)
    taken = []
    for way in WAYS:
        try:
            with through(way):
                F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
            taken.append(way)
        except RuntimeError:
            pass
    found = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "gpu": torch.cuda.get_device_name(),
        "sdpa_with_grouped_heads": taken,
    }
    print(found, flush=True)
    bench.emit(name="versions", **found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, each once")
    parser.add_argument("--json", help="append a JSON object a line to this file")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of lines: %(default)s")
    parser.add_argument("--seconds", type=float, help="then skip what has not begun")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := set(only) - set(GROUPS):
        parser.error(f"no groups: {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit("not run: PyTorch finds no GPU")
    bench = Bench(args)
    bench.case("versions", lambda: versions(bench))
    for group in GROUPS:
        if group in only:
            globals()[group](bench)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
