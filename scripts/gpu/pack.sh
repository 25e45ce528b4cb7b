#!/usr/bin/env bash
# scripts/gpu/pack.sh FOLDER - builds the tests, examples and benches that run.sh runs, and puts them and what else a GPU machine needs
# into FOLDER.
# That machine needs no cargo: a driver, and for the comparison a Python with torch.
set -euo pipefail
out=${1:?usage: $0 FOLDER}
cd "$(dirname "$0")/../.."
mkdir -p "$out"
features=${FEATURES:-nccl}

# Small and stripped; the release profile's code.
export CARGO_PROFILE_RELEASE_DEBUG=none CARGO_PROFILE_RELEASE_STRIP=symbols CARGO_PROFILE_RELEASE_LTO=thin
# What run.sh runs.
run=(--test cuda --example transformer_block --example processes --bench gpu)
cargo build --release --features "$features" "${run[@]}" --message-format=json-render-diagnostics |
    python3 -c '
import json, shutil, sys
out = sys.argv[1]
for line in sys.stdin:
    artifact = json.loads(line)
    path = artifact.get("executable")
    if path:
        kind = artifact["target"]["kind"][0]
        shutil.copy(path, out + "/" + kind + "-" + artifact["target"]["name"])
' "$out"
cp scripts/gpu/run.sh scripts/gpu/report.py scripts/peers/gpu_torch.py "$out/"
cp -r tests/data "$out/tests-data"
git rev-parse HEAD > "$out/commit"
git diff --quiet HEAD || echo "with changes that are not committed" >> "$out/commit"
du -sh "$out"
