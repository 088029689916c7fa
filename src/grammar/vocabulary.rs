//! A model's tokens, and the compiler of grammars over them.

use std::{fmt, sync::Arc, thread};

use engine_kernels::TokenMask;
use engine_models::Tokenizer;
use llguidance::{
    Logger, ParserFactory,
    api::{GrammarInit, ParserLimits},
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie},
};

use super::{LostTrack, Matcher, Source, cache::GrammarCache};

/// Longer tokens have no place in the trie: runs of spaces, in vocabularies that exist.
const TOKEN_BYTES_MAX: usize = 512;
/// Characters of what the compiler says that are passed on: it may quote the grammar.
const MESSAGE_CHARS_MAX: usize = 300;
/// Characters of a regular expression that are shown from where it is wrong.
const WRONG_CHARS_MAX: usize = 20;
/// The compiler follows rules into rules by calling itself; as many as fit into a grammar's text fit into this.
const STACK_BYTES: usize = 256 << 20;

/// What a state of a lexer takes beside what the lexer counts itself, about.
const STATE_BYTES: usize = 400;

/// Work and memory that a grammar may take.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2000,
    initial_lexer_fuel: 1_000_000,
    // Some ten milliseconds of a step in which others wait.
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    // The longest text that is counted takes two thirds of them.
    max_lexer_states: 100_000,
    max_grammar_size: 100_000,
    precompute_large_lexemes: true,
    // What they say of a grammar's insides is for whoever works on llguidance.
    verbose_errors: false,
};

/// The same of a grammar in its own words, which may be ambiguous: then an item of the parser takes the longer the more
/// there are. These bound a mask by ten milliseconds, where the others would by half a second.
const AMBIGUOUS: ParserLimits = ParserLimits { max_items_in_row: 200, step_max_items: 5_000, ..LIMITS };

/// Why a grammar cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// There is too much of it.
    #[error("it is too large: {what}, of {limit} at most")]
    TooLarge {
        /// How much of what.
        what: String,
        /// The most there may be.
        limit: usize,
    },
    /// It means nothing, or nothing that an answer could be, or takes too much to follow.
    #[error("{0}")]
    Invalid(String),
    /// This model's tokens cannot be gone through.
    #[error("the vocabulary of this model cannot be used with grammars: {0}")]
    Vocabulary(String),
}

/// The tokens of a model, ordered for going through them.
pub struct Vocabulary {
    factory: ParserFactory,
    /// Tokens that are text, or end an answer.
    known: Arc<TokenMask>,
    cache: GrammarCache,
}

impl Vocabulary {
    /// The first `vocab_size` tokens, of which `eos_token_ids` end an answer. Special tokens are no text and never part
    /// of what a grammar describes, and neither is what pads a vocabulary. Takes tenths of a second.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, eos_token_ids: &[u32]) -> Result<Self, GrammarError> {
        let is_text = |&id: &u32| !tokenizer.is_special(id);
        let bytes = |id: u32| if is_text(&id) { tokenizer.token_bytes(id) } else { &[] };
        Self::of_tokens((0..vocab_size as u32).map(|id| bytes(id).to_vec()).collect(), eos_token_ids)
    }

    /// The same, given the bytes of each token; none where it is no text.
    pub fn of_tokens(mut tokens: Vec<Vec<u8>>, eos_token_ids: &[u32]) -> Result<Self, GrammarError> {
        let ends: Vec<u32> = eos_token_ids.iter().copied().filter(|&id| (id as usize) < tokens.len()).collect();
        ends.iter().for_each(|&id| tokens[id as usize].clear());
        // That byte, of which there is none in UTF-8, tells special tokens in a trie.
        let has_no_place = |token: &[u8]| token.len() > TOKEN_BYTES_MAX || token.starts_with(&[0xff]);
        tokens.iter_mut().filter(|token| has_no_place(token)).for_each(Vec::clear);
        let texts = tokens.iter().enumerate().filter(|(_, token)| !token.is_empty()).map(|(id, _)| id as u32);
        let known = TokenMask::of_tokens(tokens.len(), texts.chain(ends.iter().copied()));
        let info = TokRxInfo::new(tokens.len() as u32, ends.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &tokens);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let unusable = |error: anyhow::Error| GrammarError::Vocabulary(brief(&error.to_string()));
        let mut factory = ParserFactory::new_simple(&tokens).map_err(unusable)?;
        *factory.quiet().limits_mut() = LIMITS;
        Ok(Self { factory, known: Arc::new(known), cache: GrammarCache::default() })
    }

    /// The same with another limit to the states of a lexer.
    #[cfg(test)]
    pub(crate) fn with_lexer_states(mut self, max: usize) -> Self {
        self.factory.limits_mut().max_lexer_states = max;
        self
    }

    fn limits(&self, source: &Source) -> ParserLimits {
        let limits = match source {
            Source::After { then, .. } => return self.limits(then),
            Source::Lark(_) => AMBIGUOUS,
            _ => LIMITS,
        };
        ParserLimits { max_lexer_states: self.factory.limits().max_lexer_states, ..limits }
    }

    /// What was made of the same text for another request, if it is still kept. Takes a fraction of a millisecond, at
    /// most a few.
    pub fn cached(&self, source: &Source) -> Option<Grammar> {
        self.cache.find(source)
    }

    /// Makes a grammar of what a request asks for, and works out how an answer may begin. Takes milliseconds, or as
    /// long as somebody has found out how to make it take.
    pub fn compile(&self, source: Source) -> Result<Grammar, GrammarError> {
        // While this request waited to be let in, another may have had the same compiled.
        if let Some(grammar) = self.cached(&source) {
            return Ok(grammar);
        }
        let grammar = source.for_compiler()?;
        let limits = self.limits(&source);
        let compile = || {
            let (init, says_nothing) = (GrammarInit::Serialized(grammar), Logger::new(0, 0));
            let parser = self.factory.create_parser_from_init_ext(init, says_nothing, Default::default(), limits);
            let with_lexer = parser.as_ref().ok().map(|parser| parser.parser.clone());
            let start = Matcher::new(parser, self.known.clone())
                .map_err(|error| GrammarError::Invalid(why(&source, &error)))?;
            let lost = |error: LostTrack| GrammarError::Invalid(brief(&error.to_string()));
            // Matchers of one grammar have a lexer together: what it learns here, none has to while others wait.
            for opening in source.openings() {
                let mut matcher = start.clone();
                for token in self.factory.tok_env().tok_trie().greedy_tokenize(opening.as_bytes()) {
                    matcher.take(token).map_err(lost)?;
                }
                if matcher.allowed().map_err(lost)?.is_empty() {
                    return Err(GrammarError::Invalid("no answer fits it".to_owned()));
                }
            }
            let stats = with_lexer.map(|parser| parser.lexer_stats());
            let bytes = stats.map_or(0, |stats| stats.num_bytes + stats.num_states * STATE_BYTES);
            Ok((start, bytes))
        };
        // It panics where it has to give up: nothing that whoever waits for the answer should see more of.
        let (start, lexer_bytes) = thread::scope(|scope| {
            let compiling = thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, compile);
            compiling.map_or_else(
                |error| Err(GrammarError::Invalid(format!("no thread to compile it: {error}"))),
                |thread| thread.join().unwrap_or_else(|_| Err(GrammarError::Invalid(brief("panic")))),
            )
        })?;
        let grammar = Grammar { source, start };
        self.cache.keep(&grammar, lexer_bytes);
        Ok(grammar)
    }
}

