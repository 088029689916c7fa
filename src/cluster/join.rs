//! Joining the cluster that is named, or the one on this machine.

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Once},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use super::{Cluster, Etcd, EtcdOptions, Loads, Local, Nats, NatsOptions, Queue};

/// Where etcd listens unless it is told otherwise.
const LOCAL_ETCD: &str = "127.0.0.1:2379";
/// Where NATS listens unless it is told otherwise.
const LOCAL_NATS: &str = "127.0.0.1:4222";
/// How long a service on this machine may take to say what it is.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long services that were named are waited for before going on without them for now.
const FIRST_CONTACT: Duration = Duration::from_secs(3);
/// Whether it was said which services were found: once for all workers of a process, of which a mock has hundreds.
static SAID: Once = Once::new();

/// Which cluster to join.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Which of the clusters that share the services.
    pub namespace: String,
    /// etcd. No endpoints: those of this machine, if they answer.
    pub etcd: EtcdOptions,
    /// NATS. No servers: those of this machine, if they answer.
    pub nats: NatsOptions,
}

impl ClusterOptions {
    /// Names the services at their usual ports of this machine.
    pub fn use_this_machine(&mut self) {
        self.use_services_at(LOCAL_ETCD, LOCAL_NATS);
    }

    fn use_services_at(&mut self, etcd: &str, nats: &str) {
        self.etcd.endpoints = vec![format!("http://{etcd}")];
        self.nats.servers = vec![format!("nats://{nats}")];
    }
}

/// Why the cluster cannot be joined as it was described.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// An option is wrong, or two do not go together.
    #[error("{0}")]
    Option(String),
    /// A file of certificates or credentials cannot be used.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// What came of joining.
#[derive(Debug)]
pub enum Joined {
    /// Part of a cluster.
    Member(Cluster),
    /// None was named and there is none on this machine.
    Alone(LocalServices),
}

impl Joined {
    /// The cluster, for `who` can do nothing without one: the error says what to start.
    pub fn needed_by(self, who: &str) -> Result<Cluster, ClusterError> {
        match self {
            Self::Member(cluster) => Ok(cluster),
            Self::Alone(found) => Err(ClusterError::Option(format!("{who} needs a cluster: {found}"))),
        }
    }
}

/// What was found at the well-known addresses of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalServices {
    /// Whether etcd answers.
    pub etcd: bool,
    /// Whether NATS answers.
    pub nats: bool,
    /// Whether that NATS keeps streams.
    pub jetstream: bool,
}

impl fmt::Display for LocalServices {
    /// What is missing and how to mend it: `no etcd answers on 127.0.0.1:2379 …`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut missing = Vec::new();
        if !self.etcd {
            missing.push(format!("no etcd answers on {LOCAL_ETCD} (start `etcd`)"));
        }
        if !self.nats {
            missing.push(format!("no NATS on {LOCAL_NATS} (start `nats-server -js`)"));
        } else if !self.jetstream {
            missing.push(format!("the NATS on {LOCAL_NATS} keeps no streams (start it as `nats-server -js`)"));
        }
        write!(f, "{}; or name them with --etcd and --nats", missing.join(", "))
    }
}

impl LocalServices {
    /// Looks for both at their usual ports of this machine.
    pub async fn of_this_machine() -> Self {
        Self::probe(LOCAL_ETCD, LOCAL_NATS).await
    }

    /// Whether they make a cluster.
    pub fn is_cluster(&self) -> bool {
        self.etcd && self.jetstream
    }

    /// Tries addresses of etcd and NATS.
    pub async fn probe(etcd: &str, nats: &str) -> Self {
        let (etcd, nats) =
            tokio::join!(timeout(PROBE_TIMEOUT, probe_etcd(etcd)), timeout(PROBE_TIMEOUT, probe_nats(nats)));
        let etcd = matches!(etcd, Ok(Ok(true)));
        let nats = nats.ok().and_then(Result::ok).flatten();
        Self { etcd, nats: nats.is_some(), jetstream: nats.unwrap_or(false) }
    }
}

/// Whether what listens there speaks as etcd does.
async fn probe_etcd(address: &str) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET /version HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(4096).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).contains("etcdserver"))
}

