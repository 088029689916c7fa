//! Answers as server-sent events.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::time::{Instant, Sleep};

use super::answer::Answer;
use crate::http::ApiError;

/// After this long without an event something is sent that is none, so that proxies keep the connection.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Room for the chunks of a step.
const BUFFER_BYTES: usize = 4096;

/// An answer as server-sent events. Everything that is there when the connection has room for more goes out in one
/// piece. Dropping it, as happens when the client goes away, cancels what still runs.
struct EventStream {
    /// `None` once everything has been sent.
    answer: Option<Answer>,
    buffer: BytesMut,
    /// When silence is looked for next: [`SILENCE_MAX`] after what was the last event when it was looked for. Moving a
    /// timer at each token would cost more than the token's JSON; noting the time does not.
    pulse: Pin<Box<Sleep>>,
    spoken: Instant,
    deadline: Pin<Box<Sleep>>,
}

/// The response that streams `answer`.
pub(crate) fn stream(answer: Answer) -> Response {
    let deadline = Box::pin(tokio::time::sleep_until(answer.deadline));
    let spoken = Instant::now();
    let pulse = Box::pin(tokio::time::sleep_until(spoken + SILENCE_MAX));
    let buffer = BytesMut::with_capacity(BUFFER_BYTES);
    let events = EventStream { answer: Some(answer), buffer, pulse, spoken, deadline };
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl Stream for EventStream {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let Some(answer) = &mut this.answer else { return Poll::Ready(None) };
            match answer.poll_events(context) {
                // Whatever is there: for a client that takes little at a time there is always something. But what is
                // whole goes out.
                Poll::Ready(false) if Instant::now() >= this.deadline.deadline() => this.fail(&ApiError::timeout()),
                Poll::Ready(ended) => {
                    if answer.can_move() {
                        // A body that breaks off is what makes a frontend go elsewhere.
                        this.answer = None;
                        return Poll::Ready(Some(Err(io::Error::other("the engine stopped"))));
                    }
                    if let Err(error) = write_news(answer, ended, &mut this.buffer) {
                        this.fail(&error);
                    } else if ended {
                        this.end();
                    }
                }
                Poll::Pending if this.deadline.as_mut().poll(context).is_ready() => this.fail(&ApiError::timeout()),
                Poll::Pending => {
                    if this.pulse.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    let now = Instant::now();
                    if now >= this.spoken + SILENCE_MAX {
                        // An empty line, which ends no event where none has begun. `vllm bench serve` strips each
                        // piece that it receives: what follows a comment would be a part of it.
                        this.buffer.extend_from_slice(b"\n");
                        this.spoken = now;
                    }
                    this.pulse.as_mut().reset(this.spoken + SILENCE_MAX);
                }
            }
            if !this.buffer.is_empty() {
                this.spoken = Instant::now();
                return Poll::Ready(Some(Ok(this.buffer.split().freeze())));
            }
        }
    }
}

fn write_news(answer: &mut Answer, ended: bool, buffer: &mut BytesMut) -> Result<(), ApiError> {
    if let Some(error) = answer.failure() {
        return Err(error);
    }
    answer.write_chunks(buffer)?;
    if ended && answer.include_usage {
        answer.write_usage(buffer)?;
    }
    Ok(())
}

impl EventStream {
    /// Tells the client, who has had its 200 already, that the answer breaks off.
    fn fail(&mut self, error: &ApiError) {
        self.buffer.extend_from_slice(b"data: ");
        self.buffer.extend_from_slice(error.to_json().as_bytes());
        self.buffer.extend_from_slice(b"\n\n");
        self.end();
    }

    fn end(&mut self) {
        self.buffer.extend_from_slice(b"data: [DONE]\n\n");
        self.answer = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    };

    use axum::{
        Router,
        body::{BodyDataStream, to_bytes},
        extract::Request,
    };
    use engine_kernels::{Batch, SampleRow, Sampled};
    use engine_models::Tokenizer;
    use futures::StreamExt;
    use serde_json::{Value, json};
    use tower::ServiceExt;

    use super::*;
    use crate::{
        api::{ApiConfig, ChatTemplate, Defaults, Parsers, Serving, router::router},
        engine::{Engine, EngineConfig, Runner, RunnerError},
        telemetry::Metrics,
    };

    const TIME_MAX: Duration = Duration::from_secs(60);
    const CHAT: &str = "/v1/chat/completions";
    const COMPLETIONS: &str = "/v1/completions";

    /// Says the same as often as it may. Each step is told of as it begins, so the ones before it have been delivered.
    struct Monotone(Sender<()>, Receiver<()>);

