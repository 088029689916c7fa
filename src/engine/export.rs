//! Prompts computed for decode workers, as the engine thread sees them.

use super::{Post, handle::RequestPermit, post::Message};
use crate::{
    cache::Salt,
    scheduler::{PlanEntry, Scheduler, Sequence, SlotId},
};

/// Takes the pages of one prompt as they are computed, on the engine thread. It never waits.
///
/// The pages stay as they are until [`PrefillHandle`] is dropped. Dropped itself when nothing more will come: the
/// prompt is computed, was cancelled, or the engine has gone.
pub trait Exporter: Send {
    /// The pages `first..first + pages.len()` of the prompt are computed in `layer`; `pages` are their numbers here.
    /// Pages before the first one asked for are left out, and for each layer pages come in order.
    fn layer(&mut self, layer: usize, first: usize, pages: &[u32]);

    /// The same of all layers at once, as the whole prompt was found in the cache.
    fn found(&mut self, first: usize, pages: &[u32]);

    /// So many tokens of the prompt are computed, and the pages they fill were passed on for all layers.
    fn computed(&mut self, tokens: usize);
}

/// A prompt to compute for a decode worker.
pub struct PrefillRequest {
    /// All of the tokens, at least one.
    pub tokens: Vec<u32>,
    /// What its pages are kept apart by.
    pub salt: Option<Salt>,
    /// The first page that is wanted. Those before it are computed, as the others depend on them, and not passed on.
    pub first_page: usize,
    /// Takes the pages.
    pub exporter: Box<dyn Exporter>,
}

/// Keeps a prompt's pages as they are. Dropping it says that nobody reads them any more.
pub struct PrefillHandle {
    pub(super) id: u64,
    pub(super) post: Post,
}

impl PrefillHandle {
    /// Stops the computation at the next step. The pages stay.
    pub fn cancel(&self) {
        // If the engine has gone it computes nothing.
        let _ = self.post.send(Message::Cancel(self.id));
    }
}

impl Drop for PrefillHandle {
    fn drop(&mut self) {
        // If the engine has gone it has no pages.
        let _ = self.post.send(Message::Release(self.id));
    }
}

/// What travels to the engine thread.
pub(crate) struct PrefillTask {
    pub(super) id: u64,
    pub(super) sequence: Sequence,
    pub(super) first_page: usize,
    pub(super) exporter: Box<dyn Exporter>,
    pub(super) permit: RequestPermit,
}

/// A prompt on the engine thread.
struct Export {
    id: u64,
    /// `None` once all of it is passed on, or nobody wants it.
    exporter: Option<Box<dyn Exporter>>,
    /// Pages passed on, or not asked for: the first ones.
    done: usize,
    _permit: RequestPermit,
}

/// All prompts on the engine thread, by slot.
pub(super) struct Exports {
    exports: Box<[Option<Export>]>,
    block_size: usize,
    count: usize,
}

impl Exports {
    pub(super) fn new(slots: usize, block_size: usize) -> Self {
        Self { exports: (0..slots).map(|_| None).collect(), block_size, count: 0 }
    }

    /// Takes in a prompt.
    pub(super) fn add(&mut self, task: PrefillTask, scheduler: &mut Scheduler) {
        let PrefillTask { id, sequence, first_page, exporter, permit } = task;
        // There are as many slots as places, so this succeeds; if not, dropping the exporter says that nothing comes.
        if let Some(slot) = scheduler.add(sequence) {
            let export = Export { id, exporter: Some(exporter), done: first_page, _permit: permit };
            self.exports[slot.index()] = Some(export);
            self.count += 1;
        }
    }

    /// Computes no more of a prompt.
    pub(super) fn cancel(&mut self, id: u64, scheduler: &mut Scheduler) {
        if let Some(slot) = self.find(id, scheduler) {
            scheduler.hold(slot);
            if let Some(export) = &mut self.exports[slot.index()] {
                export.exporter = None;
            }
        }
    }

    /// Lets go of a prompt's pages.
    pub(super) fn release(&mut self, id: u64, scheduler: &mut Scheduler) {
        if let Some(slot) = self.find(id, scheduler) {
            scheduler.remove(slot);
            self.exports[slot.index()] = None;
            self.count -= 1;
        }
    }

    /// Passes on what a step has computed in one layer.
    pub(super) fn layer(&mut self, layer: usize, entries: &[PlanEntry], scheduler: &Scheduler) {
        if self.count == 0 {
            return;
        }
        for entry in entries {
            let end = self.end(entry, scheduler);
            let Some(Export { exporter: Some(exporter), done, .. }) = &mut self.exports[entry.slot.index()] else {
                continue;
            };
            if end > *done {
                exporter.layer(layer, *done, &scheduler.sequence(entry.slot).block_table()[*done..end]);
            }
        }
    }

    /// Takes note that all layers of a step were passed on.
    pub(super) fn step_done(&mut self, entries: &[PlanEntry], scheduler: &Scheduler) {
        if self.count == 0 {
            return;
        }
        for entry in entries.iter().filter(|entry| scheduler.has(entry)) {
            let end = self.end(entry, scheduler);
            let Some(export) = &mut self.exports[entry.slot.index()] else { continue };
            export.done = export.done.max(end);
            export.computed(entry.start + entry.len, scheduler.sequence(entry.slot).tokens().len());
        }
    }

    /// Passes on a prompt that was found in the cache from end to end.
    pub(super) fn found(&mut self, slot: SlotId, scheduler: &Scheduler) {
        let sequence = scheduler.sequence(slot);
        let Some(export) = &mut self.exports[slot.index()] else { return };
        if let Some(exporter) = &mut export.exporter {
            exporter.found(export.done, &sequence.block_table()[export.done..]);
        }
        export.computed(sequence.tokens().len(), sequence.tokens().len());
    }

    /// Pages that are whole once the entry is computed; at the end of the prompt, the last one too.
    fn end(&self, entry: &PlanEntry, scheduler: &Scheduler) -> usize {
        let end = entry.start + entry.len;
        let last = end == scheduler.sequence(entry.slot).tokens().len();
        if last { end.div_ceil(self.block_size) } else { end / self.block_size }
    }

    fn find(&self, id: u64, scheduler: &Scheduler) -> Option<SlotId> {
        let is_it = |slot: &SlotId| self.exports[slot.index()].as_ref().is_some_and(|export| export.id == id);
        scheduler.slots().find(is_it)
    }
}

impl Export {
    fn computed(&mut self, tokens: usize, of: usize) {
        if let Some(exporter) = &mut self.exporter {
            exporter.computed(tokens);
            if tokens == of {
                self.exporter = None;
            }
        }
    }
}
