//! How a worker's pages may travel, as its command line says.

use anyhow::{Context, Result, bail};

use crate::{
    cli::{DeviceMemoryArg, TransportArg, TransportArgs},
    transfer::{
        Adapters, RdmaError, Reached, Transport, Unreached,
        rdma::{ChooseError, Wish},
    },
};

/// What is wrong with `--transport cuda-ipc` on a worker without a device.
pub(super) const NEEDS_DEVICE: &str =
    "--transport cuda-ipc moves pages between CUDA devices, and this worker computes on the CPU: see --device";

/// How adapters reach pages in device memory, or why they do not; none where no adapters are open.
pub(crate) type Reach = Option<Result<Reached, Unreached>>;

/// The ways that are allowed.
#[derive(Clone)]
pub struct Ways {
    /// From device to device of a host.
    pub(crate) cuda_ipc: bool,
    /// Through memory that processes of a host share.
    pub(crate) shm: bool,
    /// Through adapters, if there are any.
    pub(crate) rdma: bool,
    /// Through TCP.
    pub(crate) tcp: bool,
    /// Without adapters the worker does not start.
    rdma_needed: bool,
    wish: Wish,
    /// Adapters may reach pages in device memory.
    to_device: bool,
    adapters: Option<Adapters>,
}

impl Ways {
    /// These, and none of them needed.
    pub fn among(transports: &[Transport]) -> Self {
        let has = |transport| transports.contains(&transport);
        let (shm, rdma, tcp) = (has(Transport::Shm), has(Transport::Rdma), has(Transport::Tcp));
        Self {
            cuda_ipc: has(Transport::CudaIpc),
            shm,
            rdma,
            tcp,
            rdma_needed: false,
            wish: Wish::default(),
            to_device: true,
            adapters: None,
        }
    }

    /// As flags say; an error if they contradict each other.
    pub fn of(args: &TransportArgs) -> Result<Self> {
        let asked_for = args.require_rdma || !args.rdma_device.is_empty() || args.rdma_gid_index.is_some();
        let only = match args.transport {
            TransportArg::Auto => None,
            TransportArg::CudaIpc => Some(Transport::CudaIpc),
            TransportArg::Shm => Some(Transport::Shm),
            TransportArg::Rdma => Some(Transport::Rdma),
            TransportArg::Tcp => Some(Transport::Tcp),
        };
        if let Some(other @ (Transport::CudaIpc | Transport::Shm | Transport::Tcp)) = only.filter(|_| asked_for) {
            bail!("--transport {} has no use for --require-rdma, --rdma-device and --rdma-gid-index", other.name());
        }
        let allowed = |way| only.is_none_or(|only| only == way);
        let rdma_needed = asked_for || only == Some(Transport::Rdma);
        // Adapters do not encrypt: pages of workers that encrypt what goes over TCP use them only when told to.
        let encrypted = args.session_cert.is_some() || args.session_ca.is_some();
        Ok(Self {
            cuda_ipc: allowed(Transport::CudaIpc),
            shm: allowed(Transport::Shm),
            rdma: allowed(Transport::Rdma) && (rdma_needed || !encrypted),
            tcp: allowed(Transport::Tcp) && !args.require_rdma,
            rdma_needed,
            wish: args.rdma_wish(),
            to_device: args.rdma_device_memory == DeviceMemoryArg::Auto,
            adapters: None,
        })
    }

    /// Opens the adapters, if they are allowed and there are any. Without them it is an error only if they were asked
    /// for.
    pub async fn open(mut self) -> Result<Self> {
        if self.rdma {
            let wish = self.wish.clone();
            let opened = tokio::task::spawn_blocking(move || Adapters::open(&wish)).await;
            self.adapters = self.unless_needed(opened.context("opening RDMA devices panicked")?)?;
        }
        Ok(self)
    }

