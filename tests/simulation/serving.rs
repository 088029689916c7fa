//! What a decode worker does with requests when it does not hand them off: takes them in, finds pages, computes,
//! generates, and gives back.

use engine::handoff::{Decision, HandoffCosts, Job, LenderEvent, Situation, decide};

use crate::{
    decode::{Heard, Published, Request, State},
    model::{ANSWER_TOKENS, PAGE_TOKENS, content, next_token, page_hashes},
    world::{Ending, Event, MS, Process, World, note},
};

impl World {
    pub(crate) fn arrive(&mut self, client: usize) {
        let alive: Vec<_> = (0..self.decodes.len()).filter(|&decode| self.decodes[decode].life.alive).collect();
        if self.clients[client].ended.is_some() {
            return;
        }
        if alive.is_empty() {
            return self.end(client, Ending::Error);
        }
        let decode = alive[self.rng.index(alive.len())];
        note!(self, "client {client} asks decode {decode}");
        let (shared, own) = (vec![], vec![]);
        let request = Request { client, shared, own, state: State::Waiting, lost_handoffs: 0 };
        self.decodes[decode].requests.push(request);
        self.wake(Process::Decode(decode));
    }

    /// A client hangs up. Its worker learns of that in its own time, and may answer before.
    pub(crate) fn cancel(&mut self, client: usize) {
        if self.clients[client].ended.is_some() {
            return;
        }
        self.end(client, Ending::Cancelled);
        for decode in 0..self.decodes.len() {
            if self.decodes[decode].requests.iter().any(|request| request.client == client) {
                self.tell_decode(decode, Heard::HungUp { client });
            }
        }
    }

    pub(crate) fn forget(&mut self, decode: usize, client: usize) {
        let requests = &mut self.decodes[decode].requests;
        let Some(index) = requests.iter().position(|request| request.client == client) else { return };
        let request = requests.remove(index);
        let state = request.state;
        self.give_back(decode, request, false);
        if let State::HandedOff { handoff, .. } = state {
            self.inform(decode, LenderEvent::Withdraw { handoff });
        }
    }

    /// Computes, generates, and admits who waits.
    pub(crate) fn advance(&mut self, decode: usize) {
        for index in 0..self.decodes[decode].requests.len() {
            match self.decodes[decode].requests[index].state {
                State::Waiting => self.admit(decode, index),
                State::Prefilling { until } if until <= self.now => {
                    self.prefill_here(decode, index);
                    let until = self.now + self.rng.within(MS, 10 * MS);
                    self.decodes[decode].requests[index].state = State::Decoding { position: 0, until };
                }
                State::Decoding { position, until } if until <= self.now => self.generate(decode, index, position),
                _ => {}
            }
        }
        let done: Vec<_> = self.decodes[decode]
            .requests
            .extract_if(.., |request| matches!(request.state, State::Decoding { position: ANSWER_TOKENS, .. }))
            .collect();
        for request in done {
            if self.clients[request.client].ended != Some(Ending::Cancelled) {
                self.end(request.client, Ending::Answered);
            }
            self.give_back(decode, request, true);
        }
    }

    fn admit(&mut self, decode: usize, index: usize) {
        let worker = &mut self.decodes[decode];
        let client = worker.requests[index].client;
        let prompt = self.clients[client].prompt.clone();
        let before = &prompt[..prompt.len() - 1];
        let hashes = page_hashes(before);
        let full = before.len() / PAGE_TOKENS;
        let mut shared = vec![];
        for hash in &hashes[..full] {
            let Some(published) = worker.published.iter_mut().find(|published| published.hash == *hash) else { break };
            published.users += 1;
            shared.push(published.page);
        }
        let wanted = hashes.len() - shared.len();
        let own: Vec<_> = std::iter::from_fn(|| worker.page()).take(wanted).collect();
        if own.len() < wanted {
            let request = Request { client, shared, own, state: State::Waiting, lost_handoffs: 0 };
            return self.give_back(decode, request, false);
        }
        let request = &mut worker.requests[index];
        let lost_handoffs = request.lost_handoffs;
        request.shared = shared;
        let uncached = (prompt.len() - request.shared.len() * PAGE_TOKENS) as u32;
        let live = self.prefills.iter().filter(|prefill| prefill.life.alive).count() as u32;
        let queue_depth = (self.now >= self.queue.down_until).then_some(self.queue.len() as u64);
        let situation =
            Situation { uncached_tokens: uncached, prefill_workers: live, queue_depth, lost_handoffs, local: None };
        let now = worker.life.clock(self.now);
        let decision = decide(&worker.limits, &situation, &HandoffCosts::default(), now);
        let own = match decision {
            // Tests of the rule are its own; here a whole range of prompts is to be handed off.
            Decision::Remote => self.hand_off(decode, index, own, uncached),
            Decision::Local(_) => Err(own),
        };
        if let Err(own) = own {
            let until = self.now + u64::from(uncached) * 400;
            let request = &mut self.decodes[decode].requests[index];
            request.own = own;
            request.state = State::Prefilling { until };
        }
    }

