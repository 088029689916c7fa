#!/bin/sh
# Runs all that has to be seen on a GPU, and writes a page of results into the folder that OUT names, or this one. It is
# the program `run` in the folder that `make gpu-check` makes, which is carried to a machine with a GPU as a whole; there
# it needs a driver, for the comparison with PyTorch also that and transformers, and no network.
#
#   run         everything: a quarter of an hour or so
#   run tiny    what takes seconds, for a machine with a stand-in for libcuda
set -u
here=$(cd "$(dirname "$0")" && pwd)
size=${1:-whole}
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || gpu="no GPU: a stand-in for libcuda"
name=$(printf '%s' "$gpu" | sed 's/,.*//; s/[^A-Za-z0-9][^A-Za-z0-9]*/-/g' | tr '[:upper:]' '[:lower:]')
page=${OUT:-$here}/$(date -u +%Y-%m-%d)-$name.md
log=${OUT:-$here}/gpu-check.log
failed=0
: >"$log"

say() { printf '%s\n' "$*" | tee -a "$page"; }

# A program's verdict, as a line of the page; what it printed is in the log.
check() { # check <what> <program> <arguments>
    what=$1
    shift
    printf '\n== %s: %s\n' "$what" "$*" >>"$log"
    "$@" >"$log.part" 2>&1
    code=$?
    cat "$log.part" >>"$log"
    if [ $code -eq 0 ]; then
        say "- $what: passed. $(grep -E '^test result|ERROR SUMMARY|RACECHECK SUMMARY' "$log.part" | tail -n 1)"
    else
        failed=1
        say "- **$what: failed** (exit code $code):"
        say '```'
        say "$(grep -vE '^test .* ok$' "$log.part" | tail -n 40)"
        say '```'
    fi
}

# A program's output, as a part of the page.
part() { # part <title> <program> <arguments>
    title=$1
    shift
    say ""
    say "## $title"
    say ""
    printf '\n== %s: %s\n' "$title" "$*" >>"$log"
    if "$@" >"$log.part" 2>>"$log"; then
        say "$(cat "$log.part")"
    else
        failed=1
        say "**failed**; what it said is in the log. Until then:"
        say "$(cat "$log.part")"
    fi
}

: >"$page"
say "# The CUDA backend on $gpu"
say ""
say "## Correctness"
say ""
# In this order: the first says whether fragments lie in registers where the emulation has them.
check "tensor cores and prompts" "$here/cuda_prefill" --ignored cuda_device --test-threads 1
check "every operation beside the reference" "$here/conformance" --ignored cuda_device --test-threads 1
check "recorded and replayed steps" "$here/cuda_graphs" --ignored cuda_device --test-threads 1
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
if [ "$size" = whole ] && [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        for program in cuda_prefill cuda_graphs; do
            check "$tool of $program" timeout 240 "$sanitizer" --tool "$tool" --error-exitcode 1 \
                "$here/$program" --ignored cuda_device --test-threads 1
        done
    done
elif [ "$size" = whole ]; then
    say "- compute-sanitizer is not there: not run"
fi

if [ "$size" = tiny ]; then
    part "Kernels, tiny" "$here/kernels" tiny
else
    part "Kernels" "$here/kernels"
    if python3 -c 'import torch, transformers' 2>/dev/null; then
        part "Beside PyTorch" python3 "$here/torch_qwen3.py" --engine "$here/engine" --tokenizer "$here/tokenizer"
    else
        say ""
        say "PyTorch and transformers are not there: the engine is not compared with them."
    fi
fi
rm -f "$log.part"
echo "written to $page; all that was printed is in $log"
exit $failed
