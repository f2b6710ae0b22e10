//! What one row shows by itself: its texts, roles, tokens and mask.

use std::ops::Range;

use aho_corasick::{AhoCorasick, MatchKind};
use anyhow::{Context, Result};
use serde_json::Value;

use super::Rule;
use crate::data::encode::{Encoded, Shown};
use crate::data::{DatasetOptions, Example, SpecialToken, Tokenizer};

/// What chat templates of published models write, for a check without a tokenizer.
const KNOWN_TOKENS: [&str; 16] = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "[INST]",
    "[/INST]",
    "</s>",
];

const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// Checks of one row that need no other row.
pub(in crate::data) struct RowChecks {
    special_tokens: AhoCorasick,
    bos: Option<SpecialToken>,
    end_of_turn: Option<SpecialToken>,
    max_seq_length: usize,
}

/// A rule that a row breaks, and how.
pub(in crate::data) type Broken = (Rule, String);

impl RowChecks {
    pub(in crate::data) fn new(
        tokenizer: Option<&Tokenizer>,
        end_of_turn: Option<SpecialToken>,
        options: &DatasetOptions,
    ) -> Result<RowChecks> {
        let tokens = match tokenizer {
            Some(tokenizer) => tokenizer.special_tokens(),
            None => KNOWN_TOKENS.map(str::to_owned).to_vec(),
        };
        let special_tokens = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens)
            .context("searching for the tokenizer's special tokens")?;
        Ok(RowChecks {
            special_tokens,
            bos: tokenizer.and_then(|tokenizer| tokenizer.bos_token().cloned()),
            end_of_turn,
            max_seq_length: options.max_seq_length,
        })
    }

    /// Texts and roles.
    pub(in crate::data) fn example(&self, example: &Example) -> Vec<Broken> {
        let mut broken = Vec::new();
        match example {
            Example::Text(text) => {
                if text.trim().is_empty() {
                    broken.push((Rule::EmptyAnswer, "the text is empty".to_owned()));
                }
                replacement_character(text, "the text", &mut broken);
            }
            Example::PromptCompletion { prompt, completion } => {
                if completion.trim().is_empty() {
                    broken.push((Rule::EmptyAnswer, "the completion is empty".to_owned()));
                }
                if prompt.trim().is_empty() {
                    broken.push((Rule::EmptyPrompt, "the prompt is empty".to_owned()));
                }
                replacement_character(prompt, "the prompt", &mut broken);
                replacement_character(completion, "the completion", &mut broken);
            }
            Example::Conversation(conversation) => {
                role_order(&conversation.messages, &mut broken);
                for (message, number) in conversation.messages.iter().zip(1..) {
                    self.message(message, number, &mut broken);
                }
            }
            Example::Tokens { input_ids, .. } => {
                if input_ids.is_empty() {
                    broken.push((Rule::EmptyAnswer, "there are no tokens".to_owned()));
                }
            }
        }
        broken
    }

    fn message(&self, message: &Value, number: usize, broken: &mut Vec<Broken>) {
        let role = message["role"].as_str().unwrap_or_default();
        let name = || format!("message {number} ({role})");
        let mut empty = true;
        for text in texts(message) {
            empty &= text.trim().is_empty();
            replacement_character(text, &name(), broken);
            if let Some(found) = self.special_tokens.find(text) {
                let token = &text[found.range()];
                broken.push((Rule::TemplateTokens, format!("{} contains the special token {token}", name())));
            }
        }
        let says_otherwise = ["tool_calls", "reasoning_content", "thinking"]
            .iter()
            .any(|field| message.get(field).is_some_and(|value| !value.is_null()));
        let has_pictures =
            message["content"].as_array().is_some_and(|parts| parts.len() > texts(message).count());
        match role {
            "assistant" if empty && !says_otherwise && !has_pictures => {
                broken.push((Rule::EmptyAnswer, format!("{} is empty", name())));
            }
            "user" if empty && !has_pictures => {
                broken.push((Rule::EmptyPrompt, format!("{} is empty", name())))
            }
            _ => {}
        }
    }

    /// Whether [`encoded`](Self::encoded) would find nothing, as the text alone shows: it is too short to be cut, and the
    /// token that ends a turn, which stands for itself, is in what is trained.
    pub(in crate::data) fn are_surely_fine(&self, tokenizer: &Tokenizer, shown: &Shown) -> bool {
        let Some(end) = &self.end_of_turn else { return false };
        let text = &shown.text;
        let is_short = tokenizer.most_tokens(text.len()).is_some_and(|most| most <= self.max_seq_length);
        let two_bos = |bos: &SpecialToken| {
            text.strip_prefix(&bos.content).is_some_and(|rest| rest.starts_with(&bos.content))
        };
        // Nothing predicts the first token.
        let ends = |span: &Range<usize>| {
            text[span.clone()].rfind(&end.content).is_some_and(|at| span.start + at > 0)
        };
        let trains_end = match &shown.assistant {
            Some(spans) => spans.iter().any(ends),
            None => ends(&(0..text.len())),
        };
        is_short && trains_end && !self.bos.as_ref().is_some_and(two_bos)
    }

    /// Tokens and the label mask.
    pub(in crate::data) fn encoded(&self, example: &Example, encoded: &Encoded) -> Vec<Broken> {
        let mut broken = Vec::new();
        let (ids, trained) = (&encoded.ids, &encoded.trained);
        let length = ids.len();
        let kept = length.min(self.max_seq_length);
        let targets = |trained: &[bool]| trained.iter().skip(1).any(|trained| *trained);
        if length > kept {
            broken.push((
                Rule::TooLong,
                format!("{length} tokens, {} more than max_seq_length", length - kept),
            ));
        }
        if self.bos.as_ref().is_some_and(|bos| ids.starts_with(&[bos.id, bos.id])) {
            broken.push((Rule::DoubleBos, "the tokens begin with two bos tokens".to_owned()));
        }
        if !targets(&trained[..kept]) {
            let how = if targets(trained) {
                "max_seq_length cuts off all that is trained"
            } else {
                "no token is trained"
            };
            broken.push((Rule::AllMasked, how.to_owned()));
        } else if let (Example::Conversation(_), Some(token)) = (example, &self.end_of_turn) {
            let ends = ids.iter().zip(trained).skip(1).any(|(id, trained)| *trained && *id == token.id);
            if !ends {
                let how = format!("the end-of-turn token {} is not trained", token.content);
                broken.push((Rule::MissingEot, how));
            }
        }
        broken
    }
}

