//! The functions that a request offers to the model: which there are, and whether it has to call one.

use serde_json::{Map, Value, json};

use super::{ChatTemplate, Parsers, parser::CallFormat, types::ToolList};
use crate::{
    grammar::{Frame, Source},
    http::{ApiError, shown},
};

/// Functions at most where an answer has to fit one: each is a grammar.
const FORMS_MAX: usize = 128;
/// Bytes of a function's name at most.
const NAME_BYTES_MAX: usize = 256;

/// What a request offers.
#[derive(Debug)]
pub(crate) struct Tools {
    /// As they came, for the template.
    pub(crate) offered: Vec<Value>,
    pub(crate) format: CallFormat,
    choice: Choice,
    /// What a list of calls begins with.
    list_opening: &'static str,
    /// Whether an answer may call more than one.
    parallel: bool,
}

#[derive(Debug, PartialEq)]
enum Choice {
    Auto,
    Required,
    /// The function with this number.
    One(usize),
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`. `None`: the model is not to call anything.
    pub(crate) fn read(
        tools: Option<ToolList>,
        choice: Option<Value>,
        parallel: Option<bool>,
        template: Option<&ChatTemplate>,
        parsers: Parsers,
    ) -> Result<Option<Self>, ApiError> {
        let offered = tools.map_or_else(Vec::new, |tools| tools.0);
        let mut names: Vec<&str> = Vec::with_capacity(offered.len());
        for (index, tool) in offered.iter().enumerate() {
            let name = name_of(tool, index)?;
            if names.contains(&name) {
                let field = format!("tools[{index}].function.name");
                return Err(ApiError::invalid(field, format!("'tools' has two functions called '{name}'")));
            }
            names.push(name);
        }
        let choice = match &choice {
            None | Some(Value::Null) => Choice::Auto,
            Some(Value::String(word)) if word == "none" => return Ok(None),
            Some(Value::String(word)) if word == "auto" => Choice::Auto,
            Some(_) if names.is_empty() => {
                return Err(ApiError::unsupported(
                    "tool_choice",
                    "there are no tools to choose: send 'tools' too, or leave it out",
                ));
            }
            Some(Value::String(word)) if word == "required" => Choice::Required,
            Some(chosen) => {
                let name = chosen["function"]["name"].as_str().filter(|_| chosen["type"] == "function");
                let name = name.ok_or_else(|| {
                    let message = "'tool_choice' has to be 'none', 'auto', 'required', or \
                                   {\"type\": \"function\", \"function\": {\"name\": …}}";
                    ApiError::invalid("tool_choice", message)
                })?;
                let Some(index) = names.iter().position(|known| *known == name) else {
                    let message = format!("'tool_choice' names '{}', which is none of 'tools'", shown(name));
                    return Err(ApiError::invalid("tool_choice", message));
                };
                Choice::One(index)
            }
        };
        if names.is_empty() {
            return Ok(None);
        }
        let Some(template) = template.filter(|template| template.reads_tools()) else {
            let detail = "this model's chat template does not show them, so it has hardly been taught to call any; if \
                          it has, --chat-template gives the server a template that does";
            return Err(ApiError::unsupported("tools", detail));
        };
        let Some(format) = parsers.calls else {
            let detail = "how this model writes calls is not known; --tool-call-parser tells the server";
            return Err(ApiError::unsupported("tools", detail));
        };
        // Llama's templates refuse to show an answer with two, which the client would send back.
        let parallel = parallel.unwrap_or(format != CallFormat::Llama3Json);
        let list_opening = CallFormat::list_opening(template);
        Ok(Some(Self { offered, format, choice, list_opening, parallel }))
    }

    /// What the prompt ends with where the answer has to be calls.
    pub(crate) fn ahead(&self) -> Option<&'static str> {
        self.format.ahead().filter(|_| self.choice != Choice::Auto)
    }

    /// Calls of an answer at most.
    pub(crate) fn calls_max(&self) -> usize {
        if self.parallel && !matches!(self.choice, Choice::One(_)) { usize::MAX } else { 1 }
    }

    /// What an answer has to be, if it has to be a call, or else a JSON text that `instead` describes, which an answer
    /// that has to be a call never is. Calls are written as models do that were taught this format.
    pub(crate) fn form(&self, instead: Option<Value>) -> Result<Option<Source>, ApiError> {
        // Llama's calls begin with `{"`, as the form may: where what follows the grammar would have decided for the
        // call. What Mistral's begin with is in no grammar.
        if instead.is_some() && self.choice == Choice::Auto && self.format != CallFormat::Hermes {
            let detail = "this model cannot choose between calls and a form; send 'tool_choice' 'none' or 'required' \
                          with one";
            return Err(ApiError::unsupported("tools", detail));
        }
        let (chosen, or) = match self.choice {
            Choice::Auto if instead.is_none() => return Ok(None),
            Choice::Auto => (&self.offered[..], instead),
            Choice::Required => (&self.offered[..], None),
            Choice::One(index) => (&self.offered[index..=index], None),
        };
        if chosen.len() > FORMS_MAX {
            let message =
                format!("an answer has to fit one of {} functions in 'tools'; at most {FORMS_MAX}", chosen.len());
            return Err(ApiError::invalid("tools", message));
        }
        let (before, arguments, after, between) = match self.format {
            CallFormat::Hermes => ("<tool_call>\n", "arguments", "}\n</tool_call>", "\n"),
            CallFormat::Llama3Json => ("", "parameters", "}", "; "),
            CallFormat::Mistral => ("", "arguments", "}", ", "),
        };
        let (open, close) = match self.format {
            CallFormat::Hermes | CallFormat::Llama3Json => ("", ""),
            CallFormat::Mistral => (self.list_opening, "]"),
        };
        let frame = |tool: &Value| {
            let function = &tool["function"];
            // As OpenAI has it, a function without has none.
            let none = || json!({"type": "object", "additionalProperties": false});
            Frame {
                before: format!("{before}{{\"name\": {}, \"{arguments}\": ", function["name"]),
                schema: function["parameters"].as_object().map_or_else(none, arguments_of),
                after: after.to_owned(),
                strict: function["strict"] == true,
            }
        };
        let frames = chosen.iter().map(frame).collect();
        let between = (self.calls_max() > 1).then(|| between.to_owned());
        Ok(Some(Source::Framed { open: open.to_owned(), frames, between, close: close.to_owned(), or }))
    }
}

