//! NVIDIA GPUs, as far as the kernel shows them.

use std::fs;
use std::path::Path;

use super::text;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(in crate::doctor) struct GpuFacts {
    /// The driver's line about itself; `None`: it is not loaded.
    pub(in crate::doctor) driver: Option<String>,
    /// Names of the GPUs the driver has.
    pub(in crate::doctor) gpus: Vec<String>,
    /// Device files of GPUs that are there: `/dev/nvidia0`.
    pub(in crate::doctor) device_files: Vec<String>,
    /// The module by which adapters reach GPU memory without dma-buf.
    pub(in crate::doctor) peermem: bool,
}

impl GpuFacts {
    pub(in crate::doctor) fn collect() -> Self {
        let driver = text("/proc/driver/nvidia/version").and_then(|text| text.lines().next().map(str::to_owned));
        let cards = fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
        let mut gpus: Vec<String> = cards.filter_map(|card| model(&text(card.path().join("information"))?)).collect();
        gpus.sort();
        let files = fs::read_dir("/dev").into_iter().flatten().flatten();
        let names = files.filter_map(|file| file.file_name().into_string().ok());
        let mut device_files: Vec<String> = names
            .filter(|name| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok()))
            .collect();
        device_files.sort();
        Self { driver, gpus, device_files, peermem: Path::new("/sys/module/nvidia_peermem").exists() }
    }
}

/// The name in a card's `information`.
fn model(information: &str) -> Option<String> {
    let name = information.lines().find_map(|line| line.strip_prefix("Model:"))?;
    Some(name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_has_its_name_among_its_information() {
        let information = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 281\n";
        assert_eq!(model(information).as_deref(), Some("NVIDIA H100 80GB HBM3"));
        assert_eq!(model("IRQ: 1\n"), None);
    }
}
