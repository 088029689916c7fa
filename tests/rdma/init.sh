#!/bin/busybox sh
# The guest's first process: makes the verbs devices, runs the plan of guest.sh, and says how it ended.
#
# Devices: rxe0 on the loopback interface; rxw0 and rxw1, two adapters with a cable between them.

/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin:/usr/sbin:/sbin HOME=/root LANG=C.UTF-8 RUST_BACKTRACE=1
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
chmod 1777 /tmp /dev/shm
ulimit -l unlimited
ulimit -n 65536

# QEMU ends with twice this and one. It ends with 0 when the kernel panics, and with 1 when it could not start.
leave() { # leave <octal number>
    printf "\\$1" | dd of=/dev/port bs=1 seek=244 2>/dev/null
    poweroff -f
}
fail() {
    echo "guest: $1"
    echo "guest: the kernel's last words:"
    dmesg | tail -n 15
    leave 53
}
seconds() { cut -d ' ' -f 1 /proc/uptime; }
since() { awk -v from="$1" '{ printf "%.1f", $1 - from }' /proc/uptime; }

# busybox has an ip of its own, which knows less; the shell would take it for any command of this name.
ip() { /opt/ip "$@"; }
device() { # device <name> <interface>
    rdma link add "$1" type rxe netdev "$2" || fail "no device $1 on $2"
}

while read -r module; do
    insmod "/modules/$module" || fail "cannot load $module"
done </modules/order
ip link set lo up
device rxe0 lo

# Two interfaces of one machine reach each other through the kernel, unless told to take the cable: what comes from one
# address for the other leaves by its own interface, before the kernel finds out that the other is its own, too.
ip link add w0 type veth peer name w1
ip address add 10.7.0.1/32 dev w0
ip address add 10.7.0.2/32 dev w1
for side in "w0 10.7.0.1 10.7.0.2 100" "w1 10.7.0.2 10.7.0.1 101"; do
    set -- $side
    ip link set "$1" up
    # It takes packets that come from an address of this machine.
    echo 1 >"/proc/sys/net/ipv4/conf/$1/accept_local"
    echo 0 >"/proc/sys/net/ipv4/conf/$1/rp_filter"
    ip route add "$3/32" dev "$1" src "$2" table "$4"
    ip rule add pref 1 iif "$1" lookup local
    ip rule add pref 10 from "$2" to "$3" lookup "$4"
done
echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
ip rule add pref 20 lookup local
ip rule del pref 0
device rxw0 w0
device rxw1 w1
echo "guest: $(uname -r), ready after $(seconds) s"

# The plan is read on another descriptor, so that no command takes the rest of it for its input.
steps=0
while read -r limit name command <&3; do
    [ -n "$limit" ] || continue
    [ -n "$command" ] || fail "no command in the plan's line: $limit $name"
    steps=$((steps + 1))
    echo
    echo "== $name: $command"
    started=$(seconds)
    # A subshell: a command that ends the shell ends no more than itself.
    timeout -s KILL "$limit" sh -c "$command" </dev/null
    status=$?
    echo "== $name: exit $status after $(since "$started") s"
    [ $status != 137 ] || echo "== $name: killed, after its $limit s if nobody else did it"
    [ $status = 0 ] || fail "$name failed, and what follows it was not run"
done 3</plan
[ "$steps" -gt 0 ] || fail "nothing to do"
echo "guest: all done after $(seconds) s"
leave 52
