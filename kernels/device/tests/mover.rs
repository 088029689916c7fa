//! What a device's mover tells the driver, on the stand-in for libcuda that `scripts/check-device-pages.sh` builds: it
//! writes down each call for copies.

#![cfg(feature = "cuda")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use engine_cuda_device::Device;
use engine_kernels::cuda::Driver;
use engine_kernels::{DeviceRegion, KvRegion, PageRun, RegionShape};

/// Pages of a layer that are moved. On the device there is another behind each, so that none follows one of them.
const PAGES: usize = 50;
const PAGE_BYTES: usize = 512;
/// Set where pages are moved: how many layers there are, and that host memory is locked.
const LAYERS: &str = "ENGINE_MOVER_TEST_LAYERS";
const LOCKED: &str = "ENGINE_MOVER_TEST_LOCKED";

/// Moves pages to a device and back, and looks at them there and here.
fn move_pages(layers: usize, is_locked: bool) {
    let there = RegionShape { layers, pages: 2 * PAGES, page_bytes: PAGE_BYTES };
    let here = RegionShape { pages: PAGES, ..there };
    let device = Device::new(0).unwrap();
    let memory = device.allocate(DeviceRegion::bytes(there)).unwrap();
    let pages = DeviceRegion::new(Arc::new(memory), device.mover(), there);
    let (from, to) = (KvRegion::private(here).unwrap(), KvRegion::private(here).unwrap());
    let _locked = is_locked.then(|| [&from, &to].map(|region| pages.lock(region).unwrap()));

    let written: Vec<u8> = (0..here.total_bytes()).map(|at| (at % 251) as u8 + 1).collect();
    // SAFETY: it is as large, and nothing is under way from it.
    unsafe { from.base().copy_from_nonoverlapping(written.as_ptr(), written.len()) };
    let in_layer = |layer| (0..PAGES).map(move |page| PageRun { layer, from: page, to: 2 * page, count: 1 });
    let runs: Vec<PageRun> = (0..layers).flat_map(in_layer).collect();
    pages.upload(&from, &runs).unwrap().wait().unwrap();

    let copies = pages.copies().unwrap();
    copies.download(runs.iter().map(|run| PageRun { from: run.to, to: run.from, ..*run }), &to).unwrap();
    copies.finish().unwrap();
    // SAFETY: it is as large, and nothing is under way to it.
    let back = unsafe { std::slice::from_raw_parts(to.base(), here.total_bytes()) };
    assert!(back == written, "what comes back is what was sent");

    let mut on_device = vec![0; there.total_bytes()];
    device.read(pages.start(), &mut on_device).unwrap();
    for (number, page) in on_device.chunks(PAGE_BYTES).enumerate() {
        let sent = &written[number / 2 * PAGE_BYTES..][..PAGE_BYTES];
        let expected: &[u8] = if number % 2 == 0 { sent } else { &[0; PAGE_BYTES] };
        assert!(page == expected, "page {number}");
    }
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn copies_from_and_to_locked_memory_are_one_call_where_that_can_be_and_the_same_bytes_either_way() {
    const THIS: &str = "copies_from_and_to_locked_memory_are_one_call_where_that_can_be_and_the_same_bytes_either_way";
    if let Ok(layers) = std::env::var(LAYERS) {
        return move_pages(layers.parse().unwrap(), std::env::var_os(LOCKED).is_some());
    }
    let log = Path::new(env!("CARGO_TARGET_TMPDIR")).join("copies");
    let locked = (LOCKED, "yes");
    let one_by_one = vec![1_usize; 200];
    for (layers, variables, calls) in [
        (2_usize, vec![locked], vec![100, 100]),
        // Up to 1,024.
        (24, vec![locked], vec![1024, 176, 1024, 176]),
        // What is not locked, or the device knows by other addresses, is in no such call.
        (2, vec![], one_by_one.clone()),
        (2, vec![locked, ("STANDIN_REFUSES", "addresses")], one_by_one.clone()),
        // A driver that refuses it is asked once.
        (2, vec![locked, ("STANDIN_REFUSES", "batch")], [vec![100], one_by_one.clone()].concat()),
        (2, vec![locked, ("ENGINE_CUDA_WITHOUT_BATCHES", "1")], one_by_one),
    ] {
        let _ = std::fs::remove_file(&log);
        // Variables are a process's.
        let mut moving = Command::new(std::env::current_exe().unwrap());
        moving.args(["--exact", "--ignored", THIS]).envs(variables.iter().copied());
        let output = moving.env(LAYERS, layers.to_string()).env("STANDIN_COPIES", &log).output().unwrap();
        assert!(output.status.success(), "{variables:?}: {}", String::from_utf8_lossy(&output.stdout));
        let made = std::fs::read_to_string(&log).unwrap();
        let made: Vec<usize> = made.lines().map(|copies| copies.parse().unwrap()).collect();
        // The last is for the look at what is on the device.
        assert_eq!(made, [calls, vec![1]].concat(), "{layers} layers, {variables:?}");
    }
}
