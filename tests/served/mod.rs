//! Workers in this process: the whole server and engine, over real sockets, around a runner that draws each token as a
//! digest of everything before it. They take no time, and any two of them give the same answer.
#![allow(dead_code, reason = "each test uses some of it")]

mod answer;

pub(crate) use answer::Answer;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Condvar, LazyLock, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use engine::{
    api::{self, ApiConfig, ChatTemplate, Defaults, Parsers},
    cluster::ModelKey,
    engine::{Engine, EngineConfig, EngineHandle, Runner, RunnerError},
    http::{self, ConnectionThreads, HttpToken, ServerConfig},
    telemetry::Metrics,
};
use engine_kernels::{Batch, RowTask, SampleRow, Sampled};
use engine_models::{ModelSource, OpenOptions, Tokenizer};
use tokio::runtime::Runtime;

use crate::support::demo_model;

/// What answers are made of: characters of one to four bytes, many of them in several tokens, and a stop string's
/// parts.
const PALETTE: &str = "Grüße, 世界! 🙂🚀 stop here and sto p the en d\n\n a b c é € 🧑‍🚀 1 2 3 stop";
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}\
                        {{ strftime_now('%Y-%m-%d %H:%M:%S') }} assistant:";

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
    let path: PathBuf = demo_model();
    let source = ModelSource::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
    Arc::new(source.tokenizer().unwrap())
});

/// A seed whose requests no token can follow, as if the model gave NaN.
pub(crate) const NOTHING_FOLLOWS: u64 = 404;

/// Holds steps back, or lets them go.
#[derive(Default)]
pub(crate) struct Gate {
    /// Steps that may still be computed; `None`: all.
    steps: Mutex<Option<usize>>,
    changed: Condvar,
    held: AtomicBool,
}

impl Gate {
    /// Lets so many further steps be computed and no more.
    pub(crate) fn only(&self, steps: usize) {
        *self.steps.lock().unwrap() = Some(steps);
        self.changed.notify_all();
    }

    /// Lets everything go on.
    pub(crate) fn open(&self) {
        *self.steps.lock().unwrap() = None;
        self.changed.notify_all();
    }

    /// Whether a step is held back, and not just on its way through.
    pub(crate) fn holds(&self) -> bool {
        let steps = self.steps.lock().unwrap();
        *steps == Some(0) && self.held.load(Ordering::SeqCst)
    }

    fn pass(&self) {
        self.held.store(true, Ordering::SeqCst);
        let mut steps = self.changed.wait_while(self.steps.lock().unwrap(), |steps| *steps == Some(0)).unwrap();
        if let Some(steps) = &mut *steps {
            *steps -= 1;
        }
        self.held.store(false, Ordering::SeqCst);
    }
}

struct Digests {
    palette: Vec<u32>,
    end: u32,
    gate: Arc<Gate>,
    step: Duration,
}

impl Runner for Digests {
    fn execute<'a>(
        &mut self,
        _: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        _: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        self.gate.pass();
        // As if it computed.
        std::thread::sleep(self.step);
        for (i, sampled) in out.iter_mut().enumerate() {
            let row = row(i);
            let seed = match row.task {
                RowTask::Score { .. } => 0,
                RowTask::Sample { params, .. } => params.seed,
            };
            let all = row.prompt.iter().chain(row.output).map(|&token| u64::from(token));
            let mix = |state: u64, value: u64| (state ^ value).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
            let state = all.fold(mix(seed, 0xABCD), mix);
            let mut token = self.palette[(state >> 33) as usize % self.palette.len()];
            match row.task {
                RowTask::Score { token: given } => token = given,
                RowTask::Sample { suppress, mask: None, .. } if state % 29 == 0 && !suppress.contains(&self.end) => {
                    token = self.end;
                }
                RowTask::Sample { mask: None, .. } => {}
                RowTask::Sample { suppress, mask: Some(mask), .. } => {
                    let allowed: Vec<u32> = mask.tokens().filter(|id| !suppress.contains(id)).collect();
                    token = allowed[(state >> 33) as usize % allowed.len()];
                }
            }
            *sampled = Sampled { token, logprob: -((state >> 40) as f32) / 1e7, ..Sampled::default() };
            sampled.impossible = seed == NOTHING_FOLLOWS && row.output.len() == 3;
            for alternative in 0..row.logprobs.unwrap_or(0) {
                sampled.top[alternative as usize] = (token + alternative, sampled.logprob - alternative as f32);
                sampled.top_len = alternative + 1;
            }
        }
        Ok(())
    }
}

