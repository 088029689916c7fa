//! The frontend as a process: its flags, its cluster, its server.

use anyhow::{Context, Result};
use rustix::process::{Resource, getrlimit};

use super::{FrontendConfig, FrontendMetrics, serve};
use crate::{
    cli::FrontendArgs,
    cluster::{Needs, join},
    http::{CONNECTIONS_BESIDE_REQUESTS, ConnectionThreads, HttpToken, ServerConfig, bind},
    process::{Ready, Signals},
};

/// Open files that a frontend needs beside its connections to clients and workers: those to the cluster's services, and
/// what its threads wait with.
const FILES_BESIDE_CONNECTIONS: usize = 128;

/// Few, since workers may stand beside the frontend: each passes on tens of thousands of tokens a second, and the fewer
/// there are, the more tokens share a wake-up.
fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    (cores / 4).clamp(1, 16)
}

/// Requests at a time: as many as the flag says, if `files` open files are enough for them, each of which takes one for
/// a connection to its worker, and for the connections of clients. Without the files, workers could not be connected
/// to, nor clients be refused. `files` is the soft limit, which `main` has raised as far as it goes. Connections to
/// workers that nobody uses are not counted: they are closed when files are lacking for one to a worker.
fn requests_max(args: &FrontendArgs, files: Option<u64>) -> usize {
    let Some(files) = files else { return args.max_requests };
    let left = usize::try_from(files).unwrap_or(usize::MAX).saturating_sub(FILES_BESIDE_CONNECTIONS);
    let enough = match args.max_connections {
        Some(connections) => left.saturating_sub(connections),
        None => left.saturating_sub(CONNECTIONS_BESIDE_REQUESTS) / 2,
    };
    args.max_requests.min(enough.max(1))
}

/// Connections of clients at a time, where so many requests are taken.
fn connections_max(args: &FrontendArgs, requests_max: usize) -> usize {
    args.max_connections.unwrap_or_else(|| requests_max.saturating_add(CONNECTIONS_BESIDE_REQUESTS))
}

/// Limits and secrets, as the command line says.
fn config(args: &FrontendArgs, requests_max: usize) -> FrontendConfig {
    FrontendConfig {
        requests_max,
        api_keys: args.api_key.clone(),
        body_bytes_max: args.max_body_size,
        // Room for the largest at least: told to come again later, it would for ever.
        body_memory_max: args.max_body_memory.max(args.max_body_size),
        request_timeout: args.request_timeout,
        patience: args.worker_patience,
        cluster_token: args.cluster.cluster_token.as_deref().map(HttpToken::of),
        allowed_origins: args.allowed_origins.clone(),
    }
}

/// The server's own limits and threads, likewise.
fn server(args: &FrontendArgs, requests_max: usize) -> Result<ServerConfig> {
    let threads = args.connection_threads.unwrap_or_else(default_threads);
    Ok(ServerConfig {
        connections_max: connections_max(args, requests_max),
        drain_timeout: args.shutdown_timeout,
        threads: ConnectionThreads::start(threads).context("cannot start the threads that serve connections")?,
    })
}

/// The frontend role: serves for a cluster until a signal comes.
pub async fn run(args: FrontendArgs) -> Result<()> {
    let mut signals = Signals::new()?;
    let bound = bind(&args.host, args.port).await?;
    let cluster = join(args.cluster.options(), Needs::Etcd).await?.needed_by("a frontend")?;
    let wanted = args.max_requests;
    let requests_max = requests_max(&args, getrlimit(Resource::Nofile).current);
    if requests_max < wanted {
        let connections = connections_max(&args, wanted);
        let needed = wanted.saturating_add(connections).saturating_add(FILES_BESIDE_CONNECTIONS);
        tracing::warn!(
            "{requests_max} requests are taken at a time instead of {wanted} (--max-requests), since this process may \
             not have {needed} open files: raise the hard limit (LimitNOFILE={needed} in a systemd unit, \
             docker run --ulimit nofile={needed})"
        );
    }
    let (config, server) = (config(&args, requests_max), server(&args, requests_max)?);
    if server.connections_max <= requests_max {
        tracing::warn!(
            "--max-connections {} is no more than the {requests_max} requests that are taken at a time \
             (--max-requests): with that many, others wait for a connection instead of hearing 429, and so do probes \
             of /health",
            server.connections_max
        );
    }
    let listener = bound.listen()?;
    let address = listener.local_addr()?;
    let text = format!(
        "engine {} frontend of the cluster `{}` on http://{address}\n",
        env!("CARGO_PKG_VERSION"),
        args.cluster.namespace,
    );
    Ready { address, text }.print();
    let shutdown = async move {
        signals.next().await;
        signals.leave_at_next();
    };
    serve(listener, &cluster, config, FrontendMetrics::new(), server, shutdown).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::Invocation;

    fn args(flags: &[&str]) -> FrontendArgs {
        match Invocation::try_parse_from([&["engine", "frontend"], flags].concat()) {
            Ok(Invocation::Frontend(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_limit_of_a_frontend_is_what_its_flag_says() {
        let line = "--api-key tea --max-body-size 2MiB --max-body-memory 3MiB --request-timeout 5 --worker-patience 7 \
                    --cluster-token coffee --allowed-origins https://a --max-requests 11 --max-connections 17 \
                    --connection-threads 2 --shutdown-timeout 13";
        let args = args(&line.split_whitespace().collect::<Vec<_>>());
        let (config, server) = (config(&args, 11), server(&args, 11).unwrap());
        assert_eq!(
            (&config.api_keys[..], &config.allowed_origins[..]),
            (&["tea".into()][..], &["https://a".into()][..])
        );
        assert_eq!((config.body_bytes_max, config.body_memory_max), (2 << 20, 3 << 20));
        assert_eq!((config.request_timeout, config.patience), (Duration::from_secs(5), Duration::from_secs(7)));
        assert!(config.cluster_token == Some(HttpToken::of("coffee")));
        assert_eq!((args.max_requests, config.requests_max), (11, 11));
        assert_eq!((server.connections_max, server.drain_timeout), (17, Duration::from_secs(13)));
        assert_eq!(server.threads.count(), 2);
    }

    #[test]
    fn the_largest_body_always_finds_room() {
        assert_eq!(
            config(&args(&["--max-body-size", "2MiB", "--max-body-memory", "1MiB"]), 1).body_memory_max,
            2 << 20
        );
    }

    #[test]
    fn no_more_requests_are_taken_than_there_are_files_for() {
        let taken = |flags: &[&str], files| requests_max(&args(flags), files);
        assert_eq!(taken(&[], None), 4096);
        assert_eq!(taken(&[], Some(1 << 20)), 4096);
        assert_eq!(taken(&[], Some(4096)), (4096 - 512 - 128) / 2);
        assert_eq!(taken(&[], Some(256)), 1, "it serves at all");
        let all = 1_048_576.to_string();
        assert_eq!(taken(&["--max-requests", all.as_str()], Some(u64::MAX)), 1_048_576);
        assert_eq!(taken(&["--max-connections", "3000"], Some(4096)), 4096 - 3000 - 128);
        assert_eq!(taken(&["--max-connections", all.as_str()], Some(4096)), 1);
    }

    #[test]
    fn there_are_more_connections_than_requests_unless_a_flag_says_otherwise() {
        assert_eq!(connections_max(&args(&["--max-requests", "11"]), 7), 7 + 512, "of the requests that are taken");
        assert_eq!(connections_max(&args(&["--max-connections", "5"]), 7), 5);
    }
}
