#!/usr/bin/env python3
"""Shows what PyTorch's gloo process groups do when ranks disagree, are lost, or are missing.

    python3 scripts/peers/gloo_faults.py [--ranks 2] [--timeout 6]

Each case runs in fresh processes, without and with TORCH_DISTRIBUTED_DEBUG=DETAIL. Printed are, as rows of a Markdown table, what the
ranks that were not at fault saw: an error with its time from the fault on, a wrong result, or that their process was killed.
"""

import argparse
import datetime
import multiprocessing
import os
import re
import signal
import socket
import time

BAD = 1  # the rank at fault


def case_shape(dist, torch, rank):
    x = torch.ones(100 if rank != BAD else 50)
    dist.all_reduce(x)
    return x


def case_layout(dist, torch, rank):
    x = torch.arange(6.0).reshape((2, 3) if rank != BAD else (3, 2))
    dist.all_reduce(x)
    return x


def case_dtype(dist, torch, rank):
    x = torch.ones(64, dtype=torch.float32 if rank != BAD else torch.int32)
    dist.all_reduce(x)
    return x


def case_reduction(dist, torch, rank):
    x = torch.full((4,), float(rank + 2))
    dist.all_reduce(x, op=dist.ReduceOp.SUM if rank != BAD else dist.ReduceOp.MAX)
    return x


def case_root(dist, torch, rank):
    x = torch.full((4,), float(rank))
    dist.broadcast(x, src=0 if rank != BAD else 1)
    return x


def case_operation(dist, torch, rank):
    x = torch.ones(4)
    if rank != BAD:
        dist.all_reduce(x)
    else:
        dist.all_gather([torch.zeros(4) for _ in range(dist.get_world_size())], x)
    return x


def lost(act):
    def case(dist, torch, rank):
        if rank == BAD:
            act()
            return None
        x = torch.ones(64)
        dist.all_reduce(x)
        return x

    return case


def fail():
    raise RuntimeError("injected")


CASES = {
    "all_reduce of 100 and of 50 elements": case_shape,
    "all_reduce of [2, 3] and of [3, 2]": case_layout,
    "all_reduce of f32 and of i32": case_dtype,
    "all_reduce by sum and by max": case_reduction,
    "broadcast from rank 0 and from rank 1": case_root,
    "all_reduce and all_gather": case_operation,
    "a rank returns": lost(lambda: None),
    "a rank raises": lost(fail),
    "a rank exits": lost(lambda: os._exit(3)),
    "a rank is killed (SIGKILL)": lost(lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "a rank is stopped (SIGSTOP)": lost(lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}


def rank_main(rank, ranks, port, name, timeout, report):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout),
    )
    # Connects and synchronizes the ranks.
    dist.all_reduce(torch.ones(1))
    begin = time.monotonic()
    try:
        result = CASES[name](dist, torch, rank)
        said = None if result is None else f"no error: {[round(float(v), 3) for v in result.flatten()[:4]]}"
    except BaseException as error:  # noqa: B902: any error is the result
        said = f"{type(error).__name__}: {error}"
    report.put((rank, time.monotonic() - begin, said))
    report.close()
    report.join_thread()
    # Exits at once, which closes the rank's connections; torch's own exit may wait for others.
    os._exit(0)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(name, ranks, timeout):
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=rank_main, args=(rank, ranks, port, name, timeout, report)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    # Waits for the innocent ranks only; the other may be stopped.
    for rank, process in enumerate(processes):
        if rank != BAD:
            process.join(60 + timeout)
    said = {}
    while True:
        try:
            rank, took, words = report.get(timeout=0.5)
            said[rank] = (took, words)
        except Exception:
            break
    lines = []
    for rank, process in enumerate(processes):
        if rank == BAD:
            continue
        if rank in said:
            took, words = said[rank]
            names = bool(re.search(r"rank[s ]*\[?%d\b|Ranks %d\b" % (BAD, BAD), words or "", re.IGNORECASE))
            words = re.sub(r"\s+", " ", re.sub(r"\[[^\]]*?\.cc:\d+\]", "", words or ""))
            lines.append((took, words[:110], names))
        elif process.exitcode is None:
            lines.append((float("nan"), "hangs", False))
        else:
            lines.append((float("nan"), f"killed, exit code {process.exitcode}", False))
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=6)
    options = parser.parse_args()
    import torch

    print(f"torch {torch.__version__}, gloo, {options.ranks} ranks on loopback, timeout {options.timeout} s\n")
    print("| fault of rank 1 | debug | rank 0 | after | names rank 1 |")
    print("|---|---|---|---:|---|")
    for name in CASES:
        for debug in ("OFF", "DETAIL"):
            os.environ["TORCH_DISTRIBUTED_DEBUG"] = debug
            took, words, names = run(name, options.ranks, options.timeout)[0]
            words = words.replace("|", "/")
            after = "" if took != took else f"{took * 1e3:.0f} ms"
            print(f"| {name} | {debug} | {words} | {after} | {'yes' if names else 'no'} |", flush=True)


if __name__ == "__main__":
    main()
