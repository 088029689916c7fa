#!/bin/bash
# Boots a throw-away machine with RDMA devices, for programs that need some where there are none, and runs a plan in it.
# QEMU emulates the processor, and so needs neither root nor virtualisation; Linux' soft-RoCE does over an ordinary
# network interface what an adapter does.
#
#   tests/rdma/guest.sh [FILE...] <plan
#
# Each line of the plan is: the seconds it may take, its name, and a command for busybox's shell. The first that fails
# is the last. Each FILE is in the guest under the path it has here, without its symbols, together with the libraries it
# is linked with. Ends with 0 if everything went well, 1 if a command failed, 125 if the guest gave no verdict.
#
# LIMIT (480) bounds the whole in seconds; MEMORY (2048) is the guest's, in MiB.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
limit=${LIMIT:-480} memory=${MEMORY:-2048}

[ "$(uname -m)" = x86_64 ] || { echo "guest: made for x86-64 only" >&2; exit 125; }
for tool in qemu-system-x86_64 busybox cpio depmod xz rdma ip strip; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$tool" >/dev/null ||
        { echo "guest: $tool is missing; as root, scripts/setup.sh rdma installs what the guest needs" >&2; exit 125; }
done
PATH=$PATH:/usr/sbin:/sbin
kernel=$("$here/kernel.sh")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
root=$work/root
mkdir -p "$root"/{bin,dev,proc,sys,tmp,root,opt,etc,usr/lib,usr/lib64,usr/bin,usr/sbin}
ln -s usr/lib "$root/lib"
ln -s usr/lib64 "$root/lib64"
ln -s usr/sbin "$root/sbin"

put() { # put <file> [<path in the guest>]: with its libraries, and theirs
    local path=${2:-$(realpath -s "$1")} library
    mkdir -p "$root$(dirname "$path")"
    cp -L "$1" "$root$path"
    [ "$(head -c 4 "$1" | tr -d '\177\0')" = ELF ] || return 0
    strip "$root$path"
    # A program without libraries makes ldd fail.
    { ldd "$1" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r library; do
        [ ! -e "$root$library" ] || continue
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
}

# The last line may lack its end.
{ cat; echo; } >"$root/plan"
put "$here/init.sh" /init
put "$(command -v busybox)" /bin/busybox
put "$(command -v ip)" /opt/ip
put "$(command -v rdma)" /usr/bin/rdma
# The verbs library finds its driver when it runs, and so may a program the library.
for library in /usr/lib/x86_64-linux-gnu/{libibverbs.so.1,libibverbs/librxe-rdmav*.so} /etc/libibverbs.d/rxe.driver; do
    put "$library"
done
for file in "$@"; do put "$file"; done
echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
echo '127.0.0.1 localhost' >"$root/etc/hosts"
cp -r "$kernel/modules" "$root/modules"
(cd "$root" && find . | cpio -o -H newc --quiet) >"$work/initrd"
echo "guest: booting with $(du -m "$work/initrd" | cut -f 1) MB of files"

# Without the instructions that take much longer emulated than what programs do where they lack them.
cpu=max,avx2=off,fma=off,erms=off,fsrm=off
status=0
timeout -k 5 "$limit" qemu-system-x86_64 -accel tcg,thread=multi -cpu "$cpu" -smp 2 -m "$memory" \
    -nodefaults -no-user-config -no-reboot -display none -serial stdio -device isa-debug-exit,iobase=0xf4,iosize=1 \
    -kernel "$kernel/vmlinuz" -initrd "$work/initrd" -append "console=ttyS0 panic=-1 quiet loglevel=1" </dev/null |
    sed -u 's/\r$//' || status=${PIPESTATUS[0]}
# What init.sh leaves with.
case $status in
85) exit 0 ;;
87) exit 1 ;;
124 | 137) echo "guest: not over after $limit s" >&2 ;;
*) echo "guest: it ended without a verdict (QEMU: $status)" >&2 ;;
esac
exit 125
