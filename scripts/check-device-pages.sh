#!/bin/sh
# Runs whole clusters whose pages are in device memory (tests/device_pages), the doctor of devices
# (tests/device_doctor), and what moves pages to a device and back (kernels/device/tests/mover.rs), on this machine, on
# a stand-in for libcuda that runs the kernels as the tests' emulation does, and whose memory one process can open of
# another. Those that take RDMA devices too are left to tests/rdma/run.sh.
set -eu
cd "$(dirname "$0")/.."

standin=$(scripts/build-libcuda.sh)
# As `cargo test --workspace` builds it: another selection means other features, and compiling everything again.
LD_LIBRARY_PATH="$standin${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" \
    cargo test --workspace --features cuda --locked --test device_pages --test device_doctor --test mover -- \
    --ignored --skip rdma::
