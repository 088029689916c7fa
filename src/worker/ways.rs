//! How a worker's pages may travel, as its command line says.

use anyhow::{Context, Result, bail};

use crate::{
    cli::{DisaggArgs, TransportArg},
    transfer::{
        Adapters, RdmaError, Transport,
        rdma::{ChooseError, Wish},
    },
};

/// The ways that are allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ways {
    /// Through memory that processes of a host share.
    pub(super) shm: bool,
    /// Through adapters, if there are any.
    pub(super) rdma: bool,
    /// Through TCP.
    pub(super) tcp: bool,
    /// Without adapters the worker does not start.
    rdma_needed: bool,
    wish: Wish,
}

impl Ways {
    pub(super) fn of(disagg: &DisaggArgs) -> Result<Self> {
        let asked_for = disagg.require_rdma || !disagg.rdma_device.is_empty() || disagg.rdma_gid_index.is_some();
        let only = match disagg.transport {
            TransportArg::Auto => None,
            TransportArg::Shm => Some(Transport::Shm),
            TransportArg::Rdma => Some(Transport::Rdma),
            TransportArg::Tcp => Some(Transport::Tcp),
        };
        if let Some(other @ (Transport::Shm | Transport::Tcp)) = only.filter(|_| asked_for) {
            bail!("--transport {} has no use for --require-rdma, --rdma-device and --rdma-gid-index", other.name());
        }
        let allowed = |way| only.is_none_or(|only| only == way);
        let rdma_needed = asked_for || only == Some(Transport::Rdma);
        // Adapters do not encrypt: pages of workers that encrypt what goes over TCP use them only when told to.
        let encrypted = disagg.session_cert.is_some() || disagg.session_ca.is_some();
        Ok(Self {
            shm: allowed(Transport::Shm),
            rdma: allowed(Transport::Rdma) && (rdma_needed || !encrypted),
            tcp: allowed(Transport::Tcp) && !disagg.require_rdma,
            rdma_needed,
            wish: Wish { devices: disagg.rdma_device.clone(), gid_index: disagg.rdma_gid_index },
        })
    }

    /// Opens adapters and registers memory with them, if that is allowed and possible. It is an error only if it was
    /// asked for.
    pub(super) async fn register<T: Send + 'static>(
        &self,
        register: impl FnOnce(&Adapters) -> Result<T, RdmaError> + Send + 'static,
    ) -> Result<Option<T>> {
        if !self.rdma {
            return Ok(None);
        }
        let wish = self.wish.clone();
        let open = move || {
            let adapters = Adapters::open(&wish)?;
            let registered = register(&adapters)?;
            Ok::<_, RdmaError>((adapters, registered))
        };
        match tokio::task::spawn_blocking(open).await.context("registering memory panicked")? {
            Ok((adapters, registered)) => {
                for choice in adapters.choices() {
                    let gid = std::net::Ipv6Addr::from(choice.gid);
                    tracing::info!(device = %choice.device, port = choice.port, gid_index = choice.gid_index, %gid,
                        link = %choice.link, gbps = choice.rate_gbps, "KV memory is registered for RDMA");
                }
                Ok(Some(registered))
            }
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

    /// What is offered, for operators to read.
    pub(super) fn names(&self, rdma: bool) -> Vec<String> {
        let ways = [(self.shm, Transport::Shm), (rdma, Transport::Rdma), (self.tcp, Transport::Tcp)];
        ways.iter().filter(|(on, _)| *on).map(|(_, way)| way.name().to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Role;

    fn ways(flags: &[&str]) -> Result<Ways> {
        match Role::try_parse_from([&["engine", "--is-prefill-worker"], flags].concat()).unwrap() {
            Role::Prefill(worker) => Ways::of(&worker.disagg),
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
    }

    #[test]
    fn required_rdma_forbids_tcp_and_a_device_that_is_named_has_to_be_there() {
        assert_eq!(allowed(&["--require-rdma"]), [true, true, false, true]);
        assert_eq!(allowed(&["--transport", "rdma", "--require-rdma"]), [false, true, false, true]);
        assert_eq!(allowed(&["--rdma-device", "mlx5_0"]), [true, true, true, true]);
        assert!(ways(&["--transport", "tcp", "--require-rdma"]).unwrap_err().to_string().contains("--require-rdma"));
        assert!(ways(&["--transport", "shm", "--rdma-gid-index", "3"]).is_err());
    }

    #[test]
    fn workers_that_encrypt_send_nothing_in_the_clear_unless_told_to() {
        assert_eq!(allowed(&["--session-ca", "ca.pem"]), [true, false, true, false]);
        assert_eq!(allowed(&["--session-ca", "ca.pem", "--require-rdma"]), [true, true, false, true]);
    }
}
