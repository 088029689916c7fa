//! What computes: this machine's cores, or a CUDA device.

use std::fmt;

use anyhow::Result;

use crate::cli::{DeviceArg, EngineArgs};

/// What was chosen.
pub(crate) enum Chosen {
    /// The cores.
    Cpu,
    /// A CUDA device, opened.
    #[cfg(feature = "cuda")]
    Cuda {
        /// Its number.
        ordinal: usize,
        /// The device.
        device: engine_cuda_device::Device,
    },
}

impl fmt::Display for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Self::Cuda { ordinal, device } => {
                write!(f, "cuda:{ordinal} ({})", engine_kernels::cuda::Driver::name(device))
            }
        }
    }
}

impl Chosen {
    /// Sequences and tokens of one step at most, as far as nobody has said. Decoding is bound by memory up to a few
    /// hundred sequences on a device, and products of fewer than a thousand rows or so do not fill one.
    pub(super) fn step_limits(&self, args: &EngineArgs) -> (usize, usize) {
        let (sequences, tokens) = match self {
            Self::Cpu => (64, 512),
            #[cfg(feature = "cuda")]
            Self::Cuda { .. } => (256, 2048),
        };
        // What was said of tokens is not to be refused for what nobody said of sequences.
        let fit = args.max_num_batched_tokens.map_or(sequences, |tokens| sequences.min(tokens.max(1)));
        let sequences = args.max_num_seqs.unwrap_or(fit);
        (sequences, args.max_num_batched_tokens.unwrap_or(tokens.max(sequences)))
    }

    /// Bytes of a device's memory that are left for pages once weights and others have taken their part; `None` for the
    /// CPU, whose memory is everybody's.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, reason = "the CPU asks for none of them"))]
    pub(super) fn bytes_for_pages(&self, utilization: f64, weights: usize) -> Result<Option<usize>> {
        match self {
            Self::Cpu => Ok(None),
            #[cfg(feature = "cuda")]
            Self::Cuda { device, .. } => {
                let (free, total) = engine_kernels::cuda::Driver::memory(device)?;
                let usable = ((total as f64 * utilization) as usize).saturating_sub(total - free);
                Ok(Some(usable.saturating_sub(weights)))
            }
        }
    }
}

/// Opens the device that `--device` names; `auto` takes the first CUDA device if there is one.
#[cfg(feature = "cuda")]
pub(crate) fn choose(wanted: DeviceArg) -> Result<Chosen> {
    use engine_cuda_device::{Device, device_count};

    let ordinal = match wanted {
        DeviceArg::Cuda(ordinal) => ordinal,
        DeviceArg::Cpu => return Ok(Chosen::Cpu),
        DeviceArg::Auto => match device_count() {
            Ok(0) => return Ok(Chosen::Cpu),
            Ok(_) => 0,
            // Who has a driver expects to be served by a device.
            Err(error) => {
                tracing::warn!(%error, "computing on the CPU (--device cuda:0 would end instead)");
                return Ok(Chosen::Cpu);
            }
        },
    };
    Ok(Chosen::Cuda { ordinal, device: Device::new(ordinal)? })
}

/// Opens the device that `--device` names. This build knows the CPU alone.
#[cfg(not(feature = "cuda"))]
pub(crate) fn choose(wanted: DeviceArg) -> Result<Chosen> {
    match wanted {
        DeviceArg::Cuda(ordinal) => anyhow::bail!(
            "--device cuda:{ordinal}: this engine was built without CUDA; `make cuda` builds one that has it"
        ),
        DeviceArg::Auto | DeviceArg::Cpu => {
            if let Some(warning) = unused_device(wanted, std::path::Path::new(LOADED_DRIVER)) {
                tracing::warn!("{warning}");
            }
            Ok(Chosen::Cpu)
        }
    }
}

/// What is there while NVIDIA's driver is loaded, in containers too.
#[cfg(not(feature = "cuda"))]
const LOADED_DRIVER: &str = "/proc/driver/nvidia/version";

/// What to say of a device that this build cannot use, if its `driver` is there and nobody has chosen the CPU.
#[cfg(not(feature = "cuda"))]
fn unused_device(wanted: DeviceArg, driver: &std::path::Path) -> Option<&'static str> {
    (wanted == DeviceArg::Auto && driver.exists()).then_some(
        "computing on the CPU: this machine has an NVIDIA driver, but this engine was built without CUDA; `make cuda` \
         builds target/cuda/engine, which has it (with --device cpu nothing is said)",
    )
}

#[cfg(all(test, not(feature = "cuda")))]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_build_without_cuda_computes_on_the_cpu_and_says_what_has_it() {
        for wanted in [DeviceArg::Auto, DeviceArg::Cpu] {
            assert_eq!(choose(wanted).unwrap().to_string(), "cpu");
        }
        let refused = choose(DeviceArg::Cuda(1)).err().unwrap().to_string();
        assert!(refused.contains("cuda:1") && refused.contains("make cuda"), "{refused}");
    }

    #[test]
    fn a_build_without_cuda_says_that_a_device_goes_unused_unless_the_cpu_was_chosen() {
        let (there, nowhere) = (Path::new(env!("CARGO_MANIFEST_DIR")), Path::new("/no/such/driver"));
        let warning = unused_device(DeviceArg::Auto, there).unwrap();
        assert!(warning.contains("make cuda") && warning.contains("--device cpu"), "{warning}");
        assert_eq!(unused_device(DeviceArg::Auto, nowhere), None);
        assert_eq!(unused_device(DeviceArg::Cpu, there), None);
    }
}
