"""Writes the tables of a run of scripts/compare_gguf.sh: report_gguf.py FOLDER_OF_THE_RUN FOLDER_FOR_RESULTS."""

import datetime
import pathlib
import re
import statistics
import sys

from machine import commit, grouped, lines, machine, medians, number, ratio, stem, table, words

MIB = 1 << 20
DECODE, PROMPT, BANDWIDTH = 1.2, 2.0, 0.8
# What the example quantizes to: bytes a weight of all matrices, as the table of `kernels::Format` has them. A row's scale is stored
# for each 32 weights too.
QUANTIZED = {"--quantize int8": 34 / 32, "--quantize int4": 20 / 32, "--quantize int8 --by-row": 34 / 32}

run, results = map(pathlib.Path, sys.argv[1:3])
ours, theirs = lines(run / "shardwise.json"), lines(run / "llama_cpp.json")
if not ours or not theirs:
    raise SystemExit(f"report_gguf: {run} has no measurements")
load = (run / "load").read_text().splitlines()
case = lambda row: (row["model"], row.get("ranks", row.get("threads")))
of_ours = lambda value: grouped(ours, case, value)
of_theirs = lambda value: grouped(theirs, case, value)
median = statistics.median


def spread(values):
    """The median, the least and the largest."""
    if not values:
        return ""
    return number(median(values)) + (f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else "")


def quotient(a, b):
    return median(a) / median(b) if a and b else None


def percent(share):
    return f"{share:.0%}".replace("%", " %")


prompt, prompt_theirs = of_ours(lambda r: r["prompt_per_s"]), of_theirs(lambda r: r["prompt_per_s"])
token, token_theirs = of_ours(lambda r: r["token_ms"]), of_theirs(lambda r: r["token_ms"])
sampling, rate = of_ours(lambda r: r["sampling_ms"]), of_ours(lambda r: r["read_gb_s"])
share = of_ours(lambda r: r["read_gb_s"] / r["limit_gb_s"])
limits = grouped(ours, lambda r: r["ranks"], lambda r: r["limit_gb_s"])
decode_ratio = {key: quotient(token_theirs.get(key), times) for key, times in token.items()}
prompt_ratio = {key: quotient(rates, prompt_theirs.get(key)) for key, rates in prompt.items()}
held, peak = medians(ours, case, lambda r: r["held_bytes"]), {}
for row in ours:
    if row["peak_bytes"] is not None:
        peak[case(row)] = max(peak.get(case(row), 0), row["peak_bytes"])
bytes_a_weight = {row["model"]: row["bytes_a_weight"] for row in ours}
most = {key: 1.1 * held[key] + 64 * MIB for key in peak}

last_cache = pathlib.Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
cache = f"; last-level cache {last_cache.read_text().strip()}B" if last_cache.exists() else ""
system = "; ".join(sorted({row["system"] for row in theirs}))
enabled = re.findall(r"([A-Z0-9_]+) = 1", system)
today = datetime.date.today().isoformat()
text = [
    f"# Quantized models: shardwise and llama.cpp, {today}",
    "",
    f"{machine()}{cache}; commit {commit()}; rustc {words('rustc', '--version').split()[1]}.",
    f"llama.cpp of xllamacpp {'; '.join(sorted({row['version'] for row in theirs}))}, which uses {', '.join(enabled)}.",
    f"`scripts/compare_gguf.sh {len(load)}`: both programs in turn on the same files. Medians over the rounds, with the least and the largest.",
    f"Load averages as the rounds began: {'; '.join(load)}.",
    "Reading from memory: "
    + "; ".join(f"{spread(values)} GB/s by {ranks} thread{'s' * (ranks > 1)}" for ranks, values in limits.items())
    + ".",
    "",
    "The model is SmolLM2-135M-Instruct. F32 is its published Q4_1 file dequantized; the others are quantized from F32. The embedding, which is also",
    "the head, is in Q8_0, as llama.cpp's quantizer leaves it. n is the number of shardwise's ranks and of llama.cpp's threads. Prompts have 512",
    "tokens. 32 tokens are decoded after 64. Both include sampling the largest logit. shardwise computes in f32 and caches keys and values in f32,",
    "llama.cpp caches them in f16.",
    "",
    "## Speed",
    "",
]
text += table(
    ["model", "n", "prompt, tok/s", "llama.cpp", "times as fast", "ms a token", "llama.cpp", "times as fast", "of which sampling, ms", "weights read, GB/s", "of reading memory"],
    [
        [key[0], str(key[1]), spread(prompt[key]), spread(prompt_theirs.get(key)), ratio(prompt_ratio[key], 1.0)]
        + [spread(token[key]), spread(token_theirs.get(key)), ratio(decode_ratio[key], 1.0)]
        + [number(median(sampling[key])), number(median(rate[key])), percent(median(share[key]))]
        for key in token
    ],
)

goals = [(f"loading {key[0]}, n = {key[1]}: at most 1.1 times the shards and 64 MiB", size <= most[key], f"{size / MIB:.0f} of {most[key] / MIB:.0f} MiB") for key, size in peak.items()]
for key in token:
    if key[0] in ("Q8_0", "Q4_0"):
        for what, goal, found in (("decode", DECODE, decode_ratio[key]), ("prompt", PROMPT, prompt_ratio[key])):
            goals.append((f"{what} {key[0]}, n = {key[1]}: {goal} times llama.cpp", found is not None and found >= goal, ratio(found, 1.0)))
    if key[0] == "Q8_0":
        found = median(share[key])
        goals.append((f"weights read by decode {key[0]}, n = {key[1]}: {percent(BANDWIDTH)} of reading memory", found >= BANDWIDTH, percent(found)))
text += ["## Goals", ""]
text += table(["goal", "measured", "met"], [[goal, found, "yes" if met else "**no**"] for goal, met, found in goals])

text += ["## Loading", "", "Each load is that of a new process, from the page cache. The peak is the largest growth of its resident memory over the rounds.", ""]
seconds = of_ours(lambda r: r["load_s"])
text += table(
    ["model", "n", "seconds", "weights, MiB", "peak, MiB", "allowed, MiB"],
    [
        [key[0], str(key[1]), spread(seconds[key]), f"{held[key] / MIB:.1f}"]
        + ([f"{peak[key] / MIB:.1f}", f"{most[key] / MIB:.1f}"] if key in peak else ["", ""])
        for key in seconds
    ],
)

perplexities = lines(run / "perplexity.json")
reference = next((row["perplexity"] for row in perplexities if row["weights"] == "F32"), None)
text += ["## Precision", "", "Perplexity of DESIGN.md and docs/*.md in 40 windows of 256 tokens, on 2 ranks. Rows with an option start from the file before it.",
    "Q4_1 has the weights of F32: what changes is the rounding of activations.", ""]
rows = []
for row in perplexities:
    model, _, options = row["weights"].partition(" ")
    times = [number(median(token[model, n])) if not options and (model, n) in token else "" for n in (1, 2)]
    size = QUANTIZED.get(options) if "--quantize" in options else bytes_a_weight.get(model)
    change = "" if reference is None else f"{(row['perplexity'] / reference - 1) * 100:+.2f} %"
    rows.append([row["weights"], "" if size is None else f"{size:.3f}", *times, f"{row['perplexity']:.3f}", change])
text += table(["weights", "bytes a weight", "ms a token, n = 1", "n = 2", "perplexity", "against F32"], rows)

path = results / f"{stem('gguf-')}.md"
path.write_text("\n".join(text))
print(path)