/// Whether what listens there greets as NATS does, and if so, whether it keeps streams.
async fn probe_nats(address: &str) -> std::io::Result<Option<bool>> {
    let mut stream = TcpStream::connect(address).await?;
    let mut greeting = Vec::new();
    while !greeting.ends_with(b"\r\n") && greeting.len() < 1 << 16 {
        if stream.read_buf(&mut greeting).await? == 0 {
            break;
        }
    }
    let greeting = String::from_utf8_lossy(&greeting);
    let Some(info) = greeting.strip_prefix("INFO ") else { return Ok(None) };
    let info: serde_json::Value = serde_json::from_str(info.trim()).unwrap_or_default();
    Ok(Some(info["jetstream"].as_bool().unwrap_or(false)))
}

/// Whether the caller works without NATS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Both services: workers.
    EtcdAndNats,
    /// etcd; load reports come over NATS if it is named too: frontends.
    Etcd,
}

/// Joins the cluster `options` names; if they name none, that of this machine, if there is one.
pub async fn join(mut options: ClusterOptions, needs: Needs) -> Result<Joined, ClusterError> {
    match name_services(&mut options, needs, LOCAL_ETCD, LOCAL_NATS).await? {
        None => Cluster::connect(options).await.map(Joined::Member),
        Some(too_little) => Ok(Joined::Alone(too_little)),
    }
}

/// Sees to it that `options` name services: if they name none, those at `etcd` and `nats`, if both are there. Otherwise
/// returns what is.
async fn name_services(
    options: &mut ClusterOptions,
    needs: Needs,
    etcd: &str,
    nats: &str,
) -> Result<Option<LocalServices>, ClusterError> {
    match (options.etcd.endpoints.is_empty(), options.nats.servers.is_empty()) {
        (true, true) => {
            let found = LocalServices::probe(etcd, nats).await;
            if !found.is_cluster() {
                return Ok(Some(found));
            }
            options.use_services_at(etcd, nats);
            SAID.call_once(|| {
                tracing::info!(
                    "found etcd and NATS on this machine: joining the cluster `{}` (--standalone serves alone)",
                    options.namespace
                );
            });
        }
        (true, false) => return Err(ClusterError::Option("--nats is given and --etcd is missing".into())),
        (false, true) if needs == Needs::EtcdAndNats => {
            return Err(ClusterError::Option("--etcd is given and --nats is missing".into()));
        }
        (false, _) => {}
    }
    Ok(None)
}

/// Addresses, without who one is there.
fn shown(addresses: &[String]) -> String {
    let bare = addresses.iter().map(|address| address.rsplit('@').next().unwrap_or_default());
    bare.collect::<Vec<_>>().join(", ")
}

