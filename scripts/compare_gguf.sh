#!/usr/bin/env bash
# Times quantized models in shardwise and llama.cpp on this machine, alternating on the same files, and writes
# benches/results/<date>-gguf-<processor>.md.
#   scripts/compare_gguf.sh [ROUNDS]      (5 by default; a round takes about four minutes on two cores)
# Installs xllamacpp and gguf from PyPI into target/peers. Close other programs first: llama.cpp's threads wait in loops, so that a busy
# machine slows them down many times. The load is recorded with the results.
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-5}
peers=${PEERS_VENV:-target/peers}
work=target/compare_gguf
files=target/gguf
export PYTHONDONTWRITEBYTECODE=1
if [ ! -x "$peers/bin/python" ]; then
    python3 -m venv "$peers"
fi
"$peers/bin/python" -c 'import xllamacpp, gguf' 2> /dev/null || "$peers/bin/pip" install --quiet xllamacpp gguf
scripts/fetch_model.sh smollm2
for type in F32 Q8_0 Q4_1 Q4_0; do
    [ -f "$files/$type.gguf" ] ||
        "$peers/bin/python" scripts/peers/requantize.py target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$files" "$type"
done
rm -rf "$work"
mkdir -p "$work" benches/results
cargo build --release -p text-examples --bin perplexity
cargo bench --bench gguf --no-run --message-format=json-render-diagnostics > "$work/build.json"
bench=$(python3 -c '
import json, sys
paths = [a["executable"] for a in map(json.loads, open(sys.argv[1])) if a.get("executable") and a["target"]["name"] == "gguf"]
print(paths[-1])' "$work/build.json")
perplexity=${CARGO_TARGET_DIR:-target}/release/perplexity

ours() { "$bench" --bench "$files/$1.gguf" --ranks 1,2 --rounds 3 --json "$work/shardwise.json"; }
theirs() {
    for threads in 1 2; do
        "$peers/bin/python" scripts/peers/llama_cpp.py speed "$files/$1.gguf" --threads "$threads" --rounds 3 --json "$work/llama_cpp.json"
    done
}
for round in $(seq "$rounds"); do
    echo "== round $round of $rounds"
    cut -d ' ' -f 1-3 /proc/loadavg >> "$work/load"
    for type in Q8_0 Q4_0 Q4_1; do
        # Neither is always the first.
        if ((round % 2)); then
            ours "$type" && theirs "$type"
        else
            theirs "$type" && ours "$type"
        fi
    done
    ours F32
done

echo "== perplexity"
cat DESIGN.md docs/*.md > "$work/text.md"
# Each line: the name of a file, and the options.
while read -r type options; do
    # shellcheck disable=SC2086 # several options
    line=$("$perplexity" "$files/$type.gguf" "$work/text.md" --ranks 2 --window 256 --windows 40 $options)
    weights="$type${options:+ $options}"
    echo "$weights: $line"
    python3 -c '
import json, re, sys
print(json.dumps({"weights": sys.argv[1], "perplexity": float(re.match(r"perplexity ([0-9.]+) ", sys.argv[2])[1])}))' \
        "$weights" "$line" >> "$work/perplexity.json"
done << 'CASES'
F32
Q8_0
Q4_1
Q4_0
Q8_0 --activations exact
Q4_1 --activations exact
Q4_0 --activations exact
F32 --quantize int8
F32 --quantize int4
F32 --quantize int8 --by-row
CASES
"$peers/bin/python" scripts/peers/report_gguf.py "$work" benches/results
