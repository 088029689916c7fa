//! What a worker says of how its pages get into device memory and out of it: in its log, and in its card.

use engine_kernels::RegionShape;

use super::ways::Ways;
use crate::{
    cli::WorkerArgs,
    transfer::{Reached, Unreached},
};

/// Says that a flag has no use where pages are in host memory.
pub(super) fn warn_of_staging_flag(cli: &WorkerArgs) {
    if cli.disagg.kv_staging_memory.is_some() {
        tracing::warn!("--kv-staging-memory has no use on a worker that computes on the CPU");
    }
}

/// How pages in device memory can go.
pub(super) struct OnDevice<'a> {
    /// The ways that are allowed.
    pub(super) ways: &'a Ways,
    /// Whether some may go from device to device.
    pub(super) cuda_ipc: bool,
    /// Whether adapters reach them, if there are any.
    pub(super) rdma: Option<&'a Result<Reached, Unreached>>,
    /// The host memory that pages are staged in on all other ways.
    pub(super) staged_in: RegionShape,
    /// When they are staged, as part of the sentence.
    pub(super) when: &'static str,
}

impl OnDevice<'_> {
    /// Says it in the log, and returns what there is to say elsewhere.
    pub(super) fn announce(&self) -> String {
        let text = self.text();
        match self.rdma {
            Some(Err(Unreached::Refused(_))) => tracing::warn!("{text}"),
            _ if text.is_empty() => {}
            _ => tracing::info!("{text}"),
        }
        text
    }

    fn text(&self) -> String {
        let reached = self.rdma.and_then(|found| found.as_ref().ok());
        let mut said = Vec::new();
        if self.ways.need_staging(reached.is_some()) {
            let directly: Vec<&str> = [(self.cuda_ipc, "cuda-ipc"), (reached.is_some(), "rdma")]
                .iter()
                .filter(|w| w.0)
                .map(|w| w.1)
                .collect();
            let except =
                if directly.is_empty() { String::new() } else { format!("but over {} ", directly.join(" and ")) };
            let mut because = Vec::new();
            if self.ways.shm || self.ways.tcp {
                because.push("shared memory and TCP reach host memory alone".to_owned());
            }
            if let Some(Err(reason)) = self.rdma {
                because.push(format!("adapters do not reach the device ({reason})"));
            }
            said.push(format!(
                "{except}pages are staged {}, in {} MiB of host memory ({} pages), because {}",
                self.when,
                self.staged_in.total_bytes() >> 20,
                self.staged_in.pages,
                because.join(" and "),
            ));
        }
        said.extend(reached.map(|reached| format!("adapters reach pages on the device themselves ({reached})")));
        said.join("; ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::{RdmaError, Transport, rdma::Registration};

    const SHAPE: RegionShape = RegionShape { layers: 4, pages: 8, page_bytes: 64 << 10 };
    const DIRECTLY: Result<Reached, Unreached> = Ok(Reached { by: Registration::DmaBuf, flush: true });

    fn text(ways: &[Transport], cuda_ipc: bool, rdma: Option<&Result<Reached, Unreached>>) -> String {
        let ways = &Ways::among(ways);
        OnDevice { ways, cuda_ipc, rdma, staged_in: SHAPE, when: "on their way to the device" }.text()
    }

    #[test]
    fn what_is_staged_is_said_with_its_reason_and_what_is_not_too() {
        let all = [Transport::CudaIpc, Transport::Shm, Transport::Rdma, Transport::Tcp];
        assert_eq!(
            text(&all, true, Some(&DIRECTLY)),
            "but over cuda-ipc and rdma pages are staged on their way to the device, in 2 MiB of host memory (8 \
             pages), because shared memory and TCP reach host memory alone; adapters reach pages on the device \
             themselves (dma-buf, flushed before use)"
        );
        let refused = Err(Unreached::from(RdmaError::Peer));
        let staged = text(&all, false, Some(&refused));
        assert!(
            staged.starts_with("pages are staged") && staged.contains("adapters do not reach the device ("),
            "{staged}"
        );
        // No adapter, no word about them.
        assert!(text(&all, false, None).ends_with("reach host memory alone"));
    }

    #[test]
    fn where_no_way_leads_through_host_memory_nothing_is_said_to_be_staged() {
        assert_eq!(text(&[Transport::CudaIpc], true, None), "");
        let direct = text(&[Transport::Rdma], false, Some(&DIRECTLY));
        assert_eq!(direct, "adapters reach pages on the device themselves (dma-buf, flushed before use)");
        let refused = Err(Unreached::from(RdmaError::Peer));
        let staged = text(&[Transport::Rdma], false, Some(&refused));
        assert!(staged.contains("because adapters do not reach the device ("), "{staged}");
    }
}
