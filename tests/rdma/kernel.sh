#!/bin/bash
# Fetches Debian's generic kernel for the guest of guest.sh, once a version of it, into the cache folder: the cloud
# kernel has no soft-RoCE. Prints the folder, in which there are `vmlinuz`, and `modules`, which are loaded in the order
# of the list `modules/order`.
set -euo pipefail

cache=${XDG_CACHE_HOME:-$HOME/.cache}/engine
# crc32_generic is what soft-RoCE finds its checksums in, without saying so.
wanted="rdma_rxe crc32_generic veth"

latest() { # the package that the newest series' package stands for, if apt knows any
    local series
    for series in linux-image-6.12-amd64 linux-image-amd64; do
        apt-cache depends "$series" 2>/dev/null |
            awk '/Depends: linux-image-[0-9]/ && !found { print $2; found = 1 } END { exit !found }' && return
    done
    return 1
}

update() {
    echo "kernel: asking Debian's archive for its packages" >&2
    [ "$(id -u)" = 0 ] || { echo "kernel: this takes root: run apt-get update, then this again" >&2; exit 1; }
    apt-get update -qq >&2
}

# Elsewhere there is no such kernel to be asked for.
expect_debian() {
    local id
    id=$(. /etc/os-release 2>/dev/null && echo "$ID") || id="no /etc/os-release"
    [ "$id" = debian ] || {
        echo "kernel: the guest takes Debian's kernel, which this system has not ($id): 'make test RDMA=' leaves out" \
            "what needs RDMA devices" >&2
        exit 1
    }
}

package=$(latest) || { expect_debian; update; package=$(latest); } || {
    echo "kernel: apt knows no linux-image-amd64; the guest needs the kernel of Debian 12 or later, on x86-64" >&2
    exit 1
}
target=$cache/rdma-kernel-${package#linux-image-}
if [ ! -f "$target/modules/order" ]; then
    echo "kernel: fetching $package (100 MB) for $target, once" >&2
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 130' INT TERM
    cd "$work"
    # What apt knows may be older than the archive, which does not keep what it has replaced.
    download() { apt-get -o APT::Sandbox::User=root download -qq "$package" >&2; }
    download || { update; download; }
    dpkg-deb --extract "$package"_*.deb .
    version=$(ls lib/modules)
    depmod --basedir . "$version"
    mkdir -p done/modules
    mv "boot/vmlinuz-$version" done/vmlinuz
    for module in $wanted; do
        modprobe --dirname . --set-version "$version" --show-depends "$module"
    done |
        awk '/^insmod/ && !seen[$2]++ { print $2 }' |
        while read -r file; do
            name=$(basename "${file%.xz}")
            case $file in *.xz) xz -dc "$file" >"done/modules/$name" ;; *) cp "$file" "done/modules/$name" ;; esac
            echo "$name" >>done/modules/order
        done
    # Without it a module's missing dependency would show in the guest only.
    grep -q '^rdma_rxe.ko$' done/modules/order || { echo "kernel: $package has no soft-RoCE" >&2; exit 1; }
    rm -rf "$target"
    mv done "$target"
fi
echo "$target"
