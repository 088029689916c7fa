#!/bin/bash
# Runs all that has to be seen on a GPU, and writes a page of results into the folder that OUT names, or this one. It is
# the program `run` in the folder that `make gpu-check` makes, which is carried as a whole to a machine with a GPU.
# There it needs a driver of release 580 or later, for the comparison with PyTorch also that and transformers (PYTHON
# names the python3 that has them), and no network.
#
#   run         whether the kernels are right and how fast they are, what matters most first, within LIMIT seconds
#               (200); what there is no time for, it says
#   run pair    a decode and a prefill worker, two processes on the GPU: how fast pages move between them, whether they
#               answer as one process does, and what long prompts cost those who are being answered (175)
#   run rest    what stands behind the engine's own checks and speed: beside PyTorch, the sanitizer, larger models (225)
#   run tiny    small shapes, for a machine with a stand-in for libcuda (1800)
#
# The first three, one after the other, fit into ten minutes, of a machine whose time may be short; each writes a page
# of its own, and none repeats what another does. All is written as it comes, to the page and to where it is started:
# whoever is cut off has what was seen until then.
set -u
here=$(cd "$(dirname "$0")" && pwd)
size=${1:-whole}
python=${PYTHON:-python3}
case $size in
whole) limit=${LIMIT:-200} ;;
pair) limit=${LIMIT:-175} ;;
rest) limit=${LIMIT:-225} ;;
tiny) limit=${LIMIT:-1800} ;;
*) echo "usage: run [pair | rest | tiny]" >&2 && exit 2 ;;
esac
# The driver's default: what users will see.
unset CUDA_MODULE_LOADING
# Where containers have the driver, if nobody has told the loader.
if [ -d /usr/local/nvidia ]; then
    export PATH=$PATH:/usr/local/nvidia/bin
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/nvidia/lib64:/usr/local/nvidia/lib
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$gpu" ] || gpu="no GPU: a stand-in for libcuda"
name=$(printf '%s' "$gpu" | sed 's/,.*//; s/[^A-Za-z0-9][^A-Za-z0-9]*/-/g' | tr '[:upper:]' '[:lower:]')
case $size in pair | rest) name=$name-$size ;; esac
page=${OUT:-$here}/$(date -u +%Y-%m-%d)-$name.md
log=${OUT:-$here}/gpu-check-$size.log
# The first run leaves this where the kernels with wgmma err. (Not in OUT, which may be emptied between two runs.)
erring=$here/without-wgmma
# What is of no use afterwards.
work=$(mktemp -d)
failed=0 missing=0 code=0
SECONDS=0
: >"$log"
: >"$page"

say() { printf '%s\n' "$@" | tee -a "$page"; }

not_run() { # not_run <why>
    missing=$((missing + 1))
    say "Not run: $1."
}

# What a program said beside its output, or the end of it.
said() {
    [ -s "$work/part" ] && say '```' "$(grep -E "$1" "$work/part" | tail -n 20)" '```'
}

# A program whose output is a part of the page, as it comes. It has so many seconds, if so many are left. Output that is
# no Markdown stands between fences.
part() { # part [plain] <title> <seconds> <program> <arguments>
    local fence='' left=$((limit - SECONDS)) started=$SECONDS
    code=0
    [ "$1" = plain ] && fence='```' && shift
    local title=$1 seconds=$2 whole=$2
    shift 2
    say "" "## $title" ""
    if [ $left -lt 10 ]; then
        not_run "the $limit seconds (LIMIT) are over"
        return
    fi
    [ $left -lt "$seconds" ] && seconds=$left
    printf '\n== %s: %s\n' "$title" "$*" >>"$log"
    : >"$work/out"
    [ -n "$fence" ] && say "$fence"
    timeout --kill-after 5 "$seconds" "$@" 2>"$work/part" | tee -a "$page" "$work/out"
    code=${PIPESTATUS[0]}
    cat "$work/part" >>"$log"
    [ -n "$fence" ] && say "$fence"
    say ""
    case $code in
    0)
        say "($((SECONDS - started)) s)"
        grep -qE ' (WARN|ERROR) ' "$work/part" && said ' (WARN|ERROR) '
        ;;
    124 | 137)
        # Whose time it was that ended says nothing of the device; and a sanitizer may take any time.
        if [ "$seconds" -lt "$whole" ]; then
            not_run "to its end, as the $limit seconds (LIMIT) were over after $seconds of it"
            return
        elif [ "$1" = "$sanitizer" ] && ! grep -q '^========= [^C]' "$work/out"; then
            not_run "to its end in $seconds seconds; until then the sanitizer had found nothing"
            return
        elif [ "$1" = "$python" ] || [ "$2" = bench-kernels ]; then
            # It is PyTorch that takes long, to compile its kernels; and of kernels there are many.
            not_run "to its end in $seconds seconds; the rows above stand"
            return
        fi
        failed=1
        say "**cut off** after $seconds seconds; the end of what it said:"
        said .
        ;;
    *)
        if grep -qs 'Device not supported' "$work/part" "$work/out"; then
            not_run "compute-sanitizer does not support this device where it runs"
            return
        fi
        failed=1
        say "**failed** (exit code $code); the end of what it said:"
        said .
        ;;
    esac
}

