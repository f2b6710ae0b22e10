//! Tool calls in the text of an answer, in the forms that chat models write: `<tool_call>{..}</tool_call>` (Hermes, Qwen), a
//! JSON object or list as the whole answer (Llama 3, Mistral).

use serde_json::{Value, json};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A call, as OpenAI's API has it.
#[derive(Debug, PartialEq)]
pub(super) struct ToolCall {
    pub(super) name: String,
    /// JSON text.
    pub(super) arguments: String,
}

impl ToolCall {
    fn parse(call: &Value) -> Option<ToolCall> {
        let name = call["name"].as_str()?.to_string();
        let arguments = call.get("arguments").or_else(|| call.get("parameters"))?;
        let arguments = match arguments {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        Some(ToolCall { name, arguments })
    }

    pub(super) fn json(&self, index: usize) -> Value {
        json!({
            "index": index,
            "id": format!("call_{:024x}", rand::random::<u64>()),
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments}
        })
    }
}

/// The text outside calls, and the calls. What looks like a call and is none stays text.
pub(super) fn split(text: &str) -> (String, Vec<ToolCall>) {
    let whole = text.trim().trim_start_matches("[TOOL_CALLS]").trim_start();
    if whole.starts_with(['{', '['])
        && let Ok(value) = serde_json::from_str::<Value>(whole)
    {
        let list = value.as_array().cloned().unwrap_or_else(|| vec![value]);
        let calls: Option<Vec<ToolCall>> = list.iter().map(ToolCall::parse).collect();
        if let Some(calls) = calls.filter(|calls| !calls.is_empty()) {
            return (String::new(), calls);
        }
    }
    let (mut outside, mut calls) = (String::new(), Vec::new());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(OPEN) {
        // The last call of an answer may go without its end.
        let (inside, left) = after.split_once(CLOSE).unwrap_or((after, ""));
        match serde_json::from_str(inside.trim()).ok().as_ref().and_then(ToolCall::parse) {
            Some(call) => {
                outside += before;
                calls.push(call);
            }
            None => outside += &rest[..rest.len() - left.len()],
        }
        rest = left;
    }
    outside += rest;
    if calls.is_empty() { (text.to_string(), calls) } else { (outside.trim().to_string(), calls) }
}

/// How much of a growing text is certainly no part of a call.
pub(super) fn certain(text: &str) -> usize {
    if text.trim_start().starts_with(['{', '[']) {
        return 0;
    }
    match text.find(OPEN) {
        Some(at) => at,
        None => {
            let start = text.char_indices().map(|(at, _)| at).find(|&at| OPEN.starts_with(&text[at..]));
            start.unwrap_or(text.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_in_their_forms() {
        let call = |name: &str, arguments: &str| ToolCall { name: name.into(), arguments: arguments.into() };
        let hermes = "Let me see.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                      <tool_call>{\"name\": \"g\", \"arguments\": \"{}\"}";
        assert_eq!(split(hermes), ("Let me see.".into(), vec![call("f", "{\"x\":1}"), call("g", "{}")]));
        let llama = "{\"name\": \"f\", \"parameters\": {\"a\": \"b\"}}";
        assert_eq!(split(llama), (String::new(), vec![call("f", "{\"a\":\"b\"}")]));
        let mistral = "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}}]";
        assert_eq!(split(mistral), (String::new(), vec![call("f", "{}")]));
        for text in ["plain", "{\"a\": 1}", "[1, 2]", "a <tool_call> b", "<tool_call>{</tool_call> c"] {
            assert_eq!(split(text), (text.to_string(), vec![]));
        }
    }

    #[test]
    fn only_what_is_no_call_is_certain() {
        assert_eq!(certain("hello"), 5);
        assert_eq!(certain("hello <tool"), 6);
        assert_eq!(certain("hello <tool_call>{"), 6);
        assert_eq!(certain(" {\"name\""), 0);
        assert_eq!(certain("a < b"), 5);
    }
}
