#!/bin/busybox sh
# In the guest of tests/rdma/guest.sh: `engine transfer-bench` and `ib_write_bw` in turns, over one device. Prints a
# line a turn: `bandwidth <bytes of a page> <who> <GB/s>`.
#
#   turns.sh ENGINE TURNS
set -eo pipefail
engine=$1 turns=$2
device=rxe0 gid=1 # its IPv4 address
way="--transport rdma --rdma-device $device --rdma-gid-index $gid --log-level warn"

listening() { netstat -tln | grep -q ":$1 "; }

ours() { # ours <bytes> <pages>
    "$engine" transfer-bench --connect 127.0.0.1:7474 $way --page-size "$1" --pages "$2" --rounds 5 --json |
        sed -n 's/.*"gigabytes_per_second":\([0-9.e-]*\).*/\1/p'
}

theirs() { # theirs <bytes> <pages>
    set -- -d $device -x $gid --perform_warm_up -s "$1" -n $((5 * $2))
    ib_write_bw "$@" >/tmp/server.log 2>&1 &
    until listening 18515; do
        kill -0 $! || { cat /tmp/server.log >&2; exit 1; }
    done
    # Its megabytes are of 2^20 bytes.
    ib_write_bw "$@" 127.0.0.1 | awk '/^ *[0-9]+ +[0-9]+ / { printf "%.6f\n", $4 * 1048576 / 1e9 }'
    wait $!
}

"$engine" transfer-bench --serve $way &
until listening 7474; do kill -0 $!; done
for turn in $(seq "$turns"); do
    # Twice as much memory as is written, at both ends: 64 of the large pages leave room for it.
    for size in "65536 128" "1048576 64"; do
        set -- $size
        for who in ours theirs; do
            speed=$($who "$1" "$2")
            [ -n "$speed" ]
            echo "bandwidth $1 $who $speed"
        done
    done
done