fn replacement_character(text: &str, what: &str, broken: &mut Vec<Broken>) {
    if let Some(at) = text.find('\u{fffd}') {
        let how = format!("{what} contains U+FFFD at byte {}: its source was not read as UTF-8", at + 1);
        broken.push((Rule::BrokenUtf8, how));
    }
}

/// The texts of a message: its content, or those of its parts.
pub(in crate::data) fn texts(message: &Value) -> impl Iterator<Item = &str> {
    let content = &message["content"];
    let parts = content.as_array().into_iter().flatten().filter_map(|part| part["text"].as_str());
    content.as_str().into_iter().chain(parts)
}

/// The first place at which the roles do not follow each other as in a conversation.
fn role_order(messages: &[Value], broken: &mut Vec<Broken>) {
    let role = |at: usize| messages[at]["role"].as_str().unwrap_or_default();
    let mut problem = None;
    let mut before = "";
    for at in 0..messages.len() {
        let now = role(at);
        let wrong = match now {
            _ if !ROLES.contains(&now) => Some("is of no known role".to_owned()),
            "system" | "developer" => (!matches!(before, "")).then(|| "does not stand first".to_owned()),
            "user" => (before == "user").then(|| "follows another of the same role".to_owned()),
            "assistant" => match before {
                "" | "system" => Some("answers nobody".to_owned()),
                "assistant" => Some("follows another of the same role".to_owned()),
                _ => None,
            },
            // A tool's answer, to a call or to another tool's answer.
            _ => (!matches!(before, "assistant" | "tool")).then(|| "answers no call".to_owned()),
        };
        problem = problem.or(wrong.map(|wrong| format!("message {} ({now}) {wrong}", at + 1)));
        before = match now {
            "developer" => "system",
            "function" | "ipython" => "tool",
            other => other,
        };
    }
    if before != "assistant" {
        let last = format!("the conversation ends with {before}: no assistant answers");
        problem = problem.or(Some(last));
    }
    broken.extend(problem.map(|problem| (Rule::RoleOrder, problem)));
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::data::encode::Encoder;
    use crate::data::{ChatTemplate, Conversation};

    /// Where the text shows that nothing is wrong, the tokens show nothing either.
    #[test]
    fn what_the_text_shows_the_tokens_show() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
        let cases: Value =
            serde_json::from_str(&fs::read_to_string(golden.join("cases.json")).unwrap()).unwrap();
        let mut compared = 0;
        for folder in ["bpe", "spm"] {
            for (name, source) in cases["templates"].as_object().unwrap() {
                let mut tokenizer = Tokenizer::from_dir(&golden.join(folder)).unwrap();
                tokenizer.set_chat_template(ChatTemplate::new(source.as_str().unwrap(), name).unwrap());
                for assistant_only_loss in [false, true] {
                    let options = DatasetOptions { assistant_only_loss, ..Default::default() };
                    let encoder = Encoder::new(&tokenizer, &options);
                    let checks =
                        RowChecks::new(Some(&tokenizer), encoder.end_of_turn.clone(), &options).unwrap();
                    for messages in cases["conversations"].as_object().unwrap().values() {
                        let messages = messages.as_array().unwrap().clone();
                        let conversation = Conversation { messages, ..Default::default() };
                        let Ok(shown) = encoder.show(&conversation) else { continue };
                        let encoded = encoder.tokenise(&conversation, &shown).unwrap();
                        let tokens = encoded.ids.len();
                        assert!(tokens <= tokenizer.most_tokens(shown.text.len()).unwrap(), "{name}");
                        if checks.are_surely_fine(&tokenizer, &shown) {
                            let broken = checks.encoded(&Example::Conversation(conversation), &encoded);
                            assert!(broken.is_empty(), "{folder} {name}: {:?} {broken:?}", shown.text);
                            compared += 1;
                        }
                    }
                }
            }
        }
        assert!(compared > 20, "{compared}");
    }
}
