//! Getting a request to a worker that answers it: placing it, and going to the next worker when one refuses or is lost.

use std::{borrow::Cow, future::Future, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::{
    Method, Request, StatusCode,
    header::{self, HeaderMap, HeaderValue},
    http::uri::PathAndQuery,
};
use serde::Deserialize;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep_until},
};

use super::{
    Frontend,
    peek::Peek,
    placement::{Candidate, choose},
    upstream::{Exchange, Payload},
    worker::{Booking, LostError, Worker},
    workers::{Serving, Table},
};
use crate::{
    api::{
        MODEL_KEY_HEADER,
        progress::{PROGRESS_HEADER, RESUME_HEADER},
    },
    cluster::{ModelKey, WorkerId},
    http::{ApiError, CLUSTER_TOKEN_HEADER, Received},
};

/// Bytes of a body that are read where it came in; more would keep others' tokens there waiting.
const PEEKED_HERE_MAX: usize = 256 << 10;
/// Workers that may be lost over a request without its getting any further. A request that kills whoever takes it must
/// not go through the whole cluster.
const LOSSES_MAX: usize = 3;
/// Refusals (429 and the like) after which the last one is the answer. Those of workers that leave do not count.
const REFUSALS_MAX: usize = 3;
/// How often it is looked whether the worker one waits for is still there.
pub(super) const PULSE: Duration = Duration::from_secs(1);
/// How long it takes until workers that were given up are tried again, while a request waits for one of them: at first,
/// and at most.
const RETRY_PAUSE_FIRST: Duration = Duration::from_millis(250);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);
/// What of a client's headers workers get to see.
const PASSED_ON: [&str; 6] =
    ["content-type", "authorization", "traceparent", "tracestate", "x-request-id", "user-agent"];

/// A request as workers get it, for as long as it may have to be sent again.
pub(super) struct Asked {
    path: PathAndQuery,
    headers: HeaderMap,
    body: Bytes,
    /// Leave to keep it.
    _memory: Option<OwnedSemaphorePermit>,
    pub(super) peek: Option<Peek>,
    pub(super) arrived: Instant,
    pub(super) deadline: Instant,
}

impl Asked {
    pub(super) async fn new(path: PathAndQuery, given: &HeaderMap, received: Received, timeout: Duration) -> Self {
        let arrived = Instant::now();
        let Received { bytes, memory } = received;
        let body = Bytes::from(bytes);
        let mut headers = HeaderMap::with_capacity(PASSED_ON.len());
        for name in PASSED_ON {
            // Of some there may be several: a `tracestate` may come in parts.
            for value in given.get_all(name) {
                headers.append(name, value.clone());
            }
        }
        let peek = if body.len() <= PEEKED_HERE_MAX {
            Peek::read(&body)
        } else {
            let body = body.clone();
            // It fails only when the process ends.
            tokio::task::spawn_blocking(move || Peek::read(&body)).await.ok().flatten()
        };
        Self { path, headers, body, _memory: memory, peek, arrived, deadline: arrived + timeout }
    }

    fn model(&self) -> Option<&str> {
        self.peek.as_ref()?.model.as_deref()
    }

    pub(super) fn streams(&self) -> bool {
        self.peek.as_ref().is_some_and(|peek| peek.stream)
    }

