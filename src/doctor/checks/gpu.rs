use super::{Area, Finding, Level};
use crate::doctor::facts::GpuFacts;

/// GPUs are looked at so that nobody wonders why they are idle.
pub(in crate::doctor) fn gpus(facts: &GpuFacts) -> Vec<Finding> {
    let found = |check, level, seen: String| Finding::new(Area::Gpu, check, level, seen);
    let Some(driver) = &facts.driver else {
        let seen = match facts.device_files.len() {
            0 if facts.used => "none; workers compute on the CPU".to_owned(),
            0 => "none; this build computes on CPUs, so nothing is missing".to_owned(),
            _ => format!("no NVIDIA driver is loaded, though /dev has {}", facts.device_files.join(", ")),
        };
        return vec![found("gpu", Level::Note, seen)];
    };
    let names = if facts.gpus.is_empty() { "no GPU".to_owned() } else { facts.gpus.join(", ") };
    let mut findings = vec![
        found("driver", Level::Note, driver.clone()),
        match facts.used {
            true => found("gpu", Level::Ok, format!("{names}: for workers with --device cuda:N")),
            false => found("gpu", Level::Note, format!("{names}: left idle, as this build computes on CPUs"))
                .remedy("`make cuda` builds one that computes on GPUs"),
        },
    ];
    findings.push(peer_memory(facts));
    findings
}

/// Whether adapters could reach GPU memory. What a worker has found to work, its log and its card say.
fn peer_memory(facts: &GpuFacts) -> Finding {
    let no_dma_buf = match (facts.has_open_modules(), facts.verbs_dma_buf) {
        (true, true) => None,
        (true, false) => Some("libibverbs is missing, or too old for dma-buf"),
        (false, _) => Some("dma-buf takes NVIDIA's open kernel modules"),
    };
    let found = |level, seen: String| Finding::new(Area::Gpu, "peer memory", level, seen);
    let reached = |by: &str| {
        let level = if facts.used { Level::Ok } else { Level::Note };
        found(level, format!("adapters may reach GPU memory by {by}"))
    };
    match (no_dma_buf, facts.peermem) {
        (None, true) => reached("dma-buf, or else by nvidia_peermem"),
        (None, false) => reached("dma-buf; nvidia_peermem is not loaded"),
        (Some(reason), true) => reached(&format!("nvidia_peermem; {reason}")),
        (Some(reason), false) => {
            let seen = format!("over RDMA pages are staged in host memory: {reason}, and nvidia_peermem is not loaded");
            let level = if facts.used && facts.adapters { Level::Warning } else { Level::Note };
            found(level, seen)
                .remedy("modprobe nvidia_peermem, which comes with the driver, or install its open kernel modules")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_said_to_be_idle_and_their_absence_is_no_fault() {
        let none = gpus(&GpuFacts::default());
        assert!(none[0].seen.contains("computes on CPUs") && none[0].level == Level::Note);
        let facts =
            GpuFacts { driver: Some("NVRM version: 580".into()), gpus: vec!["H100".into()], ..GpuFacts::default() };
        let findings = gpus(&facts);
        assert!(findings.iter().any(|finding| finding.seen.starts_with("H100: left idle")), "{findings:?}");
        assert!(findings.iter().all(|finding| finding.level == Level::Note));
        let findings = gpus(&GpuFacts { used: true, ..facts });
        assert!(findings.iter().any(|finding| finding.level == Level::Ok && finding.seen.contains("--device cuda")));
    }

    #[test]
    fn what_keeps_adapters_from_gpu_memory_is_said_with_what_to_do_about_it() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05";
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05";
        let facts = |driver: &str, verbs_dma_buf, peermem| GpuFacts {
            driver: Some(driver.into()),
            used: true,
            adapters: true,
            verbs_dma_buf,
            peermem,
            ..GpuFacts::default()
        };
        for (driver, verbs, peermem, by) in [
            (open, true, true, "by dma-buf, or"),
            (open, true, false, "by dma-buf;"),
            (closed, true, true, "by nvidia_peermem; dma-buf takes"),
            (open, false, true, "by nvidia_peermem; libibverbs"),
        ] {
            let finding = peer_memory(&facts(driver, verbs, peermem));
            assert!(finding.level == Level::Ok && finding.seen.contains(by), "{finding:?}");
        }
        for (driver, verbs) in [(closed, true), (open, false), (closed, false)] {
            let finding = peer_memory(&facts(driver, verbs, false));
            assert!(finding.level == Level::Warning && finding.seen.contains("are staged"), "{finding:?}");
            assert!(finding.remedy.is_some_and(|remedy| remedy.contains("modprobe")));
        }
        let alone = peer_memory(&GpuFacts { adapters: false, ..facts(closed, true, false) });
        assert_eq!(alone.level, Level::Note, "there is no adapter that wants to");
        let idle = peer_memory(&GpuFacts { used: false, ..facts(closed, true, true) });
        assert_eq!(idle.level, Level::Note, "this build has no use for it");
    }
}
