use super::*;
use engine_kernels::cuda::Arg;

/// Runs a kernel that takes one array of 64 `int`s and what else is given, on one block of 64 threads.
fn run(kernel: &str, more: &[Arg]) -> Result<Vec<i32>, DriverError> {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 4)?;
    let args = [&[memory.address().into()], more].concat();
    driver.launch(&Launch { kernel, grid: [1, 1, 1], block: 64, args: &args, ..Launch::default() })?;
    let mut bytes = [0; 256];
    driver.read(memory.address(), &mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|int| i32::from_le_bytes(*int)).collect())
}

fn reason(result: Result<Vec<i32>, DriverError>) -> String {
    result.expect_err("a mistake").to_string()
}

#[test]
fn threads_that_never_come_to_a_barrier_are_an_error() {
    let reason = reason(run("faulty_divergence", &[]));
    assert!(reason.contains("for threads that do not come (16 wait, 48 have ended)"), "{reason}");
}

#[test]
fn lanes_that_meet_at_different_places_are_an_error() {
    let reason = reason(run("faulty_exchange", &[]));
    assert!(reason.contains("lanes of a warp meet at lines"), "{reason}");
}

#[test]
fn a_missing_barrier_shows() {
    let right: Vec<i32> = (0..64).map(|i| (i + 1) % 64).collect();
    assert_ne!(run("faulty_race", &[]).unwrap(), right);
}

#[test]
fn copies_to_shared_memory_arrive_when_they_are_waited_for() {
    assert_eq!(run("faulty_early", &[]).unwrap(), [-1; 64]);
    let unwaited = reason(run("faulty_unwaited", &[]));
    assert!(unwaited.contains("a thread ends while copies to shared memory are under way"), "{unwaited}");
    let unaligned = reason(run("faulty_alignment", &[]));
    assert!(unaligned.contains("a copy to shared memory is not aligned"), "{unaligned}");
}

#[test]
fn kernels_start_before_the_one_ahead_of_them_has_run() {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 4).unwrap();
    let args = [memory.address().into()];
    // Each adds one to what was there before, and the second is too early to see what the first has made of it.
    for _ in 0..2 {
        driver
            .launch(&Launch { kernel: "faulty_haste", grid: [1, 1, 1], block: 64, args: &args, ..Launch::default() })
            .unwrap();
    }
    let mut bytes = [0; 256];
    driver.read(memory.address(), &mut bytes).unwrap();
    assert_eq!(bytes.as_chunks::<4>().0, [1u32.to_le_bytes(); 64]);
}

#[test]
fn threads_that_do_not_wait_for_the_kernel_before_are_an_error() {
    let reason = reason(run("faulty_independence", &[]));
    assert!(reason.contains("a thread ends that has not waited for the kernel before"), "{reason}");
}

#[test]
fn memory_ends_where_it_ends() {
    const RUN: &str = "ENGINE_EMULATED_BEYOND_ITS_END";
    if std::env::var_os(RUN).is_some() {
        let _ = run("faulty_bound", &[]);
        return;
    }
    // It takes the process with it: another one.
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    let output = again.args(["--exact", "--nocapture", "tests::memory_ends_where_it_ends"]).env(RUN, "1").output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("kernel faulty_bound, block (0, 0, 0), thread 63"), "{text}");
}

#[test]
fn arguments_are_what_the_kernel_takes() {
    let more = reason(run("faulty_race", &[Arg::Int(1)]));
    assert!(more.contains("are not its arguments"), "{more}");
    let unknown = reason(run("no_such_kernel", &[]));
    assert!(unknown.contains("there is no such kernel"), "{unknown}");
    let stranger = reason(run("rms_norm", &[]));
    assert!(stranger.contains("are not its arguments"), "{stranger}");
}

#[test]
fn pointers_lead_to_what_is_allocated() {
    let driver = Emulated::default();
    let address = driver.allocate(64).unwrap().address();
    let launch =
        Launch { kernel: "faulty_bound", grid: [1, 1, 1], block: 32, args: &[address.into()], ..Launch::default() };
    let error = driver.launch(&launch).unwrap_err().to_string();
    assert!(error.contains("is nobody's"), "{error}");
}

