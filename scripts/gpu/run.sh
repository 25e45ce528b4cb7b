#!/usr/bin/env bash
# run.sh - runs pack.sh's archive on a machine with a GPU: a check that anything runs, the kernels'
# tests, the benches and torch's, compute-sanitizer on small cases, and the suite, one process per
# test. It writes $OUT/result.json and result.md after every step, so that a run that is ended early
# leaves its results so far.
#   OUT=FOLDER   the folder of the results (./results)
#   DEADLINE=n   seconds for the whole run (280; 60 with QUICK)
#   QUICK=1      small shapes, and a few tests of each kind: checks that every step runs
#   JOBS=n       concurrent tests (6)
#   STEPS="..."  the steps in order (check kernels bench torch sanitizer suite ranks invariant)
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${OUT:=$here/results}/logs"
out=$(cd "$OUT" && pwd)
cd "$here" || exit 1
deadline=${DEADLINE:-$([ -n "${QUICK:-}" ] && echo 60 || echo 280)}
jobs=${JOBS:-6}

# Adds pip's libraries after those that the caller has put on the path.
site=$(python3 -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for lib in "$site"/nvidia/*/lib; do
    [ -d "$lib" ] && LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$lib"
done
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:-}" SHARDWISE_TEST_DATA="$here/tests-data" SHARDWISE_REQUIRE_GPU=1
export SHARDWISE_CACHE="${SHARDWISE_CACHE:-$here/cache}" RUST_BACKTRACE=0
PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer

current=''
report() { python3 report.py "$out" "$@"; }
finish() {
    trap - EXIT TERM INT
    # Running processes would keep the caller's pipe open.
    kill $(jobs -p) 2> /dev/null
    [ -z "$current" ] || report --step "$current" cut-off $((SECONDS - began))
    report --end || exit 1
    exit 0
}
trap finish EXIT TERM INT
left() { echo $((deadline - SECONDS)); }

# step NAME LIMIT COMMAND... : runs a command for at most LIMIT seconds and the remaining time.
# Stores its output and its exit code.
step() {
    local name=$1 limit=$2 code
    shift 2
    [ "$limit" -gt "$(left)" ] && limit=$(left)
    if [ "$limit" -lt 5 ]; then
        report --step "$name" not-run 0
        return 1
    fi
    current=$name began=$SECONDS
    echo "== $name (at $began s, at most $limit s)"
    # In the background, so that this script handles a signal at once.
    timeout -k 5 "$limit" "$@" > "$out/logs/$name.log" 2>&1 &
    wait $!
    code=$?
    tail -n 3 "$out/logs/$name.log"
    current=''
    report --step "$name" "$code" $((SECONDS - began))
    return $code
}

# Runs one test in its own process, so that an illegal address does not end other tests.
one_test() {
    local log="$out/logs/test.${1//::/.}.log" begin=$SECONDS code
    timeout --foreground -k 5 "${TEST_SECONDS:-60}" $UNDER ./test-cuda --exact "$1" --test-threads 1 --nocapture > "$log" 2>&1
    code=$?
    # A test that lacks GPUs or a library succeeds and prints that it was not run.
    [ $code = 0 ] && grep -qi 'not run' "$log" && code=not-run
    echo "$STEP $1 $code $((SECONDS - begin))" >> "$out/tests.txt"
    case $code in 0) rm "$log" ;; *) tail -n 4 "$log" ;; esac
}
export -f one_test
export out

# tests STEP LIMIT PATTERN [UNDER...]: runs the tests whose names match, several at a time.
tests() {
    local name=$1 limit=$2 pattern=$3 pick=cat
    shift 3
    [ -n "${QUICK:-}" ] && pick='awk NR%9==1'
    ./test-cuda --list --format terse 2> /dev/null | sed -n 's/: test$//p' | grep -E "$pattern" | $pick > "$out/logs/$name.names"
    # A step without tests fails.
    [ -s "$out/logs/$name.names" ] || { report --step "$name" no-tests 0; return 1; }
    STEP=$name UNDER="$*" step "$name" "$limit" xargs -a "$out/logs/$name.names" -P "$jobs" -I{} bash -c 'one_test {}'
}

run_check() { step check 120 ./example-gpu_check; }
run_kernels() { tests kernels 60 '^(kernels|device|quantized)::'; }
run_bench() { step bench 60 ./bench-gpu --bench --json "$out/bench.jsonl" ${QUICK:+--quick}; }
run_torch() {
    python3 -c 'import importlib.util as util, sys; sys.exit(util.find_spec("torch") is None)' || {
        report --step torch not-found 0
        return
    }
    step torch 70 python3 gpu_torch.py --json "$out/torch.jsonl" ${QUICK:+--quick}
}
run_sanitizer() {
    command -v compute-sanitizer > /dev/null || { report --step memcheck not-found 0; return; }
    step memcheck 40 compute-sanitizer --tool memcheck --error-exitcode 9 ./example-gpu_check --kernels
    step racecheck 40 compute-sanitizer --tool racecheck --error-exitcode 9 ./example-gpu_check --kernels
}
run_suite() { tests suite 100 '^(layers|block|fork|models|decoding|training|optim|vocabulary|exact|overlap|disagree|nccl)::'; }
# Runs several NCCL ranks on one GPU, with few blocks each, so that all their kernels are resident.
run_ranks() {
    # Compares as text: 2.30 and later.
    if [[ ! $(sed -n 's/^NCCL //p' "$out/logs/check.log") > 2.3 ]]; then
        report --step ranks needs-NCCL-2.30 0
        return
    fi
    NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 NCCL_NVLS_ENABLE=0 NCCL_CGA_CLUSTER_SIZE=0 \
        NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1 tests ranks 60 '^nccl::'
}
run_invariant() { tests invariant 90 '^invariant::'; }

rm -f "$out"/{tests.txt,steps.txt,bench.jsonl,torch.jsonl}
for name in ${STEPS:-check kernels bench torch sanitizer suite ranks invariant}; do
    # If the check fails, no later step can succeed.
    "run_$name" || [ "$name" != check ] || break
done
