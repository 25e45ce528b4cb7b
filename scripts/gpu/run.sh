#!/usr/bin/env bash
# run.sh - on a GPU machine, in the folder that pack.sh made: runs the suite, the suite under compute-sanitizer, several NCCL
# ranks on one GPU, and the benches, and writes results/<gpu>-<date>.json.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$here/results}
mkdir -p "$out"
cd "$here" || exit 1

# Several ranks on one GPU (NCCL 2.30 or later): few blocks each, so that all ranks' kernels are resident at once.
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 NCCL_NVLS_ENABLE=0 NCCL_CGA_CLUSTER_SIZE=0
export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32
site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null || true)
for lib in "$site"/nvidia/*/lib; do
    [ -d "$lib" ] && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$lib"
done
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" SHARDWISE_TEST_DATA="$here/tests-data"

codes=()
# step NAME COMMAND... : runs it, keeps its output and its exit code.
step() {
    local name=$1
    shift
    echo "== $name"
    "$@" > "$out/$name.log" 2>&1
    local code=$?
    tail -n 3 "$out/$name.log"
    codes+=("$name=$code")
}

step suite ./test-cuda --test-threads 1
if command -v compute-sanitizer > /dev/null; then
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 9 ./test-cuda --test-threads 1 kernels device
fi
step block ./example-transformer_block --device cuda --ranks 1
step bench-gpu ./bench-gpu --bench
step bench-torch python3 gpu_torch.py
step bench-gpu-again ./bench-gpu --bench

gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '--')
python3 - "$out/${gpu:-none}-$(date +%F).json" "$out" "${codes[@]}" << 'PY'
import json, pathlib, subprocess, sys

path, out, codes = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3:]


def words(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def torch():
    return words(sys.executable, "-c", "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.nccl.version())")


result = {
    "commit": pathlib.Path("commit").read_text().split("\n")[:-1],
    "gpu": words("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
    "torch": torch(),
    "exit_codes": dict(code.split("=") for code in codes),
    "benches": {log.stem: log.read_text().splitlines() for log in sorted(out.glob("bench-*.log"))},
}
pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
print(path)
PY
for code in "${codes[@]}"; do
    [ "${code#*=}" = 0 ] || exit 1
done
