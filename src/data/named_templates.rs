//! Chat formats by name: the Jinja template, the tokens that end an answer, and the same format as Ollama's Go template.
//!
//! Written from the descriptions of the formats. Go templates cannot trim, so they agree with the Jinja ones on messages without
//! space around them; `bos_token` is left out of them, because llama.cpp writes it itself.

use anyhow::Result;
use serde_json::{Value, json};

use super::{ChatTemplate, RenderOptions};
use crate::error::Error;

/// A format that programs know by name.
pub struct NamedTemplate {
    pub name: &'static str,
    pub jinja: &'static str,
    /// Texts at which an answer ends.
    pub stop: &'static [&'static str],
    /// Ollama's TEMPLATE.
    pub ollama: &'static str,
    /// The system message that the Jinja template writes where a conversation has none.
    pub default_system: Option<&'static str>,
}

/// `system, (user, assistant)*` in which every turn has a header of its own.
macro_rules! turns {
    ($start:literal, $middle:literal, $end:literal) => {
        concat!(
            "{{ range .Messages }}",
            $start,
            "{{ .Role }}",
            $middle,
            "{{ .Content }}",
            $end,
            "{{ end }}",
            $start,
            "assistant",
            $middle
        )
    };
}

const CHATML: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n\
    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
const QWEN_SYSTEM: &str = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.";
const VICUNA_SYSTEM: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, \
    detailed, and polite answers to the user's questions.";

