#!/bin/sh
# Checks for what building and fetching need (with the argument `services`, also for what a cluster and the tests need;
# with `rdma`, for the emulated machine with RDMA devices), and installs what is missing from Debian's archive. Silent
# when there is nothing to do. As root (or with passwordless sudo) it installs; otherwise it says what to run. Without
# apt-get it says what seems to be missing, and goes on: other systems' packages have other names and places.
set -eu

missing=""
need() { # need <Debian package> <command that succeeds if it is there>
    package=$1
    shift
    "$@" >/dev/null 2>&1 || missing="$missing $package"
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: Rust is not installed (no cargo on PATH). Install it as https://rustup.rs says, and try again." >&2
    exit 1
fi
# Before anything is installed: cargo would say it minutes later.
wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$(dirname "$0")/../Cargo.toml")
rust=$("${RUSTC:-rustc}" --version 2>/dev/null | sed -n 's/^rustc \([^ ]*\).*/\1/p')
if [ "$(printf '%s\n' "$wanted" "$rust" | sort -V | head -n 1)" != "$wanted" ]; then
    echo "setup: this takes Rust $wanted or later, and here is ${rust:-none that runs}. With rustup, run:" \
        "rustup update stable && rustup default stable. Without, install it as https://rustup.rs says." >&2
    exit 1
fi

# libclang, and the headers that come with the compiler: Debian has the one without the others, too.
libclang() {
    [ -z "${LIBCLANG_PATH:-}" ] || return 0
    ls /usr/lib/llvm-*/lib/libclang*.so* && ls /usr/lib/llvm-*/lib/clang/*/include/stddef.h && return
    # Where Fedora and Arch have it.
    for library in /usr/lib64/libclang*.so* /usr/lib/libclang*.so*; do
        [ ! -e "$library" ] || return 0
    done
    return 1
}

# Google's .proto files, where protoc looks for them.
protobuf_files() {
    protoc=$(command -v "${PROTOC:-protoc}") || protoc=/usr/bin/protoc
    for folder in "${PROTOC_INCLUDE:-}" "$(dirname "$protoc")/../include" /usr/include; do
        [ ! -e "$folder/google/protobuf/empty.proto" ] || return 0
    done
    return 1
}

# Rust links with cc, and the tokenizer's regular expressions (oniguruma) and TLS (ring) are C.
need gcc cc --version
# The tests compile the CUDA kernels for an emulated device.
need g++ c++ --version
need libc6-dev sh -c 'echo "#include <stdio.h>" | cc -E -'
# etcd's protocol is compiled from its .proto files, which include Google's.
need protobuf-compiler "${PROTOC:-protoc}" --version
need libprotobuf-dev protobuf_files
# The demo model and the client tests come from PyPI, each in an environment of its own.
need python3 python3 --version
need python3-venv python3 -c 'import venv, ensurepip'
# Bindings to the verbs library are made from its headers. Running takes none of this, nor the library.
need cmake cmake --version
need pkg-config pkg-config --version
need libclang-dev libclang
need libibverbs-dev test -e /usr/include/infiniband/verbs.h
for part in "$@"; do
    case $part in
    services)
        # A cluster's services; the tests run real ones.
        need etcd-server sh -c 'command -v etcd'
        need nats-server sh -c 'command -v nats-server || command -v /usr/sbin/nats-server'
        # Network namespaces for a test between them.
        need iproute2 sh -c 'command -v ip || command -v /usr/sbin/ip'
        # Certificates for the tests of encrypted connections.
        need openssl openssl version
        ;;
    rdma)
        # The machine, and what goes into it: a shell, `ip` and `rdma`, the verbs library with its driver.
        need qemu-system-x86 sh -c 'command -v qemu-system-x86_64'
        need busybox-static busybox insmod --help
        need iproute2 sh -c 'command -v rdma'
        need ibverbs-providers test -e /etc/libibverbs.d/rxe.driver
        # The kernel is unpacked and the modules that it takes are found.
        need kmod sh -c 'command -v depmod || command -v /usr/sbin/depmod'
        need xz-utils sh -c 'command -v xz'
        need cpio cpio --version
        need binutils strip --version
        ;;
    perftest)
        # What `engine transfer-bench` is measured beside.
        need perftest sh -c 'command -v ib_write_bw'
        ;;
    *)
        echo "setup: there is no part '$part', only services, rdma and perftest" >&2
        exit 1
        ;;
    esac
done

[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup: these seem to be missing (Debian's names):$missing. Should what follows fail, install them with your" \
        "system's package manager." >&2
    exit 0
elif [ "$(id -u)" = 0 ]; then
    as_root=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    echo "setup: missing packages. Run: sudo apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "setup: installing$missing (a minute or two)"
case $missing in *-server*)
    echo "setup: Debian starts its etcd and NATS as services, which do no harm; 'systemctl disable' them if you like"
    ;;
esac
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086 # a list of words
if ! { $as_root apt-get update -qq && $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -qq -y --no-install-recommends $missing; } >"$log" 2>&1; then
    cat "$log" >&2
    echo "setup: the packages could not be installed; apt-get's own words are above" >&2
    exit 1
fi
