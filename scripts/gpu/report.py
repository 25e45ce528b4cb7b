#!/usr/bin/env python3
"""What run.sh has found out, as one file.

    report.py versions        libraries and driver as they are found here
    report.py nccl            NCCL's version as a number, 0 without one
    report.py results FOLDER  FOLDER/<gpu>-<date>.json from FOLDER's logs; fails if a step has failed
"""

import ctypes
import datetime
import json
import os
import pathlib
import re
import subprocess
import sys


def words(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def number(names, function, out=True):
    """What a library says of itself, by a function that gives one number."""
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        value = ctypes.c_int()
        if not out:
            call = getattr(library, function)
            call.restype = ctypes.c_size_t
            return call()
        if getattr(library, function)(ctypes.byref(value)) == 0:
            return value.value
    return None


def nvrtc():
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        if library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)) == 0:
            return f"{major.value}.{minor.value}"
    return None


def nccl():
    return number(["libnccl.so.2"], "ncclGetVersion")


def versions():
    torch = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.nccl.version())"
    return {
        "gpu": words("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "clocks": words("nvidia-smi", "--query-gpu=clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"),
        "driver_api": number(["libcuda.so.1"], "cuDriverGetVersion"),
        "nvrtc": nvrtc(),
        "cublaslt": number(["libcublasLt.so.13", "libcublasLt.so.12"], "cublasLtGetVersion", out=False),
        "nccl": nccl(),
        "torch": words(sys.executable, "-c", torch),
        "compute_sanitizer": words("compute-sanitizer", "--version"),
    }


def step(log):
    """How a step ended, and how many tests it ran."""
    text = log.read_text(errors="replace")
    code, seconds = re.findall(r"^exit code (\d+) after (\d+) s$", text, re.MULTILINE)[-1]
    found = {"exit_code": int(code), "seconds": int(seconds)}
    tests = re.findall(r"^test result: \w+\. (\d+) passed; (\d+) failed", text, re.MULTILINE)
    if tests:
        found["passed"], found["failed"] = (sum(map(int, column)) for column in zip(*tests))
        found["failures"] = sorted(set(re.findall(r"^test (\S+) .*FAILED$", text, re.MULTILINE)))
    # The suite ends with success where there is no GPU, and says so; a stand-in says what it is.
    found["not_run"] = re.findall(r"^.*NOT RUN.*$|^not run: .*$|^.*NO GPU IS USED.*$", text, re.MULTILINE)
    errors = re.findall(r"^========= ERROR SUMMARY: (\d+) error", text, re.MULTILINE)
    if errors:
        found["sanitizer_errors"] = int(errors[-1])
    return found


def times(log):
    """name -> microseconds, and part of the limit where the line has one."""
    row = re.compile(r"^(.{44}) +([0-9.]+) us(?: +([0-9.]+) % of the limit)?$")
    rows = filter(None, map(row.match, log.read_text(errors="replace").splitlines())) if log.exists() else []
    return {one[1].strip(): (float(one[2]), one[3] and float(one[3])) for one in rows}


def results(out):
    ours = [times(out / f"{name}.log") for name in ("bench-gpu", "bench-gpu-again")]
    torch = times(out / "bench-torch.log")
    benches = {}
    copy = max((run["copy bf16"][1] or 0 for run in ours if "copy bf16" in run), default=0)
    for name in ours[0]:
        both = [run[name] for run in ours if name in run]
        least, part = min(both, key=lambda one: one[0])
        theirs = torch.get(name, (None, None))[0]
        benches[name] = {
            "us": [took for took, _ in both],
            "percent_of_limit": part,
            "of_copy": round(part / copy, 3) if part and copy and not name.startswith(("gemm", "block")) else None,
            "torch_us": theirs,
            "of_torch": theirs and round(theirs / least, 3),
        }
    steps = {log.stem: step(log) for log in sorted(out.glob("*.log"))}
    known = json.loads((out / "versions.json").read_text())
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": pathlib.Path("commit").read_text().splitlines(),
        "versions": known,
        "quick": bool(os.environ.get("QUICK")),
        "limits": {name: float(os.environ.get(name, usual)) for name, usual in (("GPU_TFLOPS", 790), ("GPU_TBPS", 4.3))},
        "ranks_on_one_gpu": (known["nccl"] or 0) >= 23000,
        "steps": steps,
        "not_run": [name for name in ("memcheck", "bench-torch") if name not in steps],
        "benches": benches,
    }
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", (known["gpu"] or "none").split(",")[0])
    path = out / f"{gpu}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    failed = [name for name, one in steps.items() if one["exit_code"] != 0 or one["not_run"]]
    if failed:
        sys.exit(f"failed or not run: {', '.join(failed)}")


def main():
    match sys.argv[1:]:
        case ["versions"]:
            print(json.dumps(versions(), indent=1))
        case ["nccl"]:
            print(nccl() or 0)
        case ["results", folder]:
            results(pathlib.Path(folder))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