# A device that nobody has open is set up anew for each program, where its driver does not persist.
nvidia-smi dmon -d 5 >/dev/null 2>&1 &
watching=$!
trap 'kill $watching 2>/dev/null; rm -rf "$work"' EXIT
say "# The CUDA backend on $gpu" "" \
    "$("$here/engine" --version), commit $(cat "$here/commit"), $(date -u +'%Y-%m-%d %H:%M') UTC"
case $size in
whole | tiny) rm -f "$erring" ;;
*)
    if [ -e "$erring" ]; then
        export ENGINE_CUDA_WITHOUT_WGMMA=1
        say "" "All of it without wgmma, with which the first run found something wrong."
    fi
    ;;
esac

# Every kernel beside the reference; all of it once more without the kernels for compute capability 9.0 alone if one of
# them is suspected, or if the program has crashed or hangs, of which anything may be the cause: then there is still
# something to be seen of the others, in the other runs too. That a check ran out of time, or that another kernel errs,
# is no reason.
correctness() { # correctness <seconds> <seconds without>
    local silent
    part plain "Correctness" "$1" "$here/engine" doctor --gpu
    # For a minute, which no check takes on a GPU.
    silent=$(($(date +%s) - $(stat -c %Y "$work/out")))
    case $code in
    0) return ;;
    1)
        if ! grep -qE '(hopper|wgmma|box)_[a-z]' "$work/out"; then
            # Only a device shows what becomes of kernels that start before the one ahead has ended.
            part plain "Steps without early starts" 40 env ENGINE_CUDA_WITHOUT_EARLY_START=1 \
                "$here/engine" doctor --gpu=steps
            return
        fi
        ;;
    124 | 137) [ "$size" != tiny ] && [ $silent -ge 60 ] || return ;;
    esac
    # Wherever the line is broken.
    tr -s '\n ' ' ' <"$work/out" | grep -q 'used with wgmma' || return
    touch "$erring"
    export ENGINE_CUDA_WITHOUT_WGMMA=1
    part plain "Correctness without wgmma, as all that follows" "$2" "$here/engine" doctor --gpu
}

# Two processes move pages from one's device memory to the other's, and compare that with a copy within the device.
# shellcheck disable=SC2016 # The other shell's.
transfers='
engine=$1
shift
: >"$0"
"$engine" transfer-bench --serve --device cuda:0 --port 0 >"$0" &
trap "kill $!" EXIT
until grep -q -- --connect "$0"; do kill -0 $! 2>/dev/null || exit 1; sleep 0.2; done
"$engine" transfer-bench --connect "$(sed -n "s/.*--connect //p" "$0")" --device cuda:0 "$@"'

pages_between() { # pages_between <seconds> <arguments>
    local seconds=$1
    shift
    part plain "Pages between two processes" "$seconds" bash -c "$transfers" "$work/serve" "$here/engine" "$@"
}

# A decode and a prefill worker, and one process to compare with. etcd and NATS are those that were carried.
pair() { # pair <seconds> <shape> <arguments>
    local seconds=$1 shape=$2
    shift 2
    part "A decode worker and a prefill worker on one device" "$seconds" env PATH="$here:$PATH" \
        "$here/disaggregation" --engine "$here/engine" --device cuda:0 --model "$here/$shape" \
        --tokenizer "$here/tokenizer" "$@"
}

beside_pytorch() { # beside_pytorch <title> <seconds> <arguments>
    local title=$1 seconds=$2
    shift 2
    local left=$((limit - SECONDS))
    [ $left -lt 20 ] || left=20
    # Importing them takes many seconds; whether they are there does not.
    local modules='import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "transformers"))))'
    if [ $left -gt 0 ] && timeout $left "$python" -c "$modules" 2>>"$log"; then
        part "$title" "$seconds" "$python" "$here/torch_qwen3.py" --engine "$here/engine" \
            --tokenizer "$here/tokenizer" "$@"
    else
        say "" "## $title" ""
        not_run "$python has no PyTorch and transformers (PYTHON names one that has)"
    fi
}

