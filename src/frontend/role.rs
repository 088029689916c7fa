use std::io::Write;

use anyhow::{Context, Result};

use super::{FrontendConfig, FrontendMetrics, serve};
use crate::{
    api::{ConnectionThreads, HttpToken, ServerConfig, bind},
    cli::FrontendArgs,
    cluster::{Needs, join},
    worker::Signals,
};

/// Few, since workers may stand beside the frontend: each passes on tens of thousands of tokens a second, and the fewer
/// there are, the more tokens share a wake-up.
fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    (cores / 4).clamp(1, 16)
}

/// Limits and secrets, as the command line says.
fn config(args: &FrontendArgs) -> FrontendConfig {
    FrontendConfig {
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
fn server(args: &FrontendArgs) -> Result<ServerConfig> {
    let threads = args.connection_threads.unwrap_or_else(default_threads);
    Ok(ServerConfig {
        connections_max: args.max_connections,
        drain_timeout: args.shutdown_timeout,
        threads: ConnectionThreads::start(threads).context("cannot start the threads that serve connections")?,
    })
}

/// The frontend role: serves for a cluster until a signal comes.
pub async fn run(args: FrontendArgs) -> Result<()> {
    let bound = bind(&args.host, args.port).await?;
    let mut signals = Signals::new()?;
    let cluster = join(args.cluster.options(), Needs::Etcd).await?.needed_by("a frontend")?;
    let (config, server) = (config(&args), server(&args)?);
    let listener = bound.listen()?;
    let text = format!(
        "engine {} frontend of the cluster `{}` on http://{}\n",
        env!("CARGO_PKG_VERSION"),
        args.cluster.namespace,
        listener.local_addr()?
    );
    // Nobody may be reading; the frontend serves all the same.
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    let shutdown = async move {
        signals.next().await;
        // Whoever asks twice does not want to wait.
        tokio::spawn(async move { std::process::exit(signals.next().await) });
    };
    serve(listener, &cluster, config, FrontendMetrics::new(), server, shutdown).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::Role;

    fn args(flags: &[&str]) -> FrontendArgs {
        match Role::try_parse_from([&["engine", "frontend"], flags].concat()) {
            Ok(Role::Frontend(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_limit_of_a_frontend_is_what_its_flag_says() {
        let line = "--api-key tea --max-body-size 2MiB --max-body-memory 3MiB --request-timeout 5 --worker-patience 7 \
                    --cluster-token coffee --allowed-origins https://a --max-connections 11 --connection-threads 2 \
                    --shutdown-timeout 13";
        let args = args(&line.split_whitespace().collect::<Vec<_>>());
        let (config, server) = (config(&args), server(&args).unwrap());
        assert_eq!(
            (&config.api_keys[..], &config.allowed_origins[..]),
            (&["tea".into()][..], &["https://a".into()][..])
        );
        assert_eq!((config.body_bytes_max, config.body_memory_max), (2 << 20, 3 << 20));
        assert_eq!((config.request_timeout, config.patience), (Duration::from_secs(5), Duration::from_secs(7)));
        assert!(config.cluster_token == Some(HttpToken::of("coffee")));
        assert_eq!((server.connections_max, server.drain_timeout), (11, Duration::from_secs(13)));
        assert_eq!(server.threads.count(), 2);
    }

    #[test]
    fn the_largest_body_always_finds_room() {
        assert_eq!(config(&args(&["--max-body-size", "2MiB", "--max-body-memory", "1MiB"])).body_memory_max, 2 << 20);
    }
}
