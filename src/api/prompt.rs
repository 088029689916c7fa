//! From a conversation or a text to the tokens of a prompt.

use std::{ops::RangeInclusive, sync::Arc};

use engine_models::EncodeError;
use serde_json::{Map, Value, json};

use super::{
    RESERVED_NAMES, RenderOptions, Serving, TemplateError,
    parser::Thoughts,
    types::{Content, ContentPart, MESSAGES_MAX, Message, ToolCall},
    validate::too_long,
};
use crate::http::{ApiError, shown};

/// Bytes of text for each token of the context whose tokens are counted: of English, four contexts.
const COUNTED_BYTES_PER_TOKEN: usize = 16;
/// However short the context is, and however long.
const COUNTED_BYTES: RangeInclusive<usize> = 1 << 20..=4 << 20;

/// What a message, a part of one or a call counts for beside its text.
const PIECE_BYTES: usize = 64;

/// Appended to a message that is to be continued, and found again in the prompt: the text itself could be found in what
/// closes it (`<` in `<|im_end|>`). The idea is transformers'; the space at its end tells whether the template trims.
const END_MARK: &str = "END-OF-WHAT-IS-CONTINUED-5d0c7b ";

/// What a text is encoded for, which limits it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    /// To be answered: it has to fit the context.
    Answer,
    /// To have its tokens counted: it may be longer.
    Count,
}

/// How a conversation becomes a prompt.
#[derive(Debug, Default)]
pub(crate) struct ChatOptions {
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) continue_final_message: bool,
    pub(crate) add_special_tokens: bool,
    pub(crate) kwargs: Option<Map<String, Value>>,
    /// The functions that the model may call.
    pub(crate) tools: Vec<Value>,
    /// Thoughts that the prompt opens are closed again: the answer begins with something else.
    pub(crate) without_thoughts: bool,
    /// What the prompt ends with, for the answer not to begin with it.
    pub(crate) ahead: Option<&'static str>,
    /// What time the template is told, in seconds since 1970.
    pub(crate) now: Option<u64>,
}

impl Serving {
    /// A request's variables for the template, over those that hold where it says nothing.
    pub(crate) fn template_kwargs(&self, own: Option<Map<String, Value>>) -> Option<Map<String, Value>> {
        let defaults = &self.config.default_template_kwargs;
        if defaults.is_empty() {
            return own;
        }
        let mut kwargs = defaults.clone();
        // Null asks for nothing.
        kwargs.extend(own.into_iter().flatten().filter(|(_, value)| !value.is_null()));
        Some(kwargs)
    }

    /// Encodes the text of `field`. One that is far too long is refused before all of it has been looked at.
    pub(crate) async fn encode_text(
        self: &Arc<Self>,
        text: String,
        add_special_tokens: bool,
        purpose: Purpose,
        field: &'static str,
    ) -> Result<(Vec<u32>, String), ApiError> {
        self.encode(text.len(), move |serving| {
            let tokens = serving.encode_now(&text, add_special_tokens, purpose, field)?;
            Ok((tokens, text))
        })
        .await?
    }