    fn hand_off(&mut self, decode: usize, index: usize, pages: Vec<u32>, tokens: u32) -> Result<(), Vec<u32>> {
        let handoff = self.new_handoff();
        let worker = &mut self.decodes[decode];
        let request = &mut worker.requests[index];
        worker.lender.lend(handoff, request.client, pages, worker.life.clock(self.now))?;
        request.state = State::HandedOff { handoff, granted: false };
        let (life, decode_worker) = (worker.life.number, worker.life.worker);
        let job = Job {
            handoff,
            decode: decode_worker,
            model_key: crate::prefill::MODEL_KEY.into(),
            addresses: decode.into(),
            prompt_tokens: tokens,
            traceparent: None,
        };
        let taken = self.queue.publish(Some(handoff), job.encode().into(), self.now);
        // The queue's answer may be lost, and then nobody knows.
        if taken && !self.rng.per_mille(20) {
            self.decodes[decode].enqueued.push(handoff);
        } else {
            let after = self.rng.within(MS, 100 * MS);
            self.at(self.now + after, Event::PublishFailed { decode, life, handoff });
        }
        for prefill in 0..self.prefills.len() {
            self.wake(Process::Prefill(prefill));
        }
        Ok(())
    }

    fn prefill_here(&mut self, decode: usize, index: usize) {
        let worker = &mut self.decodes[decode];
        let Request { client, shared, own, .. } = &worker.requests[index];
        let prompt = &self.clients[*client].prompt;
        let hashes = page_hashes(&prompt[..prompt.len() - 1]);
        for (&page, &hash) in own.iter().zip(&hashes[shared.len()..]) {
            worker.memory[page as usize] = std::array::from_fn(|layer| content(hash, layer));
        }
    }

    fn generate(&mut self, decode: usize, index: usize, position: usize) {
        let worker = &self.decodes[decode];
        let Request { client, shared, own, .. } = &worker.requests[index];
        let client = *client;
        let last = self.clients[client].prompt[self.clients[client].prompt.len() - 1];
        let pages = shared.iter().chain(own).map(|&page| worker.memory[page as usize]);
        let token = next_token(last, position, pages);
        self.check_answer(client, position, token);
        let until = self.now + self.rng.within(MS, 15 * MS);
        self.decodes[decode].requests[index].state = State::Decoding { position: position + 1, until };
    }

    /// Takes back what a request has; full pages of one that `knows` its prompt become findable.
    pub(crate) fn give_back(&mut self, decode: usize, request: Request, knows: bool) {
        let worker = &mut self.decodes[decode];
        let Request { client, shared, own, .. } = request;
        for published in worker.published.iter_mut().filter(|published| shared.contains(&published.page)) {
            published.users -= 1;
        }
        if !knows {
            return worker.free.extend(own);
        }
        let prompt = &self.clients[client].prompt;
        let before = &prompt[..prompt.len() - 1];
        let hashes = page_hashes(before);
        let full = before.len() / PAGE_TOKENS;
        for (place, page) in own.into_iter().enumerate().map(|(place, page)| (place + shared.len(), page)) {
            if place < full && !worker.published.iter().any(|published| published.hash == hashes[place]) {
                worker.published.push(Published { hash: hashes[place], page, users: 0 });
            } else {
                worker.free.push(page);
            }
        }
    }
}