/// Every known format.
pub const NAMED_TEMPLATES: &[NamedTemplate] = &[
    NamedTemplate {
        name: "chatml",
        jinja: CHATML,
        stop: &["<|im_end|>"],
        ollama: turns!("<|im_start|>", "\n", "<|im_end|>\n"),
        default_system: None,
    },
    NamedTemplate {
        name: "qwen2.5",
        jinja: include_str!("chat_templates/qwen2.5.jinja"),
        stop: &["<|im_end|>"],
        ollama: turns!("<|im_start|>", "\n", "<|im_end|>\n"),
        default_system: Some(QWEN_SYSTEM),
    },
    NamedTemplate {
        name: "qwen3",
        jinja: include_str!("chat_templates/qwen3.jinja"),
        stop: &["<|im_end|>"],
        ollama: turns!("<|im_start|>", "\n", "<|im_end|>\n"),
        default_system: None,
    },
    NamedTemplate {
        name: "llama-3",
        jinja: include_str!("chat_templates/llama-3.jinja"),
        stop: &["<|eot_id|>"],
        ollama: turns!("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
        default_system: None,
    },
    NamedTemplate {
        name: "llama-3.1",
        jinja: include_str!("chat_templates/llama-3.1.jinja"),
        stop: &["<|eot_id|>", "<|eom_id|>"],
        ollama: "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n\
            {{ .System }}<|eot_id|>{{ range .Messages }}{{ if ne .Role \"system\" }}<|start_header_id|>{{ .Role }}\
            <|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
        default_system: None,
    },
    NamedTemplate {
        name: "llama-2",
        jinja: include_str!("chat_templates/llama-2.jinja"),
        stop: &["</s>", "[INST]"],
        ollama: "{{ $open := false }}{{ range .Messages }}{{ if eq .Role \"system\" }}[INST] <<SYS>>\n{{ .Content }}\n<</SYS>>\n\n\
            {{ $open = true }}{{ else if eq .Role \"user\" }}{{ if not $open }}[INST] {{ end }}{{ $open = false }}{{ .Content }} \
            [/INST]{{ else }} {{ .Content }} </s><s>{{ end }}{{ end }}",
        default_system: None,
    },
    NamedTemplate {
        name: "mistral-v1",
        jinja: include_str!("chat_templates/mistral-v1.jinja"),
        stop: &["</s>", "[INST]"],
        ollama: "{{ $open := false }}{{ range .Messages }}{{ if eq .Role \"system\" }} [INST] {{ .Content }}\n\n{{ $open = true }}\
            {{ else if eq .Role \"user\" }}{{ if not $open }} [INST] {{ end }}{{ $open = false }}{{ .Content }} [/INST]\
            {{ else }} {{ .Content }}</s>{{ end }}{{ end }}",
        default_system: None,
    },
    NamedTemplate {
        name: "mistral-v3",
        jinja: include_str!("chat_templates/mistral-v3.jinja"),
        stop: &["</s>", "[INST]"],
        ollama: "{{ range $i, $_ := .Messages }}{{ if eq .Role \"user\" }}[INST] \
            {{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}\n\n{{ end }}{{ .Content }}[/INST]\
            {{ else if eq .Role \"assistant\" }} {{ .Content }}</s>{{ end }}{{ end }}",
        default_system: None,
    },
    NamedTemplate {
        name: "mistral-nemo",
        jinja: include_str!("chat_templates/mistral-nemo.jinja"),
        stop: &["</s>", "[INST]"],
        ollama: "{{ range $i, $_ := .Messages }}{{ if eq .Role \"user\" }}[INST]\
            {{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}\n\n{{ end }}{{ .Content }}[/INST]\
            {{ else if eq .Role \"assistant\" }}{{ .Content }}</s>{{ end }}{{ end }}",
        default_system: None,
    },
    NamedTemplate {
        name: "phi-3",
        jinja: include_str!("chat_templates/phi-3.jinja"),
        stop: &["<|end|>"],
        ollama: turns!("<|", "|>\n", "<|end|>\n"),
        default_system: None,
    },
    NamedTemplate {
        name: "phi-4",
        jinja: include_str!("chat_templates/phi-4.jinja"),
        stop: &["<|im_end|>"],
        ollama: turns!("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        default_system: None,
    },
    NamedTemplate {
        name: "gemma-2",
        jinja: include_str!("chat_templates/gemma-2.jinja"),
        stop: &["<end_of_turn>"],
        ollama: "{{ range .Messages }}{{ if eq .Role \"user\" }}<start_of_turn>user\n{{ .Content }}<end_of_turn>\n\
            {{ else if eq .Role \"assistant\" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}\
            <start_of_turn>model\n",
        default_system: None,
    },
    NamedTemplate {
        name: "gemma-3",
        jinja: include_str!("chat_templates/gemma-3.jinja"),
        stop: &["<end_of_turn>"],
        ollama: "{{ $open := false }}{{ range .Messages }}{{ if eq .Role \"system\" }}<start_of_turn>user\n{{ .Content }}\n\n\
            {{ $open = true }}{{ else if eq .Role \"user\" }}{{ if not $open }}<start_of_turn>user\n{{ end }}{{ $open = false }}\
            {{ .Content }}<end_of_turn>\n{{ else }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n{{ end }}{{ end }}\
            <start_of_turn>model\n",
        default_system: None,
    },
    NamedTemplate {
        name: "zephyr",
        jinja: include_str!("chat_templates/zephyr.jinja"),
        stop: &["</s>"],
        ollama: turns!("<|", "|>\n", "</s>\n"),
        default_system: None,
    },
    NamedTemplate {
        name: "alpaca",
        jinja: include_str!("chat_templates/alpaca.jinja"),
        stop: &["</s>", "### Instruction:"],
        ollama: "{{ range .Messages }}{{ if eq .Role \"system\" }}{{ .Content }}\n\n{{ else if eq .Role \"user\" }}### Instruction:\n\
            {{ .Content }}\n\n{{ else }}### Response:\n{{ .Content }}</s>\n\n{{ end }}{{ end }}### Response:\n",
        default_system: None,
    },
    NamedTemplate {
        name: "vicuna",
        jinja: include_str!("chat_templates/vicuna.jinja"),
        stop: &["</s>", "USER:"],
        ollama: "{{ range .Messages }}{{ if eq .Role \"system\" }}{{ .Content }} {{ else if eq .Role \"user\" }}USER: {{ .Content }} \
            ASSISTANT:{{ else }} {{ .Content }}</s>{{ end }}{{ end }}",
        default_system: Some(VICUNA_SYSTEM),
    },
    NamedTemplate {
        name: "deepseek-r1",
        jinja: include_str!("chat_templates/deepseek-r1.jinja"),
        stop: &["<｜end▁of▁sentence｜>"],
        ollama: "{{ range .Messages }}{{ if eq .Role \"system\" }}{{ .Content }}{{ else if eq .Role \"user\" }}<｜User｜>{{ .Content }}\
            {{ else }}<｜Assistant｜>{{ .Content }}<｜end▁of▁sentence｜>{{ end }}{{ end }}<｜Assistant｜><think>\n",
        default_system: None,
    },
];

/// Conversations that tell the formats apart.
fn probes() -> Vec<Vec<Value>> {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let (first, answer, second) =
        (message("user", "What is 2+2?"), message("assistant", "It is 4."), message("user", "And  3+3? "));
    let system = message("system", "Be brief.");
    vec![
        vec![first.clone()],
        vec![first.clone(), answer.clone(), second.clone()],
        vec![system.clone(), first.clone()],
        vec![system, first.clone(), answer.clone(), second, answer, first],
    ]
}

impl NamedTemplate {
    /// The format of this name.
    ///
    /// # Errors
    /// There is none; the message lists those that there are.
    pub fn by_name(name: &str) -> Result<&'static NamedTemplate> {
        let found = NAMED_TEMPLATES.iter().find(|template| template.name == name);
        found.ok_or_else(|| {
            let supported =
                NAMED_TEMPLATES.iter().map(|template| template.name).collect::<Vec<_>>().join(", ");
            Error::Unsupported { what: format!("chat template {name:?}"), supported }.into()
        })
    }

    /// The format that renders what `template` renders, on every probe up to where the assistant speaks.
    ///
    /// # Errors
    /// None does: the message names the nearest one and shows where it differs first.
    pub fn recognize(template: &ChatTemplate) -> Result<&'static NamedTemplate> {
        let mut nearest: Option<(usize, &'static str, String)> = None;
        for named in NAMED_TEMPLATES {
            let known = template.with_source(named.jinja, named.name)?;
            let mut equal = 0;
            let mut difference = None;
            for probe in probes() {
                let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
                let render = |template: &ChatTemplate| template.render(&probe, &options).ok();
                match (render(template), render(&known)) {
                    (wanted, found) if wanted == found => equal += 1,
                    (wanted, found) => {
                        let shown = |text: Option<String>| {
                            text.map_or("an error".to_string(), |text| format!("{text:?}"))
                        };
                        difference.get_or_insert(format!("{} instead of {}", shown(wanted), shown(found)));
                    }
                }
            }
            let Some(difference) = difference else { return Ok(named) };
            if nearest.as_ref().is_none_or(|(most, ..)| equal > *most) {
                nearest = Some((equal, named.name, difference));
            }
        }
        let (_, name, difference) = nearest.unwrap_or_default();
        let what = format!(
            "the chat template {}, which renders {difference} ({name} is the nearest)",
            template.origin()
        );
        let supported = NAMED_TEMPLATES.iter().map(|template| template.name).collect::<Vec<_>>().join(", ");
        Err(Error::Unsupported { what, supported }.into())
    }
}
