//! NVIDIA GPUs, as far as the kernel shows them.

use std::{fs, path::Path};

use super::text;
use crate::transfer::rdma;

/// See the module.
#[derive(Debug, Clone, Default)]
pub(in crate::doctor) struct GpuFacts {
    /// The driver's line about itself; `None`: it is not loaded.
    pub(in crate::doctor) driver: Option<String>,
    /// Names of the GPUs the driver has.
    pub(in crate::doctor) gpus: Vec<String>,
    /// Device files of GPUs that are there: `/dev/nvidia0`.
    pub(in crate::doctor) device_files: Vec<String>,
    /// Whether this build can compute on GPUs.
    pub(in crate::doctor) used: bool,
    /// The module by which adapters find GPU memory by its address.
    pub(in crate::doctor) peermem: bool,
    /// Whether the verbs library is one that registers GPU memory by dma-buf.
    pub(in crate::doctor) verbs_dma_buf: bool,
    /// Whether there is an adapter that could reach GPU memory.
    pub(in crate::doctor) adapters: bool,
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
        let peermem = Path::new("/sys/module/nvidia_peermem").exists();
        let verbs_dma_buf = rdma::registers_dma_buf();
        let adapters = rdma::devices(Path::new(rdma::SYSFS_CLASS)).is_ok_and(|devices| !devices.is_empty());
        Self { driver, gpus, device_files, used: cfg!(feature = "cuda"), peermem, verbs_dma_buf, adapters }
    }

    /// Whether the driver's kernel modules are the open ones, which alone make dma-bufs of GPU memory.
    pub(in crate::doctor) fn has_open_modules(&self) -> bool {
        self.driver.as_deref().is_some_and(|driver| driver.contains("Open Kernel Module"))
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