    /// Registers memory with the adapters that are open, if any are.
    pub(crate) async fn register<T: Send + 'static>(
        &self,
        register: impl FnOnce(&Adapters) -> Result<T, RdmaError> + Send + 'static,
    ) -> Result<Option<T>> {
        let Some(adapters) = self.adapters.clone() else { return Ok(None) };
        let registered = tokio::task::spawn_blocking(move || register(&adapters)).await;
        let registered = self.unless_needed(registered.context("registering memory panicked")?)?;
        if registered.is_some() {
            self.tell_registered("KV memory is registered for RDMA");
        }
        Ok(registered)
    }

    /// The same of pages in device memory, and, if adapters are open, how they reach these. Why they do not is no error,
    /// as pages can be staged.
    pub(crate) async fn reach<T: Send + 'static>(
        &self,
        register: impl FnOnce(&Adapters) -> Result<(T, Reached), Unreached> + Send + 'static,
    ) -> Result<(Option<T>, Reach)> {
        let Some(adapters) = self.adapters.clone() else { return Ok((None, None)) };
        if !self.to_device {
            return Ok((None, Some(Err(Unreached::Unwanted))));
        }
        let registered = tokio::task::spawn_blocking(move || register(&adapters)).await;
        match registered.context("registering device memory panicked")? {
            Ok((registered, reached)) => {
                self.tell_registered("KV memory on the device is registered for RDMA");
                Ok((Some(registered), Some(Ok(reached))))
            }
            Err(unreached) => Ok((None, Some(Err(unreached)))),
        }
    }

    fn tell_registered(&self, what: &str) {
        for choice in self.adapters.iter().flat_map(Adapters::choices) {
            let gid = std::net::Ipv6Addr::from(choice.gid);
            tracing::info!(device = %choice.device, port = choice.port, gid_index = choice.gid_index, %gid,
                link = %choice.link, gbps = choice.rate_gbps, "{what}");
        }
    }

    /// What came of it; a failure is an error if RDMA was asked for, and otherwise only said in the log.
    fn unless_needed<T>(&self, result: Result<T, RdmaError>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if self.rdma_needed => Err(error).context("RDMA was asked for"),
            Err(RdmaError::Choose(ChooseError::NoDevice)) => {
                tracing::debug!("this host has no RDMA device");
                Ok(None)
            }
            Err(error) => {
                tracing::warn!(%error, "pages do not go over RDMA; 'engine doctor' says more");
                Ok(None)
            }
        }
    }

    /// Whether a way is allowed that reaches host memory alone; `reached`: adapters reach device memory.
    pub(crate) fn need_staging(&self, reached: bool) -> bool {
        self.shm || self.tcp || (self.rdma && !reached)
    }

    /// Whether the only way that is allowed is from device to device, so that pages in host memory have none.
    pub(crate) fn needs_device(&self) -> bool {
        self.cuda_ipc && !self.shm && !self.rdma && !self.tcp
    }

    /// What is offered, for operators to read.
    pub(crate) fn names(&self, cuda_ipc: bool, rdma: bool) -> Vec<String> {
        let ways = [
            (cuda_ipc, Transport::CudaIpc),
            (self.shm, Transport::Shm),
            (rdma, Transport::Rdma),
            (self.tcp, Transport::Tcp),
        ];
        ways.iter().filter(|(on, _)| *on).map(|(_, way)| way.name().to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Invocation;

    fn ways(flags: &[&str]) -> Result<Ways> {
        match Invocation::try_parse_from([&["engine", "--is-prefill-worker"], flags].concat()).unwrap() {
            Invocation::Prefill(worker) => Ways::of(&worker.disagg.transports),
            other => panic!("{other:?}"),
        }
    }

    /// Shared memory, RDMA and TCP, and whether RDMA has to be there.
    fn allowed(flags: &[&str]) -> [bool; 4] {
        let ways = ways(flags).unwrap();
        [ways.shm, ways.rdma, ways.tcp, ways.rdma_needed]
    }

    #[test]
    fn what_is_asked_for_is_allowed_and_nothing_else() {
        assert_eq!(allowed(&[]), [true, true, true, false]);
        assert_eq!(allowed(&["--transport", "shm"]), [true, false, false, false]);
        assert_eq!(allowed(&["--transport", "rdma"]), [false, true, false, true]);
        assert_eq!(allowed(&["--transport", "tcp"]), [false, false, true, false]);
        assert_eq!(allowed(&["--transport", "cuda-ipc"]), [false, false, false, false]);
        for (flags, from_device_to_device, alone) in [
            (&[][..], true, false),
            (&["--transport", "shm"], false, false),
            (&["--transport", "cuda-ipc"], true, true),
        ] {
            let ways = ways(flags).unwrap();
            assert_eq!((ways.cuda_ipc, ways.needs_device()), (from_device_to_device, alone), "{flags:?}");
        }
    }

    #[test]
    fn pages_are_staged_for_every_way_that_does_not_reach_a_device() {
        let staged = |flags: &[&str]| [false, true].map(|reached| ways(flags).unwrap().need_staging(reached));
        assert_eq!(staged(&[]), [true, true]);
        assert_eq!(staged(&["--transport", "rdma"]), [true, false]);
        assert_eq!(staged(&["--transport", "shm"]), [true, true]);
        assert_eq!(staged(&["--transport", "cuda-ipc"]), [false, false]);
    }

    #[test]
    fn adapters_reach_a_device_unless_that_is_forbidden() {
        assert!(ways(&[]).unwrap().to_device);
        assert!(!ways(&["--transport", "rdma", "--rdma-device-memory", "never"]).unwrap().to_device);
    }

    #[test]
    fn required_rdma_forbids_tcp_and_a_device_that_is_named_has_to_be_there() {
        assert_eq!(allowed(&["--require-rdma"]), [true, true, false, true]);
        assert_eq!(allowed(&["--transport", "rdma", "--require-rdma"]), [false, true, false, true]);
        assert_eq!(allowed(&["--rdma-device", "mlx5_0"]), [true, true, true, true]);
        assert!(
            ways(&["--transport", "tcp", "--require-rdma"])
                .is_err_and(|error| error.to_string().contains("--require-rdma"))
        );
        assert!(ways(&["--transport", "shm", "--rdma-gid-index", "3"]).is_err());
    }

    #[test]
    fn workers_that_encrypt_send_nothing_in_the_clear_unless_told_to() {
        assert_eq!(allowed(&["--session-ca", "ca.pem"]), [true, false, true, false]);
        assert_eq!(allowed(&["--session-ca", "ca.pem", "--require-rdma"]), [true, true, false, true]);
    }
}
