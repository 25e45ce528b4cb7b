#!/usr/bin/env bash
# Generates the same text with a quantized model and invariant sums at several numbers of ranks, and compares it.
#   scripts/fetch_model.sh smollm2 && scripts/same_text.sh [GENERATE]
# GENERATE is the built example; by default the script builds it.
set -euo pipefail
cd "$(dirname "$0")/.."
model=target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
program=${1:-}
if [ -z "$program" ]; then
    cargo build --quiet --release -p text-examples --bin generate
    program=${CARGO_TARGET_DIR:-target}/release/generate
fi
[ -f "$model" ] || { echo "same_text: $model is not there: scripts/fetch_model.sh smollm2 fetches it" >&2; exit 1; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

prompt=$'<|im_start|>user\nWhere is the Eiffel Tower?<|im_end|>\n<|im_start|>assistant\n'
for ranks in 1 2 3 4 5 9; do
    "$program" "$model" --prompt "$prompt" --invariant 9 --tokens 24 --ranks "$ranks" > "$out/$ranks" 2> "$out/log" ||
        { cat "$out/log" >&2; exit 1; }
    cmp "$out/1" "$out/$ranks"
done
# An empty text, or one without the answer, would prove nothing.
grep -q Paris "$out/1" || { echo "same_text: the model does not know where the Eiffel Tower is:" >&2; cat "$out/1" >&2; exit 1; }
echo "24 tokens on 1, 2, 3, 4, 5 and 9 ranks: the same text"
