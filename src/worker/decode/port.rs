//! The decode worker's way to its prefill workers, as its engine thread uses it: where prompts go, and what happens on
//! sessions.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::{
    staging::Staging,
    view::{NewJob, View},
};
use crate::{
    engine::{Destination, LendingPort, Post, StagedPages},
    handoff::{
        Decision, Epoch, Forecast, HandoffCosts, HandoffId, LenderEvent, MailboxSlot, MailboxWord, Reason, SessionId,
        Situation, ToDecode, ToPrefill, WorkerId, decide,
    },
    scheduler::{Candidate, Route},
    telemetry::TraceContext,
    transfer::{Mailbox, SessionEvent, SessionServer, Sink},
};

/// How long nothing is handed off after a job that nobody has claimed: whoever takes jobs is busy, or does not reach
/// this worker.
const UNCLAIMED_PAUSE: Duration = Duration::from_secs(30);

/// [`LendingPort`] over a real cluster.
pub(super) struct ClusterPort {
    pub(super) sessions: Arc<OnceLock<SessionServer>>,
    pub(super) mailbox: Mailbox,
    pub(super) view: Arc<View>,
    pub(super) jobs: mpsc::UnboundedSender<NewJob>,
    /// If the pages are in device memory.
    pub(super) staging: Option<Staging>,
    /// Tokens of a page.
    pub(super) block_size: usize,
    pub(super) costs: HandoffCosts,
    pub(super) started: Instant,
    /// Prompts of the step that is being planned which have left. Their jobs go to the queue when it is planned.
    pub(super) leaving: u64,
    /// When it was last found that nobody has claimed a job, if none was claimed since.
    pub(super) unclaimed: Option<Instant>,
}

impl LendingPort for ClusterPort {
    fn is_open(&self) -> bool {
        self.view.prefill_workers() > 0 && self.view.depth().is_some() && !self.pauses()
    }

    fn planning(&mut self) {
        self.leaving = 0;
    }

    fn decide(&mut self, candidate: Candidate, local: Option<Forecast>) -> Route {
        let situation = Situation {
            uncached_tokens: (candidate.tokens - candidate.cached) as u32,
            prefill_workers: self.view.prefill_workers(),
            queue_depth: self.view.depth().map(|depth| depth + self.leaving),
            lost_handoffs: candidate.lost,
            local,
        };
        let decision = decide(&self.view.limits(), &situation, &self.costs, self.started.elapsed());
        let (route, depth_mattered) = match decision {
            Decision::Remote if !self.lets_in(candidate) => (Route::Local, false),
            Decision::Remote => (Route::Remote, true),
            Decision::Local(reason) => (Route::Local, matches!(reason, Reason::Busy | Reason::Sooner)),
        };
        if depth_mattered {
            self.view.depth_mattered.store(true, Ordering::Relaxed);
        }
        route
    }

    fn left(&mut self) {
        self.leaving += 1;
    }

    fn jobs_ahead(&self) -> u64 {
        let workers = self.view.prefill_workers().max(1);
        self.view.depth().unwrap_or(0) / u64::from(workers)
    }

    fn enqueue(&mut self, handoff: HandoffId, tokens: usize, trace: Option<TraceContext>) {
        if let Some(depth) = self.view.depth() {
            // Until somebody has it, or the next look, it counts as waiting.
            self.view.set_depth(Some(depth + 1));
        }
        // The task that takes them ends with the process.
        let _ = self.jobs.send(NewJob { handoff, tokens, trace });
    }

    fn word(&self, slot: MailboxSlot) -> MailboxWord {
        self.mailbox.load(slot)
    }

    fn claimed(&mut self) {
        self.unclaimed = None;
        if let Some(depth) = self.view.depth() {
            self.view.set_depth(Some(depth.saturating_sub(1)));
        }
    }

    fn unclaimed(&mut self) -> bool {
        let news = !self.pauses();
        self.unclaimed = Some(Instant::now());
        news
    }

