#!/usr/bin/env bash
# scripts/gpu/pack.sh FILE.tar.xz - archives everything that run.sh needs on a machine with a GPU:
# the programs, the test data and a kernel cache. That machine needs a driver, cuBLASLt and NVRTC
# (pip's torch includes them), xz and Python 3.10.
#   PRECOMPILE="9.0 10.0"  fills the cache for these compute capabilities; empty: none. Needs pip's
#                          NVRTC, which scripts/compile_kernels.sh fetches.
set -euo pipefail
archive=$(realpath -m "${1:?usage: $0 FILE.tar.xz}")
cd "$(dirname "$0")/../.."
pack=$(mktemp -d)
trap 'rm -rf "$pack"' EXIT

# Builds the tests in their own profile, as for the stand-in, and the rest in the release profile.
{
    cargo test --no-run --features nccl,cli --test cuda --message-format=json-render-diagnostics
    cargo build --release --features nccl,cli --message-format=json-render-diagnostics \
        --example gpu_check --example transformer_block --example processes --bench gpu
} |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    artifact = json.loads(line)
    path = artifact.get("executable")
    if path and artifact["target"]["kind"][0] != "bin":
        kind = artifact["target"]["kind"][0]
        shutil.copy(path, sys.argv[1] + "/" + kind + "-" + artifact["target"]["name"])
' "$pack"
strip "$pack"/{test,example,bench}-*
mkdir "$pack/cache"
nvrtc=$PWD/target/nvcc/nvidia/cu13/lib
for capability in ${PRECOMPILE-9.0 10.0}; do
    if [ ! -e "$nvrtc/libnvrtc.so.13" ]; then
        echo "$0: no NVRTC in $nvrtc: run scripts/compile_kernels.sh first, or set PRECOMPILE=" >&2
        exit 1
    fi
    SHARDWISE_CACHE=$pack/cache SHARDWISE_CUDA_LIBRARIES=$nvrtc LD_LIBRARY_PATH=$nvrtc \
        "$pack/example-gpu_check" --precompile "$capability"
done
cp scripts/gpu/run.sh scripts/gpu/report.py scripts/peers/gpu_torch.py "$pack/"
cp -r tests/data "$pack/tests-data"
git rev-parse HEAD > "$pack/commit"
git diff --quiet HEAD || echo "with changes that are not committed" >> "$pack/commit"
mkdir -p "$(dirname "$archive")"
tar -C "$pack" -cf - . | xz -T0 -4 > "$archive"
size=$(stat -c %s "$archive")
echo "$archive: $((size >> 20)) MiB"
if [ "$size" -gt 50000000 ]; then
    echo "$0: the archive is larger than 50 MB" >&2
    exit 1
fi
