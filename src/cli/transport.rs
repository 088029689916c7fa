use std::path::PathBuf;

use clap::{Args, builder::NonEmptyStringValueParser};

use super::{DeviceMemoryArg, TransportArg};
use crate::transfer::{SessionTls, rdma::Wish};

/// How KV pages travel: of workers, and of those who look at them.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Transport")]
pub struct TransportArgs {
    /// How KV pages travel between workers
    #[arg(long, value_enum, value_name = "TRANSPORT", default_value = "auto")]
    pub transport: TransportArg,

    /// RDMA ports to use, each a device or device:port; several share the pages of a session between them [default: the
    /// fastest that is active]
    #[arg(long, value_name = "DEVICE", value_delimiter = ',', value_parser = NonEmptyStringValueParser::new())]
    pub rdma_device: Vec<String>,

    /// Entry of their GID tables to use as address [default: a RoCE v2 address, IPv4 before IPv6; the first on
    /// InfiniBand]
    #[arg(long, value_name = "INDEX")]
    pub rdma_gid_index: Option<u8>,

    /// Whether RDMA adapters read and write pages in the memory of a CUDA device themselves, if they can, or these are
    /// always staged in host memory (see --kv-staging-memory)
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    pub rdma_device_memory: DeviceMemoryArg,

    /// Let no pages go over TCP: without RDMA a worker does not start, and pairs of workers without it prefill locally
    #[arg(long)]
    pub require_rdma: bool,

    /// Certificates (PEM) that sign those of the other workers. Over TCP a prefill worker then opens encrypted sessions
    /// alone, and a decode worker takes only peers that show a certificate; shared memory on one host stays as it is
    #[arg(long, value_name = "FILE")]
    pub session_ca: Option<PathBuf>,

    /// Certificate (PEM) of this worker, with which a decode worker encrypts TCP sessions, and a prefill worker says
    /// who it is
    #[arg(long, value_name = "FILE", requires = "session_key")]
    pub session_cert: Option<PathBuf>,

    /// Key (PEM) of that certificate
    #[arg(long, value_name = "FILE", requires = "session_cert")]
    pub session_key: Option<PathBuf>,
}

impl TransportArgs {
    /// Which adapters are wished for.
    pub fn rdma_wish(&self) -> Wish {
        Wish { devices: self.rdma_device.clone(), gid_index: self.rdma_gid_index }
    }

    /// How sessions over TCP are encrypted.
    pub fn session_tls(&self) -> SessionTls {
        SessionTls { ca: self.session_ca.clone(), identity: self.session_cert.clone().zip(self.session_key.clone()) }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        transport: TransportArgs,
    }

    fn args(line: &str) -> TransportArgs {
        Line::try_parse_from(line.split(' ')).map_err(|error| error.to_string()).unwrap().transport
    }

    #[test]
    fn sessions_are_encrypted_with_the_files_that_are_named() {
        let identity = Some(("cert".into(), "key".into()));
        let named = args("engine --session-ca ca --session-cert cert --session-key key").session_tls();
        assert_eq!(named, SessionTls { ca: Some("ca".into()), identity: identity.clone() });
        assert_eq!(
            args("engine --session-cert cert --session-key key").session_tls(),
            SessionTls { ca: None, identity }
        );
        assert_eq!(args("engine").session_tls(), SessionTls::default());
        assert!(Line::try_parse_from(["engine", "--session-cert", "cert"]).is_err(), "a certificate without its key");
    }

    #[test]
    fn adapters_are_those_that_are_named() {
        let wish = args("engine --rdma-device a,b:2 --rdma-gid-index 3").rdma_wish();
        assert_eq!((&wish.devices[..], wish.gid_index), (&["a".into(), "b:2".into()][..], Some(3)));
    }
}
