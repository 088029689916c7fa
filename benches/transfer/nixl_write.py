"""NIXL writing pages from one process into another, for `cargo bench --bench transfer`.

    nixl_write.py shm|tcp PAGE_BYTES PAGES

Two processes, each with a NIXL agent over UCX. The first writes PAGES pages to every second page of the second's memory, once
for each line it reads, and answers with the seconds that took. `tcp` leaves UCX only that transport; else it picks one itself.
"""

import base64
import os
import pickle
import select
import subprocess
import sys
import time

TRANSPORT, PAGE_BYTES, PAGES = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if TRANSPORT == "tcp":
    os.environ["UCX_TLS"] = "tcp"
os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")

import numpy  # noqa: E402
from nixl._api import nixl_agent, nixl_agent_config  # noqa: E402

# What the library prints must not get between the answers.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def agent_with_memory(name, byte):
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    memory = numpy.full(2 * PAGES * PAGE_BYTES, byte, dtype=numpy.uint8)
    start = memory.ctypes.data
    agent.register_memory([(start, memory.nbytes, 0, "")], "DRAM")
    return agent, memory, [(start + 2 * i * PAGE_BYTES, PAGE_BYTES, 0) for i in range(PAGES)]


def answer(line):
    answers.write(line + "\n")
    answers.flush()


def tell(other, letter):
    other.stdin.write(letter)
    other.stdin.flush()


def target():
    agent, memory, pages = agent_with_memory("target", 0)
    answer(base64.b64encode(pickle.dumps((agent.get_agent_metadata(), pages))).decode())
    # Over tcp, what the receiver does is part of the transfer; between processes of a host it is needed to connect only, and a
    # receiver that leaves the core to the sender is to the sender's advantage. Between writes it sleeps.
    pause = 0 if TRANSPORT == "tcp" else 0.001
    while os.read(0, 1) == b"w":
        while not select.select([0], [], [], pause)[0]:
            agent.get_new_notifs()
        os.read(0, 1)
    if not all(memory[start - pages[0][0]] == 7 for start, _, _ in pages):
        sys.exit("pages did not arrive")


def initiator():
    other = subprocess.Popen(
        [sys.executable, *sys.argv, "target"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metadata, remote = pickle.loads(base64.b64decode(other.stdout.readline()))
    agent, _memory, local = agent_with_memory("initiator", 7)
    name = agent.add_remote_agent(metadata)
    handle = agent.initialize_xfer(
        "WRITE", agent.get_xfer_descs(local, "DRAM"), agent.get_xfer_descs(remote, "DRAM"), name
    )
    for _ in sys.stdin:
        tell(other, "w")
        started = time.perf_counter()
        state = agent.transfer(handle)
        while state != "DONE":
            if state == "ERR":
                sys.exit("the transfer failed")
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - started
        tell(other, "s")
        answer(f"{seconds:.9f}")
    other.stdin.close()
    sys.exit(other.wait())


target() if sys.argv[4:] == ["target"] else initiator()
