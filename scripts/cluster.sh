#!/bin/bash
# Starts a cluster on this machine: etcd, nats-server, a frontend, decode and prefill workers, each with its name before
# its log lines. Ctrl-C stops them in order; a second one at once.
#
#   scripts/cluster.sh <engine> <model> [flags of the decode workers]
#
# DECODE_WORKERS, PREFILL_WORKERS (1 each), PREFILL_ARGS (flags of the latter), PORT (8000, the frontend's), ETCD_PORT
# (2379), NATS_PORT (4222) and MAX_LOCAL_PREFILL_LENGTH (128, so that a long chat shows a remote prefill) change it.
set -euo pipefail
# Each process in a group of its own: Ctrl-C reaches this script alone, which then stops them in order.
set -m

[ $# -ge 2 ] || { echo "usage: $0 <engine> <model> [flags of the decode workers]" >&2; exit 2; }
engine=$1 model=$2
shift 2
port=${PORT:-8000} etcd_port=${ETCD_PORT:-2379} nats_port=${NATS_PORT:-4222}
decode_workers=${DECODE_WORKERS:-1} prefill_workers=${PREFILL_WORKERS:-1}
read -ra prefill_args <<<"${PREFILL_ARGS:-}"
PATH=$PATH:/usr/sbin:/usr/local/sbin
# Where another cluster's services are, and who one is there, is none of this one's business; and etcd reads its flags
# from variables of such names.
unset "${!ETCD_@}" "${!NATS_@}"
# For who copies what is printed below.
key=""
if [ -n "${ENGINE_API_KEY:-}" ]; then key=" -H 'Authorization: Bearer ${ENGINE_API_KEY%%,*}'"; fi

directory=$(mktemp -d)
names=()
pids=()
stopping=""

say() { printf '%-10s| %s\n' cluster "$1"; }

open() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

start() { # start <name> <command...>
    local name=$1 quiet=""
    shift
    # NATS has no level between everything and nothing.
    if [ "$name" = nats ]; then quiet='/\[INF\]/{/Server is ready/!d};'; fi
    "$@" > >(sed -u "${quiet}s/^/$(printf '%-10s' "$name")| /") 2>&1 &
    names+=("$name")
    pids+=($!)
}

# Stops processes of these names, waiting for each.
stop() {
    local pattern i tries
    for pattern in "$@"; do
        for i in "${!pids[@]}"; do
            if [[ ${names[$i]} == $pattern ]]; then kill -TERM "${pids[$i]}" 2>/dev/null || true; fi
        done
        for i in "${!pids[@]}"; do
            if [[ ${names[$i]} == $pattern ]]; then wait "${pids[$i]}" 2>/dev/null || true; fi
        done
    done
}

end() {
    trap - EXIT
    # Asked twice, nobody waits.
    trap 'kill -KILL "${pids[@]}" 2>/dev/null || true; rm -rf "$directory"; exit 130' INT TERM
    stopping=yes
    say "stopping"
    stop frontend 'decode*' 'prefill*' nats etcd
    rm -rf "$directory"
    exit "${1:-0}"
}
trap 'end 0' INT TERM
trap 'end $?' EXIT

if open "$port"; then
    say "port $port is in use; PORT chooses another" >&2
    trap - EXIT
    rm -rf "$directory"
    exit 1
fi
# Debian starts the services it installs: theirs are left alone.
while open "$etcd_port"; do etcd_port=$((etcd_port + 10)); done
while open "$nats_port"; do nats_port=$((nats_port + 10)); done

# Half the cores each, so that a prefill does not slow decoding down.
threads=$(($(nproc) / (decode_workers + prefill_workers)))
[ "$threads" -ge 1 ] || threads=1
services=(--etcd "http://127.0.0.1:$etcd_port" --nats "nats://127.0.0.1:$nats_port")

start etcd etcd --name local --data-dir "$directory/etcd" --log-level warn --logger zap \
    --listen-client-urls "http://127.0.0.1:$etcd_port" --advertise-client-urls "http://127.0.0.1:$etcd_port" \
    --listen-peer-urls http://127.0.0.1:0 --initial-advertise-peer-urls http://127.0.0.1:2380 \
    --initial-cluster local=http://127.0.0.1:2380
start nats nats-server -js -sd "$directory/nats" -a 127.0.0.1 -p "$nats_port"
for service in "$etcd_port" "$nats_port"; do
    # Whoever came first would only say so, and wait. A service that does not start has said why.
    for _ in $(seq 100); do
        if open "$service"; then break; fi
        sleep 0.1
    done
done
start frontend "$engine" frontend --port "$port" "${services[@]}"
worker_port=$port
worker_ports=()
for i in $(seq "$decode_workers"); do
    worker_port=$((worker_port + 1))
    while open "$worker_port"; do worker_port=$((worker_port + 1)); done
    worker_ports+=("$worker_port")
    start "decode$i" "$engine" --model "$model" --port "$worker_port" --threads "$threads" \
        --max-local-prefill-length "${MAX_LOCAL_PREFILL_LENGTH:-128}" "${services[@]}" "$@"
done
for i in $(seq "$prefill_workers"); do
    start "prefill$i" "$engine" --is-prefill-worker --threads "$threads" "${services[@]}" "${prefill_args[@]}"
done

# The answer to a GET, without asking for curl.
get() { # get <port> <path>
    exec 3<>"/dev/tcp/127.0.0.1/$1" || return 1
    printf 'GET %s HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n\r\n' "$2" >&3
    timeout 5 cat <&3 || true
    exec 3<&- 3>&-
}

# Whether requests are answered, and long prompts can be handed off.
ready() {
    get "$port" /health/ready | grep -q '^HTTP/1.1 200' || return 1
    local worker
    for worker in "${worker_ports[@]}"; do
        get "$worker" /metrics | grep -q "^engine_prefill_workers $prefill_workers" || return 1
    done
}

until ready 2>/dev/null; do
    for i in "${!pids[@]}"; do
        if ! kill -0 "${pids[$i]}" 2>/dev/null; then
            say "${names[$i]} ended"
            end 1
        fi
    done
    sleep 0.2
done
say "etcd on port $etcd_port, NATS on port $nats_port"
say "ready; Ctrl-C stops everything. To try, a chat, a prompt that is long enough for a prefill worker (asked again, it"
say "is in the decode worker's cache), and where prompts were computed:"
cat <<TRY

curl -N http://127.0.0.1:$port/v1/chat/completions$key -H 'Content-Type: application/json' -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": true}'

curl http://127.0.0.1:$port/v1/completions$key -H 'Content-Type: application/json' -d '{"prompt": "'"\$(seq -s ' ' 300)"'", "max_tokens": 20}'

$(printf "curl -s http://127.0.0.1:%s/metrics | grep ^engine_prefills_total\n" "${worker_ports[@]}")

TRY

# One that ends by itself is said so and left: the others go on without it.
while [ -z "$stopping" ]; do
    # The shell would say it too, in its own way.
    wait -n -p ended 2>/dev/null || true
    for i in "${!pids[@]}"; do
        if [ "${pids[$i]}" = "${ended:-}" ]; then say "${names[$i]} ended"; fi
    done
    alive=0
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then alive=1; fi
    done
    [ "$alive" = 1 ] || break
done
