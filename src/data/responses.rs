//! What the assistant says in texts that are rendered already, found by the markers around it.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::turns::end_of_turn;
use super::{RenderOptions, Tokenizer};

/// Markers around questions and answers (Unsloth's `instruction_part` and `response_part`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseMarkers {
    /// Begins a question, and so ends an answer: `<|im_start|>user\n`.
    pub instruction_part: String,
    /// Begins an answer: `<|im_start|>assistant\n`.
    pub response_part: String,
    /// Ends an answer where it stands in it; what follows it up to the next question is not the assistant's.
    pub eos_token: Option<String>,
}

/// Texts that no template contains, without space at their ends: some templates trim.
const PROBES: [&str; 4] =
    ["\u{fdd2}0\u{fdd2}", "\u{fdd2}1\u{fdd2}", "\u{fdd2}2\u{fdd2}", "\u{fdd2}3\u{fdd2}"];

const THOUGHT: &str = "<think>";

impl ResponseMarkers {
    /// Reads the markers off the tokenizer's chat template: a conversation of two turns is rendered, and what stands
    /// between the texts, less the end-of-turn token of the text before, is the marker.
    ///
    /// # Errors
    /// No chat template, or one that does not show all four texts in order.
    pub fn detect(tokenizer: &Tokenizer) -> Result<ResponseMarkers> {
        let template = tokenizer.chat_template().with_context(|| {
            format!(
                "{} has no chat template: give instruction_part and response_part",
                tokenizer.dir().display()
            )
        })?;
        let roles = ["user", "assistant", "user", "assistant"];
        let messages: Vec<_> =
            roles.iter().zip(PROBES).map(|(role, text)| json!({"role": role, "content": text})).collect();
        let text = template.render(&messages, &RenderOptions::default())?;
        let between = |before: &str, after: &str| {
            let (_, rest) = text.split_once(before)?;
            rest.split_once(after).map(|(between, _)| between)
        };
        let missing = || {
            format!(
                "chat template {} does not show two turns in order: give instruction_part and response_part",
                template.origin()
            )
        };
        let response = between(PROBES[0], PROBES[1]).with_context(missing)?;
        let instruction = between(PROBES[1], PROBES[2]).with_context(missing)?;
        let end_of_turn = end_of_turn(tokenizer, template).map(|token| token.content);
        // A thought is the assistant's, also one that the template opens for it.
        let response = response.split(THOUGHT).next().unwrap_or(response);
        let marker = |between: &str| {
            let behind_end =
                end_of_turn.as_ref().and_then(|end| Some(between.split_once(end.as_str())?.1.trim_start()));
            // A space is the tokenizer's to join to the word behind it.
            behind_end.unwrap_or(between).trim_matches(' ').to_owned()
        };
        let markers = ResponseMarkers {
            instruction_part: marker(instruction),
            response_part: marker(response),
            eos_token: tokenizer.eos_token().map(|token| token.content.clone()),
        };
        if markers.instruction_part.is_empty() || markers.response_part.is_empty() {
            bail!("{}", missing());
        }
        Ok(markers)
    }

    /// The byte ranges of `text` that are answers: from behind each response part up to and with the last eos token, or
    /// else up to the next instruction part, or to the end. `last_response_only` keeps the last one.
    pub fn spans(&self, text: &str, last_response_only: bool) -> Vec<Range<usize>> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        let mut at = 0;
        while let Some(found) = text[at..].find(&self.response_part) {
            let start = at + found + self.response_part.len();
            let next = text[start..].find(&self.instruction_part).map_or(text.len(), |length| start + length);
            // Two answers in a row, as after a tool's, are two turns.
            let again = text[start..next].find(&self.response_part).map_or(next, |length| start + length);
            let end = match &self.eos_token {
                Some(token) => text[start..again]
                    .rfind(token.as_str())
                    .map_or(again, |length| start + length + token.len()),
                None => again,
            };
            if start < end {
                spans.push(start..end);
            }
            at = again;
        }
        if last_response_only && spans.len() > 1 {
            spans.drain(..spans.len() - 1);
        }
        spans
    }

    /// The token ids of `text` and which of them are answers. A token that begins in a marker is none: it may be the
    /// marker itself, which takes the space behind it along.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        last_response_only: bool,
    ) -> Result<(Vec<u32>, Vec<bool>)> {
        let (ids, offsets) = tokenizer.encode_with_offsets(text, false)?;
        let mut spans = self.spans(text, last_response_only).into_iter().peekable();
        let trained = offsets
            .iter()
            .map(|(start, _)| {
                while spans.next_if(|span| span.end <= *start).is_some() {}
                spans.peek().is_some_and(|span| span.contains(start))
            })
            .collect();
        Ok((ids, trained))
    }
}
