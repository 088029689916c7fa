/// A prompt about to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Tokens of the sequence.
    pub tokens: usize,
    /// Leading tokens that were found in the cache.
    pub cached: usize,
    /// Sequences that are generating, which a local prefill slows down.
    pub decoding: usize,
    /// Prompt tokens of other sequences that are computed here before all of it is: at most so many, as some may be
    /// found, or leave.
    pub queued: usize,
    /// How often another worker took it on and did not bring it to an end.
    pub lost: u32,
}

/// Where a prompt is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// Here.
    Local,
    /// By another worker.
    Remote,
}

/// Decides where prompts are computed. Asked about those that run and of which nothing is computed yet, in every step
/// until some of it is.
pub trait Router {
    /// Whether any prompt could go to another worker now.
    fn is_open(&self) -> bool;

    /// Where this one goes.
    fn route(&mut self, candidate: Candidate) -> Route;

    /// One that goes to another worker has left.
    fn left(&mut self) {}
}

/// Computes everything here.
#[derive(Debug, Clone, Copy, Default)]
pub struct AllLocal;

impl Router for AllLocal {
    fn is_open(&self) -> bool {
        false
    }

    fn route(&mut self, _: Candidate) -> Route {
        Route::Local
    }
}