/// A grammar of a request, ready to be followed by any number of answers.
#[derive(Clone)]
pub struct Grammar {
    source: Source,
    start: Matcher,
}

impl Grammar {
    /// For an answer from its beginning.
    pub fn matcher(&self) -> Matcher {
        self.start.clone()
    }

    /// The same for another request, whose answers have a lexer of their own.
    pub(super) fn copied(&self) -> Self {
        Self { source: self.source.clone(), start: self.start.copied() }
    }

    /// What it was made of.
    pub(super) fn source(&self) -> &Source {
        &self.source
    }
}

/// Two are the same that were made of the same.
impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Grammar").field(&self.source).finish()
    }
}

/// What the compiler says of a source. Of a grammar that was made around it, whoever wrote it knows nothing.
fn why(source: &Source, message: &str) -> String {
    match source {
        Source::After { then, .. } => why(then, message),
        Source::JsonSchema(_) | Source::Lark(_) => brief(message),
        Source::Regex(_) => wrong_in_regex(message).unwrap_or_else(|| brief(&without_grammar(message))),
        Source::Choice(_) | Source::Framed { .. } => brief(&without_grammar(message)),
    }
}

/// What is wrong with a regular expression, and where in it.
fn wrong_in_regex(message: &str) -> Option<String> {
    // The crate regex-syntax shows the expression in a line, in the next marks below what is wrong, and then says what.
    if let Some((shown, wrong)) = message.split_once("\nerror: ") {
        let wrong = wrong.lines().next()?;
        let mut lines = shown.lines().rev();
        let (marks, regex) = (lines.next()?, lines.next()?);
        let from: String = regex.chars().skip(marks.find('^')?).take(WRONG_CHARS_MAX).collect();
        return Some(if from.is_empty() { wrong.to_owned() } else { format!("{wrong} (at '{from}')") });
    }
    let looks = message.contains("lookarounds not supported");
    looks.then(|| "'^' and '$' within it, and borders of words, are not supported".to_owned())
}

/// Without the place in the grammar, which stands before what is said of it, and the lines around that, which stand
/// behind: `at 1(8): … \n   1 | start: …`.
fn without_grammar(message: &str) -> String {
    let place = message.strip_prefix("at ").and_then(|rest| rest.split_once("): "));
    let said = place.map_or(message, |(_, said)| said);
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let is_of_grammar = |line: &str| line.trim_start().split_once(" | ").is_some_and(|(number, _)| is_number(number));
    said.lines().take_while(|line| !is_of_grammar(line)).collect::<Vec<_>>().join("\n")
}

/// What the compiler says, without what it adds for its own developers.
pub(super) fn brief(message: &str) -> String {
    // Who names one, where there are none to be named, makes the compiler panic.
    if message.contains("special token") {
        return "special tokens cannot be part of a grammar".to_owned();
    }
    if message.starts_with("panic") {
        tracing::error!(%message, "a grammar made llguidance panic");
        return "it cannot be compiled".to_owned();
    }
    let message = message.split("\n<").next().unwrap_or_default();
    let mut shown: String = message.chars().take(MESSAGE_CHARS_MAX).collect();
    if shown.len() < message.len() {
        shown.push('…');
    }
    shown
}
