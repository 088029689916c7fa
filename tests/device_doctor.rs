//! `engine doctor --gpu` and `engine bench-kernels`, the engine built with CUDA, on the stand-in for libcuda that
//! `scripts/check-device-pages.sh` builds, which can be told to break a kernel or to be of another version.

mod program;
mod support;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};

use program::command::{engine, findings};
use serde_json::Value;

/// Whether the doctor is content, and what it found.
fn doctor(words: &str, set: impl FnOnce(&mut Command)) -> (bool, Vec<Value>) {
    let mut command = engine(&["doctor", "--json", words]);
    set(&mut command);
    findings(&mut command)
}

fn seen(finding: &Value) -> &str {
    finding["seen"].as_str().unwrap()
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn kernels_that_compute_what_the_reference_does_pass() {
    let (passed, findings) = doctor("--gpu=rowwise: ", |_| {});
    assert!(passed, "{findings:?}");
    assert_eq!(findings.len(), 7, "{findings:?}");
    assert!(seen(&findings[0]).contains("a driver for CUDA 13.0"), "{findings:?}");
    assert!(findings.iter().all(|finding| finding["level"] == "ok"), "{findings:?}");

    let (passed, findings) = doctor("--gpu=no such check", |_| {});
    assert!(!passed && seen(&findings[1]).contains("no such check"), "{findings:?}");
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn recordings_are_dropped_before_the_kernels_that_they_hold() {
    // Otherwise the stand-in ends the program.
    let (passed, findings) = doctor("--gpu=steps: steps that are replayed", |_| {});
    assert!(passed && findings.len() == 2, "{findings:?}");
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn recordings_that_cannot_be_given_back_fail_no_step() {
    let (passed, findings) = doctor("--gpu=steps: a block table that outgrows", |command| {
        command.env("STANDIN_REFUSES", "destroy");
    });
    assert!(passed && findings.len() == 2, "{findings:?}");
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn a_kernel_that_does_not_is_found_and_named() {
    for (kernel, words) in [
        ("silu_mul", "--gpu=silu"),
        ("mma_check_bf16", "--gpu=fragments"),
        ("box_check", "--gpu=boxes are"),
        ("wgmma_check_bf16_128", "--gpu=sums of wgmma"),
        ("wgmma_check_stored_f16", "--gpu=stored or held"),
        ("wgmma_check_across_bf16_128", "--gpu=stored or held"),
        ("hopper_gemm_middle_f16", "--gpu=no hopper tile"),
        ("hopper_attention_128_bf16", "--gpu=no place in a tile"),
        ("sample_rows", "--gpu=mixed rows"),
    ] {
        let (passed, findings) = doctor(words, |command| {
            command.env("ENGINE_STANDIN_DEAD_KERNEL", kernel);
        });
        assert!(!passed, "{kernel}");
        let failures: Vec<&Value> = findings.iter().filter(|finding| finding["level"] == "failure").collect();
        assert_eq!(failures.len(), 1, "{findings:?}");
        let named = seen(failures[0]).rsplit(": ").next().unwrap();
        assert!(named.split(", ").any(|name| name == kernel), "{kernel}: {findings:?}");
        assert!(failures[0]["remedy"].as_str().unwrap().contains("--device cpu"), "{findings:?}");
    }
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn checks_after_one_that_breaks_the_device_have_processes_of_their_own() {
    let (passed, findings) = doctor("--gpu=rowwise: ", |command| {
        command.env("ENGINE_STANDIN_FAULTY_KERNEL", "rms_norm");
    });
    assert!(!passed, "{findings:?}");
    let of = |level| findings.iter().filter(|finding| finding["level"] == level).map(seen).collect::<Vec<_>>();
    let (failures, fine) = (of("failure"), of("ok"));
    assert!(failures[0].contains("rms norms match the reference"), "{findings:?}");
    assert!(failures[1].contains("does nothing more for this process"), "{findings:?}");
    assert!(fine.iter().any(|seen| seen.starts_with("silu mul matches the reference")), "{findings:?}");
    assert_eq!(findings.len(), 1 + 6 + 1, "{findings:?}");
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn what_is_wrong_with_wgmma_can_be_done_without() {
    for without in [false, true] {
        let (passed, findings) = doctor("--gpu=bias", |command| {
            command.env("ENGINE_STANDIN_DEAD_KERNEL", "hopper_gemm_flat_bf16");
            if without {
                command.env("ENGINE_CUDA_WITHOUT_WGMMA", "1");
            }
        });
        assert_eq!(passed, without, "{findings:?}");
        let used = if without { "used without wgmma" } else { "used with wgmma" };
        assert!(seen(&findings[0]).contains(used), "{findings:?}");
    }
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn a_driver_that_is_too_old_or_missing_is_named_together_with_what_to_do() {
    let (passed, findings) = doctor("--gpu", |command| {
        command.env("ENGINE_STANDIN_CUDA", "12080");
    });
    assert!(!passed && findings.len() == 1, "{findings:?}");
    assert!(seen(&findings[0]).contains("CUDA 12.8") && seen(&findings[0]).contains("release 580"), "{findings:?}");

    let (passed, findings) = doctor("--gpu", |command| {
        command.env_remove("LD_LIBRARY_PATH");
    });
    assert!(!passed && findings.len() == 1, "{findings:?}");
    assert!(seen(&findings[0]).contains("libcuda is not found") && seen(&findings[0]).contains("nvidia-smi"));

    let output = engine(&["bench-kernels"]).env("ENGINE_STANDIN_CUDA", "12080").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("CUDA 12.8"), "{said}");
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn steps_and_operations_are_measured_one_row_each() {
    let output = engine(&["bench-kernels", "--shape", "tiny"]).output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{table}{}", String::from_utf8_lossy(&output.stderr));
    for row in [
        "tiny: 1 × 200 tokens: a step †",
        "tiny: 1 × 200 tokens: attention, attention_2x8_bf16",
        "tiny: 8 × 20 tokens: norm, rms_norm",
        "tiny: 8 × 20 tokens: attention, attention_2x8_bf16",
        "tiny: 8 × 20 tokens: attention, attention_2x8_f8",
        "tiny: 17 × 20 tokens: down, hopper_gemm_flat_bf16",
        "tiny: 17 × 20 tokens: down, product_small_bf16",
        "tiny: 17 × 20 tokens: logits, hopper_gemm_flat_bf16",
        "tiny: 20 of a prompt behind 9: rotation, rope_and_cache_bf16",
        "tiny: 20 of a prompt behind 9: attention, hopper_attention_64_bf16",
        "tiny: 20 of a prompt behind 9: attention, prefill_attention_64_bf16",
    ] {
        assert!(table.lines().any(|line| line.starts_with(&format!("| {row} |"))), "{row}:\n{table}");
    }
    // A layer of one row is five kernels, and what follows the layers three.
    let of_one_row = table.lines().filter(|line| line.starts_with("| tiny: 1 × ")).count();
    assert_eq!(of_one_row, 1 + 5 + 3, "{table}");
    // All but whole steps was recorded.
    assert!(table.lines().all(|line| line.contains(" † |") == line.contains("a step")), "{table}");
}

/// A process that ends with its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs a stand-in for libcuda: make device-pages"]
fn two_processes_measure_pages_from_device_to_device_beside_a_copy() {
    let mut serving = engine(&["transfer-bench", "--serve", "--port", "0", "--device", "cuda:0", "--log-level", "off"]);
    let mut serving = Killed(serving.stdout(Stdio::piped()).spawn().unwrap());
    let mut line = String::new();
    BufReader::new(serving.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().rsplit(' ').next().unwrap();
    let measured = |refused: &str, flags: &[&str]| {
        let few = ["--page-size", "64KiB", "--pages", "4", "--rounds", "2", "--json"];
        let mut command = engine(&[&["transfer-bench", "--connect", address], &few[..], flags].concat());
        command.env("STANDIN_REFUSES", refused).output().unwrap()
    };
    // Copies in one call, or one after the other where a driver does not take them so.
    for refused in ["nothing", "batch"] {
        let Output { status, stdout, stderr } = measured(refused, &["--device", "cuda:0"]);
        let said = String::from_utf8_lossy(&stderr);
        assert!(status.success(), "{said}");
        assert_eq!(said.matches("one by one from now on").count(), usize::from(refused == "batch"), "{said}");
        let row: Value = serde_json::from_slice(&stdout).unwrap();
        assert_eq!(row["transport"], "cuda-ipc");
        assert!(row["gigabytes_per_second"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["copy_gigabytes_per_second"].as_f64().unwrap() > 0.0, "{row}");
    }
    // Out of host memory no way leads there, and the other ways are not measured out of a device's.
    for (flags, why) in [
        (&["--device", "cpu"][..], "takes no pages over shm"),
        (&["--device", "cuda:0", "--transport", "shm"], "cuda-ipc"),
    ] {
        let Output { status, stderr, .. } = measured("nothing", flags);
        let said = String::from_utf8_lossy(&stderr);
        assert!(!status.success() && said.contains(why), "{flags:?} {said}");
    }
}
