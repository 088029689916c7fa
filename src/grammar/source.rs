//! What a grammar is compiled from, and its limits.

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use serde_json::{Value, json};

use super::{
    GrammarError,
    schema::{REGEX_BYTES_MAX, at_most, check, that_can_be_followed},
};

/// Bytes of a grammar's text at most. A schema of this size has about a thousand properties.
const BYTES_MAX: usize = 64 << 10;
/// Bytes of all texts with a frame together, each of which may have as many as a grammar: descriptions are most of
/// them, of which nothing is compiled.
const FRAMED_BYTES_MAX: usize = 512 << 10;
/// Choices at most.
const CHOICES_MAX: usize = 1024;
/// Texts with a frame at most: each has a compiler's work of its own.
const FRAMES_MAX: usize = 128;
/// How deep brackets may be nested in a grammar, in regular expressions and strings too.
const DEPTH_MAX: usize = 64;
/// What may stand between the parts of a JSON text: a space, or a line break and an indentation. JSON allows any
/// amount, of which some models, once they have begun, find no end.
const WHITESPACE: &str = r"\x20|\x0D?\x0A[\x20\x09]{0,40}";

/// What a request asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// JSON text that a schema describes.
    JsonSchema(Value),
    /// Text that a regular expression (Rust's syntax) matches as a whole.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// Text of a context-free grammar, in llguidance's variant of Lark's syntax.
    Lark(String),
    /// One of several JSON texts, each between two that are given; or one or more of them, if there is something to
    /// stand between them; or another JSON text instead.
    Framed {
        /// Stands before the first, if anything does.
        open: String,
        /// What there is to choose from.
        frames: Vec<Frame>,
        /// What stands between two.
        between: Option<String>,
        /// Stands behind the last, if anything does.
        close: String,
        /// The schema of what may be there instead.
        or: Option<Value>,
    },
    /// Any text up to a mark, as what a model thinks first, and then what another source describes.
    After {
        /// What the text begins with, if there is any; `None`: there is, and it has begun already.
        open: Option<String>,
        /// What ends it.
        close: String,
        /// Describes what follows, behind a line break or two.
        then: Box<Source>,
    },
}

/// JSON text, and what stands around it.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// Stands before it.
    pub before: String,
    /// Describes it.
    pub schema: Value,
    /// Stands behind it.
    pub after: String,
    /// Whether all that the schema says has to be followed. Else what is not known, or cannot be, says nothing.
    pub strict: bool,
}

impl Frame {
    fn bytes(&self) -> usize {
        self.before.len() + self.schema.to_string().len() + self.after.len()
    }

    /// What of the schema is followed.
    fn followed(&self) -> Value {
        let mut schema = self.schema.clone();
        if !self.strict {
            that_can_be_followed(&mut schema);
        }
        schema
    }
}

impl Source {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::JsonSchema(json!({"type": "object"}))
    }

    /// Refuses what is too large to be looked at.
    fn check_bytes(&self) -> Result<(), GrammarError> {
        let bytes = match self {
            Self::JsonSchema(schema) => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(choices) => choices.iter().map(String::len).sum(),
            Self::Framed { frames, or, .. } => {
                let each = frames.iter().map(Frame::bytes).chain(or.iter().map(|schema| schema.to_string().len()));
                let each: Vec<usize> = each.collect();
                at_most("bytes", each.iter().sum(), FRAMED_BYTES_MAX)?;
                each.into_iter().max().unwrap_or(0)
            }
            Self::After { then, .. } => return then.check_bytes(),
        };
        at_most("bytes", bytes, BYTES_MAX)
    }

    /// Texts behind which something begins: whatever they are of, something has to fit there. The longest leaves no
    /// white space to fit.
    pub(super) fn openings(&self) -> Vec<String> {
        let mut openings = vec![String::new()];
        if let Self::After { open, close, .. } = self {
            let mark = format!("{}{close}", open.as_deref().unwrap_or_default());
            openings.extend([mark.clone(), mark + "\n\n"]);
        }
        openings
    }

    /// As llguidance takes it. What is too large to be looked at is refused.
    pub(super) fn for_compiler(&self) -> Result<TopLevelGrammar, GrammarError> {
        self.check_bytes()?;
        match self {
            Self::JsonSchema(schema) => Ok(TopLevelGrammar::from_json_schema(with_options(schema, true)?)),
            Self::Regex(regex) => {
                at_most("bytes", regex.len(), REGEX_BYTES_MAX)?;
                Ok(TopLevelGrammar::from_regex(without_anchors(regex)))
            }
            Self::Choice(choices) => {
                if choices.is_empty() {
                    return Err(GrammarError::Invalid("there is nothing to choose from".to_owned()));
                }
                at_most("choices", choices.len(), CHOICES_MAX)?;
                let choices: Vec<String> = choices.iter().map(|choice| escaped(choice)).collect();
                Ok(TopLevelGrammar::from_regex(&choices.join("|")))
            }
            Self::Lark(grammar) => {
                // The compiler goes down into brackets by calling itself.
                let depth = depth(grammar);
                if depth > DEPTH_MAX {
                    let what = format!("brackets {depth} deep");
                    return Err(GrammarError::TooLarge { what, limit: DEPTH_MAX });
                }
                Ok(TopLevelGrammar::from_lark(grammar.clone()))
            }
            Self::Framed { open, frames, between, close, or } => {
                at_most("texts", frames.len(), FRAMES_MAX)?;
                let around = (open.as_str(), close.as_str());
                Ok(TopLevelGrammar::from_lark(framed(around, frames, between.as_deref(), or.as_ref())?))
            }
            Self::After { open, close, then } => {
                let mut grammar = then.for_compiler()?;
                // It is one by itself, whatever names and white space it has.
                for then in &mut grammar.grammars {
                    then.name = Some("then".to_owned());
                }
                grammar.grammars.insert(0, GrammarWithLexer::from_lark(after(open.as_deref(), close)));
                Ok(grammar)
            }
        }
    }
}

