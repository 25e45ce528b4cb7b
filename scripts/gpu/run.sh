#!/usr/bin/env bash
# run.sh - on a GPU machine, in the folder that pack.sh made: runs the suite, the suite under compute-sanitizer, several NCCL
# ranks on one GPU, and the benches in turn with torch, and writes results/<gpu>-<date>.json.
#   OUT=FOLDER          where results go
#   QUICK=1             benches of small shapes, once: to see whether all of it runs
#   STEP_SECONDS=n      after which a step is given up (3600)
#   GPU_TFLOPS, GPU_TBPS the limits of the GPU (790 and 4.3, an H200's)
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${OUT:-$here/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.log
cd "$here" || exit 1

site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for lib in "$site"/nvidia/*/lib; do
    [ -d "$lib" ] && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$lib"
done
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" SHARDWISE_TEST_DATA="$here/tests-data"
export CUDA_MODULE_LOADING=EAGER CUDA_DEVICE_MAX_CONNECTIONS=32
python3 report.py versions > "$out/versions.json"
# Several ranks on one GPU (NCCL 2.30 or later): few blocks each, so that all ranks' kernels are resident at once.
nccl=$(python3 report.py nccl)
if [ "$nccl" -ge 23000 ]; then
    export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 NCCL_NVLS_ENABLE=0 NCCL_CGA_CLUSTER_SIZE=0
    export NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
fi

# step NAME COMMAND... : runs it, keeps its output, its exit code and how long it took.
step() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    timeout "${STEP_SECONDS:-3600}" "$@" > "$out/$name.log" 2>&1
    local code=$?
    echo "exit code $code after $((SECONDS - begin)) s" >> "$out/$name.log"
    tail -n 3 "$out/$name.log"
}

step suite ./test-cuda --test-threads 1
if command -v compute-sanitizer > /dev/null; then
    step memcheck compute-sanitizer --tool memcheck --error-exitcode 9 ./test-cuda --test-threads 1
fi
step ranks ./test-cuda --test-threads 1 nccl::
small=(--hidden 64 --heads 4 --ffn 128 --tokens 16 --batch 1 --repeat 1)
step block ./example-transformer_block --device cuda --ranks 1 ${QUICK:+"${small[@]}"}
# The shell gives a rank its variables as torchrun would.
RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 step torchrun ./example-processes --device cuda
step bench-gpu ./bench-gpu --bench ${QUICK:+--quick}
if python3 -c 'import torch' 2> /dev/null; then
    step bench-torch python3 gpu_torch.py
fi
step bench-gpu-again ./bench-gpu --bench ${QUICK:+--quick}
exec python3 report.py results "$out"
