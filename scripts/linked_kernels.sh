#!/usr/bin/env bash
# Fails if a program compiles kernels of the CPU by itself, rather than link to those that were compiled with the crate
# (src/kernels/compiled.rs). Takes an example that uses many layers and elements.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -f target/release/examples/layer_bits-*.o
cargo rustc -q --release --example layer_bits -- --emit=obj -C codegen-units=1
object=$(ls target/release/examples/layer_bits-*.o)
# Symbols that the object defines: of a kernel, `<… for …::Cpu>::name`.
kernels=$(nm --defined-only --demangle "$object" | grep -E 'shardwise::kernels::.*cpu::.*for shardwise::device::cpu::Cpu>::' || true)
if [ -n "$kernels" ]; then
    echo "kernels that layer_bits compiles by itself:"
    echo "$kernels"
    exit 1
fi
# A name that nothing has any more would be found nowhere: kernels have to be among what the object links to.
linked=$(nm --undefined-only --demangle "$object" | grep -cE 'shardwise::kernels::.*cpu::.*for shardwise::device::cpu::Cpu>::')
echo "layer_bits links to $linked kernels of the CPU and compiles none"
