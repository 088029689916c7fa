//! What form an answer is to have: from a request's fields to a grammar.

use std::{sync::Arc, time::Duration};

use serde_json::Value;
use tokio::{sync::Semaphore, time::timeout};

use super::{
    Serving,
    types::{ResponseFormat, StructuredOutputs},
    validate::refuse,
};
use crate::{
    grammar::{Grammar, GrammarError, Source, Vocabulary},
    http::{ApiError, shown},
};

/// How long a grammar may take to compile, and how long a place for that is waited for.
const COMPILE_TIME_MAX: Duration = Duration::from_secs(10);

/// What a request asks for, and the field that says so.
pub(crate) type Asked = (Source, &'static str);

impl Serving {
    /// Compiles what a request asks for, if it does.
    pub(crate) async fn compile(self: &Arc<Self>, asked: Option<Asked>) -> Result<Option<Grammar>, ApiError> {
        let Some((source, field)) = asked else { return Ok(None) };
        // Most requests ask for what another has asked for before.
        if let Some(Ok(vocabulary)) = self.vocabulary.get()
            && let Some(grammar) = vocabulary.cached(&source)
        {
            return Ok(Some(grammar));
        }
        // The first time that takes long in any case.
        let made = self.aside(|serving| serving.vocabulary().map(drop)).await?;
        let serving = self.clone();
        let compile = move || made.and_then(|()| serving.vocabulary()?.compile(source));
        let compiled = in_a_place(&self.compilers, field, compile).await?;
        compiled.map(Some).map_err(|error| match error {
            GrammarError::Vocabulary(_) => ApiError::unsupported(field, &error.to_string()),
            GrammarError::TooLarge { .. } | GrammarError::Invalid(_) => {
                ApiError::invalid(field, format!("'{field}' cannot be used: {error}"))
            }
        })
    }

    /// The model's tokens, made ready for grammars by the first request that has one.
    fn vocabulary(&self) -> Result<&Vocabulary, GrammarError> {
        let made = self.vocabulary.get_or_init(|| {
            Vocabulary::new(&self.config.tokenizer, self.engine.config().vocab_size, &self.config.eos_token_ids)
        });
        made.as_ref().map_err(GrammarError::clone)
    }
}

/// Compiles on a thread of its own, a few at a time. What takes too long is not waited for; it keeps its place until it
/// ends, since nobody can end it.
async fn in_a_place<T: Send + 'static>(
    places: &Arc<Semaphore>,
    field: &'static str,
    compile: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ApiError> {
    let place = timeout(COMPILE_TIME_MAX, places.clone().acquire_owned());
    let place = place.await.map_err(|_| ApiError::compilers_busy())?.map_err(|_| ApiError::draining())?;
    let compiling = tokio::task::spawn_blocking(move || {
        let _place = place;
        compile()
    });
    let Ok(compiled) = timeout(COMPILE_TIME_MAX, compiling).await else {
        let message = format!("'{field}' cannot be used: it takes more than {COMPILE_TIME_MAX:?} to compile");
        return Err(ApiError::invalid(field, message));
    };
    compiled.map_err(|_| ApiError::internal("The grammar could not be compiled"))
}

/// What the two fields ask for together.
pub(crate) fn asked(
    format: Option<ResponseFormat>,
    outputs: Option<StructuredOutputs>,
) -> Result<Option<Asked>, ApiError> {
    let format = format.map(of_format).transpose()?.flatten();
    let outputs = outputs.map(of_outputs).transpose()?;
    match (format, outputs) {
        (Some(_), Some((_, field))) => {
            Err(ApiError::invalid(field, format!("'{field}' and 'response_format' exclude each other")))
        }
        (format, outputs) => Ok(format.or(outputs)),
    }
}

fn of_format(format: ResponseFormat) -> Result<Option<Asked>, ApiError> {
    const FIELD: &str = "response_format.json_schema.schema";
    const DIRECT: &str = "response_format.schema";
    let ResponseFormat { kind, json_schema, schema } = format;
    if json_schema.is_some() && kind != "json_schema" {
        let message = "'response_format.json_schema' goes with the type 'json_schema'";
        return Err(ApiError::invalid("response_format.json_schema", message));
    }
    if schema.is_some() && (json_schema.is_some() || kind == "text") {
        let message = "'response_format.schema' goes with the types 'json_object' and 'json_schema', and not with \
                       'response_format.json_schema'";
        return Err(ApiError::invalid(DIRECT, message));
    }
    match (&*kind, schema) {
        ("text", _) => Ok(None),
        // As llama.cpp has it, an empty one says no more than the type does.
        ("json_object", Some(Value::Object(schema))) if schema.is_empty() => {
            Ok(Some((Source::json_object(), "response_format")))
        }
        ("json_object" | "json_schema", Some(schema)) => Ok(Some((Source::JsonSchema(schema), DIRECT))),
        ("json_object", None) => Ok(Some((Source::json_object(), "response_format"))),
        ("json_schema", None) => {
            let schema = json_schema.and_then(|given| given.schema).ok_or_else(|| ApiError::missing(FIELD))?;
            Ok(Some((Source::JsonSchema(schema), FIELD)))
        }
        (other, _) => {
            let detail = format!("its type has to be 'text', 'json_object' or 'json_schema', not '{}'", shown(other));
            Err(ApiError::unsupported("response_format", &detail))
        }
    }
}

fn of_outputs(outputs: StructuredOutputs) -> Result<Asked, ApiError> {
    for (field, value) in [
        ("structured_outputs.structural_tag", outputs.structural_tag),
        ("structured_outputs.whitespace_pattern", outputs.whitespace_pattern),
        ("structured_outputs.disable_any_whitespace", outputs.disable_any_whitespace),
        ("structured_outputs.disable_additional_properties", outputs.disable_additional_properties),
    ] {
        refuse(field, value)?;
    }
    let mut given: Vec<Asked> = Vec::new();
    if let Some(json) = outputs.json {
        given.push((Source::JsonSchema(schema(json)?), "structured_outputs.json"));
    }
    if outputs.json_object == Some(true) {
        given.push((Source::json_object(), "structured_outputs.json_object"));
    }
    given.extend(outputs.regex.map(|regex| (Source::Regex(regex), "structured_outputs.regex")));
    given.extend(outputs.choice.map(|choices| (Source::Choice(choices), "structured_outputs.choice")));
    if let Some(grammar) = outputs.grammar {
        if looks_like_ebnf(&grammar) {
            let detail = "it looks like EBNF ('::='); grammars here are Lark's (':')";
            return Err(ApiError::unsupported("structured_outputs.grammar", detail));
        }
        given.push((Source::Lark(grammar), "structured_outputs.grammar"));
    }
    match given.pop() {
        Some(asked) if given.is_empty() => Ok(asked),
        _ => {
            let message = "'structured_outputs' has to have exactly one of 'json', 'json_object', 'regex', 'choice', \
                           'grammar'";
            Err(ApiError::invalid("structured_outputs", message))
        }
    }
}

/// Whether a grammar's rules begin as in EBNF, which vLLM takes too: by this it tells one from the other.
fn looks_like_ebnf(grammar: &str) -> bool {
    let is_name = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || "_-<>".contains(c));
    grammar.lines().any(|line| line.split_once("::=").is_some_and(|(name, _)| is_name(name.trim())))
}

