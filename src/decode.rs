//! The decode role in one process: a model, its engine thread and the OpenAI API over it.

use std::{io::Write, net::SocketAddr, sync::Arc};

use anyhow::{Context, Result, bail};
use engine_kernels::{
    KvLayout,
    cpu::{CpuBackend, CpuOptions},
};
use engine_models::{ForwardLimits, ModelSource, OpenOptions, Tokenizer};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    api::{self, ApiConfig, ChatTemplate, Defaults, ServerConfig},
    cli::WorkerArgs,
    telemetry::Metrics,
    worker::{Engine, EngineConfig, EngineHandle, EngineStatus, KvRequest, ModelRunner, available_memory, size_kv},
};

/// Rows of logits held at a time. More only cost memory: a vocabulary of 150,000 takes 0.6 MB a row.
const LOGIT_ROWS_MAX: usize = 64;

/// Loads the model and serves it until a signal comes.
pub async fn run(cli: WorkerArgs) -> Result<()> {
    // An address that cannot be had is said now, not after minutes of loading.
    let bound = api::bind(&cli.host, cli.port()).await?;
    let metrics = Metrics::new();
    let loading = tokio::task::spawn_blocking({
        let metrics = metrics.clone();
        move || load(&cli, &metrics).map(|loaded| (loaded, cli))
    });
    let interrupted = || bail!("interrupted while the model was loading");
    let mut signals = Signals::new()?;
    let ((config, engine), cli) = tokio::select! {
        loaded = loading => loaded.context("loading the model panicked")??,
        // The loading thread cannot be told to stop: the process ends around it.
        code = signals.next() => { tracing::info!(code, "interrupted"); return interrupted() }
    };
    let listener = bound.listen()?;
    announce(&config, listener.local_addr()?);
    let server = ServerConfig { connections_max: cli.max_connections, drain_timeout: cli.shutdown_timeout };
    let failed = engine.clone();
    let shutdown = async move {
        tokio::select! {
            _ = signals.next() => {
                // Whoever asks twice does not want to wait.
                tokio::spawn(async move { std::process::exit(signals.next().await) });
            }
            _ = failed.stopped() => {}
        }
    };
    api::serve(listener, config, engine.clone(), metrics, server, shutdown).await;
    if let EngineStatus::Failed { reason } = engine.status() {
        bail!("the engine failed: {reason}");
    }
    engine.stop();
    engine.stopped().await;
    Ok(())
}

/// Everything from the files to a running engine thread. Takes seconds to minutes, and blocks.
fn load(cli: &WorkerArgs, metrics: &Metrics) -> Result<(ApiConfig, EngineHandle)> {
    let options = OpenOptions {
        load_format: cli.load_format.into(),
        revision: cli.revision.clone(),
        progress: true,
        ..OpenOptions::default()
    };
    let Some(model) = &cli.model else { bail!("--model is missing") };
    let source = ModelSource::open(model, &options).with_context(|| format!("cannot open the model {model}"))?;
    let tokenizer = Arc::new(source.tokenizer()?);
    let template = chat_template(cli, &source)?;
    let model = source.config();
    let threads = cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get()));
    if threads == 0 {
        bail!("--threads must be at least 1");
    }
    let mut backend = CpuBackend::new(CpuOptions { threads, level: None });
    let limits = ForwardLimits {
        max_tokens: cli.max_num_batched_tokens,
        max_logit_rows: LOGIT_ROWS_MAX.min(cli.max_num_batched_tokens).max(1),
        max_positions: cli.max_model_len.unwrap_or(model.max_position_embeddings).min(model.max_position_embeddings),
    };
    let mut layout = KvLayout {
        layers: model.layers,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim,
        block_size: cli.block_size,
        blocks: 0,
        dtype: cli.kv_cache_dtype.or(source.kv_dtype()),
    };
    if cli.block_size == 0 {
        bail!("--block-size must be at least 1");
    }
    let loaded = source.load(&mut backend, limits)?;
    // After loading, so that the weights are no longer counted as free memory.
    let wish = KvRequest { blocks: cli.kv_blocks, bytes: cli.kv_cache_memory, max_model_len: cli.max_model_len };
    let available = available_memory().unwrap_or(0);
    let sizing = size_kv(wish, layout, model.max_position_embeddings, cli.max_num_seqs, available)?;
    tracing::info!("{}", sizing.explanation);
    layout.blocks = sizing.blocks;
    let runner = ModelRunner::new(backend, loaded.model, layout, limits.max_logit_rows)?;
    let config = EngineConfig {
        max_num_seqs: cli.max_num_seqs,
        max_num_batched_tokens: cli.max_num_batched_tokens,
        max_waiting_requests: cli.max_waiting_requests,
        max_model_len: sizing.max_model_len,
        vocab_size: model.vocab_size,
        block_size: layout.block_size,
        blocks: sizing.blocks,
        // One process shares its pages with nobody: what tells its model from another is enough.
        model_key: format!("{}\n{layout:?}", source.path().display()).into_bytes(),
    };
    let engine = Engine::start(runner, config, metrics.engine.clone())?;
    Ok((api_config(cli, &source, tokenizer, template), engine))
}

