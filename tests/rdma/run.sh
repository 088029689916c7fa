#!/bin/bash
# Runs all tests that need an RDMA device, in the guest of guest.sh, which has three: those of the verbs transport, and
# then those of tests/rdma/main.rs, whole clusters.
#
#   tests/rdma/run.sh [transport] [cluster]     all of it, or these steps
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/usr/local/sbin

# Of the whole workspace, as `make test` builds them: one package has other features, and all would be compiled again.
programs=$(cargo test --workspace --lib --bin engine --test rdma --locked --no-run \
    --message-format json-render-diagnostics | python3 -c '
import json, sys
names = {("engine", "lib", True): "transport", ("engine", "bin", False): "engine", ("rdma", "test", True): "cluster"}
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable"):
        target = artifact["target"]
        name = names.get((target["name"], target["kind"][0], artifact["profile"]["test"]))
        if name:
            print(name, artifact["executable"])
')
program() {
    awk -v name="$1" '$1 == name { print substr($0, length(name) + 2); found = 1 } END { exit !found }' <<<"$programs" ||
        { echo "cargo built no program for: $1" >&2; exit 1; }
}
transport=$(program transport) engine=$(program engine) cluster=$(program cluster)
some=$PWD/tests/rdma/some.sh
tokenizer=$PWD/tests/reference/models/qwen3

plan() { # plan <step>
    case $1 in
    transport) printf '240 transport %q %q transfer::rdma --ignored --test-threads 1 --nocapture\n' "$some" "$transport" ;;
    cluster) printf '240 cluster %q %q --ignored --test-threads 1 --nocapture\n' "$some" "$cluster" ;;
    *) echo "there is no step '$1', only transport and cluster" >&2; exit 2 ;;
    esac
}
steps=("$@")
[ $# -gt 0 ] || steps=(transport cluster)
plan=$(for step in "${steps[@]}"; do plan "$step"; done)

LIMIT=450 tests/rdma/guest.sh "$some" "$transport" "$engine" "$cluster" "$tokenizer"/tokenizer{,_config}.json \
    "$(command -v etcd)" "$(command -v nats-server)" <<<"$plan"
