use serde_json::{Value, json};

/// A streamed answer, however its text was cut into events.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Answer {
    /// Id, time, object and model of all chunks: one entry, if all is well.
    pub(crate) ids: Vec<Value>,
    pub(crate) choices: Vec<Choice>,
    pub(crate) usage: Vec<Value>,
    /// How often the end was told.
    pub(crate) done: usize,
}

#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) thoughts: String,
    /// As they came, each once.
    pub(crate) calls: Vec<Value>,
    pub(crate) roles: usize,
    pub(crate) logprobs: Vec<Value>,
    pub(crate) finishes: Vec<Value>,
    /// How many tokens there were by the latest chunk, where each tells.
    pub(crate) tokens_told: u64,
}

impl Answer {
    /// Takes the data of the next event.
    pub(crate) fn take(&mut self, data: &str) {
        assert_eq!(self.done, 0, "more after the end");
        if data == "[DONE]" {
            self.done += 1;
            return;
        }
        let chunk: Value = serde_json::from_str(data).unwrap();
        assert!(chunk["error"].is_null(), "{chunk}");
        let id = json!([chunk["id"], chunk["created"], chunk["object"], chunk["model"]]);
        if !self.ids.contains(&id) {
            self.ids.push(id);
        }
        let choices = chunk["choices"].as_array().unwrap();
        if chunk["usage"].is_object() && choices.is_empty() {
            self.usage.push(chunk["usage"].clone());
        }
        for choice in choices {
            let index = choice["index"].as_u64().unwrap() as usize;
            self.choices.resize(self.choices.len().max(index + 1), Choice::default());
            self.choices[index].take(choice);
            if let Some(tokens) = chunk["usage"]["completion_tokens"].as_u64() {
                let before = std::mem::replace(&mut self.choices[index].tokens_told, tokens);
                assert!(before <= tokens, "{before} tokens, then {tokens}: {chunk}");
            }
        }
    }

    /// The same without what every answer has of its own.
    pub(crate) fn anonymous(mut self) -> Self {
        assert_eq!(self.ids.len(), 1, "{:?}", self.ids);
        self.ids.clear();
        for usage in &mut self.usage {
            usage["prompt_tokens_details"] = Value::Null;
        }
        self
    }
}

impl Choice {
    fn take(&mut self, choice: &Value) {
        let delta = &choice["delta"];
        self.text += choice["text"].as_str().or(delta["content"].as_str()).unwrap_or_default();
        assert_eq!(delta["reasoning"], delta["reasoning_content"]);
        self.thoughts += delta["reasoning"].as_str().unwrap_or_default();
        self.calls.extend(delta["tool_calls"].as_array().into_iter().flatten().cloned());
        self.roles += usize::from(delta["role"].is_string());
        let logprobs = &choice["logprobs"];
        self.logprobs.extend(logprobs["content"].as_array().into_iter().flatten().cloned());
        for (at, token) in logprobs["tokens"].as_array().into_iter().flatten().enumerate() {
            let field = |name: &str| logprobs[name][at].clone();
            self.logprobs.push(json!([token, field("token_logprobs"), field("top_logprobs"), field("text_offset")]));
        }
        if !choice["finish_reason"].is_null() {
            self.finishes.push(choice["finish_reason"].clone());
        }
    }
}
