#!/usr/bin/env bash
# Times shardwise and PyTorch on this machine, alternating, and writes
# benches/results/<date>-<processor>.md and .png. Then runs scripts/compare_gguf.sh, which does so with llama.cpp.
#   scripts/compare.sh [ROUNDS]      (3 by default; a round takes about five minutes on two cores)
# Installs PyTorch and matplotlib from PyPI into target/peers (several GB on the first run). Close
# other programs first: the machine's state during the run is recorded with the results.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3}
peers=${PEERS_VENV:-target/peers}
work=target/compare
export PYTHONDONTWRITEBYTECODE=1
if [ ! -x "$peers/bin/python" ]; then
    python3 -m venv "$peers"
fi
"$peers/bin/python" -c 'import torch, numpy, matplotlib' 2> /dev/null ||
    "$peers/bin/pip" install --quiet torch numpy matplotlib
rm -rf "$work"
mkdir -p "$work" benches/results
cargo bench --no-run --message-format=json-render-diagnostics > "$work/build.json"
bench() { python3 -c '
import json, sys
paths = [a["executable"] for a in map(json.loads, open(sys.argv[1])) if a.get("executable") and a["target"]["name"] == sys.argv[2]]
print(paths[-1])' "$work/build.json" "$1"; }
collectives=$(bench collectives) layers=$(bench layers) decode=$(bench decode)

for round in $(seq "$rounds"); do
    echo "== round $round of $rounds"
    cut -d ' ' -f 1-3 /proc/loadavg >> "$work/load"
    "$layers" --bench --rounds 3 --invariant 8 --json "$work/layers.json" | tee -a "$work/layers.txt"
    "$decode" --bench --rounds 3 --json "$work/decode.json" | tee -a "$work/decode.txt"
    "$peers/bin/python" scripts/peers/layers_torch.py --rounds 3 --json "$work/torch.json"
    "$collectives" --bench --json "$work/collectives-$round.json" | tee -a "$work/collectives.txt"
    "$peers/bin/python" scripts/peers/collectives_torch.py --json "$work/gloo.json"
done
"$peers/bin/python" scripts/peers/report.py "$work" benches/results
scripts/compare_gguf.sh "$rounds"
