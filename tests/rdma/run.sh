#!/bin/bash
# Runs all tests that need an RDMA device, in the guest of guest.sh, which has three: those of the verbs transport, and
# then those of tests/rdma/main.rs, whole clusters.
set -euo pipefail
cd "$(dirname "$0")/../.."
PATH=$PATH:/usr/sbin:/usr/local/sbin

# Of the whole workspace, as `make test` builds them: for one package with other features everything would be compiled again.
programs=$(cargo test --workspace --lib --bin engine --test rdma --locked --no-run --message-format json-render-diagnostics | python3 -c '
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

LIMIT=450 tests/rdma/guest.sh "$some" "$transport" "$engine" "$cluster" "$(command -v etcd)" "$(command -v nats-server)" \
    "$tokenizer"/tokenizer{,_config}.json <<END
240 transport $(printf '%q ' "$some" "$transport") transfer::rdma --ignored --test-threads 1
240 cluster $(printf '%q ' "$some" "$cluster") --ignored --test-threads 1
END
