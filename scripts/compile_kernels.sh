#!/usr/bin/env bash
# Compiles cuda/*.cu with NVIDIA's compilers for every supported architecture. Fails on register
# spills and local memory.
#   scripts/compile_kernels.sh [FILE_FOR_THE_REPORT]
# Installs pinned compilers from PyPI into target/nvcc; nothing else of CUDA is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=target/nvcc
report=${1:-target/kernels.txt}
if [ ! -e "$tools/nvidia/cu13/lib/libnvrtc.so.13" ]; then
    python3 -m pip install --quiet --no-deps --upgrade --target "$tools" nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvrtc==13.0.88
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$report")"
echo "kernels by architecture, $("$tools/nvidia/cu13/bin/nvcc" --version | tail -n 2 | head -n 1)" > "$report"
printf '%-28s %8s %14s %14s %14s %14s\n' file kernels 'most registers' 'spilled bytes' 'stack bytes' 'shared bytes' >> "$report"
export tools work

# compile ARCH FILE : compiles a file for an architecture, and stores the compiler's output.
compile() {
    local arch=$1 file=$2 contracts=false log
    log=$work/$arch.$(basename "$file")
    # The options of program.rs: only attention may contract products and sums.
    case $file in cuda/attention.cu | cuda/flash.cu) contracts=true ;; esac
    "$tools/nvidia/cu13/bin/nvcc" -arch="$arch" -std=c++17 --fmad=$contracts -cubin -Xptxas -v -o "$log.cubin" "$file" \
        > "$log" 2>&1 || { cat "$log"; return 1; }
}
export -f compile
for arch in sm_80 sm_90 sm_100; do printf "$arch %s\n" cuda/*.cu; done |
    xargs -P "$(nproc)" -L 1 bash -c 'compile "$@"' compile

bad=0
for arch in sm_80 sm_90 sm_100; do
    for file in cuda/*.cu; do
        log=$work/$arch.$(basename "$file")
        largest() { grep -oE "$1" "$log" | grep -oE '[0-9]+' | sort -n | tail -n 1 || true; }
        kernels=$(grep -c 'Compiling entry function' "$log")
        spilled=$(largest '[0-9]+ bytes spill (stores|loads)')
        stack=$(largest '[0-9]+ bytes stack frame')
        registers=$(largest 'Used [0-9]+ registers')
        shared=$(largest '[0-9]+ bytes smem')
        printf '%-28s %8s %14s %14s %14s %14s\n' "$arch $(basename "$file")" "$kernels" "$registers" "$spilled" "$stack" "${shared:-0}" >> "$report"
        if [ "$spilled" != 0 ] || [ "$stack" != 0 ]; then
            echo "$arch $file spills or uses local memory" >&2
            bad=1
        fi
    done
done
cat "$report"
exit $bad
