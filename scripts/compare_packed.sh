#!/usr/bin/env bash
# Runs SmolLM2-135M, quantized as GPTQ, AWQ, compressed-tensors and FP8 checkpoints are, on 1 and 2 ranks, compares the texts of 1, 3 and
# 9 ranks, and writes benches/results/<date>-packed-<processor>.md. Close other programs first. Takes about five minutes on two cores.
#   scripts/compare_packed.sh
# Installs gguf from PyPI into target/peers.
set -euo pipefail
cd "$(dirname "$0")/.."
peers=${PEERS_VENV:-target/peers}
work=target/packed
[ -x "$peers/bin/python" ] || python3 -m venv "$peers"
"$peers/bin/python" -c 'import gguf' 2> /dev/null || "$peers/bin/pip" install --quiet gguf
scripts/fetch_model.sh smollm2
cargo build --release -p text-examples --bin generate --bin perplexity
programs=${CARGO_TARGET_DIR:-target}/release
mkdir -p "$work" benches/results
cat DESIGN.md docs/*.md > "$work/text.md"
prompt=$'<|im_start|>user\nWhere is the Eiffel Tower?<|im_end|>\n<|im_start|>assistant\n'
processor=$(grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2 | sed 's/^ *//')
name=$(echo "$processor" | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9]+/-/g; s/-(cpu|[0-9]+-core).*//; s/-$//')
report=benches/results/$(date +%F)-packed-$name.md
{
    echo "# SmolLM2-135M-Instruct in formats of quantized folders"
    echo
    echo "\`scripts/compare_packed.sh\` at $(git rev-parse --short HEAD), $processor, $(nproc) cores. Weights are those of the published"
    echo "Q4_1 file, rounded to nearest; the embedding, which is also the head, is f32 in memory. Best of 3 runs of 64 tokens."
    echo
    echo '| folder | MiB of weights | tokens/s, 1 rank | 2 ranks | perplexity |'
    echo '|---|---:|---:|---:|---:|'
} > "$report"
for kind in f32 ct8 ct4 awq gptq fp8; do
    folder=$work/$kind
    [ -f "$folder/tokenizer.json" ] ||
        "$peers/bin/python" scripts/peers/pack.py target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf "$folder" "$kind"
    for ranks in 1 3 9; do
        "$programs/generate" "$folder" --prompt "$prompt" --invariant 9 --tokens 24 --ranks "$ranks" > "$work/$kind.$ranks" 2> "$work/log"
        cmp "$work/$kind.1" "$work/$kind.$ranks"
    done
    [ -s "$work/$kind.1" ]
    best() {
        for _ in 1 2 3; do
            "$programs/generate" "$folder" --tokens 64 --ranks "$1" 2>&1 > /dev/null | tee "$work/log" |
                sed -nE 's/.* wrote [0-9]+ at ([0-9]+) a second.*/\1/p'
        done | sort -n | tail -n 1
    }
    one=$(best 1)
    weights=$(sed -nE 's/.*MiB of all weights a rank: ([0-9.]+).*/\1/p' "$work/log")
    two=$(best 2)
    perplexity=$("$programs/perplexity" "$folder" "$work/text.md" --ranks 2 --window 256 --windows 40 | sed -nE 's/^perplexity ([0-9.]+) .*/\1/p')
    [ -n "$one" ] && [ -n "$two" ] && [ -n "$perplexity" ]
    echo "| $kind | $weights | $one | $two | $perplexity |" | tee -a "$report"
done
echo "$report"
