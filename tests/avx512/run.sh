#!/bin/bash
# Runs the kernels' tests on an emulated processor with AVX-512 and VNNI, for machines that have none: Bochs with its
# Ice Lake model, in which Debian's cloud kernel boots with nothing but the tests. Takes minutes a test, on one core.
#
#   tests/avx512/run.sh [FILTER...]   names of tests, as cargo takes them; without any, those that use the instructions
set -euo pipefail
cd "$(dirname "$0")/../.."

LIMIT=${LIMIT:-7200}
packages="bochs bochsbios busybox-static cpio grub-pc-bin linux-image-cloud-amd64 xorriso"
# shellcheck disable=SC2086
missing=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' $packages 2>&1 | grep -v '^installed' |
    grep -o '[^ ]*$' || true)
[ -z "$missing" ] || { echo "this needs some packages: apt-get install --no-install-recommends $packages" >&2; exit 1; }

filters=("$@")
[ $# -gt 0 ] ||
    filters=(every_instruction_set cpu::{linear,quant,attention,rowwise,rope,sample::scan}::)
programs=$(cargo test --workspace --locked --no-run --message-format json | python3 -c '
import json, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["name"] in ("engine_kernels", "conformance"):
        print(artifact["executable"])
')
[ -n "$programs" ] || { echo "cargo built no tests of the kernels" >&2; exit 1; }

work=$(mktemp -d)
children=()
finish() {
    for child in "${children[@]}"; do kill "$child" 2>/dev/null || true; done
    rm -rf "$work"
}
trap finish EXIT

# The guest's files: busybox, the programs without their symbols, and the libraries they are linked with.
root=$work/root
mkdir -p "$root"/{bin,proc,dev,tmp,tests} "$work/disc/boot/grub"
cp "$(command -v busybox)" "$root/bin/busybox"
cat >"$root/init" <<'END'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox grep -m 1 -o avx512_vnni /proc/cpuinfo
status=0
END
for program in $programs; do
    name=$(basename "$program")
    strip -o "$root/tests/$name" "$program"
    ldd "$program" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -Lu "$library" "$root$library"
    done
    echo "/tests/$name ${filters[*]} --test-threads 1 || status=1" >>"$root/init"
done
cat >>"$root/init" <<'END'
echo "all over: $status"
/bin/busybox sleep 1 # until the line is out
/bin/busybox poweroff -f
END
chmod +x "$root/init"
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/disc/boot/initrd"

# A bootable disc. Nothing in the guest may depend on how fast the emulation is, and Linux is told to leave alone what
# this model of a processor announces and then does not do right: with protection keys and compacted XSAVE it gives up
# the wide registers, and with the rest (one at least of PCID, INVPCID, FSGSBASE, SMAP, SMEP, UMIP, ERMS, FSRM) it
# faults for ever.
kernel=$(printf '%s\n' /boot/vmlinuz-*cloud* | sort -V | tail -n 1)
cp "$kernel" "$work/disc/boot/vmlinuz"
cat >"$work/disc/boot/grub/grub.cfg" <<'END'
set timeout=0
menuentry tests {
    linux /boot/vmlinuz console=ttyS0 quiet loglevel=3 nosmp nokaslr mitigations=off tsc=reliable no_timer_check lpj=1000000 random.trust_cpu=on clearcpuid=515,321,323,288,295,298,308,145,514,297,580
    initrd /boot/initrd
}
END
grub-mkrescue -o "$work/disc.iso" "$work/disc" >"$work/grub.log" 2>&1 || { cat "$work/grub.log" >&2; exit 1; }

cat >"$work/bochsrc" <<END
cpu: model=corei7_icelake_u, count=1, ips=20000000, reset_on_triple_fault=0
memory: guest=1024, host=1024
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=$work/disc.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial
display_library: rfb, options="timeout=0"
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
clock: sync=none, time0=local
log: $work/bochs.log
END
echo c >"$work/commands" # Debian's Bochs has its debugger compiled in, which waits to be told to continue.
touch "$work/serial"
# Its display is a VNC server that nobody needs: it gets a network of its own.
unshare --map-root-user --net bochs -q -f "$work/bochsrc" -rc "$work/commands" >"$work/screen" 2>&1 </dev/null &
bochs=$!
children+=("$bochs")
echo "booting; about a minute until the tests start"
tail -f "$work/serial" &
children+=("$!")

for ((second = 0; second < LIMIT; second++)); do
    if grep -q '^all over: ' "$work/serial"; then
        grep -q '^avx512_vnni' "$work/serial" || { echo "the emulated processor lacks AVX-512" >&2; exit 1; }
        grep -q '^test result: ok. [1-9]' "$work/serial" || { echo "no test has these words in its name" >&2; exit 1; }
        exit "$(sed -n 's/^all over: \([0-9]\).*/\1/p' "$work/serial")"
    fi
    kill -0 "$bochs" 2>/dev/null || { echo "Bochs ended early:" >&2; tail -n 20 "$work/bochs.log" >&2; exit 1; }
    sleep 1
done
echo "not over after $LIMIT s" >&2
exit 1