#[test]
fn nothing_runs_before_somebody_waits_and_events_wait_for_what_was_before_them() {
    let driver = Emulated::default();
    let (host, device) = (driver.allocate_host(16).unwrap(), driver.allocate(16).unwrap());
    let set = |byte: u8| {
        // SAFETY: sixteen bytes, and this test says when copies run.
        unsafe { host.start().write_bytes(byte, 16) }
    };
    let back = driver.allocate_host(16).unwrap();
    // SAFETY: as above.
    let seen = || unsafe { *back.start() };
    set(1);
    driver.upload(&host, device.address(), 16).unwrap();
    driver.download(device.address(), &back, 16).unwrap();
    let event = driver.record(None).unwrap();
    assert_eq!(seen(), 0);
    // Too early: the copy has not run, and will see this.
    set(2);
    driver.upload(&host, device.address(), 16).unwrap();
    driver.download(device.address(), &back, 16).unwrap();
    driver.wait(&event).unwrap();
    assert_eq!(seen(), 2);
    set(3);
    driver.synchronize().unwrap();
    assert_eq!(seen(), 3);
}

#[test]
fn what_was_recorded_runs_when_it_is_replayed_and_nothing_waits_in_between() {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 4).unwrap();
    let args = [memory.address().into()];
    driver.begin_capture().unwrap();
    driver
        .launch(&Launch { kernel: "faulty_race", grid: [1, 1, 1], block: 64, args: &args, ..Launch::default() })
        .unwrap();
    assert!(driver.synchronize().is_err() && driver.allocate(1).is_err() && driver.begin_capture().is_err());
    let graph = driver.end_capture().unwrap();
    driver.synchronize().unwrap();
    assert_eq!(driver.launches(), 0);
    for replays in 1..=2 {
        driver.replay(&graph).unwrap();
        driver.synchronize().unwrap();
        assert_eq!(driver.launches(), replays);
    }
}

/// What a kernel of faulty_hopper.cu makes of the matrix whose rows are all one but for the first, which is their
/// numbers.
fn run_on_hopper(mistake: &str) -> Result<Vec<f32>, DriverError> {
    let driver = EmulatedHopper::default();
    let (matrix, out) = (driver.allocate(64 * 128)?, driver.allocate(64 * 4)?);
    // Half precision: row i is i / 64 in its first column, and 1 in its last.
    let one = 0x3c00u16;
    let halves = (0..64 * 64).map(|i| match (i / 64, i % 64) {
        (row, 0) => half(row),
        (_, 63) => one,
        _ => 0,
    });
    driver.write(&halves.flat_map(u16::to_le_bytes).collect::<Vec<_>>(), matrix.address())?;
    let boxes = Boxes { start: matrix.address(), rows: 64, cols: 64, row_bytes: 128, box_rows: 64 };
    let maps = [driver.tensor_map(&boxes)?];
    let kernel = format!("faulty_{mistake}");
    let args = [out.address().into()];
    driver.launch(&Launch {
        kernel: &kernel,
        grid: [1, 1, 1],
        block: 128,
        shared: 64 * 128 + 1008,
        maps: &maps,
        args: &args,
    })?;
    let mut bytes = [0; 256];
    driver.read(out.address(), &mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|float| f32::from_le_bytes(*float)).collect())
}

/// A small whole number and a half, in half precision.
fn half(number: usize) -> u16 {
    // 2^10 units of one: exponents of 2^0 to 2^6 are 15 to 21.
    let value = 2 * number as u32 + 1;
    let exponent = value.ilog2();
    ((14 + exponent) << 10 | (value << (10 - exponent) & 0x3ff)) as u16
}

/// What rows multiplied with the first are.
fn products() -> Vec<f32> {
    (0..64).map(|row| (row as f32 + 0.5) * 0.5 + 1.0).collect()
}