# Single checks: each takes many times as long as without.
sanitized() { # sanitized <check>
    local tool flags
    for tool in memcheck racecheck; do
        # That a module lacks a kernel, which another has, is no error.
        [ $tool = memcheck ] && flags='--report-api-errors no' || flags=
        if [ -n "$sanitizer" ]; then
            # shellcheck disable=SC2086 # Words.
            part plain "$tool of '$1'" 25 "$sanitizer" --tool $tool $flags --error-exitcode 1 \
                "$here/engine" doctor "--gpu=$1"
        else
            say "" "## $tool of '$1'" ""
            not_run "compute-sanitizer is not there"
        fi
    done
}

# Drivers compile the kernels for devices after 9.0, for minutes the first time, and keep nothing if they are cut off.
case $(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1) in
'' | 8.* | 9.*) ;;
*)
    timeout "${COMPILING:-900}" "$here/engine" doctor --gpu='fragments lie' >/dev/null 2>&1
    SECONDS=0 ;;
esac

case $size in
whole)
    # So that nothing waits for the disk later, in another run.
    nice timeout 60 "$python" -c 'import torch, transformers, torch._inductor' >/dev/null 2>&1 &
    importing=$!
    correctness 100 60
    wait $importing
    part plain "Qwen3-0.6B in bf16, made-up weights" 60 "$here/engine" bench --model "$here/qwen3-0.6b" \
        --load-format dummy --device cuda:0 --decode 1,64,256 --prefill 2048,16384 --max-num-batched-tokens 8192 \
        --log-level warn
    part plain "The same, no kernel starting before the one ahead has ended" 25 env ENGINE_CUDA_WITHOUT_EARLY_START=1 \
        "$here/engine" bench --model "$here/qwen3-0.6b" --load-format dummy --device cuda:0 --decode 1,64 \
        --prefill 2048 --rounds 2 --max-num-batched-tokens 8192 --log-level warn
    part "Kernels, qwen3-0.6b" 60 "$here/engine" bench-kernels --shape qwen3-0.6b
    ;;
pair)
    pages_between 60 --page-size 256KiB,1MiB --pages 1024 --rounds 30
    if [ $code != 0 ]; then
        # A driver that errs where it is told many copies in one call may do them one by one.
        export ENGINE_CUDA_WITHOUT_BATCHES=1
        say "" "Once more, and what follows too, with copies one by one (ENGINE_CUDA_WITHOUT_BATCHES)."
        pages_between 40 --page-size 1MiB --pages 1024 --rounds 10
    else
        # Whether one call is worth it.
        say "" "The same with copies one by one (ENGINE_CUDA_WITHOUT_BATCHES)."
        export ENGINE_CUDA_WITHOUT_BATCHES=1
        pages_between 20 --page-size 1MiB --pages 1024 --rounds 5
        unset ENGINE_CUDA_WITHOUT_BATCHES
    fi
    pair 140 qwen3-0.6b --flags "--kv-cache-memory 12GiB --max-model-len 12288 --max-num-seqs 16" \
        --prompt-tokens 8000 --prompts 25 --handoffs 40
    ;;
rest)
    beside_pytorch "Beside PyTorch" 130 --requests 0
    # Products by wgmma; then a whole step that is replayed, and prompts' attention.
    sanitized 'operands and sums'
    for shape in qwen3-8b qwen3-14b; do
        part "Kernels, $shape" 30 "$here/engine" bench-kernels --shape $shape
    done
    sanitized 'steps that are replayed'
    sanitized 'no place in a tile'
    ;;
tiny)
    correctness 1200 600
    part plain "A model of a small shape" 300 "$here/engine" bench --model "$here/tiny" --load-format dummy \
        --device cuda:0 --prefill 20 --decode 1,3 --context 24 --steps 4 --rounds 1 --kv-blocks 20 --log-level warn
    part "Kernels, small shapes" 300 "$here/engine" bench-kernels --shape tiny
    pages_between 60 --page-size 64KiB --pages 8 --rounds 3
    # Workers warm up with their largest steps, which take long here.
    pair 600 tiny --flags "--kv-blocks 64 --max-num-batched-tokens 128 --max-num-seqs 4" --prompt-tokens 300 \
        --handoffs 1 --rounds 0
    beside_pytorch "Beside PyTorch, on the CPU" 600 --shape tiny --device cpu --prefill 64 --decode 1,2 --context 32 \
        --steps 4 --rounds 1 --requests 4 --answer 8
    ;;
esac
if [ $failed != 0 ]; then
    say "" "**failed**: see above"
elif [ $missing != 0 ]; then
    say "" "passed, but for $missing parts that were not run"
else
    say "" "passed"
fi
echo "written to $page; what programs said beside that is in $log"
exit $failed
