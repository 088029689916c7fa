//! Continuous batching: which tokens of which sequences the next step computes.
//!
//! There is no prefill phase and no decode phase (the idea is vLLM V1's): a sequence has tokens, and a count of those
//! computed, `num_computed`; each step moves the count towards the tokens under a budget. Chunked prefill, prefix hits
//! and preemption are all changes of `num_computed`, and so is a prompt that another worker has prefilled. Planning
//! does no I/O and knows no clock; a step is [`Scheduler::plan`], the computation itself elsewhere,
//! [`Scheduler::commit`], and [`Scheduler::push_token`] for what was sampled. Where it takes a while for that to be
//! known, [`Scheduler::push_placeholder`] stands in for it, and [`Scheduler::reveal`] follows before the next commit.

mod loans;
mod plan;
mod planner;
mod route;
mod sequence;
mod state;

pub use plan::{Loan, PlanEntry, StepPlan};
pub use route::{AllLocal, Candidate, Route, Router};
pub use sequence::Sequence;
pub use state::{Scheduler, SchedulerLimits, SlotId};

#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