#[test]
fn groups_of_warps_multiply_what_was_copied() {
    assert_eq!(run_on_hopper("nothing").unwrap(), products());
}

#[test]
fn what_is_not_waited_for_is_not_a_number() {
    for mistake in ["no_wait", "wrong_parity", "no_wait_for_sums", "reused_stage"] {
        let seen = run_on_hopper(mistake).unwrap();
        assert!(seen.iter().all(|x| x.is_nan()), "{mistake}: {seen:?}");
    }
}

#[test]
fn what_is_said_wrong_of_an_operand_gives_something_else() {
    for mistake in ["no_swizzle", "wrong_stride"] {
        assert_ne!(run_on_hopper(mistake).unwrap(), products(), "{mistake}");
    }
}

#[test]
fn operands_are_held_in_registers_and_stored_by_threads() {
    assert_eq!(run_on_hopper("held_nothing").unwrap(), [16.0; 64]);
    // What was there before it was stored, which is the first rows of the matrix in their first column.
    let before: f32 = (0..16).map(|row| row as f32 + 0.5).sum();
    assert_eq!(run_on_hopper("shown_late").unwrap(), [before; 64]);
}

#[test]
fn misuse_of_what_goes_on_by_itself_is_an_error() {
    for (mistake, said) in [
        ("endless_phase", "for a phase that does not end (128 wait, 0 have ended)"),
        ("too_many_bytes", "for a phase that does not end (128 wait, 0 have ended)"),
        ("unshown", "a box is to arrive at a barrier that was not shown to what copies it"),
        ("unaligned_box", "not at a multiple of 128 bytes"),
        ("nobody_waits", "a block ends, and boxes are under way"),
        ("overwritten", "a barrier was written over"),
        ("no_fence", "no fence stands before the product of line"),
        ("touched", "sums are touched while products add to them"),
        ("left_products", "a thread ends while products are under way"),
        ("one_warp_less", "a block ends, and a warp has left the others to multiply alone"),
        ("wrong_place", "reads beyond the shared memory that was asked for"),
        ("held_touched", "registers are touched while the product of line"),
        ("held_late", "no fence stands between registers and the product of line"),
        ("held_unfenced", "no fence stands between registers and the product of line"),
        ("not_across", "does not begin where its swizzle does"),
        ("not_shown", "a thread ends that has not shown what it stored to products"),
    ] {
        let error = run_on_hopper(mistake).expect_err(mistake).to_string();
        assert!(error.contains(said), "{mistake}: {error}");
    }
}

#[test]
fn boxes_are_of_what_the_driver_can_describe() {
    let driver = EmulatedHopper::default();
    let memory = driver.allocate(64 * 128).unwrap();
    let right = Boxes { start: memory.address(), rows: 64, cols: 64, row_bytes: 128, box_rows: 64 };
    assert!(driver.tensor_map(&right).is_ok());
    for (wrong, said) in [
        (Boxes { start: memory.address().offset(8), ..right }, "starts at a multiple of 16 bytes"),
        (Boxes { cols: 4, row_bytes: 8, ..right }, "rows are multiples of 16 bytes apart"),
        (Boxes { cols: 65, ..right }, "rows are multiples of 16 bytes apart"),
        (Boxes { rows: 0, ..right }, "1 to 2^32 rows"),
        (Boxes { box_rows: 257, ..right }, "1 to 256 rows and columns"),
        (Boxes { rows: 65, ..right }, "not in one allocation"),
    ] {
        let error = driver.tensor_map(&wrong).unwrap_err().to_string();
        assert!(error.contains(said), "{wrong:?}: {error}");
    }
}

#[test]
fn devices_of_another_kind_copy_no_boxes() {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 128).unwrap();
    let boxes = Boxes { start: memory.address(), rows: 64, cols: 64, row_bytes: 128, box_rows: 64 };
    let error = driver.tensor_map(&boxes).unwrap_err().to_string();
    assert!(error.contains("only devices of compute capability 9.0"), "{error}");
}