/// A schema that may be given as text.
fn schema(json: Value) -> Result<Value, ApiError> {
    let Value::String(text) = json else { return Ok(json) };
    serde_json::from_str(&text).map_err(|error| {
        let message = format!("'structured_outputs.json' is a text that is not JSON: {error}");
        ApiError::invalid("structured_outputs.json", message)
    })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use serde_json::json;
    use tokio::{sync::oneshot, time::advance};

    use super::*;
    use crate::api::{extract::parse_json, types::CompletionRequest};

    fn ask(body: Value) -> Result<Option<Asked>, ApiError> {
        let request: CompletionRequest = parse_json(body.to_string().as_bytes())?;
        asked(request.response_format, request.structured_outputs)
    }

    #[test]
    fn each_way_to_ask_is_understood() {
        let schema = json!({"type": "integer"});
        let of_schema = || Source::JsonSchema(schema.clone());
        for (body, source) in [
            (json!({"response_format": {"type": "json_object"}}), Source::json_object()),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {
                    "name": "n", "description": "d", "strict": true, "schema": schema,
                }}}),
                of_schema(),
            ),
            (json!({"response_format": {"type": "json_object", "schema": schema}}), of_schema()),
            (json!({"response_format": {"type": "json_schema", "schema": schema}}), of_schema()),
            (json!({"structured_outputs": {"json": schema}}), of_schema()),
            (json!({"structured_outputs": {"json": schema.to_string()}}), of_schema()),
            (json!({"structured_outputs": {"json_object": true}}), Source::json_object()),
            (json!({"structured_outputs": {"regex": "a+", "json": null}}), Source::Regex("a+".into())),
            (json!({"structured_outputs": {"choice": ["a", "b"]}}), Source::Choice(vec!["a".into(), "b".into()])),
            (json!({"structured_outputs": {"grammar": "start: \"a\""}}), Source::Lark("start: \"a\"".into())),
            (
                json!({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}),
                Source::Regex("a".into()),
            ),
        ] {
            assert_eq!(ask(body.clone()).unwrap().map(|(source, _)| source), Some(source), "{body}");
        }
        for body in [json!({}), json!({"response_format": {"type": "text"}}), json!({"structured_outputs": null})] {
            assert_eq!(ask(body).unwrap(), None);
        }
    }

    #[test]
    fn what_is_asked_for_wrongly_is_refused_by_name() {
        let structured = |outputs: Value| json!({"structured_outputs": outputs});
        let format = |format: Value| json!({"response_format": format});
        for (body, param) in [
            (format(json!({"type": "xml"})), "response_format"),
            (format(json!({"type": "json_schema"})), "response_format.json_schema.schema"),
            (
                format(json!({"type": "json_schema", "json_schema": {"name": "n"}})),
                "response_format.json_schema.schema",
            ),
            (format(json!({"type": "json_object", "json_schema": {}})), "response_format.json_schema"),
            (format(json!({"type": "text", "schema": {}})), "response_format.schema"),
            (
                format(json!({"type": "json_schema", "json_schema": {"schema": {}}, "schema": {}})),
                "response_format.schema",
            ),
            (format(json!({})), "response_format.type"),
            (structured(json!({})), "structured_outputs"),
            (structured(json!({"json_object": false})), "structured_outputs"),
            (structured(json!({"regex": "a", "choice": ["a"]})), "structured_outputs"),
            (structured(json!({"regex": 5})), "structured_outputs.regex"),
            (structured(json!({"json": "{"})), "structured_outputs.json"),
            (structured(json!({"regex": "a", "whitespace_pattern": " "})), "structured_outputs.whitespace_pattern"),
            (structured(json!({"structural_tag": "{}"})), "structured_outputs.structural_tag"),
            (structured(json!({"regexp": "a"})), "structured_outputs.regexp"),
            (
                json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}),
                "structured_outputs.regex",
            ),
        ] {
            assert_eq!(ask(body.clone()).unwrap_err().param(), Some(param), "{body}");
        }
    }

    #[test]
    fn a_grammar_as_others_write_it_is_told_from_lark() {
        let of = |grammar: &str| ask(json!({"structured_outputs": {"grammar": grammar}}));
        for ebnf in ["root ::= \"a\"", "# sums\n  <sum> ::=\n    number\n", "select-list::=\"*\""] {
            let refused = of(ebnf).unwrap_err();
            assert_eq!(refused.param(), Some("structured_outputs.grammar"), "{ebnf}");
            assert!(refused.to_json().contains("looks like EBNF ('::=')"), "{refused:?}");
        }
        for lark in ["start: \"root ::= a\"", "# root ::= \"a\"\nstart: \"a\"", "start: /b::=c/ // d ::= e"] {
            assert_eq!(of(lark).unwrap().map(|(source, _)| source), Some(Source::Lark(lark.into())));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_compiles_for_too_long_is_refused_and_keeps_its_place_until_it_ends() {
        let places = Arc::new(Semaphore::new(1));
        let ask = |compile: Box<dyn FnOnce() -> u32 + Send>| {
            let places = places.clone();
            tokio::spawn(async move { in_a_place(&places, "the field", compile).await })
        };
        let ((begin, begun), (end, ended)) = (oneshot::channel(), mpsc::channel());
        let endless = ask(Box::new(move || {
            begin.send(()).unwrap();
            ended.recv().unwrap();
            1
        }));
        begun.await.unwrap();
        // Whoever waits for the place is told to come again.
        let waiting = ask(Box::new(|| 2));
        tokio::task::yield_now().await;
        advance(COMPILE_TIME_MAX + Duration::from_millis(1)).await;
        let refused = endless.await.unwrap().unwrap_err();
        assert!(refused.param() == Some("the field") && refused.to_json().contains("takes more than"), "{refused:?}");
        assert_eq!(waiting.await.unwrap(), Err(ApiError::compilers_busy()));
        assert_eq!(places.available_permits(), 0);
        end.send(()).unwrap();
        assert_eq!(ask(Box::new(|| 3)).await.unwrap(), Ok(3));
    }
}
