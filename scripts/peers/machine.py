"""What the reports of scripts/compare.sh and scripts/compare_gguf.sh share: the machine, the commit, medians and tables."""

import collections
import datetime
import json
import platform
import re
import statistics
import subprocess


def words(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def grouped(rows, key, value):
    """The values of each key over the rounds."""
    all_rounds = collections.defaultdict(list)
    for row in rows:
        all_rounds[key(row)].append(value(row))
    return dict(all_rounds)


def medians(rows, key, value):
    """The median of each key's measurements over the rounds."""
    return {key: statistics.median(values) for key, values in grouped(rows, key, value).items()}


def processor():
    for line in open("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine():
    flags = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "")
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    vectors += " with VNNI" if "avx512_vnni" in flags else ""
    cores = len(re.findall(r"^processor", open("/proc/cpuinfo").read(), re.M))
    return f"{processor()} ({vectors}), {cores} processors, Linux {platform.release()}"


def commit():
    changed = words("git", "status", "--porcelain", "--untracked-files=no")
    return words("git", "rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def stem(kind=""):
    """The name of a result file, without its end."""
    name = re.sub("[^a-z0-9]+", "-", processor().lower()).strip("-")
    return f"{datetime.date.today().isoformat()}-{kind}{name}"


def number(value):
    return "" if value is None else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def ratio(a, b):
    return "" if a is None or b is None else f"{a / b:.2f}"


def table(head, rows):
    yield "| " + " | ".join(head) + " |"
    yield "|" + "|".join("---" if at == 0 else "---:" for at in range(len(head))) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
