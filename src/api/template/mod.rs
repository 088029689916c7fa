//! Chat templates: the Jinja program a model carries that turns messages into the prompt it was trained on.
//!
//! Templates are written against the environment that Hugging Face transformers gives them (`chat_template_utils.py`),
//! so that environment is rebuilt here on minijinja: Python's string and dictionary methods, `tojson` as `json.dumps`,
//! `raise_exception`, `strftime_now`, loop controls, trimmed blocks. Rendering is bounded in steps and in output,
//! because a template is a program from a file nobody has read.

mod json;
mod quiet;
#[cfg(test)]
mod tests;

use std::{
    fmt::Write as _,
    io::{self, Write},
};

use chrono::TimeZone;
use minijinja::{
    Environment, Error, ErrorKind,
    syntax::SyntaxConfig,
    value::{Kwargs, Value},
};

/// Steps every rendering may take; Qwen3's template takes about 200 for a short chat.
const FUEL_BASE: u64 = 2_000_000;
/// Further steps for each value (object, list or scalar) in the request's messages.
const FUEL_PER_VALUE: u64 = 5_000;
/// Steps no rendering may exceed: a second or two of a processor's time.
const FUEL_MAX: u64 = 50_000_000;
/// Longest prompt a template may write, in bytes, beyond [`OUTPUT_PER_INPUT_BYTE`] times its input.
const OUTPUT_BASE_BYTES: usize = 16 << 20;
/// Bytes a template may write for each byte of its input.
const OUTPUT_PER_INPUT_BYTE: usize = 8;
/// Names of the templates in their environment; they appear in error messages.
const NAME: &str = "chat_template";
const TOOL_USE: &str = "tool_use";

/// What a request's variables must not be called: names that mean something else already, most of them to the server,
/// the last two to transformers, where requests like this come from.
pub const RESERVED_NAMES: [&str; 10] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "raise_exception",
    "strftime_now",
    "continue_final_message",
    "chat_template",
];

/// Why a template could not be compiled or a prompt not be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is broken. Found when the model is loaded; nothing a client does can cause it.
    #[error("the chat template does not compile: {0}")]
    Compile(String),
    /// The template called `raise_exception`: it refuses these messages, in its author's words. Answer 400.
    #[error("{0}")]
    Raised(String),
    /// The template failed on these messages (a field it needs is missing, or of another type). Answer 400.
    #[error("the chat template cannot render these messages: {0}")]
    Render(String),
    /// The template ran longer, or wrote more, than any real one. Answer 400.
    #[error("the chat template exceeded its limit of {0}")]
    Limit(&'static str),
}

/// What a request may say about its rendering besides the messages.
#[derive(Debug, Clone, Copy, Default)]
pub struct RenderOptions<'a> {
    /// End the prompt with the opening of the assistant's answer.
    pub add_generation_prompt: bool,
    /// The functions that may be called, as requests have them; none: there are none to be told of.
    pub tools: &'a [serde_json::Value],
    /// Further variables (`chat_template_kwargs` of vLLM), such as Qwen3's `enable_thinking`; none of
    /// [`RESERVED_NAMES`], which whoever takes requests refuses.
    pub kwargs: Option<&'a serde_json::Map<String, serde_json::Value>>,
    /// What time it is, in seconds since 1970, so that a prompt can be rendered again later. `None`: now.
    pub now: Option<u64>,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
    takes_content_parts: bool,
    /// Whether the template may ask for the time.
    tells_time: bool,
    source: String,
    /// The one for conversations in which functions are offered, if that is another.
    tool_use: Option<String>,
}

