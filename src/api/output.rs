//! From an answer's tokens to the text that may be shown of it.

use engine_models::DecodeStream;

use super::{
    parser::{Parser, Pieces},
    progress::Past,
    stop::StopMatcher,
    validate::Plan,
};
use crate::engine::{Event, FinishReason, TokenOutput};

/// A token with its log-probability, and where in the text it stands.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ScoredToken {
    pub(crate) token: u32,
    /// `None` for the first token of a prompt.
    pub(crate) logprob: Option<f32>,
    /// Alternatives, best first.
    pub(crate) top: Vec<(u32, f32)>,
    /// Characters of text before it, the echoed prompt included.
    pub(crate) text_offset: usize,
}

/// How an answer ended, as clients hear it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finish {
    /// A stop token or stop string.
    Stop,
    /// `max_tokens` or the context.
    Length,
    /// Not at all: this engine could not go on.
    Aborted,
    /// Not at all: no engine could.
    Impossible,
    /// Not at all: its grammar became too much to follow.
    LostTrack,
}

impl Finish {
    /// OpenAI's word.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Aborted | Self::Impossible | Self::LostTrack => "error",
        }
    }
}

/// A prompt that precedes its answer.
pub(crate) struct Echo {
    text: String,
    with_logprobs: bool,
    /// Tells how long each token's text is.
    decoder: DecodeStream,
    tokens: Vec<ScoredToken>,
    decoded_chars: usize,
}

impl Echo {
    /// The prompt is `text`; its tokens are shown too if they are asked for.
    pub(crate) fn new(text: String, with_logprobs: bool, decoder: DecodeStream) -> Self {
        Self { text, with_logprobs, decoder, tokens: Vec::new(), decoded_chars: 0 }
    }

    fn push(&mut self, output: TokenOutput) {
        if self.with_logprobs {
            let TokenOutput { token, logprob, top } = output;
            self.tokens.push(ScoredToken { token, logprob, top, text_offset: self.decoded_chars });
            self.decoded_chars += self.decoder.push(token).chars().count();
        }
    }
}

/// Turns one generation's events into what may be shown: whole characters, never a part of a stop string, and of chats
/// what the text is made of.
///
/// How far it has come is told in bytes of the text that has been let out, of which another output, which is given the
/// same tokens, lets out nothing again: see [`Output::replay`].
pub(crate) struct Output {
    /// The prompt, until all of it has come by.
    echo: Option<Echo>,
    decoder: DecodeStream,
    matcher: StopMatcher,
    stop_token_ids: Vec<u32>,
    min_tokens: u32,
    include_stop: bool,
    parser: Parser,
    /// What there is to show that was not taken yet.
    pieces: Pieces,
    /// Text on its way to the parser.
    text: String,
    /// Tokens whose text is not let out yet: where it starts and ends in bytes of everything decoded.
    held: Vec<(usize, usize, ScoredToken)>,
    /// Tokens to show that were not taken yet.
    tokens: Vec<ScoredToken>,
    decoded_bytes: usize,
    decoded_chars: usize,
    shown_bytes: usize,
    /// Bytes of text that the parser was given.
    parsed_bytes: usize,
    /// Bytes at the beginning of the text that were let out elsewhere.
    bytes_elsewhere: usize,
    /// For a frontend: tokens that its journal does not have yet; and whether it has the cached tokens.
    unreported: Option<Vec<u32>>,
    cached_reported: bool,
    /// For a client that wants ids: tokens of which nothing was told yet.
    untold: Option<Vec<u32>>,
    pub(crate) completion_tokens: u32,
    /// Set by whoever holds the generation, with the first token.
    pub(crate) cached_tokens: Option<u32>,
    pub(crate) finish: Option<Finish>,
}

