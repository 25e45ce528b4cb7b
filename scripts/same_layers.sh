#!/usr/bin/env bash
# Compares the bits of every layer's outputs and gradients (examples/layer_bits.rs) on this machine
# with those of another commit that has the example. Prints the lines that differ, and fails if
# there are any.
#   scripts/same_layers.sh COMMIT
set -euo pipefail
cd "$(dirname "$0")/.."
base=$(mktemp -d)
trap 'git worktree remove --force "$base/tree" 2> /dev/null || true; rm -rf "$base"' EXIT
git worktree add --quiet --detach "$base/tree" "$1"
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
# Older commits have it as an example of the root package.
name=$([ -e "$base/tree/examples/Cargo.toml" ] && echo --bin || echo --example)
(cd "$base/tree" && CARGO_TARGET_DIR=$target/same_layers cargo run --quiet --release "$name" layer_bits > "$base/before")
cargo run --quiet --release --bin layer_bits > "$base/after"
diff "$base/before" "$base/after" && echo "$(wc -l < "$base/after") lines of hashes: the same bits"