    /// Renders a conversation with the model's template and encodes it. Returns also whether an answer may have
    /// thoughts, by what it follows.
    pub(crate) async fn encode_chat(
        self: &Arc<Self>,
        messages: Vec<Message>,
        options: ChatOptions,
        purpose: Purpose,
    ) -> Result<(Vec<u32>, Thoughts), ApiError> {
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "'messages' has to have at least one message"));
        }
        let pieces: usize = messages.iter().map(|message| 1 + message.pieces()).sum();
        if pieces > 2 * MESSAGES_MAX {
            let message = format!("'messages' has {pieces} messages, parts and calls; at most {}", 2 * MESSAGES_MAX);
            return Err(ApiError::invalid("messages", message));
        }
        options.kwargs.as_ref().map_or(Ok(()), refuse_reserved)?;
        let variables = options.kwargs.iter().flatten().map(|(name, value)| name.len() + bytes_of(value));
        let tools = options.tools.iter().map(bytes_of);
        let bytes = messages.iter().map(Message::bytes).chain(variables).chain(tools).sum();
        self.encode(bytes, move |serving| {
            let continued = messages.last().filter(|_| options.continue_final_message);
            let thoughts = continued.map(|message| Thoughts::amid(&message.text()));
            let mut text = serving.render(messages, &options)?;
            let thoughts = thoughts.unwrap_or_else(|| Thoughts::after(&text));
            if options.without_thoughts && thoughts == Thoughts::Opened {
                text.truncate(text.trim_end().len());
                text.push_str(Thoughts::NONE);
            }
            text.push_str(options.ahead.unwrap_or_default());
            Ok((serving.encode_now(&text, options.add_special_tokens, purpose, "messages")?, thoughts))
        })
        .await?
    }

    fn encode_now(
        &self,
        text: &str,
        add_special_tokens: bool,
        purpose: Purpose,
        field: &'static str,
    ) -> Result<Vec<u32>, ApiError> {
        let tokenizer = &self.config.tokenizer;
        let encoded = match purpose {
            Purpose::Answer => tokenizer.encode_bounded(text, add_special_tokens, self.max_model_len()),
            Purpose::Count => {
                let (bytes, limit) = (text.len(), self.counted_bytes_max());
                if bytes > limit {
                    let message = format!(
                        "'{field}' has {bytes} bytes of text, more than the {limit} whose tokens this server counts"
                    );
                    return Err(ApiError::invalid(field, message));
                }
                tokenizer.encode(text, add_special_tokens)
            }
        };
        encoded.map_err(|error| match error {
            EncodeError::TooLong { at_least, limit } => too_long(field, &format!("at least {at_least}"), limit),
            failed => ApiError::invalid(field, format!("'{field}' cannot be encoded: {failed}")),
        })
    }

    /// Bytes of a text whose tokens are counted, at most. Who counts wants to know by how much a text exceeds the
    /// context, but a limit in tokens would not bound the memory that takes: a text is encoded as a whole before all of
    /// its tokens are known, may have one for each byte, and `tokenizers` takes hundreds of bytes for each.
    fn counted_bytes_max(&self) -> usize {
        let contexts = self.max_model_len().saturating_mul(COUNTED_BYTES_PER_TOKEN);
        self.config.body_bytes_max.min(contexts.clamp(*COUNTED_BYTES.start(), *COUNTED_BYTES.end()))
    }

    fn render(&self, messages: Vec<Message>, options: &ChatOptions) -> Result<String, ApiError> {
        let Some(template) = &self.config.template else {
            let message = "This model has no chat template, so it cannot hold conversations; use /v1/completions";
            return Err(ApiError::invalid("messages", message));
        };
        let continued = options.continue_final_message;
        if continued && options.add_generation_prompt == Some(true) {
            let message = "'continue_final_message' and 'add_generation_prompt' exclude each other";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        if continued && messages.last().is_none_or(|message| message.content.is_none()) {
            return Err(ApiError::invalid("messages", "the final message has no content to continue"));
        }
        let parts = template.takes_content_parts();
        let messages = messages.into_iter().enumerate().map(|(index, message)| message.for_template(index, parts));
        let mut messages = messages.collect::<Result<Vec<_>, _>>()?;
        if continued && let Some(last) = messages.last_mut() {
            mark_end(&mut last["content"]);
        }
        let messages = Value::Array(messages);
        let add_generation_prompt = options.add_generation_prompt.unwrap_or(true) && !continued;
        let (tools, kwargs, now) = (&options.tools, options.kwargs.as_ref(), options.now);
        let render = RenderOptions { add_generation_prompt, tools, kwargs, now };
        let mut text = template.render(&messages, render).map_err(|error| match error {
            TemplateError::Compile(_) => ApiError::internal("The model's chat template is broken"),
            refused => ApiError::invalid("messages", refused.to_string()),
        })?;
        if continued {
            // What the template writes after the mark closes the message.
            let Some(end) = text.rfind(END_MARK.trim_end()) else {
                let message = "the chat template does not show the final message as it is, so it cannot be continued";
                return Err(ApiError::invalid("continue_final_message", message));
            };
            // A template that trims messages has taken the mark's space, and would have taken the message's.
            let is_whole = text[end..].starts_with(END_MARK);
            text.truncate(if is_whole { end } else { text[..end].trim_end().len() });
        }
        Ok(text)
    }
}

