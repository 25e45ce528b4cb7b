"""The cases of benches/collectives.rs in torch.distributed over gloo, on the loopback interface.

python3 scripts/peers/collectives_torch.py --json FILE [--ranks 2]      (needs torch)
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


def run(rank, port, args):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks)
    for size in (4 << 10, 64 << 10, 1 << 20, 16 << 20):
        whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // args.ranks)
        ops = {
            "all_reduce": lambda: dist.all_reduce(whole),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        }
        for op, call in ops.items():
            call()
            batch = 200 if size <= 64 << 10 else 20
            times = []
            for _ in range(5):
                dist.barrier()
                start = time.perf_counter()
                for _ in range(batch):
                    call()
                times.append((time.perf_counter() - start) / batch)
            if rank == 0:
                median = statistics.median(times)
                print(f"{op:<16} {args.ranks} ranks {size:>10} bytes {median * 1e6:10.1f} µs", flush=True)
                line = {"op": op, "ranks": args.ranks, "bytes": size, "median_s": median, "mode": "gloo"}
                with open(args.json, "a") as file:
                    file.write(json.dumps(line) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    mp.spawn(run, (29500 + random.randint(0, 400), options), nprocs=options.ranks)
