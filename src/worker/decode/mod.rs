//! The decode role: a model, its engine thread, the OpenAI API over it, and the cluster it may be part of.

mod port;
mod staging;
mod start;
mod view;

use std::{net::SocketAddr, sync::Arc};

use anyhow::{Context, Result, bail};
use engine_models::{ModelSource, Tokenizer};

use super::{
    membership::{self, Particulars},
    model::{self, Loaded, Purpose},
    role, watchdog,
    ways::Ways,
};
use crate::{
    api::{self, ApiConfig, ChatTemplate, Defaults, Parsers},
    cli::{DisaggArgs, WorkerArgs},
    cluster::{Cluster, Joined, Needs, Role, join},
    engine::Engine,
    handoff::Limits,
    http::{self, ConnectionThreads, HttpToken, ServerConfig},
    process::{Ready, Signals},
    telemetry::Metrics,
};

/// Loads the model and serves it until a signal comes. `ready` hears when and where it begins to.
pub async fn run(cli: WorkerArgs, ready: impl FnOnce(Ready)) -> Result<()> {
    let mut signals = Signals::new()?;
    // An address that cannot be had is said now, not after minutes of loading.
    let bound = http::bind(&cli.host, cli.port()).await?;
    let limits = limits(&cli.disagg)?;
    let ways = Ways::of(&cli.disagg.transports)?;
    let cluster = cluster(&cli).await?;
    let ways = match &cluster {
        Some(_) => Some(ways.open().await?),
        None => None,
    };
    let metrics = Metrics::new();
    let shared = ways.as_ref().is_some_and(|ways| ways.shm);
    let work = move || load(&cli, shared).map(|loaded| (loaded, cli));
    let ((config, loaded), cli) = role::load(&mut signals, work).await?;
    let (model, key) = (loaded.card(&cli.engine, config.model_names.clone()), loaded.key);
    metrics.set_model(&config.model_names[0], Role::Decode, &loaded.device, key);
    let step_time_max = cli.step_time_max(loaded.is_on_device());
    let (engine, tasks) = if let Some(ways) = &ways {
        let (engine, tasks) = start::start_lending(&cli, limits, loaded, ways, &metrics).await?;
        (engine, Some(tasks))
    } else {
        (Engine::start(loaded.runner, loaded.config, metrics.engine.clone())?, None)
    };
    watchdog::watch(&engine, step_time_max);
    let requests_max = engine.config().max_requests();
    let connections_max = cli.connections_max(requests_max);
    if connections_max <= requests_max {
        tracing::warn!(
            "--max-connections {connections_max} is no more than --max-num-seqs and --max-waiting-requests together: \
             with that many requests, others wait for a connection instead of hearing 429, and so do probes of /health"
        );
    }
    let listener = bound.listen()?;
    let address = listener.local_addr()?;
    let lease = cluster.zip(tasks).map(|(cluster, tasks)| {
        let (sessions, transports) = (tasks.addresses.clone(), tasks.transports.clone());
        let staging_notice = tasks.staging_notice.clone();
        let worker = Particulars { role: Role::Decode, address, model, key, sessions, transports, staging_notice };
        let lease = membership::register(&cluster, &cli, worker, &engine);
        tasks.spawn(&cluster, lease.id());
        lease
    });
    ready(Ready { address, text: announcement(&config, address) });
    let server =
        ServerConfig { connections_max, drain_timeout: cli.shutdown_timeout, threads: ConnectionThreads::default() };
    let told_to_leave = role::told_to_leave(signals, engine.clone());
    let shutdown = async move {
        told_to_leave.await;
        // Nobody is to send requests here any more, while those that are here end.
        if let Some(lease) = lease {
            lease.withdraw().await;
        }
    };
    api::serve(listener, config, engine.clone(), metrics, server, shutdown).await;
    role::end(&engine).await
}

/// The cluster to be part of, if any.
async fn cluster(cli: &WorkerArgs) -> Result<Option<Cluster>> {
    if cli.disagg.standalone {
        return Ok(None);
    }
    member(join(cli.cluster.options(), Needs::EtcdAndNats).await?, &cli.disagg)
}

/// Without a cluster the worker serves alone, and the log says which services it lacks. Nobody looks for RDMA then, so
/// it is an error if that has to be there.
fn member(joined: Joined, disagg: &DisaggArgs) -> Result<Option<Cluster>> {
    match joined {
        Joined::Member(cluster) => Ok(Some(cluster)),
        Joined::Alone(found) if disagg.transports.require_rdma => {
            bail!("--require-rdma is about pages of a cluster, and there is none: {found}; or say --standalone")
        }
        Joined::Alone(found) => {
            tracing::info!("serving alone. To share prefills with other processes, join a cluster: {found}");
            Ok(None)
        }
    }
}

/// The limits of the command line.
fn limits(disagg: &DisaggArgs) -> Result<Limits> {
    let narrow = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let limits = Limits {
        policy: disagg.disagg_policy.into(),
        max_local_prefill_length: narrow(disagg.max_local_prefill_length),
        max_prefill_queue_size: narrow(disagg.max_prefill_queue_size),
        itl_target_ms: disagg.itl_target.as_secs_f64() * 1e3,
    };
    limits.check()?;
    Ok(limits)
}