/// As a grammar. Each schema is one by itself, so that what it refers to is found in it.
fn framed(
    (open, close): (&str, &str),
    frames: &[Frame],
    between: Option<&str>,
    or: Option<&Value>,
) -> Result<String, GrammarError> {
    // What one schema may have of something, all have together.
    let schemas: Vec<Value> = frames.iter().map(Frame::followed).collect();
    check(&schemas.iter().chain(or).cloned().collect())?;
    let rules: Vec<String> = (0..frames.len()).map(|index| format!("frame_{index}")).collect();
    let more = between.map_or_else(String::new, |between| format!(" ({} frame)*", literal(between)));
    let [open, close] = [open, close].map(|text| if text.is_empty() { String::new() } else { literal(text) });
    let instead = or.map_or("", |_| " | instead");
    let mut grammar = format!("start: {open} frame{more} {close}{instead}\nframe: {}\n", rules.join(" | "));
    if let Some(schema) = or {
        grammar += &format!("instead: %json {}\n", with_options(schema, true)?);
    }
    for (rule, (frame, schema)) in rules.iter().zip(frames.iter().zip(&schemas)) {
        let (before, after) = (literal(&frame.before), literal(&frame.after));
        let schema = with_options(schema, frame.strict)?;
        grammar += &format!("{rule}: {before} json_{rule} {after}\njson_{rule}: %json {schema}\n");
    }
    Ok(grammar)
}

/// As a grammar that goes on in the one called `then`. The text ends with the first mark, whatever could follow.
fn after(open: Option<&str>, close: &str) -> String {
    let start = match open {
        Some(open) => format!("({} text)? @then", literal(open)),
        None => "text @then".to_owned(),
    };
    format!("start: {start}\ntext: up_to_mark /[ \\n]{{1,2}}/?\nup_to_mark[lazy]: /(?s:.*)/ {}\n", literal(close))
}

/// A string in a grammar: as JSON has it, but for a character that a grammar's text may not have.
fn literal(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

/// The schema, saying what whitespace there may be, that one of several is any of them where nobody can tell that they
/// exclude each other, and whether what llguidance does not know is to be passed over.
fn with_options(schema: &Value, strict: bool) -> Result<Value, GrammarError> {
    let mut schema = match schema {
        Value::Object(_) => schema.clone(),
        Value::Bool(true) => json!({}),
        Value::Bool(false) => return Err(GrammarError::Invalid("the schema 'false' allows nothing".to_owned())),
        _ => return Err(GrammarError::Invalid("a JSON schema is an object".to_owned())),
    };
    check(&schema)?;
    if let Some(fields) = schema.as_object_mut() {
        let options = json!({"whitespace_pattern": WHITESPACE, "coerce_one_of": true, "lenient": !strict});
        if fields.insert("x-guidance".to_owned(), options).is_some() {
            return Err(GrammarError::Invalid("'x-guidance' is not for requests to say".to_owned()));
        }
    }
    Ok(schema)
}

/// A regular expression has to match all of an answer in any case, so anchors around it say nothing new.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    match regex.strip_suffix('$') {
        // An even number of backslashes stand for themselves.
        Some(rest) if (rest.len() - rest.trim_end_matches('\\').len()) % 2 == 0 => rest,
        _ => regex,
    }
}

/// A text as a regular expression that matches it alone.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            // Behind a backslash, these two are borders of words.
            '<' | '>' => out.push(c),
            c if c.is_ascii_punctuation() => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out
}

/// How deep brackets are nested, at most.
fn depth(grammar: &str) -> usize {
    let (mut depth, mut deepest) = (0usize, 0);
    for byte in grammar.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}
