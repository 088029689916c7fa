//! An answer's text taken apart: what the model thought, what it says, and the functions it calls. Models mark these
//! with texts that their templates have taught them; vLLM calls what reads them parsers, and so do the flags.
//!
//! What is found does not depend on how the text was cut into pieces, and nothing is let out that what follows could
//! turn into something else. Text that is kept back is the end of what has been read, so how far an answer has come is
//! a number of bytes, and another parser that reads so many is where this one is (see `output`).

mod calls;
#[cfg(test)]
mod tests;

pub(crate) use calls::Call;

use super::ChatTemplate;
use crate::grammar::Source;

/// What thoughts stand between: Qwen3, DeepSeek-R1 and those made from it, and others.
const THOUGHTS: (&str, &str) = ("<think>", "</think>");
/// What a call stands between: NousResearch's Hermes models, Qwen2.5, Qwen3, and others.
const HERMES: (&str, &str) = ("<tool_call>", "</tool_call>");
/// What a list of calls stands behind: Mistral's models, to most of which it is a token of its own.
const MISTRAL: &str = "[TOOL_CALLS]";
/// Characters at most, nearly all of them white space, between what opens a call and the call.
const SPACE_MAX: usize = 64;

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// `{"name": …, "arguments": {…}}` between `<tool_call>` and `</tool_call>`, anywhere, any number of times.
    Hermes,
    /// An answer that is `{"name": …, "parameters": {…}}` and nothing else: Llama 3.1 and later, whose templates show
    /// no answer with two. Several have semicolons between them.
    Llama3Json,
    /// `[{"name": …, "arguments": {…}}, …]` behind `[TOOL_CALLS]`: Mistral 7B v0.3, Nemo and others.
    Mistral,
}

impl CallFormat {
    /// What tells that there are calls.
    fn mark(self) -> Option<&'static str> {
        match self {
            Self::Hermes => Some(HERMES.0),
            Self::Llama3Json => None,
            Self::Mistral => Some(MISTRAL),
        }
    }

    /// What the prompt ends with if the answer has to be calls, so that it is not for the answer to begin with: special
    /// tokens are in no grammar, and the model knows no other spelling of this one.
    pub(crate) fn ahead(self) -> Option<&'static str> {
        (self == Self::Mistral).then_some(MISTRAL)
    }

    /// What opens a list of calls, as the model was taught by this template.
    pub(crate) fn list_opening(template: &ChatTemplate) -> &'static str {
        // A token that begins with a space is another one.
        if template.sources()[0].contains(&format!("{MISTRAL} ")) { " [" } else { "[" }
    }
}

/// What a server looks for in its model's answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parsers {
    /// Whether answers may begin with thoughts between `<think>` and `</think>`.
    pub thoughts: bool,
    /// How calls are written; `None`: requests with tools are refused.
    pub calls: Option<CallFormat>,
}

impl Parsers {
    /// What a model with this template has been taught, as far as that shows.
    pub fn of_template(template: &ChatTemplate) -> Self {
        let [with_tools, without] = template.sources();
        let shows = |text| with_tools.contains(text);
        let calls = if !template.reads_tools() {
            None
        } else if shows(HERMES.0) {
            // Qwen3-Coder's calls and GLM's stand between the same, and are no JSON.
            (!shows("<function=") && !shows("<arg_key>")).then_some(CallFormat::Hermes)
        } else if shows(MISTRAL) {
            // Later models' calls stand behind the same, and are no list.
            (!shows("[ARGS]")).then_some(CallFormat::Mistral)
        } else {
            (shows("\"name\"") && shows("\"parameters\"")).then_some(CallFormat::Llama3Json)
        };
        let thinks = |source: &str| source.contains(THOUGHTS.0) || source.contains(THOUGHTS.1);
        Self { thoughts: thinks(with_tools) || thinks(without), calls }
    }

    /// The texts that are looked for.
    pub(crate) fn marks(&self) -> impl Iterator<Item = &'static str> {
        let thoughts = self.thoughts.then_some(THOUGHTS);
        let hermes = (self.calls == Some(CallFormat::Hermes)).then_some(HERMES);
        let mistral = (self.calls == Some(CallFormat::Mistral)).then_some(MISTRAL);
        thoughts.into_iter().chain(hermes).flat_map(|(open, close)| [open, close]).chain(mistral)
    }
}

/// What is looked for in one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Wanted {
    pub(crate) thoughts: Thoughts,
    /// Whether clients see what was thought.
    pub(crate) show_thoughts: bool,
    pub(crate) calls: Option<CallFormat>,
    /// Whether the prompt ends with [`CallFormat::ahead`].
    pub(crate) calls_opened: bool,
    /// Calls beyond these are left out.
    pub(crate) calls_max: usize,
}

