//! Chat formats by name beside the templates that models are published with, and their Go templates beside their Jinja ones.

use std::path::Path;

use ferrotune::data::{ChatTemplate, NAMED_TEMPLATES, NamedTemplate, RenderOptions};
use serde_json::{Value, json};

use super::test_data;

fn conversation(roles: &str) -> Vec<Value> {
    let role = |letter| match letter {
        's' => "system",
        'u' => "user",
        _ => "assistant",
    };
    let content =
        |(i, letter): (usize, char)| json!({"role": role(letter), "content": format!("Words of {i}.")});
    roles.chars().enumerate().map(content).collect()
}

/// BOS and EOS of a format, as its models have them.
fn tokens_of(name: &str) -> (&'static str, &'static str) {
    match name {
        "gemma-2" | "gemma-3" => ("<bos>", "<eos>"),
        "llama-3" | "llama-3.1" => ("<|begin_of_text|>", "<|eot_id|>"),
        "deepseek-r1" => ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        _ => ("<s>", "</s>"),
    }
}

fn with_tokens(mut template: ChatTemplate, name: &str) -> ChatTemplate {
    let (bos, eos) = tokens_of(name);
    template.set_variable("bos_token", bos.to_string());
    template.set_variable("eos_token", eos.to_string());
    template
}

fn named(name: &str) -> ChatTemplate {
    with_tokens(ChatTemplate::new(NamedTemplate::by_name(name).unwrap().jinja, name).unwrap(), name)
}

fn published(path: &Path) -> ChatTemplate {
    if path.extension().is_some_and(|end| end == "jinja") {
        return ChatTemplate::from_file(path).unwrap();
    }
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    ChatTemplate::new(json["chat_template"].as_str().unwrap(), &path.display().to_string()).unwrap()
}

