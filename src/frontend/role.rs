use std::io::Write;

use anyhow::{Context, Result, bail};

use super::{FrontendConfig, FrontendMetrics, serve};
use crate::{
    api::{ConnectionThreads, HttpToken, ServerConfig, bind},
    cli::FrontendArgs,
    cluster::{Joined, Needs, join},
    worker::Signals,
};

/// Few, since workers may stand beside the frontend: each passes on tens of thousands of tokens a second, and the fewer
/// there are, the more tokens share a wake-up.
fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    (cores / 4).clamp(1, 16)
}

/// The frontend role: serves for a cluster until a signal comes.
pub async fn run(args: FrontendArgs) -> Result<()> {
    let bound = bind(&args.host, args.port).await?;
    let mut signals = Signals::new()?;
    let cluster = match join(args.cluster.options(), Needs::Etcd).await? {
        Joined::Member(cluster) => cluster,
        Joined::Alone(found) => bail!("a frontend needs a cluster: {found}"),
    };
    let config = FrontendConfig {
        api_keys: args.api_key,
        body_bytes_max: args.max_body_size,
        // Room for the largest at least: told to come again later, it would for ever.
        body_memory_max: args.max_body_memory.max(args.max_body_size),
        request_timeout: args.request_timeout,
        patience: args.worker_patience,
        cluster_token: args.cluster.cluster_token.as_deref().map(HttpToken::of),
        allowed_origins: args.allowed_origins,
    };
    let threads = args.connection_threads.unwrap_or_else(default_threads);
    let threads = ConnectionThreads::start(threads).context("cannot start the threads that serve connections")?;
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
    let server = ServerConfig { connections_max: args.max_connections, drain_timeout: args.shutdown_timeout, threads };
    let shutdown = async move {
        signals.next().await;
        // Whoever asks twice does not want to wait.
        tokio::spawn(async move { std::process::exit(signals.next().await) });
    };
    serve(listener, &cluster, config, FrontendMetrics::new(), server, shutdown).await;
    Ok(())
}