fn api_config(
    cli: &WorkerArgs,
    source: &ModelSource,
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
) -> ApiConfig {
    let recommended = source.generation_defaults();
    let openai = Defaults::default();
    let mut model_names = cli.served_model_name.clone();
    if model_names.is_empty() {
        model_names.push(source.name().to_owned());
    }
    ApiConfig {
        model_names,
        model_root: cli.model.clone().unwrap_or_default(),
        tokenizer,
        template,
        defaults: Defaults {
            temperature: recommended.temperature.unwrap_or(openai.temperature),
            top_k: recommended.top_k.unwrap_or(openai.top_k),
            top_p: recommended.top_p.unwrap_or(openai.top_p),
            min_p: recommended.min_p.unwrap_or(openai.min_p),
            repetition_penalty: recommended.repetition_penalty.unwrap_or(openai.repetition_penalty),
        },
        eos_token_ids: recommended.eos_token_ids.clone(),
        api_keys: cli.api_key.clone(),
        body_bytes_max: cli.max_body_size,
        request_timeout: cli.request_timeout,
        cluster_token: cli.cluster.cluster_token.clone(),
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
    match ChatTemplate::new(&own.source, &bos, &eos) {
        Ok(template) => Ok(Some(template)),
        Err(error) => {
            tracing::warn!(%error, "chats are refused, completions served; --chat-template FILE gives another template");
            Ok(None)
        }
    }
}

/// Says on standard output what is served and how to try it.
fn announce(config: &ApiConfig, address: SocketAddr) {
    let name = &config.model_names[0];
    let key = if config.api_keys.is_empty() { "" } else { " -H \"Authorization: Bearer $ENGINE_API_KEY\"" };
    let (path, body) = match config.template {
        Some(_) => (
            "chat/completions",
            format!(
                r#"{{"model": "{name}", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}], "stream": true}}"#
            ),
        ),
        None => (
            "completions",
            format!(r#"{{"model": "{name}", "prompt": "The sky is blue because", "max_tokens": 64, "stream": true}}"#),
        ),
    };
    let text = format!(
        "engine {} serves {name} on http://{address}\n\
         Try it:\n  curl -N http://{address}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'\n",
        env!("CARGO_PKG_VERSION"),
    );
    // Nobody may be reading; the server serves all the same.
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// The signals that ask a process to leave.
pub(crate) struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    /// Handles them from now on.
    pub(crate) fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot handle signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Waits for one and returns the exit status it stands for.
    pub(crate) async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => 128 + 15,
            _ = self.interrupt.recv() => 128 + 2,
        }
    }
}