    fn request(&self, worker: &Worker, journal: &Bytes, token: Option<&HeaderValue>) -> Request<Payload> {
        let mut request = Request::new(Payload::new(journal.clone(), self.body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.path.clone().into();
        let headers = request.headers_mut();
        headers.clone_from(&self.headers);
        if let Ok(host) = HeaderValue::from_str(&worker.card.address) {
            headers.insert(header::HOST, host);
        }
        if let Ok(key) = HeaderValue::from_str(&worker.card.model_key.to_string()) {
            headers.insert(MODEL_KEY_HEADER, key);
        }
        if self.streams() {
            headers.insert(PROGRESS_HEADER, HeaderValue::from_static("1"));
            if let Some(token) = token {
                headers.insert(CLUSTER_TOKEN_HEADER, token.clone());
            }
            if !journal.is_empty() {
                headers.insert(RESUME_HEADER, journal.len().into());
            }
        }
        request
    }
}

/// An answer in progress, and where from.
pub(super) struct Placed {
    pub(super) exchange: Exchange,
    pub(super) booking: Booking,
}

/// Why there is none.
#[derive(Debug)]
pub(super) enum Failure {
    /// A worker's own words: its status, headers and body.
    Refused(StatusCode, HeaderMap, Bytes),
    /// Ours.
    Error(ApiError),
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

/// What has been tried for a request since it last got anywhere.
#[derive(Default)]
pub(super) struct Attempts {
    tried: Vec<WorkerId>,
    losses: usize,
    refusals: usize,
    /// Its model was served when the request came or a moment before, whether or not it is now.
    known: bool,
    /// A worker could not be reached, because this process lacks something (files, ports, memory).
    lacking: bool,
    /// The refusal that says most, the last of several such, and its status.
    refused: Option<(Failure, StatusCode)>,
    /// It has waited for workers to come back.
    waited: bool,
}

impl Attempts {
    /// Notes that a worker is lost; too many are the end. One that could not be reached has nothing to do with the
    /// request. One that was lost over a slow client counts, though not against the worker: the request may be sent
    /// again as long as it gets further each time, and no longer.
    pub(super) fn lost(&mut self, worker: &Worker, error: &LostError) -> Result<(), ApiError> {
        if error.blames_worker() && !worker.avoid() {
            tracing::warn!(worker = %worker.lease, address = worker.card.address, %error, "lost a worker");
        }
        match error {
            LostError::Connect(_) => self.lacking = false,
            LostError::Replaced => {
                self.lacking = false;
                worker.note_replaced();
            }
            LostError::Lacking(_) => {
                self.lacking = true;
                if !worker.is_out_of_reach() {
                    tracing::warn!(worker = %worker.lease, %error, "cannot ask a worker");
                }
            }
            LostError::SlowClient(_) | LostError::Broken(_) | LostError::Silent(_) => self.losses += 1,
        }
        if self.losses >= LOSSES_MAX {
            return Err(workers_lost());
        }
        if matches!(error, LostError::SlowClient(_)) {
            tracing::info!(worker = %worker.lease, %error, "a slow client's answer is asked for again");
        }
        Ok(())
    }

    /// Notes that a worker would not, unless another has said more: in which order they are asked decides nothing.
    fn refused(&mut self, refusal: Failure, status: StatusCode) {
        if self.refused.as_ref().is_none_or(|&(_, before)| weight(before) <= weight(status)) {
            self.refused = Some((refusal, status));
        }
    }
}

/// 502: those who should have answered are gone.
pub(super) fn workers_lost() -> ApiError {
    let message = "The workers that took the request were lost before they had answered it";
    ApiError::new(StatusCode::BAD_GATEWAY, "workers_lost", message)
}

/// 503: nobody is there to answer.
pub(super) fn no_workers() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_workers", "No worker serves requests at the moment")
}

/// 503: nobody can be asked.
fn no_connection() -> ApiError {
    let message = "The server cannot connect to its workers at the moment; its log says what it lacks";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "no_connection", message)
}

impl Frontend {
    /// Gets a request to a worker that answers it, until its head. With `key` it continues the answer of `journal`, on
    /// a worker of that model. A request that some worker has taken already waits a while for another to come, and so
    /// does any while those who would answer it leave, have been lost for no longer than that, or are back and refuse
    /// it.
    pub(super) async fn place(
        &self,
        asked: &Asked,
        journal: &Bytes,
        key: Option<ModelKey>,
        attempts: &mut Attempts,
    ) -> Result<Placed, Failure> {
        let patience_ends = (Instant::now() + self.config.patience).min(asked.deadline);
        let mut table = self.table.clone();
        let mut rounds = Rounds::default();
        loop {
            let current = table.borrow_and_update().clone();
            let worker = match self.pick(asked, key, &current, attempts)? {
                Pick::Worker(worker) => worker,
                Pick::Nobody { lost_lately } => {
                    let taken = key.is_some() || attempts.losses > 0;
                    let refusal = attempts.refused.as_ref().map(|&(_, status)| status);
                    // Whoever leaves may be back in a moment, as after its lease is gone. A refusal by a worker that
                    // stays says more than that others are missing.
                    let left = refusal.is_some_and(leaves);
                    let unreached = left || (lost_lately || attempts.lacking) && refusal.is_none();
                    let missed = unreached || current.misses(asked.model());
                    attempts.waited |= missed;
                    // The first to come back gets all who have waited. Whom it refuses waits for those after it.
                    let expected = taken || missed || attempts.waited && refusal.is_some();
                    let hopeless = refusal.is_some_and(|status| !may_pass(status));
                    if expected && !hopeless && Instant::now() < patience_ends {
                        if rounds.next(&mut table, patience_ends).await {
                            attempts.tried.clear();
                        }
                        continue;
                    }
                    let ours = if taken {
                        workers_lost()
                    } else if attempts.lacking {
                        no_connection()
                    } else {
                        no_workers()
                    };
                    return Err(attempts.refused.take().map_or(ours.into(), |(refused, _)| refused));
                }
            };
            if key.is_none() && !attempts.tried.is_empty() {
                self.metrics.retries.inc();
            }
            attempts.tried.push(worker.lease);
            let tokens = asked.peek.as_ref().map_or(0, |peek| peek.prompt_tokens + peek.answer_tokens);
            let booking = worker.book(tokens);
            let request = || asked.request(&worker, journal, self.token.as_ref());
            let mut exchange = match self.guard(&worker, asked.deadline, worker.send(&request)).await? {
                Ok(exchange) => exchange,
                Err(error) => {
                    attempts.lost(&worker, &error)?;
                    continue;
                }
            };
            let status = exchange.response.status();
            // One that will not continue an answer says nothing about the others.
            if !may_pass(status) && (key.is_none() || status == StatusCode::OK) {
                return Ok(Placed { exchange, booking });
            }
            // Others may say yes; if none does, this was the answer.
            match self.guard(&worker, asked.deadline, async { Ok(exchange.collect().await?) }).await? {
                Ok(body) => {
                    let headers = exchange.response.headers().clone();
                    worker.keep(exchange);
                    if status == StatusCode::MISDIRECTED_REQUEST {
                        attempts.lost(&worker, &LostError::Replaced)?;
                        continue;
                    }
                    if was_aborted(status, &body) {
                        attempts.lost(&worker, &LostError::Silent("its engine failed over the request"))?;
                        continue;
                    }
                    attempts.refused(Failure::Refused(status, headers, body), status);
                    attempts.refusals += usize::from(key.is_none() && !attempts.waited && !leaves(status));
                    if let Some((refused, _)) = attempts.refused.take_if(|_| attempts.refusals >= REFUSALS_MAX) {
                        return Err(refused);
                    }
                }
                Err(error) => attempts.lost(&worker, &error)?,
            }
        }
    }