impl ChatTemplate {
    /// Compiles a template. `bos_token` and `eos_token` are the texts of the model's special tokens, empty where it has
    /// none.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| TemplateError::Compile(error.to_string()))?);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(chrono::Local::now(), format));
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        let mut template = Self {
            environment,
            bos_token: bos_token.into(),
            eos_token: eos_token.into(),
            takes_content_parts: false,
            tells_time: source.contains("strftime_now"),
            source: source.into(),
            tool_use: None,
        };
        template.takes_content_parts = template.probe_content_parts();
        Ok(template)
    }

    /// With another template for conversations in which functions are offered: as transformers has it, one that a model
    /// calls `tool_use`.
    pub fn with_tool_use(mut self, source: &str) -> Result<Self, TemplateError> {
        self.environment
            .add_template_owned(TOOL_USE, without_generation_marks(source))
            .map_err(|error| TemplateError::Compile(describe(&error)))?;
        self.tool_use = Some(source.into());
        Ok(self)
    }

    /// Whether the template itself reads content given as a list of parts. If not, the parts' texts must be joined
    /// before rendering: such a template would print the list, or nothing.
    pub fn takes_content_parts(&self) -> bool {
        self.takes_content_parts
    }

    /// Whether how long the model is to think makes a difference to the template: by `reasoning_effort`, or by
    /// `enable_thinking`.
    pub fn reads_effort(&self) -> bool {
        self.sources().iter().any(|source| source.contains("reasoning_effort") || source.contains("enable_thinking"))
    }

    /// Whether the template tells the model which functions it may call.
    pub fn reads_tools(&self) -> bool {
        self.sources()[0].contains("tools")
    }

    /// The texts of the templates: for conversations in which functions are offered, and for others.
    pub fn sources(&self) -> [&str; 2] {
        [self.tool_use.as_deref().unwrap_or(&self.source), &self.source]
    }

    /// Renders `messages`, an array of objects as the OpenAI API has them.
    pub fn render(&self, messages: &serde_json::Value, options: RenderOptions<'_>) -> Result<String, TemplateError> {
        let mut size = InputSize::default();
        let mut variables: Vec<(String, Value)> = Vec::new();
        for (name, value) in options.kwargs.into_iter().flatten() {
            variables.push((name.clone(), size.convert(value)));
        }
        // After the request's own variables: of two pairs with one name the later counts.
        variables.push(("messages".into(), size.convert(messages)));
        let tools = match options.tools {
            [] => Value::from(()),
            tools => tools.iter().map(|tool| size.convert(tool)).collect(),
        };
        variables.push(("tools".into(), tools));
        variables.push(("documents".into(), Value::from(())));
        variables.push(("add_generation_prompt".into(), options.add_generation_prompt.into()));
        variables.push(("bos_token".into(), self.bos_token.as_str().into()));
        variables.push(("eos_token".into(), self.eos_token.as_str().into()));

        // Fuel is a setting of the environment; cloning one copies a few reference-counted tables, no template.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some((FUEL_BASE + FUEL_PER_VALUE * size.values).min(FUEL_MAX)));
        let now = options.now.and_then(|seconds| chrono::Local.timestamp_opt(seconds.try_into().ok()?, 0).single());
        if let Some(now) = now.filter(|_| self.tells_time) {
            environment.add_function("strftime_now", move |format: &str| strftime(now, format));
        }
        let name = if options.tools.is_empty() || self.tool_use.is_none() { NAME } else { TOOL_USE };
        let template = environment.get_template(name).map_err(|error| TemplateError::Compile(describe(&error)))?;
        let mut out = BoundedOutput { bytes: Vec::new(), left: OUTPUT_BASE_BYTES + OUTPUT_PER_INPUT_BYTE * size.bytes };
        // minijinja 3.0.5 panics on some values (an empty list reversed by `[::-1]`, which fuzzing found). Nothing but
        // `out`, which is given up then, could be left half-done.
        let rendered = quiet::catch_panic(|| {
            template.render_captured_to(Value::from_pairs(variables), &mut out).map(|_| ()).map_err(|e| classify(&e))
        });
        match rendered {
            Ok(Ok(())) => String::from_utf8(out.bytes).map_err(|error| TemplateError::Render(error.to_string())),
            Ok(Err(error)) => Err(error),
            Err(panic) => {
                tracing::debug!(panic, "the template engine panicked");
                Err(TemplateError::Render("the template engine failed on them".into()))
            }
        }
    }

    /// Renders one message as text and one as parts: a template that reads parts shows the text alone, without the
    /// quotes of a printed list.
    fn probe_content_parts(&self) -> bool {
        let parts = serde_json::json!([{"role": "user", "content": [{"type": "text", "text": "probe-7f3a"}]}]);
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        self.render(&parts, options).is_ok_and(|text| {
            text.contains("probe-7f3a") && !text.contains("'probe-7f3a'") && !text.contains("\"probe-7f3a\"")
        })
    }
}