    impl Runner for Monotone {
        fn execute<'a>(
            &mut self,
            _: &Batch,
            _: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
            out: &mut [Sampled],
            _: &mut dyn FnMut(usize),
        ) -> Result<(), RunnerError> {
            out.fill(Sampled::default());
            let over = || RunnerError("the test is over".into());
            self.0.send(()).map_err(|_| over())?;
            self.1.recv().map_err(|_| over())
        }
    }

    /// A server whose model computes one sequence at a time.
    struct Server {
        router: Router,
        begun: Receiver<()>,
        permits: Sender<()>,
    }

    impl Server {
        fn start() -> Self {
            let bytes =
                json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
            let model = json!({"type": "BPE", "vocab": {"a": 0}, "merges": []});
            let tokenizer = json!({"version": "1.0", "model": model, "decoder": bytes, "added_tokens": []});
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), tokenizer.to_string()).unwrap();
            let api = ApiConfig {
                model_names: vec!["m".into()],
                model_root: "m".into(),
                tokenizer: Arc::new(Tokenizer::from_file(file.path()).unwrap()),
                template: Some(ChatTemplate::new("a", "", "").unwrap()),
                default_template_kwargs: serde_json::Map::new(),
                parsers: Parsers::default(),
                defaults: Defaults::default(),
                eos_token_ids: Vec::new(),
                api_keys: Vec::new(),
                body_bytes_max: 1 << 20,
                request_timeout: TIME_MAX,
                cluster_token: None,
                allowed_origins: Vec::new(),
            };
            let config = EngineConfig {
                max_num_seqs: 1,
                max_num_batched_tokens: 16,
                itl_target: Duration::from_millis(200),
                max_waiting_requests: 1,
                max_model_len: 64,
                vocab_size: 1,
                block_size: 16,
                blocks: 4,
                prefix_caching: true,
                model_key: Vec::new(),
            };
            let metrics = Metrics::new();
            let ((begins, begun), (permits, permitted)) = (mpsc::channel(), mpsc::channel());
            let engine = Engine::start(Monotone(begins, permitted), config, metrics.engine.clone()).unwrap();
            Self { router: router(Serving::new(api, engine, metrics)), begun, permits }
        }

        /// The stream that answers with `tokens` tokens.
        async fn ask(&self, path: &str, tokens: usize) -> Body {
            let messages = json!([{"role": "user", "content": "a"}]);
            let mut body = if path == CHAT { json!({ "messages": messages }) } else { json!({"prompt": [0]}) };
            (body["max_tokens"], body["stream"]) = (tokens.into(), true.into());
            let request = Request::post(path).header(header::CONTENT_TYPE, "application/json");
            let request = request.body(Body::from(body.to_string())).unwrap();
            let response = self.router.clone().oneshot(request).await.unwrap();
            assert_eq!(response.status(), 200);
            response.into_body()
        }

        /// Lets the step that has begun end, and the next begin.
        fn step(&self) {
            self.permits.send(()).unwrap();
            self.begun.recv().unwrap();
        }
    }

    #[tokio::test]
    async fn time_is_up_whatever_is_there() {
        let server = Server::start();
        let answer = server.ask(COMPLETIONS, 8).await;
        server.begun.recv().unwrap();
        // Some of it is there, and nobody has taken any.
        (0..4).for_each(|_| server.step());
        tokio::time::pause();
        tokio::time::advance(TIME_MAX).await;
        let body = to_bytes(answer, usize::MAX).await.unwrap();
        let expected = format!("data: {}\n\ndata: [DONE]\n\n", ApiError::timeout().to_json());
        assert_eq!(body, expected);
    }

    #[tokio::test]
    async fn a_sign_of_life_is_no_part_of_what_follows_for_clients_that_strip_each_piece() {
        let server = Server::start();
        let mut pieces = server.ask(COMPLETIONS, 2).await.into_data_stream();
        server.begun.recv().unwrap();
        tokio::time::pause();
        tokio::time::advance(SILENCE_MAX).await;
        let piece = pieces.next().await.unwrap().unwrap();
        assert!(!piece.is_empty() && piece.trim_ascii().is_empty(), "{piece:?}");
        server.step();
        assert!(pieces.next().await.unwrap().unwrap().starts_with(b"data: {"));
    }

    /// The first choice of each chunk that is there now.
    async fn next_choices(pieces: &mut BodyDataStream) -> Vec<Value> {
        let piece = pieces.next().await.unwrap().unwrap();
        let events = std::str::from_utf8(&piece).unwrap().split_terminator("\n\n");
        let data = events.map(|event| event.strip_prefix("data: ").unwrap()).filter(|data| *data != "[DONE]");
        data.map(|data| serde_json::from_str::<Value>(data).unwrap()["choices"][0].clone()).collect()
    }

    #[tokio::test]
    async fn each_step_has_a_chunk_and_the_last_ones_says_how_the_answer_ended_too() {
        const TOKENS: usize = 4;
        for path in [CHAT, COMPLETIONS] {
            let server = Server::start();
            let mut pieces = server.ask(path, TOKENS).await.into_data_stream();
            // Once its turn has come, the first answer has ended for certain.
            let _next = server.ask(path, 1).await;
            server.begun.recv().unwrap();
            for token in 1..=TOKENS {
                server.step();
                let mut choices = next_choices(&mut pieces).await;
                if path == CHAT && token == 1 {
                    assert_eq!(choices.remove(0)["delta"], json!({"role": "assistant", "content": ""}));
                }
                let [choice] = &choices[..] else { panic!("{path}, token {token}: {choices:?}") };
                assert_eq!(choice["text"].as_str().or(choice["delta"]["content"].as_str()), Some("a"), "{choice}");
                let end = if token == TOKENS { json!("length") } else { Value::Null };
                assert_eq!(choice["finish_reason"], end);
            }
        }
    }
}