    /// Works on something that `worker` has to answer, until the deadline, or until the worker is found not to answer
    /// anything any more.
    pub(super) async fn guard<T>(
        &self,
        worker: &Worker,
        deadline: Instant,
        work: impl Future<Output = Result<T, LostError>>,
    ) -> Result<Result<T, LostError>, ApiError> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(done),
                () = sleep_until(deadline.min(Instant::now() + PULSE)) => {
                    if Instant::now() >= deadline {
                        return Err(ApiError::timeout());
                    }
                    if worker.is_silent() {
                        return Ok(Err(LostError::Silent("it does not answer")));
                    }
                }
            }
        }
    }

    /// The worker to try next.
    fn pick(
        &self,
        asked: &Asked,
        key: Option<ModelKey>,
        table: &Table,
        attempts: &mut Attempts,
    ) -> Result<Pick, ApiError> {
        let anybody;
        let workers = match &asked.peek {
            Some(_) => match table.serving(asked.model()) {
                Serving::By(workers) => {
                    attempts.known = true;
                    workers
                }
                Serving::Nobody => {
                    attempts.known = true;
                    &[]
                }
                // There was such a model, and may be again.
                Serving::Unknown if attempts.known || key.is_some() => &[],
                Serving::Unknown => {
                    let served: Vec<String> = table.models().into_keys().map(str::to_owned).collect();
                    return Err(ApiError::unknown_model(asked.model().unwrap_or_default(), &served));
                }
                // Whoever has the model that began the answer.
                Serving::Ambiguous if key.is_some() => {
                    anybody = table.anybody();
                    &anybody
                }
                Serving::Ambiguous => {
                    let message = "Several models are served: name one in 'model'";
                    return Err(ApiError::invalid("model", message));
                }
            },
            // Any worker will say what is wrong with the body.
            None => {
                anybody = table.anybody();
                &anybody
            }
        };
        let open = |worker: &&Arc<Worker>| {
            let fits = key.is_none_or(|key| worker.card.model_key == key);
            fits && !worker.is_silent() && !attempts.tried.contains(&worker.lease)
        };
        let mut candidates: Vec<_> = workers.iter().filter(open).filter(|worker| !worker.is_avoided()).collect();
        if candidates.is_empty() {
            // Those that failed a moment ago are better than nobody.
            candidates = workers.iter().filter(open).collect();
        }
        let loads: Vec<_> =
            candidates.iter().map(|worker| Candidate { id: worker.instance, load: worker.load() }).collect();
        let affinity = asked.peek.as_ref().and_then(|peek| peek.affinity);
        Ok(match choose(&loads, affinity, rand::random()) {
            Some(index) => Pick::Worker(candidates[index].clone()),
            None => {
                let patience = self.config.patience;
                Pick::Nobody { lost_lately: workers.iter().any(|worker| worker.was_lost_within(patience)) }
            }
        })
    }
}

