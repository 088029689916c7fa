/// What to send instead of what other servers take.
pub(crate) fn instead_of(param: &str) -> Option<&'static str> {
    Some(match param {
        "enable_thinking" => "chats take it in 'chat_template_kwargs'",
        "thinking" | "reasoning" | "reasoning_format" => "chats take 'reasoning_effort', or 'chat_template_kwargs'",
        "content" => "text that is no conversation goes in 'prompt'",
        "n_predict" | "num_predict" | "max_new_tokens" => "answers are limited by 'max_tokens'",
        "repeat_penalty" => "'repetition_penalty' is there, which looks at all of the context",
        "cache_prompt" => "leave it out: what prompts have in common is cached, and 'cache_salt' keeps it apart",
        "grammar" => "'structured_outputs.grammar' is there, in Lark's syntax",
        "json_schema" => "'response_format' takes it",
        "num_ctx" => "the length of the context is the server's: --max-model-len",
        _ => return None,
    })
}
