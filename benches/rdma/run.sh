#!/bin/bash
# Measures `engine transfer-bench` beside `ib_write_bw`, and the two ways a mailbox word could take (word.c), over the
# same emulated device in the same boot of the guest of tests/rdma/guest.sh, and writes a page into benches/results. The
# emulated processor does the device's work, so the speeds mean nothing; but both sides of a comparison have as much of
# it, and what is compared is what each adds.
set -euo pipefail
cd "$(dirname "$0")/../.."
turns=5
rounds=15

cargo build --release --locked --bin engine
engine=$(realpath "${CARGO_TARGET_DIR:-target}/release/engine")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log word=$work/word
cc -std=c11 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror benches/rdma/word.c -libverbs -o "$word"
{
    printf '60 word %q rxe0 1 %s\n' "$word" "$rounds"
    printf '500 turns %q %q %s\n' "$PWD/benches/rdma/turns.sh" "$engine" "$turns"
} | LIMIT=600 MEMORY=3072 tests/rdma/guest.sh \
    "$PWD/benches/rdma/turns.sh" "$engine" "$(command -v ib_write_bw)" "$word" |
    tee "$log"

python3 - "$log" "$turns" "$rounds" "$(dpkg-query -W -f '${Version}' perftest)" <<'PYTHON'
import datetime, os, pathlib, re, statistics, subprocess, sys
log, turns, rounds, perftest = pathlib.Path(sys.argv[1]).read_text(), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
speeds = {}
for size, who, speed in re.findall(r"^bandwidth (\d+) (\w+) (\S+)$", log, re.MULTILINE):
    speeds.setdefault((int(size), who), []).append(float(speed))
assert len(speeds) == 4 and all(len(each) == turns for each in speeds.values()), speeds

processor = pathlib.Path("/proc/cpuinfo").read_text()
field = lambda name: re.search(rf"^{name}\s*: (.*)$", processor, re.MULTILINE)[1]
cpu = f"{field('model name')} (family {field('cpu family')}, model {field('model')})"
memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
kernel = re.search(r"^guest: (\S+), ready", log, re.MULTILINE)[1]
version = re.search(r'^version = "(.*)"', pathlib.Path("Cargo.toml").read_text(), re.MULTILINE)[1]
spread = lambda each: f"{statistics.median(each):.4f} ({min(each):.4f} to {max(each):.4f})"
row = lambda size: (size, *(speeds[size, who] for who in ("ours", "theirs")))
lines = [
    f"# RDMA transfers, engine {version}",
    "",
    f"- Machine: {cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; on it QEMU, which emulates two cores",
    f"- Device: soft-RoCE of Linux {kernel} on the loopback interface, MTU 4096",
    f"- Peer: `ib_write_bw` of perftest {perftest}",
    f"- {turns} turns each, alternating, in one boot; GB/s, median (least to most). A turn of `engine transfer-bench`",
    "  is the median of 5 rounds of 128 pages of 64 KiB, or 64 of 1 MiB, no two adjacent, and the mailbox word behind",
    "  them; one of `ib_write_bw` is as many writes after a warm-up, into one place, up to 128 at a time",
    "- The emulated processor does the device's work: only the ratio means something",
    "",
    "| page | engine transfer-bench | ib_write_bw | ratio | floor |",
    "| --- | --- | --- | --- | --- |",
]
for size, ours, theirs in map(row, (65536, 1048576)):
    ratio = statistics.median(ours) / statistics.median(theirs)
    page = f"{size >> 20} MiB" if size >> 20 else f"{size >> 10} KiB"
    lines.append(f"| {page} | {spread(ours)} | {spread(theirs)} | {ratio:.2f}× | 0.9× |")

words = {}
for way, *figures in re.findall(r"^word (\w+) (\S+) (\S+) (\S+)$", log, re.MULTILINE):
    words.setdefault(way, []).append([float(figure) for figure in figures])
assert len(words) == 2 and all(len(each) == rounds for each in words.values()), words
lines += [
    "",
    "## The mailbox word, two ways",
    "",
    f"`word.c`: eight bytes between two queue pairs of one process, {rounds} rounds of 64 words each way, alternating.",
    "Medians, in nanoseconds (of the emulated processor).",
    "",
    "| | from posting until it is found | a look that finds nothing | to make ready for the next |",
    "| --- | --- | --- | --- |",
]
titles = {"write": "a write, found in memory", "immediate": "with immediate data, found in a completion queue"}
for way, title in titles.items():
    found, look, ready = (statistics.median(column) for column in zip(*words[way]))
    lines.append(f"| {title} | {found:,.0f} | {look:.1f} | {ready:,.0f} |")

name = re.sub(r"[^a-z0-9]+", "-", cpu.lower()).strip("-")
page = pathlib.Path(f"benches/results/{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{name}-rdma.md")
page.write_text("\n".join(lines) + "\n")
print(f"\n{page}:\n\n{page.read_text()}")
PYTHON
