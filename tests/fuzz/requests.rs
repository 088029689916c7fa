//! Request bodies, sent over HTTP to the whole server: what is valid is answered, the rest refused with a 4xx that says
//! why.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use engine::api::{self, ApiConfig, ChatTemplate, Defaults, Parsers};
use engine::engine::{Engine, EngineConfig, Runner, RunnerError};
use engine::http::{self, ConnectionThreads, ServerConfig};
use engine::telemetry::Metrics;
use engine_kernels::{Batch, RowTask, SampleRow, Sampled};
use engine_models::Tokenizer;
use engine_models::gguf::Gguf;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use crate::driver::Target;

const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];
const VOCABULARY: usize = 17;

/// A server with a tokenizer, a template and an engine thread, but no model. Its tasks run on the thread of the test,
/// so what they allocate is counted.
pub(crate) struct RequestBody {
    runtime: Rc<Runtime>,
    address: std::net::SocketAddr,
    connection: Option<BufStream<TcpStream>>,
}

impl RequestBody {
    /// Starts the server on a free port.
    pub(crate) fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let gguf = Gguf::from_bytes(include_bytes!("../corpus/gguf/llama.gguf").to_vec()).unwrap();
        let goldens: Value = serde_json::from_str(include_str!("../reference/templates.json")).unwrap();
        let template = ChatTemplate::new(goldens["templates"]["qwen3"].as_str().unwrap(), "<s>", "</s>").unwrap();
        let api = ApiConfig {
            model_names: vec!["m".into()],
            model_root: "m".into(),
            tokenizer: Arc::new(Tokenizer::from_gguf(&gguf).unwrap()),
            default_template_kwargs: serde_json::Map::new(),
            parsers: Parsers::of_template(&template),
            template: Some(template),
            defaults: Defaults::default(),
            eos_token_ids: vec![1],
            api_keys: Vec::new(),
            body_bytes_max: 1 << 17,
            request_timeout: Duration::from_secs(60),
            cluster_token: None,
            allowed_origins: Vec::new(),
        };
        let engine = EngineConfig {
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            itl_target: Duration::from_millis(200),
            max_waiting_requests: 256,
            max_model_len: 128,
            vocab_size: VOCABULARY,
            block_size: 4,
            blocks: 256,
            prefix_caching: true,
            model_key: Vec::new(),
        };
        let metrics = Metrics::new();
        let engine = Engine::start(Dice, engine, metrics.engine.clone()).unwrap();
        let bound = runtime.block_on(http::bind("127.0.0.1", 0)).unwrap();
        let _guard = runtime.enter();
        let listener = bound.listen().unwrap();
        let address = listener.local_addr().unwrap();
        let server =
            ServerConfig { connections_max: 4, drain_timeout: Duration::ZERO, threads: ConnectionThreads::default() };
        runtime.spawn(api::serve(listener, api, engine, metrics, server, std::future::pending()));
        Self { runtime: Rc::new(runtime), address, connection: None }
    }

    /// Sends one body and returns status and answer.
    async fn post(&mut self, endpoint: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                BufStream::new(stream)
            }
        };
        let head = format!(
            "POST {endpoint} HTTP/1.1\r\nHost: fuzz\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all(head.as_bytes()).await?;
        connection.write_all(body).await?;
        connection.flush().await?;
        let (mut status, mut length, mut close) = (0, None, false);
        loop {
            let line = read_line(&mut connection).await?.to_ascii_lowercase();
            match line.split_once(": ") {
                _ if line.is_empty() => break,
                _ if status == 0 => status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0),
                Some(("content-length", value)) => length = value.parse().ok(),
                Some(("connection", value)) => close = value == "close",
                _ => {}
            }
        }
        let mut answer = Vec::new();
        match length {
            Some(length) => read_exact(&mut connection, length, &mut answer).await?,
            None => loop {
                // Chunked.
                let size = usize::from_str_radix(&read_line(&mut connection).await?, 16).map_err(io::Error::other)?;
                read_exact(&mut connection, size, &mut answer).await?;
                read_line(&mut connection).await?;
                if size == 0 {
                    break;
                }
            },
        }
        self.connection = (!close).then_some(connection);
        Ok((status, answer))
    }
}

async fn read_line(connection: &mut BufStream<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    match connection.read_line(&mut line).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim_end().to_owned()),
    }
}

async fn read_exact(connection: &mut BufStream<TcpStream>, bytes: usize, into: &mut Vec<u8>) -> io::Result<()> {
    let start = into.len();
    into.resize(start + bytes, 0);
    connection.read_exact(&mut into[start..]).await.map(|_| ())
}

impl Target for RequestBody {
    fn run(&mut self, input: &[u8]) -> String {
        let mut outcome = String::new();
        for endpoint in ENDPOINTS {
            let answer = self.runtime.clone().block_on(self.post(endpoint, input));
            let (status, answer) = answer.unwrap_or_else(|error| panic!("{endpoint} gave no answer: {error}"));
            let text = String::from_utf8(answer).unwrap();
            if status != 200 {
                let error: Value = serde_json::from_str(&text).unwrap();
                assert!((400..500).contains(&status), "{endpoint}: {status} {text}");
                assert!(error["error"]["message"].as_str().is_some_and(|message| !message.is_empty()), "{text}");
            }
            // An answer has an id of its own.
            let telling = if status == 200 { "" } else { &text[..text.floor_char_boundary(90)] };
            outcome += &format!("{status} {telling}");
        }
        outcome
    }
}

/// A model whose every token is drawn by the number of tokens before it.
struct Dice;

impl Runner for Dice {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        _: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        for (index, sampled) in out.iter_mut().enumerate().take(batch.logit_rows.len()) {
            let row = row(index);
            let token = match row.task {
                RowTask::Score { token } => token,
                RowTask::Sample { mask, .. } => {
                    let first = row.prompt.len() * 7 + row.output.len() * 5;
                    let mut from = (first..first + VOCABULARY).map(|token| token % VOCABULARY);
                    let is_allowed = |&token: &usize| mask.is_none_or(|mask| mask.allows(token as u32));
                    from.find(is_allowed).unwrap_or(0) as u32
                }
            };
            let top_len = row.logprobs.unwrap_or(0).min(VOCABULARY as u32);
            *sampled = Sampled { token, logprob: -1.0, top_len, ..Sampled::default() };
        }
        Ok(())
    }
}
