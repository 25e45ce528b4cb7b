#!/usr/bin/env bash
# Opens a page of `shardwise plan --html` in headless Chromium. Fails if its charts are not in the
# document, or if the screenshot is empty.
#   scripts/plan_page.sh PAGE SCREENSHOT
# Needs chromium.
set -euo pipefail
page=$(realpath "$1")
shot=$2
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
browse() {
    timeout 120 chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --user-data-dir="$profile" --window-size=1400,1800 "$@" "file://$page" \
        2> "$profile/errors" || { cat "$profile/errors" >&2; return 1; }
}
rm -f "$shot"
browse --screenshot="$(realpath -m "$shot")"
browse --dump-dom > "$profile/dom"
charts=$(grep -o '<svg' "$profile/dom" | wc -l)
test "$charts" -eq 2 || { echo "$page has $charts charts instead of 2" >&2; exit 1; }
# A PNG begins with these bytes. A page without text or charts is compressed to less than 20 kB.
test "$(head -c 4 "$shot" | od -An -tx1 | tr -d ' \n')" = 89504e47
bytes=$(stat -c %s "$shot")
test "$bytes" -gt 20000 || { echo "$shot has only $bytes bytes" >&2; exit 1; }
echo "$page: $charts charts, a screenshot of $bytes bytes"
