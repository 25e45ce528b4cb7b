#!/usr/bin/env python3
"""Turns the files that run.sh has written to a folder into result.json and result.md.

    report.py FOLDER                           writes both, and prints the second
    report.py FOLDER --step NAME CODE SECONDS  notes how a step has ended, and writes both
    report.py FOLDER --end                     as the first; fails if a step or a test has failed

Needs Python 3.10.
"""

import datetime
import json
import os
import pathlib
import re
import subprocess
import sys


def lines(path):
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def tail(path, count=12):
    return lines(path)[-count:]


def objects(path):
    """The objects of a file with one per line; the last may be truncated."""
    found = []
    for line in lines(path):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def asked(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def machine(out):
    """Describes the machine; queried once and stored."""
    path = out / "machine.json"
    if not path.exists():
        query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
        path.write_text(json.dumps({
            "gpu": asked("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"),
            "cores": os.cpu_count(),
            "started": datetime.datetime.now().isoformat(timespec="seconds"),
        }))
    return json.loads(path.read_text())


def steps(out):
    found = []
    for line in lines(out / "steps.txt"):
        name, code, seconds = line.split()
        step = {"step": name, "ended": int(code) if code.isdigit() else code, "seconds": int(seconds)}
        if code not in ("0", "not-run"):
            step["log"] = tail(out / "logs" / f"{name}.log", 25)
        found.append(step)
    return found


def tests(out):
    """By step: the number of passed tests, the failed ones with their output, and those not begun."""
    found = {}
    for line in lines(out / "tests.txt"):
        step, name, code, seconds = line.split()
        group = found.setdefault(step, {"passed": 0, "failed": {}, "not_run": {}, "slowest": {}})
        log = tail(out / "logs" / f"test.{name.replace('::', '.')}.log")
        if code == "0":
            group["passed"] += 1
        elif code == "not-run":
            group["not_run"][name] = [line for line in log if "not run" in line.lower()][:1]
        else:
            group["failed"][name] = {"code": int(code), "seconds": int(seconds), "log": log}
        group["slowest"][name] = int(seconds)
    for step, group in found.items():
        slowest = sorted(group["slowest"].items(), key=lambda one: -one[1])[:5]
        begun, group["slowest"] = set(group["slowest"]), dict(slowest)
        group["not_begun"] = [name for name in lines(out / "logs" / f"{step}.names") if name not in begun]
    return found


def benches(out):
    """By line: our time, torch's, and the ratio torch / ours (above 1: ours is faster)."""
    theirs = {}
    for line in objects(out / "torch.jsonl"):
        theirs.setdefault(line["name"], line)
    found = {}
    for line in objects(out / "bench.jsonl"):
        name = line.pop("name")
        if name == "device":
            continue
        # torch times attention with each of its implementations.
        same = {other: its["us"] for other, its in theirs.items()
                if "us" in its and (other == name or other.startswith(f"{name} ["))}
        if same and "us" in line:
            line["torch_us"] = same
            line["of_torch"] = {other: round(us / line["us"], 3) for other, us in same.items()}
        # A wrong result is reported after its time.
        found[name] = {**found.get(name, {}), **line}
    return found


def collect(out):
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": lines(pathlib.Path("commit")),
        "machine": machine(out),
        # File names without the folders, which check.log has.
        "libraries": [re.sub(r"\(.*/", "(", line) for line in lines(out / "logs" / "check.log")
                      if not line.startswith(("ok ", "FAILED ")) and not line.endswith(" failed")],
        "quick": bool(os.environ.get("QUICK")),
        "steps": steps(out),
        "tests": tests(out),
        "benches": benches(out),
        "torch": [line for line in objects(out / "torch.jsonl") if "us" not in line],
    }
    path = out / "result.json"
    partial = out / "result.json.part"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(path)
    return found


def page(found):
    """The report as Markdown."""
    rows = [f"# {(found['machine']['gpu'] or 'no GPU').split(',')[0]}, {found['date']}", ""]
    rows += [f"* commit {' '.join(found['commit'])}", f"* {found['machine']['gpu']}"]
    rows += [f"* {library}" for library in found["libraries"]]
    rows += [f"* torch: {json.dumps(line)}" for line in found["torch"]]
    rows += ["", "| step | ended | seconds |", "|---|---|---:|"]
    rows += [f"| {step['step']} | {step['ended']} | {step['seconds']} |" for step in found["steps"]]
    if found["tests"]:
        rows += ["", "| tests | passed | failed | not run | not begun |", "|---|---:|---:|---:|---:|"]
    for step, group in found["tests"].items():
        counts = [group["passed"], *(len(group[kind]) for kind in ("failed", "not_run", "not_begun"))]
        rows.append(f"| {step} | {' | '.join(map(str, counts))} |")
    for step, group in found["tests"].items():
        rows += ["", *(f"* {step}: **{name}** ended with {one['code']} after {one['seconds']} s: "
                       f"`{' / '.join(one['log'])[-600:]}`" for name, one in group["failed"].items())]
    if found["benches"]:
        rows += ["", "| bench | µs | part of the limit | torch, µs | torch's time / ours |", "|---|---:|---:|---:|---:|"]
    for name, line in found["benches"].items():
        if "us" not in line:
            said = next((f"{kind}: {line[kind]}" for kind in ("error", "wrong", "skipped") if kind in line), "")
            rows.append(f"| {name} | {said} | | | |")
            continue
        wrong = " **wrong**" if "wrong" in line else ""
        part = line.get("part_of_limit")
        part = f"{100 * part:.0f} %" if part is not None else ""
        by = line.get("torch_us") or {"": None}
        for other, us in by.items():
            label = other[len(name):].strip()
            theirs = f"{us:.1f} {label}" if us else ""
            ratio = f"{us / line['us']:.2f}" if us else ""
            rows.append(f"| {name}{wrong} | {line['us']:.1f} | {part} | {theirs} | {ratio} |")
    return "\n".join(rows) + "\n"


def main():
    match sys.argv[1:]:
        case [folder, "--step", name, code, seconds]:
            out = pathlib.Path(folder)
            with open(out / "steps.txt", "a") as file:
                file.write(f"{name} {code} {seconds}\n")
            (out / "result.md").write_text(page(collect(out)))
        case [folder, *end] if end in ([], ["--end"]):
            out = pathlib.Path(folder)
            found = collect(out)
            text = page(found)
            (out / "result.md").write_text(text)
            print(text, end="")
            failed = [step["step"] for step in found["steps"] if step["ended"] not in (0, "needs-NCCL-2.30", "not-found")]
            failed += [name for group in found["tests"].values() for name in group["failed"]]
            if end and (failed or not found["steps"]):
                sys.exit(f"failed or not run: {', '.join(failed) or 'everything'}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
