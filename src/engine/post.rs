use std::{
    sync::mpsc::{Receiver, Sender, channel},
    time::Duration,
};

use super::{
    export::PrefillTask,
    request_state::{RequestState, Terms},
};
use crate::{handoff::LenderEvent, scheduler::Sequence};

/// What travels to the engine thread.
pub(crate) enum Message {
    /// A new request.
    Request(Box<(Sequence, Terms, RequestState)>),
    /// A prompt to compute for a decode worker.
    Prefill(Box<PrefillTask>),
    /// Nobody wants that prompt any more: compute no more of it. Its pages may still be read.
    Cancel(u64),
    /// Nobody reads the pages of that prompt any more.
    Release(u64),
    /// Something happened to pages that are lent.
    Lender(LenderEvent),
    /// No prefill worker is left to take jobs.
    NoPrefillWorkers,
    /// How long a step should take from now on while answers are being generated.
    ItlTarget(Duration),
    /// Look at the flags.
    Wake,
}

/// Where an engine thread takes its messages from. Made before the engine, for those who have to reach it and whom it
/// has to reach. Nothing bounds the channel: requests and prompts have places, which are counted, and sessions few
/// messages.
pub struct Inbox(pub(crate) Receiver<Message>, pub(super) Post);

/// The way into an [`Inbox`].
#[derive(Clone)]
pub struct Post(Sender<Message>);

/// An inbox and the way into it.
pub fn inbox() -> (Post, Inbox) {
    let (sender, receiver) = channel();
    (Post(sender.clone()), Inbox(receiver, Post(sender)))
}

impl Post {
    /// Tells the engine thread of something that happened to pages it lent. Lost if the engine has gone.
    pub fn lender(&self, event: LenderEvent) {
        let _ = self.send(Message::Lender(event));
    }

    /// Tells the engine thread that no prefill worker is left: jobs on the queue are not to be waited for.
    pub fn no_prefill_workers(&self) {
        let _ = self.send(Message::NoPrefillWorkers);
    }

    /// Changes how long a step should take while answers are being generated.
    pub fn itl_target(&self, target: Duration) {
        let _ = self.send(Message::ItlTarget(target));
    }

    /// `false`: the engine has gone.
    pub(super) fn send(&self, message: Message) -> bool {
        self.0.send(message).is_ok()
    }
}