/// Everything from the files to a model that is ready to compute. Takes seconds to minutes, and blocks.
fn load(cli: &WorkerArgs, shared: bool) -> Result<(ApiConfig, Loaded)> {
    let source = model::open(&cli.engine)?;
    let tokenizer = Arc::new(source.tokenizer()?);
    let template = chat_template(cli, &source)?;
    let purpose = Purpose { shared, decodes: true, ..Purpose::of(cli) };
    let loaded = model::load(&cli.engine, &source, &purpose)?;
    Ok((api_config(cli, &source, tokenizer, template), loaded))
}

fn api_config(
    cli: &WorkerArgs,
    source: &ModelSource,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
) -> ApiConfig {
    let recommended = source.generation_defaults();
    let mut model_names = cli.served_model_name.clone();
    if model_names.is_empty() {
        model_names.push(source.name().to_owned());
    }
    let by_template = template.as_ref().map(Parsers::of_template).unwrap_or_default();
    ApiConfig {
        model_names,
        model_root: cli.engine.model.clone().unwrap_or_default(),
        tokenizer,
        template,
        default_template_kwargs: cli.default_chat_template_kwargs.clone().unwrap_or_default(),
        parsers: cli.parsers(by_template),
        defaults: Defaults::recommended(recommended),
        eos_token_ids: recommended.eos_token_ids.clone(),
        api_keys: cli.api_key.clone(),
        body_bytes_max: cli.max_body_size,
        request_timeout: cli.request_timeout,
        cluster_token: cli.cluster.cluster_token.as_deref().map(HttpToken::of),
        allowed_origins: cli.allowed_origins.clone(),
    }
}

/// The template of `--chat-template`, else the model's own. A broken one of the operator's is an error; a broken one of
/// the model's leaves completions to be served.
fn chat_template(cli: &WorkerArgs, source: &ModelSource) -> Result<Option<ChatTemplate>> {
    let own = source.chat_template();
    let token = |text: Option<&String>| text.cloned().unwrap_or_default();
    let (bos, eos) =
        own.map_or_else(Default::default, |own| (token(own.bos_token.as_ref()), token(own.eos_token.as_ref())));
    if let Some(path) = &cli.chat_template {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read --chat-template {}", path.display()))?;
        return Ok(Some(ChatTemplate::new(&text, &bos, &eos)?));
    }
    let Some(own) = own else {
        tracing::warn!("the model has no chat template: chats are refused, completions served");
        return Ok(None);
    };
    let template = || ChatTemplate::new(&own.source, &bos, &eos);
    if let Some(tool_use) = &own.tool_use {
        match template().and_then(|template| template.with_tool_use(tool_use)) {
            Ok(template) => return Ok(Some(template)),
            Err(error) => tracing::warn!(%error, "the model's template for tools is not used"),
        }
    }
    match template() {
        Ok(template) => Ok(Some(template)),
        Err(error) => {
            tracing::warn!(
                %error, "chats are refused, completions served; --chat-template FILE gives another template"
            );
            Ok(None)
        }
    }
}

/// What is served and how to try it.
fn announcement(config: &ApiConfig, address: SocketAddr) -> String {
    let name = &config.model_names[0];
    let key = if config.api_keys.is_empty() { "" } else { " -H \"Authorization: Bearer $ENGINE_API_KEY\"" };
    let (path, prompt) = match config.template {
        Some(_) => ("chat/completions", r#""messages": [{"role": "user", "content": "Why is the sky blue?"}]"#),
        None => ("completions", r#""prompt": "The sky is blue because", "max_tokens": 64"#),
    };
    format!(
        "engine {} serves {name} on http://{address}\n\
         Try it:\n  curl -N http://{address}/v1/{path} -H 'Content-Type: application/json'{key} \
         -d '{{\"model\": \"{name}\", {prompt}, \"stream\": true}}'\n",
        env!("CARGO_PKG_VERSION"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::Invocation, cluster::LocalServices};

    const NO_STREAMS: LocalServices = LocalServices { etcd: true, nats: true, jetstream: false };

    fn disagg(flags: &[&str]) -> DisaggArgs {
        match Invocation::try_parse_from([&["engine", "--model", "m"], flags].concat()).unwrap() {
            Invocation::Decode(worker) => worker.disagg,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn without_a_cluster_a_decode_worker_serves_alone() {
        assert!(member(Joined::Alone(NO_STREAMS), &disagg(&[])).unwrap().is_none());
        assert!(member(Joined::Member(Cluster::local()), &disagg(&[])).unwrap().is_some());
    }

    #[test]
    fn a_decode_worker_that_has_to_have_rdma_does_not_serve_alone() {
        let disagg = disagg(&["--require-rdma"]);
        let refused = member(Joined::Alone(NO_STREAMS), &disagg).unwrap_err().to_string();
        assert!(refused.contains("--require-rdma") && refused.contains("keeps no streams"), "{refused}");
        assert!(member(Joined::Member(Cluster::local()), &disagg).unwrap().is_some());
    }
}