impl Wanted {
    /// Whether anything is, so that there may be text that is not shown as it comes.
    pub(crate) fn is_any(&self) -> bool {
        self.thoughts != Thoughts::No || self.calls.is_some()
    }
}

/// Whether an answer has thoughts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Thoughts {
    /// Whatever it looks like, it has none.
    #[default]
    No,
    /// If it begins with what opens them.
    IfOpened,
    /// It begins amid them: the prompt has opened them.
    Opened,
}

impl Thoughts {
    /// What follows what opens them where there are none: as Qwen3's template writes it.
    pub(crate) const NONE: &str = "\n\n</think>\n\n";

    /// By what the prompt ends with.
    pub(crate) fn after(prompt: &str) -> Self {
        if prompt.trim_end().ends_with(THOUGHTS.0) { Self::Opened } else { Self::IfOpened }
    }

    /// What an answer has to be that has a form: that, behind its thoughts.
    pub(crate) fn before(self, form: Source) -> Source {
        let (open, close) = THOUGHTS;
        let open = match self {
            Self::No => return form,
            Self::IfOpened => Some(open.to_owned()),
            Self::Opened => None,
        };
        Source::After { open, close: close.to_owned(), then: Box::new(form) }
    }

    /// Of an answer that continues `message`, of which all is shown, thoughts too.
    pub(crate) fn amid(message: &str) -> Self {
        if message.rfind(THOUGHTS.0) > message.rfind(THOUGHTS.1) { Self::Opened } else { Self::No }
    }
}

/// What has been read and not been told.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Pieces {
    pub(crate) thoughts: String,
    pub(crate) content: String,
    pub(crate) calls: Vec<Call>,
}

impl Pieces {
    pub(crate) fn is_empty(&self) -> bool {
        self.thoughts.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }

    /// The thoughts, if there are any.
    pub(crate) fn thoughts(&self) -> Option<&str> {
        (!self.thoughts.is_empty()).then_some(&self.thoughts)
    }

    /// What is said, be it nothing; `None` if there is something else instead.
    pub(crate) fn content(&self) -> Option<&str> {
        let instead = !self.thoughts.is_empty() || !self.calls.is_empty();
        (!instead || !self.content.is_empty()).then_some(&self.content)
    }

    pub(crate) fn clear(&mut self) {
        self.thoughts.clear();
        self.content.clear();
        self.calls.clear();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing has been said yet, so that what comes next tells what the answer is. Whether it may be thoughts.
    Beginning(bool),
    Thoughts,
    Content,
    /// In what may be a call of [`CallFormat::Hermes`], white space before it included.
    Call,
    /// In what may be calls of [`CallFormat::Llama3Json`]: that is known when all of it is there.
    Calls,
    /// Where a call of [`CallFormat::Mistral`] may begin: so many bytes of what is held open a list, or none do where a
    /// call of the list came before or the prompt opened it.
    List {
        opened: usize,
        first: bool,
    },
    /// In what may be such a call, which begins with this byte of what is held.
    Item {
        start: usize,
    },
}

/// Where the end of a call was looked for, so that nothing is looked at again and again.
#[derive(Debug, Default)]
struct Search {
    /// Where in what is held it goes on.
    from: usize,
    /// How far it is known what is a text among the arguments; whether that place is in one, and behind a backslash.
    known: usize,
    in_text: bool,
    escaped: bool,
    /// Objects that are open there.
    depth: usize,
    /// Whether what is there up to a mark was found to be the first part of a call, up to somewhere amid a text.
    begins_a_call: bool,
}

impl Search {
    /// Whether `at`, a later place each time, is amid a text.
    fn is_in_text(&mut self, json: &str, at: usize) -> bool {
        json[self.known..at].bytes().for_each(|byte| self.take(byte));
        self.known = at;
        self.in_text
    }

    /// Where the object that began at `known` at first ends, if it does.
    fn end_of_object(&mut self, json: &str) -> Option<usize> {
        for byte in json[self.known..].bytes() {
            self.known += 1;
            self.take(byte);
            match byte {
                b'{' if !self.in_text => self.depth += 1,
                b'}' if !self.in_text => self.depth -= 1,
                _ => continue,
            }
            if self.depth == 0 {
                return Some(self.known);
            }
        }
        None
    }

