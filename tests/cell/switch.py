"""Passes ethernet frames between two interfaces, late and not all of them, where the kernel has no netem.

switch.py INTERFACE INTERFACE DELAY_MS LOSS_PERCENT: says "ready" on standard output, and goes on until it is killed.
"""

import heapq
import itertools
import random
import select
import socket
import sys
import time

ETH_P_ALL = 3
PACKET_OUTGOING = 4
# From linux/if_packet.h. With it, frames carry what the sender left to the network adapter to do (segments, checksums),
# and the receiver gets it as it was.
SOL_PACKET, PACKET_VNET_HDR = 263, 15
FRAME_MAX = 1 << 17


def main():
    names, delay, loss = sys.argv[1:3], float(sys.argv[3]) / 1e3, float(sys.argv[4]) / 100
    chance = random.Random(1)
    ends = []
    for name in names:
        end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        end.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        end.bind((name, ETH_P_ALL))
        end.setblocking(False)
        ends.append(end)
    others = {ends[0]: ends[1], ends[1]: ends[0]}
    waiting, order = [], itertools.count()
    print("ready", flush=True)
    while True:
        pause = max(0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], pause)[0]:
            try:
                frame, sender = end.recvfrom(FRAME_MAX)
            except (BlockingIOError, OSError):
                continue
            if sender[2] != PACKET_OUTGOING and chance.random() >= loss:
                heapq.heappush(waiting, (time.monotonic() + delay, next(order), others[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, frame = heapq.heappop(waiting)
            try:
                end.send(frame)
            except OSError:
                pass  # Too much at once: lost, as on any network.


main()