impl Output {
    /// For a generation under `plan`.
    pub(crate) fn new(plan: &Plan, decoder: DecodeStream, echo: Option<Echo>) -> Self {
        Self {
            decoded_chars: echo.as_ref().map_or(0, |echo| echo.text.chars().count()),
            echo,
            decoder,
            matcher: StopMatcher::new(plan.stops.clone(), plan.include_stop),
            stop_token_ids: plan.stop_token_ids.clone(),
            min_tokens: plan.min_tokens,
            include_stop: plan.include_stop,
            parser: Parser::new(plan.wanted),
            pieces: Pieces::default(),
            text: String::new(),
            held: Vec::new(),
            tokens: Vec::new(),
            decoded_bytes: 0,
            shown_bytes: 0,
            parsed_bytes: 0,
            bytes_elsewhere: 0,
            unreported: None,
            cached_reported: false,
            untold: None,
            completion_tokens: 0,
            cached_tokens: None,
            finish: None,
        }
    }

    /// Keeps tokens for a frontend's journal from now on.
    pub(crate) fn keep_unreported(&mut self) {
        self.unreported = Some(Vec::new());
    }

    /// Keeps tokens for a client that wants their ids from now on.
    pub(crate) fn keep_untold(&mut self) {
        self.untold = Some(Vec::new());
    }

    /// Works through what was generated elsewhere, and forgets the text that was let out there. `end`: how the engine
    /// ended the answer with the last of the tokens, if it did.
    pub(crate) fn replay(&mut self, past: &Past, end: Option<FinishReason>) {
        self.bytes_elsewhere = past.bytes;
        self.show_echo();
        for &token in &past.tokens {
            self.push(Event::Token(TokenOutput { token, logprob: None, top: Vec::new() }));
        }
        if let (Some(reason), None) = (end, self.finish) {
            self.end(reason);
        }
        (self.cached_tokens, self.cached_reported) = (past.cached_tokens, past.cached_tokens.is_some());
        if past.ended {
            self.clear();
            self.finish = None;
        }
    }

    /// Takes the next event. Once [`Output::finish`] is set, later ones change nothing.
    pub(crate) fn push(&mut self, event: Event) {
        match event {
            _ if self.finish.is_some() => {}
            Event::Prompt(token) => {
                if let Some(echo) = &mut self.echo {
                    echo.push(token);
                }
            }
            Event::Token(token) => {
                self.show_echo();
                for kept in [&mut self.unreported, &mut self.untold].into_iter().flatten() {
                    kept.push(token.token);
                }
                self.push_token(token);
            }
            Event::Finished { reason, .. } => {
                self.show_echo();
                self.end(reason);
            }
        }
    }

    /// The engine went away without a word.
    pub(crate) fn abort(&mut self) {
        self.end(FinishReason::Aborted);
    }

    /// What may be shown now, each once. Give the buffers back with [`Output::clear`].
    pub(crate) fn pending(&self) -> (&Pieces, &[ScoredToken]) {
        (&self.pieces, &self.tokens)
    }

    /// The tokens whose ids may be told now, if they are wanted: those that the journal gets, so that whoever continues
    /// the answer tells the others.
    pub(crate) fn untold(&self) -> Option<&[u32]> {
        self.untold.as_ref().map(|tokens| &tokens[..tokens.len().saturating_sub(self.held.len())])
    }

