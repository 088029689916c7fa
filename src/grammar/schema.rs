//! What of a JSON schema would take its compiler, or whoever follows it, too long. Its own limits do not hold for
//! these.

use serde_json::{Number, Value};

use super::GrammarError;

/// Patterns for the names of properties, in the whole schema: each is compared with each, which takes milliseconds for
/// these and half a minute for four hundred.
const PATTERN_PROPERTIES_MAX: usize = 32;
/// Members of all `oneOf` and `allOf` together, which are compared too.
const MEMBERS_MAX: usize = 256;
/// `pattern`s that one text may have to match at once, as members of `allOf`: each more may double the time, a tenth of
/// a second for these and minutes for twice as many.
const PATTERNS_AT_ONCE_MAX: usize = 16;
/// Bytes of a `pattern`, as of a regular expression.
pub(super) const REGEX_BYTES_MAX: usize = 4096;
/// The longest text that is counted: six states of the lexer a character.
const LENGTH_MAX: u64 = 10_000;
/// A `multipleOf` as a whole number of its last decimals: what ten times it fits into is 32 bits wide.
const MULTIPLE_MAX: f64 = 4e8;
const MULTIPLE_DECIMALS_MAX: i32 = 8;

/// Refuses a schema with too much of that. Names of properties are taken for keywords, but not what stands under them.
pub(super) fn check(schema: &Value) -> Result<(), GrammarError> {
    let (mut names, mut members, mut in_all, mut patterns) = (0, 0, 0, 0);
    let mut rest = vec![schema];
    while let Some(value) = rest.pop() {
        let Value::Object(fields) = value else {
            rest.extend(value.as_array().into_iter().flatten());
            continue;
        };
        for (keyword, value) in fields {
            match (&**keyword, value) {
                ("patternProperties", Value::Object(all)) => names += all.len(),
                ("oneOf", Value::Array(all)) => members += all.len(),
                ("allOf", Value::Array(all)) => in_all += all.len(),
                ("pattern", Value::String(pattern)) => {
                    at_most("bytes in 'pattern'", pattern.len(), REGEX_BYTES_MAX)?;
                    patterns += 1;
                }
                ("minLength" | "maxLength", Value::Number(length)) if !is_counted(length) => {
                    return Err(too_large(format!("'{keyword}' {length}"), LENGTH_MAX as usize));
                }
                ("multipleOf", Value::Number(number)) if !is_small_multiple(number.as_f64()) => {
                    let what = "'multipleOf' with more than eight digits is not supported";
                    return Err(GrammarError::Invalid(what.to_owned()));
                }
                _ => {}
            }
            rest.push(value);
        }
    }
    at_most("'patternProperties'", names, PATTERN_PROPERTIES_MAX)?;
    at_most("members of 'oneOf' and 'allOf'", members + in_all, MEMBERS_MAX)?;
    // Whichever members they come from, by reference too: no more can meet than there are of either.
    at_most("'pattern' beside 'allOf'", patterns.min(in_all), PATTERNS_AT_ONCE_MAX)
}

/// Leaves of a schema what can be followed: no patterns that look around, which no lexer can, and no numbers beyond those
/// above. Here too names of properties are taken for keywords.
pub(super) fn that_can_be_followed(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.retain(|keyword, value| match (&**keyword, &*value) {
                ("pattern", Value::String(pattern)) => !looks_around(pattern),
                ("minLength" | "maxLength", Value::Number(length)) => is_counted(length),
                ("multipleOf", Value::Number(number)) => is_small_multiple(number.as_f64()),
                _ => true,
            });
            if let Some(Value::Object(names)) = fields.get_mut("patternProperties") {
                names.retain(|name, _| !looks_around(name));
            }
            fields.values_mut().for_each(that_can_be_followed);
        }
        Value::Array(all) => all.iter_mut().for_each(that_can_be_followed),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Whether texts may be counted up to this length.
fn is_counted(length: &Number) -> bool {
    length.as_u64() <= Some(LENGTH_MAX)
}

fn looks_around(pattern: &str) -> bool {
    ["(?=", "(?!", "(?<=", "(?<!"].iter().any(|group| pattern.contains(group))
}

/// Refuses more of `what` than there may be.
pub(super) fn at_most(what: &str, count: usize, limit: usize) -> Result<(), GrammarError> {
    if count > limit { Err(too_large(format!("{count} {what}"), limit)) } else { Ok(()) }
}

fn too_large(what: String, limit: usize) -> GrammarError {
    GrammarError::TooLarge { what, limit }
}

fn is_small_multiple(number: Option<f64>) -> bool {
    let whole = |decimals| number.map(|number| number.abs() * 10f64.powi(decimals));
    (0..=MULTIPLE_DECIMALS_MAX)
        .filter_map(whole)
        .any(|whole| (whole - whole.round()).abs() < 1e-6 && whole.round() <= MULTIPLE_MAX)
}