impl Message {
    /// About how much the template has to read and write for it, so that a conversation that takes long is known by it.
    fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let content = match &self.content {
            None => 0,
            Some(Content::Text(text)) => text.len(),
            Some(Content::Parts(parts)) => parts.iter().map(|part| PIECE_BYTES + text(&part.text)).sum(),
        };
        let call = |call: &ToolCall| call.function.name.len() + call.function.arguments.as_ref().map_or(0, bytes_of);
        let calls: usize = self.tool_calls.iter().flatten().map(|each| PIECE_BYTES + call(each)).sum();
        let thoughts = text(&self.reasoning_content) + text(&self.reasoning);
        PIECE_BYTES + content + text(&self.refusal) + calls + thoughts + text(&self.name) + text(&self.tool_call_id)
    }

    /// All of its text.
    fn text(&self) -> String {
        match &self.content {
            None => String::new(),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => joined(parts),
        }
    }

    /// Its parts and calls.
    fn pieces(&self) -> usize {
        let parts = match &self.content {
            Some(Content::Parts(parts)) => parts.len(),
            Some(Content::Text(_)) | None => 0,
        };
        parts + self.tool_calls.as_ref().map_or(0, Vec::len)
    }

    /// The message as templates know it. `parts`: whether the template reads a list of parts.
    fn for_template(self, index: usize, parts: bool) -> Result<Value, ApiError> {
        let at = |field: &str| format!("messages[{index}].{field}");
        let role = match self.role.as_str() {
            // OpenAI's newer name, which models' templates do not know.
            "developer" => "system",
            role @ ("system" | "user" | "assistant" | "tool") => role,
            other => {
                let message = format!(
                    "'{}' is '{}', but has to be one of 'system', 'developer', 'user', 'assistant', 'tool'",
                    at("role"),
                    shown(other)
                );
                return Err(ApiError::invalid(at("role"), message));
            }
        };
        let refused = [("audio", self.audio), ("function_call", self.function_call)];
        if let Some((field, _)) = refused.into_iter().find(|(_, value)| value.is_some_and(|value| value.asks)) {
            return Err(ApiError::unsupported(at(field), "leave it out"));
        }
        let calls = self.tool_calls.unwrap_or_default();
        if !calls.is_empty() && role != "assistant" {
            let message = format!("'{}' is for messages of the assistant", at("tool_calls"));
            return Err(ApiError::invalid(at("tool_calls"), message));
        }
        let mut message = Map::new();
        message.insert("role".into(), role.into());
        match self.content {
            Some(Content::Text(text)) => message.insert("content".into(), text.into()),
            Some(Content::Parts(list)) => {
                for (part_index, part) in list.iter().enumerate() {
                    check_part(part, || at(&format!("content[{part_index}]")))?;
                }
                let content = if parts { list.into_iter().map(as_part).collect() } else { joined(&list).into() };
                message.insert("content".into(), content)
            }
            // As OpenAI has it, an assistant that calls tools may say nothing; and some have answered with nothing.
            None if role == "assistant" => message.insert("content".into(), self.refusal.unwrap_or_default().into()),
            None => return Err(ApiError::missing(at("content"))),
        };
        if !calls.is_empty() {
            let calls = calls.into_iter().enumerate().map(|(call_index, call)| {
                let field = || at(&format!("tool_calls[{call_index}].function.arguments"));
                let arguments = as_arguments(call.function.arguments, field)?;
                let function = json!({ "name": call.function.name, "arguments": arguments });
                let kind = call.kind.unwrap_or_else(|| "function".into());
                Ok(json!({ "id": call.id, "type": kind, "function": function }))
            });
            message.insert("tool_calls".into(), calls.collect::<Result<_, ApiError>>()?);
        }
        let thoughts = self.reasoning.or(self.reasoning_content);
        let optional = [("name", self.name), ("tool_call_id", self.tool_call_id), ("reasoning_content", thoughts)];
        message.extend(optional.into_iter().filter_map(|(field, value)| Some((field.to_owned(), value?.into()))));
        Ok(Value::Object(message))
    }
}