    fn take(&mut self, byte: u8) {
        match byte {
            _ if self.escaped => self.escaped = false,
            b'\\' => self.escaped = self.in_text,
            b'"' => self.in_text = !self.in_text,
            _ => {}
        }
    }
}

/// Reads one answer.
#[derive(Debug)]
pub(crate) struct Parser {
    wanted: Wanted,
    state: State,
    /// Text that was not let out yet.
    held: String,
    /// Bytes of white space that `held` is known to begin with: there may be any amount of it.
    blank: usize,
    /// The search for the end of a call.
    search: Search,
    /// Whether white space means nothing until something else comes.
    skips_space: bool,
    calls_made: usize,
}

impl Parser {
    pub(crate) fn new(wanted: Wanted) -> Self {
        let state = match (wanted.thoughts, wanted.calls) {
            (Thoughts::Opened, _) => State::Thoughts,
            (Thoughts::IfOpened, _) => State::Beginning(true),
            (Thoughts::No, Some(CallFormat::Llama3Json)) => State::Beginning(false),
            (Thoughts::No, Some(CallFormat::Mistral)) if wanted.calls_opened => State::List { opened: 0, first: true },
            (Thoughts::No, _) => State::Content,
        };
        let skips_space = state == State::Thoughts;
        Self { wanted, state, held: String::new(), blank: 0, search: Search::default(), skips_space, calls_made: 0 }
    }

    /// Takes the next piece of the text and appends what it has turned out to be to `out`.
    pub(crate) fn push(&mut self, text: &str, out: &mut Pieces) {
        self.held.push_str(text);
        while self.advance(out) {}
    }

    /// The text is complete: what was kept back is what it looks like. What follows all the same is read as if that
    /// had not been the end.
    pub(crate) fn finish(&mut self, out: &mut Pieces) {
        let held = std::mem::take(&mut self.held);
        let blank = std::mem::take(&mut self.blank);
        if held.is_empty() {
            return;
        }
        let calls = match self.state {
            State::Thoughts => return self.think(held.trim_end(), out),
            // Some models do not close their last call, or only begin to.
            State::Call => {
                let inside = &held[blank + HERMES.0.len()..];
                calls::one(&inside[..inside.len() - begun(inside, HERMES.1)]).ok().map(|call| vec![call])
            }
            State::Calls => calls::several(&held),
            State::Beginning(_) | State::Content | State::List { .. } | State::Item { .. } => None,
        };
        let follows_a_call = matches!(self.state, State::Content | State::List { .. }) && self.made_calls();
        self.state = State::Content;
        match calls {
            Some(calls) => self.call(calls, out),
            // White space at the end of an answer with calls stood around them.
            None if follows_a_call && held.trim_start().is_empty() => {}
            None => out.content.push_str(&held),
        }
    }

    /// Bytes of text that are kept back.
    pub(crate) fn bytes_held(&self) -> usize {
        self.held.len()
    }

    /// Whether a function was called.
    pub(crate) fn made_calls(&self) -> bool {
        self.calls_made > 0
    }

    /// Goes as far as the state reaches. Whether there is another, in which more may be found.
    fn advance(&mut self, out: &mut Pieces) -> bool {
        if self.skips_space {
            let spaces = self.held.len() - self.held.trim_start().len();
            self.held.drain(..spaces);
            self.skips_space = self.held.is_empty();
        }
        match self.state {
            State::Beginning(may_think) => self.begin(may_think),
            State::Thoughts => {
                let (bytes, closed) = self.look_for(THOUGHTS.1);
                self.think(&self.held[..bytes], out);
                self.held.drain(..bytes);
                if closed {
                    self.resolve(self.blank + THOUGHTS.1.len());
                    self.state = State::Beginning(false);
                    self.skips_space = true;
                }
                closed
            }
            State::Content => {
                let Some(mark) = self.wanted.calls.and_then(CallFormat::mark) else {
                    self.say(self.held.len(), out);
                    return false;
                };
                let (bytes, opened) = self.look_for(mark);
                out.content.push_str(&self.held[..bytes]);
                self.held.drain(..bytes);
                if opened {
                    let opened = self.blank + mark.len();
                    self.search = Search { from: opened, known: opened, ..Search::default() };
                    self.state = match self.wanted.calls {
                        Some(CallFormat::Mistral) => State::List { opened, first: true },
                        _ => State::Call,
                    };
                }
                opened
            }
            State::Call => self.close(out),
            State::Calls => false,
            State::List { opened, first } => self.begin_item(opened, first, out),
            State::Item { start } => self.end_item(start, out),
        }
    }

    /// How much of what is held stands before `mark`, or before what may be its beginning, and before the white space
    /// ahead of that; and whether all of the mark is there. That white space is what is known once so much is gone.
    fn look_for(&mut self, mark: &str) -> (usize, bool) {
        let new = &self.held[self.blank..];
        let found = new.find(mark);
        let end = found.unwrap_or_else(|| new.len() - begun(new, mark));
        let text = new[..end].trim_end().len();
        let bytes = if text == 0 { 0 } else { self.blank + text };
        self.blank = self.blank + end - bytes;
        (bytes, found.is_some())
    }

