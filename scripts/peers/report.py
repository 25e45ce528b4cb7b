"""Writes the table and the plot of a run of scripts/compare.sh: report.py FOLDER_OF_THE_RUN FOLDER_FOR_RESULTS."""

import datetime
import json
import pathlib
import re
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from machine import commit, lines, machine, medians, number, processor, ratio, stem, table, words

run, results = map(pathlib.Path, sys.argv[1:3])
ours = medians(lines(run / "layers.json") + lines(run / "decode.json"), lambda r: (r["case"], r["ranks"]), lambda r: r["median_ms"])
share = medians(lines(run / "layers.json"), lambda r: (r["case"], r["ranks"]), lambda r: r["of_peak"])
torch_ms = medians(lines(run / "torch.json"), lambda r: (r["case"], r["mode"]), lambda r: r["median_ms"])
collectives = [row for path in sorted(run.glob("collectives-*.json")) for row in json.loads(path.read_text())]
threads_us = medians(collectives, lambda r: (r["op"], r["ranks"], r["dtype"], r["bytes"]), lambda r: r["median_s"] * 1e6)
gloo_us = medians(lines(run / "gloo.json"), lambda r: (r["op"], r["ranks"], r["bytes"]), lambda r: r["median_s"] * 1e6)

today = datetime.date.today().isoformat()
name, at_commit = stem(), commit()
load = (run / "load").read_text().split("\n")[:-1]
limits = re.findall(r"^(?:one core|read from memory): .*$", (run / "layers.txt").read_text() + (run / "decode.txt").read_text(), re.M)

text = [
    f"# shardwise and PyTorch, {today}",
    "",
    f"{machine()}; commit {at_commit}; rustc {words('rustc', '--version').split()[1]},",
    f"PyTorch {torch.__version__} with gloo. `scripts/compare.sh {len(load)}`: all programs in turn, {len(load)} rounds, medians over the rounds.",
    f"Load averages as the rounds began: {'; '.join(load)}.",
    "Measured limits, best of the rounds' first lines: " + "; ".join(sorted(set(limits))) + ".",
    "",
    "## Layers, f32, ms",
    "",
]
modes = ["torch, 1 thread", "torch, 2 threads", "torch, 2 ranks gloo"]
cases = [case for case, ranks in ours if ranks == 2 and "invariant" not in case]
rows = []
for case in cases:
    one, two = ours.get((case, 1)), ours[case, 2]
    peers = [torch_ms.get((case, mode)) for mode in modes]
    best = min((peer for peer in peers if peer is not None), default=None)
    kind = next((case.removesuffix(end) + " invariant" + end for end in (" f+b", " f") if case.endswith(end)), "")
    cost = ours.get((kind, 2))
    rows.append(
        [case, number(one), number(two), *map(number, peers), ratio(best, two), f"{one / two / 2:.0%}" if one else "", ratio(cost, two)]
    )
head = ["case", "1 rank", "2 ranks", *modes, "best of PyTorch : 2 ranks", "efficiency of 2 ranks", "invariant : fast, 2 ranks"]
text += table(head, rows)
text += ["## Products on one core", ""]
text += table(
    ["case", "ms", "of the core's multiply-adds"],
    [[case, number(ms), f"{share[case, 1]:.0f} %"] for (case, ranks), ms in ours.items() if case.startswith("gemm")],
)
text += ["## Collectives, f32 unless said, µs", "", "Bytes are those of the whole tensor. Wrong elements: 0 everywhere, or the bench fails.", ""]
text += table(
    ["operation", "ranks", "bytes", "threads", "gloo, 2 processes", "gloo : threads"],
    [
        [op if dtype == "f32" else f"{op}, {dtype}", str(ranks), str(size), number(us)]
        + [number(gloo_us.get((op, ranks, size)) if dtype == "f32" else None)]
        + [ratio(gloo_us.get((op, ranks, size)) if dtype == "f32" else None, us)]
        for (op, ranks, dtype, size), us in threads_us.items()
    ],
)
text += ["This compares threads that share memory with processes that do not, which is the purpose of the transport. It says nothing about gloo on a network.", ""]
text += [f"![times of layers]({name}.png)", ""]
(results / f"{name}.md").write_text("\n".join(text))

shown = [case for case in cases if any((case, mode) in torch_ms for mode in modes)]
figure, axes = plt.subplots(figsize=(10, 0.9 * len(shown) + 1.2))
bars = [("shardwise, 1 rank", "#9ecae1", lambda case: ours.get((case, 1))), ("shardwise, 2 ranks", "#08519c", lambda case: ours[case, 2])]
bars += [
    (mode.replace("torch", "PyTorch"), colour, lambda case, mode=mode: torch_ms.get((case, mode)))
    for mode, colour in zip(modes, ["#fdd0a2", "#fd8d3c", "#a63603"])
]
for at, (label, colour, value) in enumerate(bars):
    # Times relative to two ranks, so that short and long cases are comparable.
    heights = [(value(case) or 0) / ours[case, 2] for case in shown]
    axes.barh([row + 0.16 * (at - 2) for row in range(len(shown))], heights, 0.15, label=label, color=colour)
axes.set_yticks(range(len(shown)), [f"{case}\n{ours[case, 2]:.3g} ms" for case in shown])
axes.invert_yaxis()
axes.axvline(1, color="black", linewidth=0.8)
axes.set_xlabel("time, as a multiple of shardwise on 2 ranks (shorter is faster)")
axes.set_title(f"{processor()}, {today}, commit {at_commit}")
axes.legend(fontsize=8)
figure.tight_layout()
figure.savefig(results / f"{name}.png", dpi=110)
print(results / f"{name}.md")