/// The schema of a call's arguments, which are an object even where that goes without saying.
fn arguments_of(parameters: &Map<String, Value>) -> Value {
    let mut schema = parameters.clone();
    if !["type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum"].iter().any(|keyword| schema.contains_key(*keyword))
    {
        schema.insert("type".into(), "object".into());
    }
    schema.into()
}

/// The name of the function that `tools[index]` is.
fn name_of(tool: &Value, index: usize) -> Result<&str, ApiError> {
    let at = |field: &str| format!("tools[{index}]{field}");
    let wrong =
        |field: &str, what: &str| Err(ApiError::invalid(at(field), format!("'{}' has to be {what}", at(field))));
    let Some(fields) = tool.as_object() else { return wrong("", "an object") };
    match fields.get("type") {
        Some(Value::String(kind)) if kind == "function" => {}
        Some(Value::String(_)) => return Err(ApiError::unsupported(at(".type"), "only 'function' is")),
        Some(_) => return wrong(".type", "'function'"),
        None => return Err(ApiError::missing(at(".type"))),
    }
    let function = match fields.get("function") {
        Some(Value::Object(function)) => function,
        Some(_) => return wrong(".function", "an object"),
        None => return Err(ApiError::missing(at(".function"))),
    };
    if !matches!(function.get("parameters"), None | Some(Value::Null | Value::Object(_))) {
        return wrong(".function.parameters", "an object: a JSON schema");
    }
    match function.get("name") {
        Some(Value::String(name)) if (1..=NAME_BYTES_MAX).contains(&name.len()) => Ok(name),
        Some(_) => wrong(".function.name", &format!("a text of 1 to {NAME_BYTES_MAX} bytes")),
        None => Err(ApiError::missing(at(".function.name"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{
        extract::parse_json,
        types::{ChatRequest, TOOLS_MAX},
    };

    const HERMES: Parsers = Parsers { thoughts: true, calls: Some(CallFormat::Hermes) };

    fn read_by(parsers: Parsers, template: &str, body: &Value) -> Result<Option<Tools>, ApiError> {
        let request: ChatRequest = parse_json(body.to_string().as_bytes())?;
        let template = ChatTemplate::new(template, "", "").unwrap();
        Tools::read(request.tools, request.tool_choice, request.parallel_tool_calls, Some(&template), parsers)
    }

    fn read(body: Value) -> Result<Option<Tools>, ApiError> {
        read_by(HERMES, "{{ tools }}", &body)
    }

    fn two() -> Value {
        let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}});
        json!([
            {"type": "function", "function": {"name": "weather", "description": "d", "parameters": parameters}},
            {"type": "function", "function": {"name": "time", "strict": true}},
        ])
    }

    #[test]
    fn a_request_says_what_there_is_and_what_is_called() {
        let chosen = json!({"type": "function", "function": {"name": "time"}});
        for (choice, parallel, expected, calls_max) in [
            (Value::Null, Value::Null, Choice::Auto, usize::MAX),
            (json!("auto"), json!(false), Choice::Auto, 1),
            (json!("required"), json!(true), Choice::Required, usize::MAX),
            (chosen, json!(true), Choice::One(1), 1),
        ] {
            let body = json!({"tools": two(), "tool_choice": choice, "parallel_tool_calls": parallel});
            let tools = read(body).unwrap().unwrap();
            assert_eq!(Value::Array(tools.offered.clone()), two(), "templates get what came");
            assert_eq!((&tools.choice, tools.calls_max()), (&expected, calls_max));
        }
        for body in [
            json!({}),
            json!({"tools": []}),
            json!({"tools": null, "tool_choice": "auto"}),
            json!({"tools": two(), "tool_choice": "none"}),
        ] {
            assert!(read(body.clone()).unwrap().is_none(), "{body}");
        }
    }

    #[test]
    fn a_call_that_has_to_be_made_is_written_as_the_model_was_taught() {
        let form = |format, choice: Value, parallel: Value| {
            let parsers = Parsers { thoughts: false, calls: Some(format) };
            let body = json!({"tools": two(), "tool_choice": choice, "parallel_tool_calls": parallel});
            match read_by(parsers, "{{ tools }}", &body).unwrap().unwrap().form(None).unwrap() {
                Some(Source::Framed { frames, between, or: None, .. }) => Some((frames, between)),
                Some(other) => panic!("{other:?}"),
                None => None,
            }
        };
        assert_eq!(form(CallFormat::Hermes, json!("auto"), Value::Null), None);
        let (frames, between) = form(CallFormat::Hermes, json!("required"), Value::Null).unwrap();
        assert_eq!(frames[0].before, "<tool_call>\n{\"name\": \"weather\", \"arguments\": ");
        assert_eq!((frames[0].schema["properties"]["city"]["type"].as_str(), frames.len()), (Some("string"), 2));
        let none = json!({"type": "object", "additionalProperties": false});
        assert_eq!((&frames[1].schema, &*frames[1].after), (&none, "}\n</tool_call>"));
        assert_eq!((frames[0].strict, frames[1].strict), (false, true), "as the functions say");
        assert_eq!(between.as_deref(), Some("\n"));
        let time = json!({"type": "function", "function": {"name": "time"}});
        let (frames, between) = form(CallFormat::Llama3Json, time, json!(true)).unwrap();
        assert_eq!((&*frames[0].before, &*frames[0].after), ("{\"name\": \"time\", \"parameters\": ", "}"));
        assert_eq!((frames.len(), between), (1, None));
        assert_eq!(form(CallFormat::Llama3Json, json!("required"), json!(false)).unwrap().1, None);
        assert_eq!(form(CallFormat::Llama3Json, json!("required"), Value::Null).unwrap().1, None, "not by itself");
        assert_eq!(form(CallFormat::Llama3Json, json!("required"), json!(true)).unwrap().1.as_deref(), Some("; "));
    }

    #[test]
    fn calls_of_a_list_stand_behind_what_the_prompt_ends_with() {
        let parsers = Parsers { thoughts: false, calls: Some(CallFormat::Mistral) };
        let tools = |template: &str, choice: Value, parallel: Value| {
            let body = json!({"tools": two(), "tool_choice": choice, "parallel_tool_calls": parallel});
            read_by(parsers, template, &body).unwrap().unwrap()
        };
        let time = json!({"type": "function", "function": {"name": "time"}});
        for (template, opening) in [("{{ tools }}[TOOL_CALLS] [", " ["), ("{{ tools }}[TOOL_CALLS][", "[")] {
            for (choice, parallel, expected) in [
                (json!("required"), Value::Null, Some(", ")),
                (json!("required"), json!(false), None),
                (time.clone(), json!(true), None),
            ] {
                let tools = tools(template, choice, parallel);
                assert_eq!(tools.ahead(), Some("[TOOL_CALLS]"));
                let Some(Source::Framed { open, frames, between, close, or: None }) = tools.form(None).unwrap() else {
                    panic!("{tools:?}");
                };
                assert_eq!((&*open, between.as_deref(), &*close), (opening, expected, "]"));
                let last = frames.last().unwrap();
                assert_eq!((&*last.before, &*last.after), ("{\"name\": \"time\", \"arguments\": ", "}"));
            }
        }
        let auto = tools("{{ tools }}", json!("auto"), Value::Null);
        assert_eq!((auto.ahead(), auto.form(None).unwrap()), (None, None));
        let hermes = read(json!({"tools": two(), "tool_choice": "required"})).unwrap().unwrap();
        assert_eq!(hermes.ahead(), None, "its answers begin with the mark");
    }

    #[test]
    fn an_answer_may_be_a_call_or_of_a_form() {
        let schema = json!({"type": "integer"});
        let or = |choice: &str| {
            let tools = read(json!({"tools": two(), "tool_choice": choice})).unwrap().unwrap();
            match tools.form(Some(schema.clone())).unwrap() {
                Some(Source::Framed { frames, or, .. }) if frames.len() == 2 => or,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((or("auto"), or("required")), (Some(schema.clone()), None));
        for format in [CallFormat::Llama3Json, CallFormat::Mistral] {
            let parsers = Parsers { thoughts: false, calls: Some(format) };
            for (choice, may) in [("auto", false), ("required", true)] {
                let body = json!({"tools": two(), "tool_choice": choice});
                let tools = read_by(parsers, "{{ tools }}", &body).unwrap().unwrap();
                assert_eq!(tools.form(Some(schema.clone())).is_ok(), may, "one cannot be chosen over the other");
            }
        }
    }

    #[test]
    fn arguments_are_an_object_even_where_that_goes_without_saying() {
        let of = |parameters: Value| arguments_of(parameters.as_object().unwrap());
        assert_eq!(of(json!({})), json!({"type": "object"}));
        assert_eq!(of(json!({"properties": {}})), json!({"properties": {}, "type": "object"}));
        for said in [json!({"type": "object"}), json!({"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}})] {
            assert_eq!(of(said.clone()), said);
        }
    }

    #[test]
    fn what_is_offered_or_chosen_wrongly_is_refused_by_name() {
        let function = |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        let choose = |choice: Value| json!({"tools": two(), "tool_choice": choice});
        let many = |choice: Value| {
            let named = (0..=FORMS_MAX).map(|n| json!({"type": "function", "function": {"name": format!("f{n}")}}));
            json!({"tools": named.collect::<Value>(), "tool_choice": choice})
        };
        assert!(read(many(json!("auto"))).unwrap().unwrap().form(None).is_ok());
        let refused = read(many(json!("required"))).unwrap().unwrap().form(None).unwrap_err();
        assert_eq!(refused.param(), Some("tools"));
        let twice = json!([two()[0], two()[0]]);
        for (body, param) in [
            (json!({"tools": [7]}), "tools[0]"),
            (json!({"tools": [{}]}), "tools[0].type"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [two()[0], {"type": "function"}]}), "tools[1].function"),
            (json!({"tools": [{"type": "function", "function": "f"}]}), "tools[0].function"),
            (function(json!({})), "tools[0].function.name"),
            (function(json!({"name": ""})), "tools[0].function.name"),
            (function(json!({"name": "f", "parameters": [1]})), "tools[0].function.parameters"),
            (json!({"tools": twice}), "tools[1].function.name"),
            (json!({"tools": vec![two()[0].clone(); TOOLS_MAX + 1]}), "tools"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (choose(json!("always")), "tool_choice"),
            (choose(json!({"type": "function"})), "tool_choice"),
            (choose(json!({"type": "function", "function": {"name": "f"}})), "tool_choice"),
            (choose(json!(7)), "tool_choice"),
            (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls"),
        ] {
            assert_eq!(read(body.clone()).unwrap_err().param(), Some(param), "{body}");
        }
    }

    #[test]
    fn tools_of_no_use_to_the_model_are_refused() {
        let body = json!({"tools": two()});
        for (parsers, template, why) in
            [(HERMES, "{{ messages }}", "template"), (Parsers::default(), "{{ tools }}", "--tool-call-parser")]
        {
            let refused = read_by(parsers, template, &body).unwrap_err();
            assert!(refused.param() == Some("tools") && refused.to_json().contains(why), "{refused:?}");
        }
    }
}
