//! JSON as Python writes it, which is how models have seen it.

use minijinja::{
    Error, ErrorKind,
    value::{Value, ValueKind},
};

/// Objects and lists deeper than this are refused rather than followed; request bodies are limited to 128 anyway.
const MAX_DEPTH: usize = 200;

/// The parameters of Python's `json.dumps` that templates use.
#[derive(Debug, Clone, Default)]
pub(super) struct Style {
    /// Spaces a level; `None` puts everything on one line.
    pub(super) indent: Option<usize>,
    /// Between items, and between key and value; `None` is Python's default for the indent.
    pub(super) separators: Option<[String; 2]>,
    /// Write everything outside ASCII as `\u` escapes.
    pub(super) ensure_ascii: bool,
    /// Order objects by key.
    pub(super) sort_keys: bool,
}

/// `json.dumps` as transformers calls it for the filter `tojson`: unlike Jinja's own, no HTML escapes, and spaces after
/// separators. Models have seen exactly this text in training.
pub(super) fn to_json(value: &Value, style: &Style) -> Result<String, Error> {
    let (item, key) = match (&style.separators, style.indent) {
        (Some([item, key]), _) => (item.as_str(), key.as_str()),
        (None, Some(_)) => (",", ": "),
        (None, None) => (", ", ": "),
    };
    let mut writer = Writer { out: String::new(), style, item, key };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    out: String,
    style: &'a Style,
    item: &'a str,
    key: &'a str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: nested too deep"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.float(f64::try_from(value.clone())?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.object(value, depth)?,
            kind => return Err(Error::new(ErrorKind::BadSerialization, format!("{kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut items = value.try_iter()?.peekable();
        if items.peek().is_none() {
            self.out.push_str("[]");
            return Ok(());
        }
        self.out.push('[');
        for (i, item) in items.enumerate() {
            self.separate(i, depth + 1);
            self.value(&item, depth + 1)?;
        }
        self.line(depth);
        self.out.push(']');
        Ok(())
    }

    fn object(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if keys.is_empty() {
            self.out.push_str("{}");
            return Ok(());
        }
        if self.style.sort_keys {
            keys.sort();
        }
        self.out.push('{');
        for (i, key) in keys.iter().enumerate() {
            self.separate(i, depth + 1);
            match key.as_str() {
                Some(text) => self.string(text),
                None => self.string(&to_json(key, &Style::default())?),
            }
            self.out.push_str(self.key);
            self.value(&value.get_item(key)?, depth + 1)?;
        }
        self.line(depth);
        self.out.push('}');
        Ok(())
    }

    fn separate(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(self.item);
        }
        self.line(depth);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent.min(64) * depth));
        }
    }

    /// The shortest text that reads back as the same number, as Python's `repr`. Rust changes to exponents at the same
    /// magnitudes and writes them `1e16` where Python has `1e+16`, `1e-5` where it has `1e-05`.
    fn float(&mut self, number: f64) {
        if !number.is_finite() {
            self.out.push_str(match number {
                n if n.is_nan() => "NaN",
                n if n > 0.0 => "Infinity",
                _ => "-Infinity",
            });
            return;
        }
        let text = format!("{number:?}");
        match text.split_once('e') {
            None => self.out.push_str(&text),
            Some((mantissa, exponent)) => {
                let (sign, digits) = match exponent.strip_prefix('-') {
                    Some(digits) => ('-', digits),
                    None => ('+', exponent),
                };
                self.out.push_str(&format!("{mantissa}e{sign}{digits:0>2}"));
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if (c as u32) < 0x20
                    || (self.style.ensure_ascii && !c.is_ascii())
                    || (self.style.ensure_ascii && c == '\u{7f}') =>
                {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
