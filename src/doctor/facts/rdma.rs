//! RDMA: the kernel's devices, the files that lead to them, and the library that speaks to them.

use std::{fs, fs::File, path::Path};

use crate::transfer::{
    Adapters,
    rdma::{self, Choice, ChooseError, Device, Wish},
};

/// Where the kernel puts the devices' files.
const DEVICE_FILES: &str = "/dev/infiniband";

/// See the module.
#[derive(Debug, Clone)]
pub(in crate::doctor) struct RdmaFacts {
    pub(in crate::doctor) devices: Result<Vec<Device>, String>,
    /// `uverbs0`, and why it cannot be opened.
    pub(in crate::doctor) device_files: Vec<(String, Result<(), String>)>,
    /// Whether libibverbs can be loaded.
    pub(in crate::doctor) library: Result<(), String>,
    pub(in crate::doctor) wish: Wish,
    /// What the engine would use.
    pub(in crate::doctor) choice: Result<Vec<Choice>, ChooseError>,
    /// Whether that can be opened; `None`: something it takes is missing.
    pub(in crate::doctor) opened: Option<Result<(), String>>,
}

impl RdmaFacts {
    pub(in crate::doctor) fn collect(wish: &Wish) -> Self {
        let devices = rdma::devices(Path::new(rdma::SYSFS_CLASS)).map_err(|error| error.to_string());
        let choice = rdma::choose(devices.as_deref().unwrap_or_default(), wish);
        let library = rdma::library().map_err(|error| error.to_string());
        let usable = choice.is_ok() && library.is_ok();
        let opened = usable.then(|| Adapters::open(wish).map(drop).map_err(|error| error.to_string()));
        Self { devices, device_files: device_files(), library, wish: wish.clone(), choice, opened }
    }
}

fn device_files() -> Vec<(String, Result<(), String>)> {
    let entries = fs::read_dir(DEVICE_FILES).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| name.starts_with("uverbs")).collect();
    names.sort();
    let open = |name: &str| File::options().read(true).write(true).open(Path::new(DEVICE_FILES).join(name));
    names.into_iter().map(|name| (name.clone(), open(&name).map(drop).map_err(|error| error.to_string()))).collect()
}