    fn permit(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch, pages: Arc<[u32]>) {
        self.with_sessions(|sessions| sessions.lend(session, slot, epoch, pages));
    }

    fn stage(&mut self, session: SessionId, pages: usize) -> Option<Destination> {
        let Some(staging) = &mut self.staging else { return Some(Destination::InPlace) };
        let transport = self.sessions.get().and_then(|sessions| sessions.transport(session));
        staging.stage(transport, pages)
    }

    fn staged(&self) -> usize {
        self.staging.as_ref().map_or(0, Staging::lent)
    }

    fn flush(&mut self) -> bool {
        self.staging.as_ref().is_none_or(Staging::flush)
    }

    fn take_up(&mut self, staged: StagedPages, pages: &[u32]) -> bool {
        self.staging.as_mut().is_some_and(|staging| staging.take_up(staged, pages))
    }

    fn unstage(&mut self, staged: &StagedPages) {
        if let Some(staging) = &mut self.staging {
            staging.give_back(staged);
        }
    }

    fn send(&mut self, session: SessionId, message: ToPrefill) {
        self.with_sessions(|sessions| sessions.send(session, Bytes::from(message.encode())));
    }

    fn revoke(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        self.with_sessions(|sessions| sessions.revoke(session, slot, epoch));
    }

    fn forget(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        self.with_sessions(|sessions| sessions.forget(session, slot, epoch));
    }

    fn fence(&mut self, session: SessionId) {
        self.with_sessions(|sessions| sessions.fence(session));
    }

    fn handed_off(&mut self, ahead: u64, queued: Duration, tokens: usize, computing: Duration) {
        self.costs.observe(ahead, queued, tokens as u32, computing, self.started.elapsed());
    }
}

impl ClusterPort {
    /// Whether nothing is handed off for a while, since nobody has claimed what was.
    fn pauses(&self) -> bool {
        self.unclaimed.is_some_and(|since| since.elapsed() < UNCLAIMED_PAUSE)
    }

    /// Whether all that a prompt lacks could come from another worker at once.
    fn lets_in(&mut self, candidate: Candidate) -> bool {
        let Self { staging: Some(staging), block_size, view, .. } = self else { return true };
        // The last token stays here.
        let pages = (candidate.tokens - 1).div_ceil(*block_size) - candidate.cached / *block_size;
        staging.lets_in(pages, view.beside.load(Ordering::Relaxed), view.adapters.load(Ordering::Relaxed))
    }

    /// The server is there before anything is lent, since it hears the claims.
    fn with_sessions(&self, act: impl FnOnce(&SessionServer)) {
        if let Some(sessions) = self.sessions.get() {
            act(sessions);
        }
    }
}