    /// What the answer is, once that is known.
    fn begin(&mut self, may_think: bool) -> bool {
        let begun = self.held[self.blank..].trim_start();
        self.blank = self.held.len() - begun.len();
        if begun.is_empty() || may_think && begun.len() < THOUGHTS.0.len() && THOUGHTS.0.starts_with(begun) {
            return false;
        }
        if may_think && begun.starts_with(THOUGHTS.0) {
            self.resolve(self.blank + THOUGHTS.0.len());
            self.skips_space = true;
            self.state = State::Thoughts;
        } else if self.wanted.calls == Some(CallFormat::Llama3Json) && begun.starts_with('{') {
            self.state = State::Calls;
        } else {
            self.state = State::Content;
        }
        true
    }

    /// Looks for the end of the call that `held` begins with, behind white space.
    fn close(&mut self, out: &mut Pieces) -> bool {
        let opened = self.blank + HERMES.0.len();
        // Whoever writes about calls is not held up.
        match self.held[opened..].chars().take(SPACE_MAX).find(|c| !c.is_whitespace()) {
            Some('{') => {}
            None if self.held[opened..].chars().nth(SPACE_MAX).is_none() => return false,
            _ => {
                self.say(opened, out);
                self.state = State::Content;
                return true;
            }
        }
        loop {
            let from = self.held.floor_char_boundary(self.search.from);
            let Some(at) = self.held[from..].find(HERMES.1) else {
                self.search.from = from.max((self.held.len() + 1).saturating_sub(HERMES.1.len()));
                return false;
            };
            let (inside, end) = (opened..from + at, from + at + HERMES.1.len());
            self.search.from = end;
            // What a text among the arguments says ends nothing.
            if self.search.is_in_text(&self.held, inside.end) && self.search.begins_a_call {
                continue;
            }
            match calls::one(&self.held[inside]) {
                Ok(call) => {
                    self.resolve(end);
                    self.call(vec![call], out);
                }
                Err(error) if calls::breaks_off_in_text(&error) => {
                    self.search.begins_a_call = true;
                    continue;
                }
                Err(_) => self.say(end, out),
            }
            self.state = State::Content;
            return true;
        }
    }

    /// Looks for the beginning of a list's next call, or its end, behind `opened` bytes of what is held.
    fn begin_item(&mut self, opened: usize, first: bool, out: &mut Pieces) -> bool {
        let before = if first { '[' } else { ',' };
        let mut is_due = false;
        let next = self.held[opened..].char_indices().take(SPACE_MAX).find(|&(_, c)| {
            let passes = c.is_whitespace() || c == before && !is_due;
            is_due |= c == before;
            !passes
        });
        match next {
            Some((at, '{')) if is_due => {
                let start = opened + at;
                self.search = Search { known: start, ..Search::default() };
                self.state = State::Item { start };
            }
            Some((at, ']')) if !first && !is_due => {
                self.resolve(opened + at + 1);
                self.state = State::Content;
            }
            None if self.held[opened..].chars().nth(SPACE_MAX).is_none() => return false,
            _ => {
                self.say(opened, out);
                self.state = State::Content;
            }
        }
        true
    }

    /// Looks for the end of a list's call, which begins at `start`. It is told when it is whole, whatever becomes of
    /// the list: some models do not close it.
    fn end_item(&mut self, start: usize, out: &mut Pieces) -> bool {
        let Some(end) = self.search.end_of_object(&self.held) else { return false };
        if let Ok(call) = calls::one(&self.held[start..end]) {
            self.resolve(end);
            self.call(vec![call], out);
            self.state = State::List { opened: 0, first: false };
        } else {
            self.say(end, out);
            self.state = State::Content;
        }
        true
    }

    fn think(&self, thoughts: &str, out: &mut Pieces) {
        if self.wanted.show_thoughts {
            out.thoughts.push_str(thoughts);
        }
    }

    fn call(&mut self, calls: Vec<Call>, out: &mut Pieces) {
        for call in calls.into_iter().take(self.wanted.calls_max - self.calls_made) {
            out.calls.push(Call { index: self.calls_made, ..call });
            self.calls_made += 1;
        }
    }

    /// The first `bytes` of what is held are content.
    fn say(&mut self, bytes: usize, out: &mut Pieces) {
        out.content.push_str(&self.held[..bytes]);
        self.resolve(bytes);
    }

    /// Nothing that follows changes what the first `bytes` of what is held are.
    fn resolve(&mut self, bytes: usize) {
        self.held.drain(..bytes);
        self.blank = 0;
    }
}

/// Bytes at the end of `text` that may be the beginning of `mark`.
fn begun(text: &str, mark: &str) -> usize {
    (1..mark.len()).rev().find(|&length| text.ends_with(&mark[..length])).unwrap_or(0)
}