impl Cluster {
    /// A cluster over real services. Waits for them a moment; if they are away it says so and goes on, and they are
    /// found when they come. Without NATS servers, load reports are those of this process alone, and so is the queue.
    pub async fn connect(options: ClusterOptions) -> Result<Self, ClusterError> {
        let ClusterOptions { namespace, etcd, nats } = options;
        let names = [format!("etcd ({})", shown(&etcd.endpoints)), format!("NATS ({})", shown(&nats.servers))];
        let etcd = Arc::new(Etcd::new(etcd, &namespace)?);
        let (queue, loads): (Arc<dyn Queue>, Arc<dyn Loads>);
        let named = !nats.servers.is_empty();
        let nats = if named { Some(Arc::new(Nats::new(nats, &namespace).await?)) } else { None };
        let first_nats = async {
            match &nats {
                Some(nats) => timeout(FIRST_CONTACT, nats.reachable()).await,
                None => Ok(Ok(())),
            }
        };
        let (etcd_answer, nats_answer) = tokio::join!(timeout(FIRST_CONTACT, etcd.reachable()), first_nats);
        for (name, answer) in names.iter().zip([etcd_answer, nats_answer]) {
            let late = || Err(format!("no answer within {FIRST_CONTACT:?}"));
            if let Err(error) = answer.unwrap_or_else(|_| late()) {
                tracing::warn!("{name} cannot be used: {error}; going on without it until it can");
            }
        }
        match nats {
            Some(nats) => (queue, loads) = (nats.clone(), nats),
            None => {
                let local = Arc::new(Local::new());
                (queue, loads) = (local.clone(), local);
            }
        }
        Ok(Self { discovery: etcd, queue, loads })
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    fn options(etcd: &[&str], nats: &[&str]) -> ClusterOptions {
        ClusterOptions {
            namespace: "n".into(),
            etcd: EtcdOptions::new(etcd.iter().map(ToString::to_string).collect()),
            nats: NatsOptions::new(nats.iter().map(ToString::to_string).collect()),
        }
    }

    /// Where something says these words to whoever comes.
    async fn saying(words: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(words.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
                // Closed with something unread in it, a connection would be reset.
                let _ = stream.read_to_end(&mut Vec::new()).await;
            }
        });
        address
    }

    #[tokio::test]
    async fn services_of_this_machine_are_joined_if_none_are_named_and_both_are_there() {
        let etcd = saying("HTTP/1.1 200 OK\r\n\r\n{\"etcdserver\":\"3.5.0\",\"etcdcluster\":\"3.5.0\"}").await;
        let nats = saying("INFO {\"version\":\"2.10.0\",\"jetstream\":true}\r\n").await;
        for needs in [Needs::EtcdAndNats, Needs::Etcd] {
            let mut named = options(&[], &[]);
            assert_eq!(name_services(&mut named, needs, &etcd, &nats).await.unwrap(), None);
            assert_eq!(named.etcd.endpoints, [format!("http://{etcd}")]);
            assert_eq!(named.nats.servers, [format!("nats://{nats}")]);
        }
        // Whoever names services means those.
        let mut named = options(&["http://a:1"], &["nats://b:2"]);
        assert_eq!(name_services(&mut named, Needs::EtcdAndNats, &etcd, &nats).await.unwrap(), None);
        assert_eq!([&named.etcd.endpoints[0], &named.nats.servers[0]], ["http://a:1", "nats://b:2"]);
        let no_streams = saying("INFO {\"version\":\"2.10.0\"}\r\n").await;
        for (etcd, nats) in [(&etcd, &no_streams), (&nats, &nats), (&etcd, &etcd)] {
            let mut named = options(&[], &[]);
            let found = name_services(&mut named, Needs::EtcdAndNats, etcd, nats).await.unwrap();
            assert!(found.is_some() && named.etcd.endpoints.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn who_needs_a_cluster_and_finds_none_says_what_to_start() {
        let alone = Joined::Alone(LocalServices { etcd: true, nats: false, jetstream: false });
        let error = alone.needed_by("a frontend").unwrap_err().to_string();
        assert!(error.starts_with("a frontend needs a cluster: no NATS on 127.0.0.1:4222"), "{error}");
        assert!(Joined::Member(Cluster::local()).needed_by("a frontend").is_ok());
    }

    #[test]
    fn addresses_are_shown_without_secrets() {
        let addresses = ["nats://ada:secret@a:4222", "b:4222"].map(str::to_owned);
        assert_eq!(shown(&addresses), "a:4222, b:4222");
    }

    #[test]
    fn what_is_missing_is_said_with_what_to_start() {
        let nothing = LocalServices { etcd: false, nats: false, jetstream: false };
        let text = nothing.to_string();
        assert!(text.contains("start `etcd`") && text.contains("start `nats-server -js`"), "{text}");
        let no_streams = LocalServices { etcd: true, nats: true, jetstream: false }.to_string();
        assert!(no_streams.starts_with("the NATS on 127.0.0.1:4222 keeps no streams"), "{no_streams}");
    }

    #[tokio::test]
    async fn one_service_without_the_other_is_an_error_of_the_command_line() {
        for (etcd, nats) in [(&["http://127.0.0.1:1"][..], &[][..]), (&[][..], &["nats://127.0.0.1:1"][..])] {
            let error = join(options(etcd, nats), Needs::EtcdAndNats).await.unwrap_err();
            assert!(matches!(error, ClusterError::Option(_)), "{error}");
        }
    }
}