/// Passes on what happens on sessions to the engine thread. A peer that says what cannot be read is cut off. The server
/// holds what this gives, so this does not hold the server.
pub(super) fn sink(post: Post, sessions: Weak<OnceLock<SessionServer>>) -> Sink {
    let peers: Mutex<HashMap<SessionId, WorkerId>> = Mutex::default();
    Arc::new(move |event| {
        let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            SessionEvent::Opened { session, peer } => {
                let transport = peer.transport.name();
                // A prefill worker, or somebody who measures in the place of one.
                tracing::info!(worker = %peer.worker, transport, "a peer opened a session");
                peers.insert(session, peer.worker);
            }
            SessionEvent::Message { session, message } => {
                let Some(&worker) = peers.get(&session) else { return };
                match ToDecode::decode(&message) {
                    Ok(message) => {
                        if let ToDecode::Failed { handoff, reason, .. } = &message {
                            tracing::warn!(
                                %worker, %handoff, %reason,
                                "a prompt is prefilled here: it is beyond a prefill worker"
                            );
                        }
                        post.lender(LenderEvent::Message { session, worker, message });
                    }
                    Err(error) => {
                        tracing::warn!(%worker, %error, "a peer is cut off: what it says cannot be read");
                        if let Some(server) = sessions.upgrade().as_ref().and_then(|sessions| sessions.get()) {
                            server.fence(session);
                        }
                    }
                }
            }
            SessionEvent::Revoked { session, slot, epoch } => {
                post.lender(LenderEvent::Revoked { session, slot, epoch });
            }
            SessionEvent::Closed { session } => {
                if let Some(worker) = peers.get(&session) {
                    tracing::info!(%worker, "a peer's session ended");
                }
                post.lender(LenderEvent::SessionClosed { session });
            }
            SessionEvent::Fenced { session } => {
                peers.remove(&session);
                post.lender(LenderEvent::SessionFenced { session });
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        handoff::{Limits, Policy},
        worker::decode::{staging::tests::staging, view::tests::view},
    };

    /// A port to nobody, over this view.
    fn port(view: Arc<View>) -> ClusterPort {
        ClusterPort {
            sessions: Arc::default(),
            mailbox: Mailbox::new(1).unwrap(),
            view,
            jobs: mpsc::unbounded_channel().0,
            staging: None,
            block_size: 16,
            costs: HandoffCosts::default(),
            started: Instant::now(),
            leaving: 0,
            unclaimed: None,
        }
    }

    #[test]
    fn after_a_job_that_nobody_claimed_no_other_is_handed_off_for_a_while() {
        let view = view(Limits::default());
        view.set_registered(1);
        view.set_depth(Some(0));
        let mut port = port(view);
        assert!(port.is_open());
        assert!(port.unclaimed(), "that is news");
        assert!(!port.is_open());
        assert!(!port.unclaimed(), "it is not");
        // Of those that were handed off before, one is claimed after all.
        port.claimed();
        assert!(port.is_open() && port.unclaimed());
        port.unclaimed = Instant::now().checked_sub(UNCLAIMED_PAUSE);
        assert!(port.is_open(), "somebody may be there by now");
    }

    #[test]
    fn auto_weighs_what_handoffs_took_against_what_a_prompt_takes_here() {
        let view = view(Limits { policy: Policy::Auto, max_local_prefill_length: 512, ..Limits::default() });
        view.set_registered(1);
        view.set_depth(Some(0));
        let mut port = port(view);
        let candidate = Candidate { tokens: 400, cached: 100, decoding: 0, queued: 0, lost: 0 };
        let takes = |seconds| Some(Forecast { first_token: Duration::from_secs(seconds), gap: None });
        assert_eq!(port.decide(candidate, takes(100)), Route::Local, "it is short, and nothing was measured there");
        // A second in the queue, and one for each hundred tokens.
        port.handed_off(0, Duration::from_secs(1), 200, Duration::from_secs(2));
        assert_eq!(port.decide(candidate, takes(5)), Route::Remote);
        assert_eq!(port.decide(candidate, takes(3)), Route::Local);
        assert_eq!(port.decide(candidate, None), Route::Local, "it is short, and nothing was measured here");
    }

    #[test]
    fn a_prompt_that_has_more_pages_than_can_be_staged_is_not_handed_off_unless_they_may_come_another_way() {
        let view = view(Limits { policy: Policy::Always, ..Limits::default() });
        view.set_registered(1);
        view.set_depth(Some(0));
        let (_driver, _memory, two_pages) = staging(2);
        let mut port = ClusterPort { staging: Some(two_pages), ..port(view.clone()) };
        let candidate = |tokens, cached| Candidate { tokens, cached, decoding: 0, queued: 0, lost: 0 };
        let cases = [(33, 0, Route::Remote), (34, 0, Route::Local), (65, 32, Route::Remote), (66, 32, Route::Local)];
        for (tokens, cached, route) in cases {
            assert_eq!(port.decide(candidate(tokens, cached), None), route, "{tokens} tokens, {cached} of them cached");
        }
        port.staging = port.staging.take().map(Staging::exported);
        assert_eq!(port.decide(candidate(1000, 0), None), Route::Local, "no other device is here");
        view.beside.store(true, Ordering::Relaxed);
        assert_eq!(port.decide(candidate(1000, 0), None), Route::Remote);
    }
}