/// The same for a variable of the template.
fn bytes_of(value: &Value) -> usize {
    let inside = match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(bytes_of).sum(),
        Value::Object(fields) => fields.iter().map(|(name, value)| name.len() + bytes_of(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    };
    PIECE_BYTES + inside
}

/// Refuses variables for the template that have another meaning. Null asks for nothing.
pub(crate) fn refuse_reserved(kwargs: &Map<String, Value>) -> Result<(), ApiError> {
    match kwargs.iter().find(|(name, value)| RESERVED_NAMES.contains(&name.as_str()) && !value.is_null()) {
        Some((name, _)) => {
            Err(ApiError::unsupported(format!("chat_template_kwargs.{name}"), "the server sets it itself"))
        }
        None => Ok(()),
    }
}

fn check_part(part: &ContentPart, at: impl Fn() -> String) -> Result<(), ApiError> {
    if part.kind != "text" {
        let detail = format!("'{}' parts; this model reads text", shown(&part.kind));
        return Err(ApiError::unsupported(format!("{}.type", at()), &detail));
    }
    match part.text {
        Some(_) => Ok(()),
        None => Err(ApiError::missing(format!("{}.text", at()))),
    }
}

/// A call's arguments as templates want them, an object. Clients send JSON in a string, mostly, and nothing or an empty
/// string where there are none.
fn as_arguments(given: Option<Value>, field: impl Fn() -> String) -> Result<Value, ApiError> {
    match given {
        None => Ok(json!({})),
        Some(Value::String(text)) if text.trim_ascii().is_empty() => Ok(json!({})),
        Some(Value::String(text)) => Ok(serde_json::from_str(&text).map_or(Value::String(text), Value::Object)),
        Some(object @ Value::Object(_)) => Ok(object),
        Some(_) => {
            let message = format!("'{}' has to be an object, or JSON of one in a string", field());
            Err(ApiError::invalid(field(), message))
        }
    }
}

/// Appends [`END_MARK`] to a message's content, a text or a list of parts.
fn mark_end(content: &mut Value) {
    match content {
        Value::String(text) => text.push_str(END_MARK),
        Value::Array(parts) => {
            if let Some(part) = parts.last_mut() {
                mark_end(&mut part["text"]);
            }
        }
        _ => {}
    }
}

fn as_part(part: ContentPart) -> Value {
    json!({ "type": "text", "text": part.text })
}

fn joined(parts: &[ContentPart]) -> String {
    let texts: Vec<&str> = parts.iter().filter_map(|part| part.text.as_deref()).collect();
    texts.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{extract::parse_json, types::ChatRequest};

    fn rendered(messages: Value) -> Result<Vec<Value>, ApiError> {
        let request: ChatRequest = parse_json(json!({ "messages": messages }).to_string().as_bytes())?;
        let messages = request.messages.unwrap().0.into_iter().enumerate();
        messages.map(|(index, message)| message.for_template(index, false)).collect()
    }

    #[test]
    fn what_client_libraries_add_to_an_answer_changes_nothing() {
        let plain = json!({"role": "assistant", "content": "{\"a\": 1}"});
        for added in [
            // OpenAI's, after `parse()` and `stream()`.
            json!({"parsed": {"a": 1}, "refusal": null, "annotations": null, "audio": null, "function_call": null,
                   "tool_calls": null}),
            json!({"parsed": null}),
            // LiteLLM's, and OpenRouter's.
            json!({"provider_specific_fields": {"refusal": null}, "thinking_blocks": null, "function_call": null,
                   "tool_calls": null, "reasoning_content": null}),
            json!({"thinking_blocks": [{"type": "thinking", "thinking": "…", "signature": "s"}]}),
            json!({"reasoning": null, "reasoning_details": [{"type": "reasoning.text", "text": "…"}]}),
            // OpenAI's after a web search; and what others note: Copilot, lm-evaluation-harness, Swarm.
            json!({"annotations": [{"type": "url_citation"}], "refusal": "No."}),
            json!({"copilot_cache_control": {"type": "ephemeral"}, "cot_id": "1"}),
            json!({"type": "text", "sender": "A"}),
        ] {
            let mut message = plain.clone();
            message.as_object_mut().unwrap().extend(added.as_object().unwrap().clone());
            assert_eq!(rendered(json!([message])), Ok(vec![plain.clone()]), "{added}");
        }
    }

    #[test]
    fn what_would_be_lost_is_refused_by_name() {
        for field in ["audio", "function_call"] {
            let refused = rendered(json!([{"role": "assistant", field: {"id": "a"}}])).unwrap_err();
            assert_eq!(refused.param(), Some(&*format!("messages[0].{field}")));
        }
    }

    #[test]
    fn thoughts_have_two_names_of_which_one_may_be_null() {
        for (older, newer) in [(json!("hm"), Value::Null), (Value::Null, json!("hm")), (json!("hm"), json!("hm"))] {
            let message = json!({"role": "assistant", "content": "a", "reasoning_content": older, "reasoning": newer});
            assert_eq!(rendered(json!([message])).unwrap()[0]["reasoning_content"], "hm");
        }
    }

    #[test]
    fn an_assistant_may_have_said_nothing() {
        for message in [json!({"role": "assistant", "content": null}), json!({"role": "assistant"})] {
            assert_eq!(rendered(json!([message])).unwrap()[0]["content"], "");
        }
        let refused = rendered(json!([{"role": "user", "content": null}])).unwrap_err();
        assert_eq!(refused.param(), Some("messages[0].content"));
    }

    #[test]
    fn a_refusal_is_what_an_assistant_said_where_it_said_nothing_else() {
        let refusal = |content: Value| json!([{"role": "assistant", "content": content, "refusal": "No."}]);
        assert_eq!(rendered(refusal(Value::Null)).unwrap()[0], json!({"role": "assistant", "content": "No."}));
        assert_eq!(rendered(refusal(json!("Yes."))).unwrap()[0], json!({"role": "assistant", "content": "Yes."}));
        let refused = rendered(json!([{"role": "user", "refusal": "No."}])).unwrap_err();
        assert_eq!(refused.param(), Some("messages[0].content"));
    }

    #[test]
    fn arguments_of_a_call_are_an_object_however_they_are_sent() {
        let call = |function: Value| {
            json!([{"role": "assistant", "tool_calls": [{
                "id": "c", "type": "function", "index": 0, "function": function,
                "extra_content": {"google": {"thought_signature": "s"}},
            }]}])
        };
        let shown = |function: Value| {
            rendered(call(function)).map(|messages| messages[0]["tool_calls"][0]["function"]["arguments"].clone())
        };
        for (arguments, expected) in [
            (json!("{\"b\": 1, \"a\": {}}"), json!({"b": 1, "a": {}})),
            (json!({"b": 1, "a": {}}), json!({"b": 1, "a": {}})),
            (json!(""), json!({})),
            (json!(" "), json!({})),
            (Value::Null, json!({})),
            // What a model wrote and did not finish is shown as it is.
            (json!("{\"b\": "), json!("{\"b\": ")),
        ] {
            let function = json!({"name": "f", "arguments": arguments, "parsed_arguments": null});
            assert_eq!(shown(function), Ok(expected), "{arguments}");
        }
        assert_eq!(shown(json!({"name": "f"})), Ok(json!({})));
        for arguments in [json!(7), json!([1]), json!(true)] {
            let refused = shown(json!({"name": "f", "arguments": arguments})).unwrap_err();
            assert_eq!(refused.param(), Some("messages[0].tool_calls[0].function.arguments"));
        }
    }
}
