use super::{Area, Finding, Level};
use crate::doctor::facts::GpuFacts;

/// GPUs are looked at so that nobody wonders why they are idle.
pub(in crate::doctor) fn gpus(facts: &GpuFacts) -> Vec<Finding> {
    let found = |check, level, seen: String| Finding::new(Area::Gpu, check, level, seen);
    let Some(driver) = &facts.driver else {
        let seen = match facts.device_files.len() {
            0 => "none; this build computes on CPUs, so nothing is missing".to_owned(),
            _ => format!("no NVIDIA driver is loaded, though /dev has {}", facts.device_files.join(", ")),
        };
        return vec![found("gpu", Level::Note, seen)];
    };
    let names = if facts.gpus.is_empty() { "no GPU".to_owned() } else { facts.gpus.join(", ") };
    let mut findings = vec![
        found("driver", Level::Note, driver.clone()),
        found("gpu", Level::Note, format!("{names}: left idle, as this build computes on CPUs; CUDA is in the works")),
    ];
    let seen = match facts.peermem {
        true => "nvidia_peermem is loaded: adapters will be able to write to GPU memory through it",
        false => "nvidia_peermem is not loaded; adapters will reach GPU memory by dma-buf alone (open kernel modules)",
    };
    findings.push(found("peer memory", Level::Note, seen.to_owned()));
    findings
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
    }
}
