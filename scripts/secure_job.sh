#!/usr/bin/env bash
# The example of docs/security.md: a job of four processes with keys, roles and audit logs; processes that are refused, and logs that were
# changed. Expects `shardwise` and `processes` where cargo builds them (--features cli --bin shardwise --example processes).
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-$PWD/target}/release
page=$PWD/docs/security.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
PATH=$bin:$bin/examples:$PATH

# Runs the page's blocks, so that the page cannot be wrong.
awk '/^## Example/ { example = 1 } /^## Certificates/ { example = 0 }
     /^```$/ { block = 0 } example && block { print } /^```sh$/ { block = 1 }' "$page" > commands.sh
test "$(wc -l < commands.sh)" -gt 20
# A port of this run's own.
sed -i "s/MASTER_PORT=29500/MASTER_PORT=$((20000 + RANDOM % 10000))/" commands.sh
bash -euo pipefail commands.sh > out 2> err || { cat out err; exit 1; }
cat out
grep -q "^job train-7, epochs 0 to 9" out
test "$(grep -c '^rank [0-3] of 4: ' out)" = 4
grep -q 'network, TLS 1.3' out
test "$(tail -n 1 out)" = intact
test -s model/model.safetensors
for rank in 0 1 2 3; do
    # No part of a private key is in a record or a log, or was printed.
    secret=$(sed -n 2p "rank$rank.pem" | cut -c 24-)
    test ${#secret} -gt 30
    if grep -rqF -- "$secret" records audit out err; then echo "a key of rank $rank was written"; exit 1; fi
done

# Logs that were changed: exit code 1, and 3 if only the end is missing.
log=audit/train-7-rank2.audit.jsonl
found() {
    code=$1
    cp -r audit changed
    sed -i "$2" "changed/${log#audit/}"
    status=0
    shardwise audit verify changed --membership membership.json --owner owner.pub > said || status=$?
    test "$status" = "$code" || { cat said; echo "exit code $status, not $code, after: $2"; exit 1; }
    echo "found: $(grep -m 1 'rank2.audit.jsonl' said | sed 's/^changed.//' | cut -c 1-150)"
    rm -r changed
}
found 1 '2s/TLS 1.3/plaintext/'
found 1 3d
found 1 4p
found 3 '$d'
found 1 '4,$d'
cp -r audit changed
rm changed/train-7-rank3.audit.jsonl
if shardwise audit verify changed > said; then cat said; exit 1; fi
grep 'rank 3 of 4 is missing' said

# Rank 2's key in the place of rank 3's; a list that was changed.
refused() {
    words=$1
    shift
    if env "$@" processes > said 2>&1; then cat said; exit 1; fi
    grep -q -- "$words" said || { cat said; exit 1; }
    echo "refused: $(head -n 1 said | cut -c 1-150)"
}
job=(SHARDWISE_MEMBERSHIP=membership.json SHARDWISE_OWNER=owner.pub WORLD_SIZE=4 LOCAL_WORLD_SIZE=1 LOCAL_RANK=0
    MASTER_ADDR=localhost MASTER_PORT=29500 SHARDWISE_JOB=train-7)
refused 'cannot be used for rank 3' "${job[@]}" RANK=3 SHARDWISE_KEY=rank2.pem
refused 'this job is `train-8`' "${job[@]}" RANK=3 SHARDWISE_KEY=rank3.pem SHARDWISE_JOB=train-8
refused 'sends plaintext between machines' "${job[@]}" RANK=3 SHARDWISE_POLICY=require-encrypted SHARDWISE_TOKEN=t \
    SHARDWISE_MEMBERSHIP= SHARDWISE_OWNER= SHARDWISE_KEY=
# Without a checkpointer nobody saves, and every rank says so.
sed 's/checkpointer/trainer/' membership.json > trainers.json
shardwise membership sign trainers.json --key owner.pem
for rank in 0 1 2 3; do
    env "${job[@]}" SHARDWISE_MEMBERSHIP=trainers.json SHARDWISE_AUDIT_DIR=audit RANK=$rank SHARDWISE_KEY=rank$rank.pem \
        processes --save nobody > "said$rank" 2>&1 &
done
wait
for rank in 0 1 2 3; do
    grep -q 'save: every rank of group `world` has the role `trainer`' "said$rank" || { cat "said$rank"; exit 1; }
done
test ! -e nobody
echo "refused: $(grep -h save: said2)"
# The refusals are in the logs. Each start needs its own list.
verify() { shardwise audit verify audit --owner owner.pub "$@" > said; }
status=0
verify --membership membership.json || status=$?
test "$status" = 3
grep -q 'was not given' said
status=0
verify --membership membership.json --membership trainers.json || status=$?
# The ranks have failed, so nobody has witnessed their ends.
test "$status" = 3
if grep -q 'was not given' said; then cat said; exit 1; fi
test "$(grep -h '"event":"deny"' audit/*.jsonl | wc -l)" = 4
refused 'cannot be used for rank 3: the role of the key' "${job[@]}" RANK=3 SHARDWISE_KEY=ann.pem
sed -i 's/"rank": 3/"rank": 7/' membership.json
refused 'has not signed' "${job[@]}" RANK=3 SHARDWISE_KEY=rank3.pem
