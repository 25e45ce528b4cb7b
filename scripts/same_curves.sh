#!/usr/bin/env bash
# Trains the same small model with invariant sums on every tensor-parallel size and on meshes of the
# same batch. Compares losses (loss.csv) and weights (model.safetensors) byte by byte.
#   scripts/same_curves.sh [TRAIN_TEXT]
# TRAIN_TEXT is the built example; by default the script builds it.
set -euo pipefail
cd "$(dirname "$0")/.."
program=${1:-}
if [ -z "$program" ]; then
    cargo build --quiet --release -p text-examples --bin train_text
    program=${CARGO_TARGET_DIR:-target}/release/train_text
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# dp, tp, microbatches per replica: four in the whole batch.
meshes="1,1,4 1,2,4 1,3,4 1,4,4 1,5,4 1,6,4 1,7,4 1,8,4 2,1,2 4,1,1 2,2,2 4,2,1"
files=0
for dtype in f32 bf16; do
    want=
    for mesh in $meshes; do
        IFS=, read -r dp tp microbatches <<< "$mesh"
        for stream in "" --sequence-parallel; do
            got=$out/$dtype-$mesh$stream
            "$program" --invariant 8 --heads 8 --hidden 64 --layers 2 --context 32 --batch 8 --steps 6 --every 3 \
                --dropout 0.1 --dtype "$dtype" --dp "$dp" --tp "$tp" --microbatches "$microbatches" $stream \
                --out "$got" > "$got.log" 2>&1 || { cat "$got.log"; exit 1; }
            want=${want:-$got}
            for file in loss.csv model.safetensors; do
                cmp "$want/$file" "$got/$file"
                files=$((files + 1))
            done
        done
    done
    test "$(wc -l < "$want/loss.csv")" -ge 10
done
# Checks that the comparison can fail: fast sums do depend on the number of ranks.
for tp in 1 2; do
    "$program" --heads 8 --hidden 64 --layers 2 --context 32 --batch 8 --steps 6 --every 3 --tp "$tp" --out "$out/fast$tp" \
        > "$out/fast$tp.log" 2>&1
    sed -i 's/^"[^"]*"//' "$out/fast$tp/loss.csv"
done
if cmp --silent "$out/fast1/loss.csv" "$out/fast2/loss.csv"; then
    echo "fast sums have the same bits on 1 and 2 ranks, too: nothing was compared" >&2
    exit 1
fi
echo "$files files on $(wc -w <<< "$meshes") meshes, in f32 and bf16, with and without sequence parallelism: the same bytes"
