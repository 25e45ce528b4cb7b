#!/usr/bin/env bash
# Fails if a program compiles CPU kernels instead of linking to those in the crate
# (src/kernels/compiled.rs). Checks an example that uses many layers and elements.
set -euo pipefail
cd "$(dirname "$0")/.."
rm -f target/release/deps/layer_bits-*.o
# Cargo would not compile an unchanged example again, and so not write the object.
touch examples/layer_bits.rs
# As in the crate of a user: at a lower level rustc would link to other generic functions as well.
cargo rustc -q --release -p examples --bin layer_bits -- --emit=obj -C codegen-units=1 -C opt-level=3
object=$(ls target/release/deps/layer_bits-*.o)
# The symbol of a kernel that the object defines: `<… for …::Cpu>::name`.
kernels=$(nm --defined-only --demangle "$object" | grep -E 'shardwise::kernels::.*cpu::.*for shardwise::device::cpu::Cpu>::' || true)
if [ -n "$kernels" ]; then
    echo "kernels that layer_bits compiles by itself:"
    echo "$kernels"
    exit 1
fi
# Also fails if the pattern above no longer matches kernels: the object must link to some.
linked=$(nm --undefined-only --demangle "$object" | grep -cE 'shardwise::kernels::.*cpu::.*for shardwise::device::cpu::Cpu>::')
echo "layer_bits links to $linked kernels of the CPU and compiles none"
