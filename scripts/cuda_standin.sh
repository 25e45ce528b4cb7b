#!/bin/sh
# Runs a command on a machine without a GPU as if it had eight, with a stand-in for the CUDA driver,
# NVRTC, cuBLASLt and NCCL. For tests.
#   scripts/cuda_standin.sh COMMAND...
# CUDA_STANDIN_SEED=n delays the streams' work at random; tests/cuda_standin/src/lib.rs lists the
# other variables. The libraries are in a separate folder, so that no other program finds them.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
cargo build --quiet --release --manifest-path "$root/Cargo.toml" -p cuda-standin
stage=$target/cuda_standin
# Images refer to kernels that this library has compiled.
images=$stage/images-$(cksum < "$target/release/libcuda_standin.so" | cut -d ' ' -f 1)
mkdir -p "$stage/kernels" "$images"
for name in libcuda.so libcuda.so.1 libnvrtc.so libnvrtc.so.13 libcublasLt.so libcublasLt.so.13 libnccl.so.2; do
    ln -sf "$target/release/libcuda_standin.so" "$stage/$name"
done
export CUDA_STANDIN_CACHE="$stage/kernels" SHARDWISE_CACHE="$images" SHARDWISE_CUDA_LIBRARIES="$stage"
LD_LIBRARY_PATH=$stage${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$@"