    /// Forgets what [`Output::pending`] and [`Output::untold`] showed.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.tokens.clear();
        let told = self.untold().map_or(0, <[u32]>::len);
        if let Some(untold) = &mut self.untold {
            untold.drain(..told);
        }
    }

    /// Bytes of text let out, once what is pending has been.
    pub(crate) fn bytes_shown(&self) -> usize {
        self.bytes_elsewhere.max(self.parsed_bytes - self.parser.bytes_held())
    }

    /// How it ended, as clients hear it.
    pub(crate) fn finish_reason(&self) -> Option<&'static str> {
        self.finish.map(|finish| match finish {
            Finish::Stop if self.parser.made_calls() => "tool_calls",
            finish => finish.as_str(),
        })
    }

    /// Tokens that whoever continues the answer need not compute again.
    pub(crate) fn tokens_told(&self) -> u32 {
        self.completion_tokens - self.held.len() as u32
    }

    /// Tokens that the journal is to have with the next event. A token whose log-probability is held back is not among
    /// them: whoever continues the answer has to compute it once more.
    pub(crate) fn take_unreported(&mut self) -> Vec<u32> {
        let held = self.held.len();
        let unreported = self.unreported.as_mut();
        unreported.map(|tokens| tokens.drain(..tokens.len().saturating_sub(held)).collect()).unwrap_or_default()
    }

    /// The cached tokens, if the journal does not have them and they are known. Asked for once.
    pub(crate) fn cached_tokens_unreported(&mut self) -> Option<u32> {
        let unreported = self.cached_tokens.filter(|_| !self.cached_reported);
        self.cached_reported |= unreported.is_some();
        unreported
    }

    /// Has the parser read the text that is there. Of what was let out elsewhere nothing is pending.
    fn parse(&mut self) {
        let elsewhere = self.bytes_elsewhere.saturating_sub(self.parsed_bytes);
        let (known, new) = self.text.split_at(self.text.floor_char_boundary(elsewhere));
        self.parsed_bytes += self.text.len();
        if !known.is_empty() {
            let mut shown = Pieces::default();
            self.parser.push(known, &mut shown);
            // What was let out is not kept back, whatever would have become of it.
            if known.len() == elsewhere {
                self.parser.finish(&mut shown);
            }
        }
        self.parser.push(new, &mut self.pieces);
        self.text.clear();
    }

    /// All of the prompt has been seen.
    fn show_echo(&mut self) {
        if let Some(echo) = self.echo.take() {
            self.text.push_str(&echo.text);
            self.parse();
            self.tokens.extend(echo.tokens);
        }
    }

    fn push_token(&mut self, output: TokenOutput) {
        self.completion_tokens += 1;
        // A stop token is no part of the answer's text unless that is asked for.
        let shown = self.include_stop || self.stop_token_ids.binary_search(&output.token).is_err();
        let piece = if shown { self.decoder.push(output.token) } else { "" };
        let start = self.decoded_bytes;
        let text_offset = self.decoded_chars;
        self.decoded_bytes += piece.len();
        self.decoded_chars += piece.chars().count();
        if output.logprob.is_some() {
            let TokenOutput { token, logprob, top } = output;
            self.held.push((start, self.decoded_bytes, ScoredToken { token, logprob, top, text_offset }));
        }
        let mut stopped = false;
        if self.completion_tokens <= self.min_tokens {
            self.matcher.push_unchecked(piece, &mut self.text);
        } else {
            stopped = self.matcher.push(piece, &mut self.text);
        }
        self.shown_bytes += self.text.len();
        self.parse();
        if stopped {
            self.finish = Some(Finish::Stop);
            self.parser.finish(&mut self.pieces);
            // A token that begins in the stop string is not shown.
            self.held.retain(|&(start, _, _)| start < self.shown_bytes);
        }
        self.release(stopped);
    }

    fn end(&mut self, reason: FinishReason) {
        let stopped = self.matcher.push(self.decoder.finish(), &mut self.text);
        if !stopped {
            self.matcher.flush(&mut self.text);
        }
        self.shown_bytes += self.text.len();
        self.parse();
        self.parser.finish(&mut self.pieces);
        self.release(true);
        self.finish = Some(match reason {
            FinishReason::Aborted => Finish::Aborted,
            FinishReason::Impossible => Finish::Impossible,
            FinishReason::LostTrack => Finish::LostTrack,
            _ if stopped => Finish::Stop,
            FinishReason::Stop => Finish::Stop,
            FinishReason::Length => Finish::Length,
        });
    }

    /// Shows the tokens whose text is shown; all of them at the end.
    fn release(&mut self, all: bool) {
        let shown = self.shown_bytes;
        let ready = self.held.iter().take_while(|&&(_, end, _)| all || end <= shown).count();
        self.tokens.extend(self.held.drain(..ready).map(|(_, _, token)| token));
    }
}