/// Who to try next.
enum Pick {
    /// This one.
    Worker(Arc<Worker>),
    /// All that could answer were tried; one of them may have been lost a moment ago.
    Nobody { lost_lately: bool },
}

/// Whether another worker may answer what one has answered so: too busy, leaving, failed, another model's, or not
/// reached by something in between. A 500 is about the request: the others would say it too.
fn may_pass(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::BAD_GATEWAY
            | StatusCode::MISDIRECTED_REQUEST
    )
}

/// Whether a worker that answers so is about to go, or its engine has: it says nothing of the others.
fn leaves(status: StatusCode) -> bool {
    status == StatusCode::SERVICE_UNAVAILABLE
}

/// Whether a worker says so of a request that it had taken and over which its engine failed: its process ends as well.
fn was_aborted(status: StatusCode, body: &Bytes) -> bool {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow)]
        error: Told<'a>,
    }
    #[derive(Deserialize)]
    struct Told<'a> {
        #[serde(borrow)]
        code: Cow<'a, str>,
    }
    leaves(status) && serde_json::from_slice(body).is_ok_and(|answer: Answer<'_>| answer.error.code == "aborted")
}

/// How much a refusal says: most if its worker is full and may take the request in a moment, less if something between
/// fails, still less if it leaves, and least if it never will.
fn weight(status: StatusCode) -> u8 {
    match status {
        StatusCode::TOO_MANY_REQUESTS => 3,
        _ if leaves(status) => 1,
        _ => 2 * u8::from(may_pass(status)),
    }
}

/// When those that were tried in vain are tried again. Each time costs them the request's body and what there is of its
/// answer, and all who wait would come at once: so pauses grow, and no two are alike.
struct Rounds {
    pause: Duration,
    /// When the pause under way ends.
    due: Option<Instant>,
}

impl Default for Rounds {
    fn default() -> Self {
        Self { pause: RETRY_PAUSE_FIRST, due: None }
    }
}

