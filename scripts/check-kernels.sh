#!/bin/sh
# Compiles the CUDA kernels as the build does, and fails if one of them keeps local variables in memory (spills, or
# arrays that are indexed in ways the compiler cannot see through): what should be registers would be traffic. Prints
# what each uses.
set -eu
cd "$(dirname "$0")/.."

CUDA_HOME=$(scripts/fetch-nvcc.sh | tail -1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for target in 80 90; do
    "$CUDA_HOME/bin/nvcc" -std=c++17 -O3 -cubin -arch="sm_$target" kernels/cuda/kernels.cu -o "$work/kernels.cubin"
    "$CUDA_HOME/bin/cuobjdump" --dump-resource-usage "$work/kernels.cubin" >"$work/usage"
    awk -v target="$target" '
        /^ *Function / { name = $2; sub(/:$/, "", name) }
        /REG:/ {
            for (i = 1; i <= NF; i++) { split($i, pair, ":"); value[pair[1]] = pair[2] }
            kernels++
            if (value["REG"] > most) { most = value["REG"]; hungriest = name }
            if (value["LOCAL"] > 0 || value["STACK"] > 0) {
                printf "sm_%s %s: %d bytes of local memory, %d of stack\n", target, name, value["LOCAL"], value["STACK"]
                bad = 1
            }
        }
        END {
            printf "sm_%s: %d kernels, at most %d registers a thread (%s)\n", target, kernels, most, hungriest
            exit bad || kernels == 0
        }' "$work/usage"
done
