#!/bin/bash
# Runs all tests that need an RDMA device, in the guest of guest.sh, which has three: those of the verbs transport, then
# those of tests/rdma/main.rs, whole clusters, and those of tests/device_pages/rdma.rs, clusters whose pages are in the
# memory of a CUDA device, of which a stand-in for libcuda makes believe that there is one.
#
#   tests/rdma/run.sh [transport] [cluster] [device]     all of it, or these steps
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/usr/local/sbin

# Before minutes of compiling: not every system has one.
tests/rdma/kernel.sh >/dev/null

executables() { # executables <further arguments of cargo test>: a name and a path each
    # Of the whole workspace, as `make test` builds them: one package alone has other features, and compiles all anew.
    cargo test --workspace --locked --no-run --message-format json-render-diagnostics "$@" | python3 -c '
import json, sys
names = {("engine", "lib", True): "transport", ("engine", "bin", False): "engine", ("rdma", "test", True): "cluster",
         ("device_pages", "test", True): "device"}
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable"):
        target = artifact["target"]
        name = names.get((target["name"], target["kind"][0], artifact["profile"]["test"]))
        if name:
            print(name, artifact["executable"])
'
}
# In this order: both build an engine under the same name, and the one with CUDA, which does without where there is no
# libcuda, serves all tests.
programs=$(executables --lib --bin engine --test rdma)
CUDA_HOME=$(scripts/fetch-nvcc.sh)
export CUDA_HOME
programs+=$'\n'$(executables --features cuda --test device_pages)
standin=$(scripts/build-libcuda.sh)
program() {
    awk -v name="$1" '$1 == name && !found++ { print substr($0, length(name) + 2) } END { exit !found }' \
        <<<"$programs" ||
        { echo "cargo built no program for: $1" >&2; exit 1; }
}
transport=$(program transport) engine=$(program engine) cluster=$(program cluster) device=$(program device)
some=$PWD/tests/rdma/some.sh
tokenizer=$PWD/tests/reference/models/qwen3

plan() { # plan <step>
    case $1 in
    transport)
        printf '400 transport %q %q transfer::rdma --ignored --test-threads 1 --nocapture\n' "$some" "$transport"
        ;;
    cluster) printf '400 cluster %q %q --ignored --test-threads 1 --nocapture\n' "$some" "$cluster" ;;
    device)
        printf '400 device LD_LIBRARY_PATH=%q %q %q rdma:: --ignored --test-threads 1 --nocapture\n' \
            "$standin" "$some" "$device"
        ;;
    *) echo "there is no step '$1', only transport, cluster and device" >&2; exit 2 ;;
    esac
}
steps=("$@")
[ $# -gt 0 ] || steps=(transport cluster device)
plan=$(for step in "${steps[@]}"; do plan "$step"; done)

LIMIT=900 tests/rdma/guest.sh "$some" "$transport" "$engine" "$cluster" "$device" "$standin/libcuda.so" \
    "$tokenizer"/tokenizer{,_config}.json "$(command -v etcd)" "$(command -v nats-server)" <<<"$plan"