/// How a worker differs from others.
pub(crate) struct Options {
    pub(crate) model: &'static str,
    /// Which of those of that name it is.
    pub(crate) weights: &'static str,
    /// How a conversation becomes a prompt, which also tells what answers are looked through for.
    pub(crate) template: &'static str,
    /// What the template is told where a request says nothing.
    pub(crate) template_kwargs: serde_json::Map<String, serde_json::Value>,
    pub(crate) cluster_token: Option<HttpToken>,
    pub(crate) max_model_len: usize,
    pub(crate) max_num_seqs: usize,
    pub(crate) max_waiting_requests: usize,
    pub(crate) prefix_caching: bool,
    /// How long a step takes: where it takes any time, most tokens have an event of their own.
    pub(crate) step: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            model: "m",
            weights: "",
            template: TEMPLATE,
            template_kwargs: serde_json::Map::new(),
            cluster_token: None,
            max_model_len: 2048,
            max_num_seqs: 8,
            max_waiting_requests: 256,
            prefix_caching: true,
            step: Duration::ZERO,
        }
    }
}

/// A worker. Its sockets break when it is dropped, as if its process had been killed.
pub(crate) struct Worker {
    pub(crate) address: SocketAddr,
    pub(crate) engine: EngineHandle,
    pub(crate) gate: Arc<Gate>,
    runtime: Option<Runtime>,
}

impl Worker {
    pub(crate) fn start(options: Options) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let tokenizer = TOKENIZER.clone();
        let gate = Arc::new(Gate::default());
        let mut palette = tokenizer.encode(PALETTE, false).unwrap();
        palette.sort_unstable();
        palette.dedup();
        let end = tokenizer.encode("<|im_end|>", false).unwrap()[0];
        let template = ChatTemplate::new(options.template, "", "").unwrap();
        let api = ApiConfig {
            model_names: vec![options.model.into()],
            model_root: options.model.into(),
            tokenizer,
            default_template_kwargs: options.template_kwargs,
            parsers: Parsers::of_template(&template),
            template: Some(template),
            defaults: Defaults::default(),
            eos_token_ids: vec![end],
            api_keys: Vec::new(),
            body_bytes_max: 1 << 20,
            request_timeout: Duration::from_secs(120),
            cluster_token: options.cluster_token,
            allowed_origins: Vec::new(),
        };
        let config = EngineConfig {
            max_num_seqs: options.max_num_seqs,
            max_num_batched_tokens: 64,
            itl_target: Duration::from_millis(200),
            max_waiting_requests: options.max_waiting_requests,
            max_model_len: options.max_model_len,
            vocab_size: 49_152,
            block_size: 16,
            blocks: options.max_model_len.div_ceil(16) * 4,
            prefix_caching: options.prefix_caching,
            model_key: ModelKey::of([options.model, options.weights].concat().as_bytes()).as_bytes().to_vec(),
        };
        let metrics = Metrics::new();
        let runner = Digests { palette, end, gate: gate.clone(), step: options.step };
        let engine = Engine::start(runner, config, metrics.engine.clone()).unwrap();
        let bound = runtime.block_on(http::bind("127.0.0.1", 0)).unwrap();
        let _guard = runtime.enter();
        let listener = bound.listen().unwrap();
        let address = listener.local_addr().unwrap();
        let server = ServerConfig {
            connections_max: 1024,
            drain_timeout: Duration::ZERO,
            threads: ConnectionThreads::default(),
        };
        runtime.spawn(api::serve(listener, api, engine.clone(), metrics, server, std::future::pending()));
        drop(_guard);
        Self { address, engine, gate, runtime: Some(runtime) }
    }

    /// Ends it without a word: connections break off, the address refuses further ones.
    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
            self.engine.stop();
            self.gate.open();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}