#[test]
fn renders_are_those_of_published_templates() {
    let Some(dir) = test_data("chat_templates") else { return };
    let mut wrong = Vec::new();
    for (name, file) in [
        ("chatml", "chat_templates/axolotl/chatml.jinja"),
        ("qwen2.5", "chat_templates/axolotl/qwen_25.jinja"),
        ("qwen2.5", "tokenizers/qwen2.5/tokenizer_config.json"),
        ("qwen3", "tokenizers/qwen3/tokenizer_config.json"),
        ("llama-3", "chat_templates/axolotl/llama3.jinja"),
        ("llama-3", "tokenizers/llama-3.1/tokenizer_config.json"),
        ("mistral-v1", "chat_templates/axolotl/mistral_v1.jinja"),
        ("mistral-v3", "chat_templates/axolotl/mistral_v2v3.jinja"),
        ("mistral-nemo", "chat_templates/axolotl/mistral_v3_tekken.jinja"),
        ("phi-3", "chat_templates/axolotl/phi_35.jinja"),
        ("phi-3", "tokenizers/phi-3-mini/tokenizer_config.json"),
        ("phi-4", "chat_templates/onnxruntime-extensions/phi-4.jinja"),
        ("gemma-2", "chat_templates/axolotl/gemma.jinja"),
        ("gemma-3", "chat_templates/axolotl/gemma3.jinja"),
        ("alpaca", "chat_templates/axolotl/alpaca.jinja"),
    ] {
        let theirs = with_tokens(published(&dir.join(file)), name);
        for roles in ["u", "uau", "su", "suauau"] {
            let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
            let render = |template: &ChatTemplate| template.render(&conversation(roles), &options).ok();
            let (wanted, found) = (render(&theirs), render(&named(name)));
            if wanted != found {
                wrong.push(format!("{name} {file} {roles}\nexpected {wanted:?}\nfound    {found:?}"));
            }
        }
        match NamedTemplate::recognize(&theirs) {
            Ok(found) if found.ollama == NamedTemplate::by_name(name).unwrap().ollama => {}
            Ok(found) => wrong.push(format!("{file} was taken for {}", found.name)),
            Err(error) => wrong.push(format!("{file}: {error:#}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_format_recognises_itself_and_no_other_is() {
    for template in NAMED_TEMPLATES {
        let found = NamedTemplate::recognize(&named(template.name)).unwrap();
        assert_eq!(found.ollama, template.ollama, "{}", template.name);
    }
    let strange =
        ChatTemplate::new("{% for m in messages %}<<{{ m.content }}>>{% endfor %}", "strange.jinja");
    let error = NamedTemplate::recognize(&strange.unwrap()).err().unwrap().to_string();
    assert!(error.contains("strange.jinja") && error.contains("nearest"), "{error}");
    assert!(NamedTemplate::by_name("chat-ml").is_err());
}

/// Go's text/template, as much of it as the table uses.
struct Go<'a> {
    parts: Vec<&'a str>,
    at: usize,
    messages: &'a [Value],
    system: &'a str,
    open: bool,
}

impl Go<'_> {
    /// Renders up to `end` or `else`, which is left to the caller; `live` says whether it is shown.
    fn block(&mut self, message: Option<usize>, live: bool, out: &mut String) {
        while self.at < self.parts.len() {
            let part = self.parts[self.at];
            let Some(action) = part.strip_prefix("{{").and_then(|part| part.strip_suffix("}}")) else {
                if live {
                    out.push_str(part);
                }
                self.at += 1;
                continue;
            };
            let action = action.trim();
            if action == "end" || action.starts_with("else") {
                return;
            }
            self.at += 1;
            let field =
                |name: &str| message.and_then(|i| self.messages[i][name].as_str()).unwrap_or_default();
            match action {
                ".Content" | ".Role" if live => {
                    out.push_str(field(if action == ".Content" { "content" } else { "role" }));
                }
                ".System" | "$.System" if live => out.push_str(self.system),
                "$open := false" | "$open = false" if live => self.open = false,
                "$open = true" if live => self.open = true,
                _ if action.starts_with("range") => {
                    let start = self.at;
                    for i in 0..self.messages.len() {
                        self.at = start;
                        self.block(Some(i), live, out);
                    }
                    self.at += 1;
                }
                _ if action.starts_with("if ") => self.branches(&action[3..], message, live, out),
                _ => assert!(!live, "the evaluator does not know {action:?}"),
            }
        }
    }

    fn branches(&mut self, condition: &str, message: Option<usize>, live: bool, out: &mut String) {
        let mut condition = condition.to_string();
        let mut taken = false;
        loop {
            let shown = live && !taken && self.holds(&condition, message);
            taken |= shown;
            self.block(message, shown, out);
            let action = self.parts[self.at].trim_matches(['{', '}']).trim().to_string();
            self.at += 1;
            match action.strip_prefix("else if ") {
                Some(next) => condition = next.to_string(),
                None if action == "else" => condition = "true".to_string(),
                None => return,
            }
        }
    }

    fn holds(&self, condition: &str, message: Option<usize>) -> bool {
        let role = message.and_then(|i| self.messages[i]["role"].as_str()).unwrap_or_default();
        let quoted = |prefix: &str| condition.strip_prefix(prefix).map(|rest| rest.trim_matches(['"', ' ']));
        match condition {
            "true" => true,
            "not $open" => !self.open,
            "and $.System (eq (len (slice $.Messages $i)) 1)" => {
                !self.system.is_empty() && message == Some(self.messages.len() - 1)
            }
            _ => match (quoted("eq .Role"), quoted("ne .Role")) {
                (Some(wanted), _) => role == wanted,
                (_, Some(other)) => role != other,
                _ => panic!("the evaluator does not know the condition {condition:?}"),
            },
        }
    }
}

fn go(template: &str, messages: &[Value]) -> String {
    let (mut parts, mut rest) = (Vec::new(), template);
    while let Some(start) = rest.find("{{") {
        let end = rest.find("}}").unwrap() + 2;
        parts.extend([&rest[..start], &rest[start..end]]);
        rest = &rest[end..];
    }
    parts.push(rest);
    let system = messages.iter().find(|message| message["role"] == "system");
    let system = system.and_then(|message| message["content"].as_str()).unwrap_or_default();
    let mut out = String::new();
    Go { parts, at: 0, messages, system, open: false }.block(None, true, &mut out);
    out
}

/// As Ollama renders a conversation: its default system message in front, and BOS written by llama.cpp.
#[test]
fn go_templates_render_what_jinja_ones_do() {
    for template in NAMED_TEMPLATES {
        let (bos, _) = tokens_of(template.name);
        for roles in ["u", "uau", "su", "suauau"] {
            let mut messages = conversation(roles);
            let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
            let Ok(wanted) = named(template.name).render(&messages, &options) else {
                assert!(template.name == "gemma-2" && roles.starts_with('s'), "{} {roles}", template.name);
                continue;
            };
            if let (Some(system), false) = (template.default_system, roles.starts_with('s')) {
                messages.insert(0, json!({"role": "system", "content": system}));
            }
            let found = go(template.ollama, &messages);
            let wanted = wanted.strip_prefix(bos).unwrap_or(&wanted);
            assert_eq!(found, wanted, "{} {roles}", template.name);
        }
    }
}