/// Takes a request's JSON over and counts what it is made of: the limits of a rendering grow with its input.
#[derive(Default)]
struct InputSize {
    values: u64,
    bytes: usize,
}

impl InputSize {
    fn convert(&mut self, json: &serde_json::Value) -> Value {
        self.values += 1;
        match json {
            serde_json::Value::Null => Value::from(()),
            serde_json::Value::Bool(b) => Value::from(*b),
            serde_json::Value::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Value::from(n),
                (None, Some(n)) => Value::from(n),
                (None, None) => Value::from(n.as_f64().unwrap_or(f64::NAN)),
            },
            serde_json::Value::String(s) => {
                self.bytes += s.len();
                Value::from(s.as_str())
            }
            serde_json::Value::Array(items) => items.iter().map(|item| self.convert(item)).collect(),
            serde_json::Value::Object(entries) => Value::from_pairs(entries.iter().map(|(key, value)| {
                self.bytes += key.len();
                (key.as_str(), self.convert(value))
            })),
        }
    }
}

/// Collects the prompt and refuses what is beyond the limit.
struct BoundedOutput {
    bytes: Vec<u8>,
    left: usize,
}

impl Write for BoundedOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(data.len()).ok_or_else(|| io::Error::other(OutputTooLong))?;
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the prompt is too long")]
struct OutputTooLong;

/// Marks an error that the template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct RaisedByTemplate;

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message).with_source(RaisedByTemplate))
}

/// Date and time as `datetime.now().strftime(format)` writes it.
fn strftime(now: chrono::DateTime<chrono::Local>, format: &str) -> Result<String, Error> {
    let mut out = String::new();
    write!(out, "{}", now.format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now does not know the format {format:?}"))
    })?;
    Ok(out)
}

/// `tojson` with the parameters transformers gives it. `ensure_ascii` and `sort_keys` default to false.
fn tojson(value: &Value, indent: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")? {
        None => None,
        Some(pair) => Some(
            <[String; 2]>::try_from(pair)
                .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson's separators are two strings"))?,
        ),
    };
    let style = json::Style {
        indent: indent.filter(|i| !i.is_none()).and_then(|i| i.as_usize()),
        separators,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    json::to_json(value, &style).map(Value::from)
}

/// `{% generation %}` blocks mark the assistant's text for training and print as they are; here they become blocks that
/// always run.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let (before, tag) = rest.split_at(open);
        let end = tag.find("%}").map_or(tag.len(), |at| at + 2);
        let (tag, after) = tag.split_at(end);
        out.push_str(before);
        match tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+', ' ', '\t', '\n', '\r']) {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn classify(error: &Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if cause.is::<OutputTooLong>()
            || cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref).is_some_and(|e| e.is::<OutputTooLong>())
        {
            return TemplateError::Limit("output");
        }
        if let Some(error) = cause.downcast_ref::<Error>() {
            if error.kind() == ErrorKind::OutOfFuel {
                return TemplateError::Limit("steps");
            }
            let raised = std::error::Error::source(error).is_some_and(|e| e.is::<RaisedByTemplate>());
            if raised {
                return TemplateError::Raised(error.detail().unwrap_or_default().to_owned());
            }
        }
        source = cause.source();
    }
    TemplateError::Render(describe(error))
}

/// An error with the line it happened on, and its causes.
fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    text
}