impl Rounds {
    /// Waits for the next round, but no longer than until `latest`. Returns earlier, and false, if other workers are
    /// there: they need not wait for it.
    async fn next(&mut self, table: &mut watch::Receiver<Arc<Table>>, latest: Instant) -> bool {
        let pause = self.pause.mul_f64(rand::random_range(0.75..1.25));
        let due = *self.due.get_or_insert_with(|| Instant::now() + pause);
        tokio::select! {
            // It fails once nobody follows the workers any more.
            Ok(()) = table.changed() => return false,
            () = sleep_until(due.min(latest)) => {}
        }
        *self = Self { pause: (self.pause * 2).min(RETRY_PAUSE_MAX), due: None };
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::{
        cluster::{Role, tests::card},
        frontend::fake::bound,
    };

    #[tokio::test]
    async fn of_a_header_that_comes_in_parts_workers_get_all() {
        let mut given = HeaderMap::new();
        for part in ["a=1", "b=2"] {
            given.append("tracestate", HeaderValue::from_static(part));
        }
        let received = Received { bytes: b"{}".to_vec(), memory: None };
        let asked = Asked::new(PathAndQuery::from_static("/"), &given, received, Duration::ZERO).await;
        let (_, worker) = bound().await;
        let request = asked.request(&worker, &Bytes::new(), None);
        let passed: Vec<_> = request.headers().get_all("tracestate").iter().collect();
        assert_eq!(passed, ["a=1", "b=2"]);
    }

    #[test]
    fn what_is_lacking_here_neither_counts_nor_speaks_against_a_worker() {
        let card = card(Role::Decode, ModelKey::of(b"model"), "127.0.0.1:1");
        let worker = Worker::new(WorkerId(1), Arc::new(card));
        let mut attempts = Attempts::default();
        let lacking = LostError::Lacking(io::ErrorKind::OutOfMemory.into());
        assert!((0..=LOSSES_MAX).all(|_| attempts.lost(&worker, &lacking).is_ok()));
        assert!(attempts.lacking && !worker.is_avoided());
        // A worker that is gone says nothing of the request.
        let gone = LostError::Connect(io::ErrorKind::ConnectionRefused.into());
        assert!((0..=LOSSES_MAX).all(|_| attempts.lost(&worker, &gone).is_ok()));
        assert!(worker.is_avoided());
    }

    #[test]
    fn who_may_take_it_in_a_moment_says_more_than_who_leaves_and_both_more_than_who_never_will() {
        let [full, unreached] = [StatusCode::TOO_MANY_REQUESTS, StatusCode::BAD_GATEWAY];
        let [leaving, never] = [StatusCode::SERVICE_UNAVAILABLE, StatusCode::CONFLICT];
        for (refusals, kept) in [
            (&[full, leaving][..], full),
            (&[leaving, full], full),
            (&[full, never], full),
            (&[never, full], full),
            (&[leaving, never], leaving),
            (&[never, leaving], leaving),
            (&[never], never),
            (&[full, leaving, unreached, never], full),
            (&[leaving, unreached, never], unreached),
        ] {
            let mut attempts = Attempts::default();
            for &status in refusals {
                attempts.refused(Failure::Refused(status, HeaderMap::new(), Bytes::new()), status);
            }
            let (refusal, status) = attempts.refused.unwrap();
            assert_eq!(status, kept, "{refusals:?}");
            assert!(matches!(refusal, Failure::Refused(status, ..) if status == kept));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rounds_in_vain_grow_apart() {
        let (_following, mut table) = watch::channel(Arc::new(Table::new(Duration::ZERO)));
        let (mut rounds, patience_ends) = (Rounds::default(), Instant::now() + Duration::from_secs(60));
        for pause_ms in [250, 500, 1000, 2000, 2000] {
            let before = Instant::now();
            assert!(rounds.next(&mut table, patience_ends).await);
            let pause = before.elapsed().as_millis();
            assert!((pause_ms * 3 / 4..=pause_ms * 5 / 4 + 1).contains(&pause), "{pause} for {pause_ms}");
        }
        let patience_ends = Instant::now() + Duration::from_millis(10);
        assert!(rounds.next(&mut table, patience_ends).await, "the last round comes as patience ends");
        assert!(Instant::now() < patience_ends + Duration::from_millis(10));
    }

    #[tokio::test(start_paused = true)]
    async fn other_workers_need_not_wait_for_the_next_round() {
        let (following, mut table) = watch::channel(Arc::new(Table::new(Duration::ZERO)));
        let (mut rounds, start) = (Rounds::default(), Instant::now());
        let patience_ends = start + Duration::from_secs(60);
        for _ in 0..5 {
            following.send_replace(Arc::new(Table::new(Duration::ZERO)));
            assert!(!rounds.next(&mut table, patience_ends).await);
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        // Nor do those that were tried wait for longer, however often others come and go.
        assert!(rounds.next(&mut table, patience_ends).await);
        assert!(start.elapsed() <= RETRY_PAUSE_FIRST * 2);
    }
}
