//! Where the assistant speaks in a rendered conversation, for templates that do not mark it with `{% generation %}`.

use std::ops::Range;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::{ChatTemplate, Conversation, RenderOptions, SpecialToken, Tokenizer};

/// Stands in for a message whose place is sought; a noncharacter, so no message contains it.
const PROBE: &str = "\u{fdd2}";

/// The token that ends the assistant's turn: the first added token that the template writes after the content, or
/// else `eos_token`.
pub fn end_of_turn(tokenizer: &Tokenizer, template: &ChatTemplate) -> Option<SpecialToken> {
    let messages = [json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": PROBE})];
    let text = template.render(&messages, &RenderOptions::default()).unwrap_or_default();
    let after = text.rsplit_once(PROBE).map_or("", |(_, after)| after);
    let added = tokenizer.inner().get_added_tokens_decoder();
    added
        .into_iter()
        .filter_map(|(id, token)| Some((after.find(&token.content)?, id, token.content)))
        // Of tokens that start at one place the tokenizer takes the longest.
        .min_by_key(|(at, _, content)| (*at, usize::MAX - content.len()))
        .map(|(_, id, content)| SpecialToken { content, id })
        .or_else(|| tokenizer.eos_token().cloned())
}

/// What the template writes around each of the assistant's turns, where it is the same for all of them. Then one rendering
/// shows where they stand; [`assistant_spans`] needs two for each turn.
#[derive(Clone, Debug)]
pub(super) struct TurnMarkers {
    /// What `add_generation_prompt` writes.
    header: String,
    end_of_turn: String,
}

impl TurnMarkers {
    /// The markers of `template`, if they show the same turns as [`assistant_spans`] in conversations of one and two turns
    /// with and without a system message, with thoughts, and with texts that begin and end in space.
    pub(super) fn detect(template: &ChatTemplate, end_of_turn: &str) -> Option<TurnMarkers> {
        let user = json!({"role": "user", "content": "Hi"});
        let question = [user.clone()];
        let plain = template.render(&question, &RenderOptions::default()).ok()?;
        let open = RenderOptions { add_generation_prompt: true, ..Default::default() };
        let header = template.render(&question, &open).ok()?.strip_prefix(plain.as_str())?.to_owned();
        let markers = TurnMarkers { header, end_of_turn: end_of_turn.to_owned() };
        if markers.header.trim().is_empty() {
            return None;
        }
        let system = json!({"role": "system", "content": "Be terse."});
        for answer in ["Yes.", " Yes, and\nno \n", "\n\nYes", "<think>\nwell\n</think>\n\nYes."] {
            let assistant = json!({"role": "assistant", "content": answer});
            let messages = [system.clone(), user.clone(), assistant.clone(), user.clone(), assistant.clone()];
            for part in [&messages[1..3], &messages[1..], &messages[..3], &messages[..]] {
                let conversation = Conversation { messages: part.to_vec(), ..Default::default() };
                let Ok(text) = template.render(part, &RenderOptions::default()) else { continue };
                let slow = assistant_spans(template, &conversation, &text, Some(end_of_turn)).ok()?;
                if markers.spans(&conversation, &text)? != slow {
                    return None;
                }
            }
        }
        Some(markers)
    }

    /// As [`assistant_spans`]; `None` where the markers do not tell: tools, thoughts in fields of their own, parts, a text
    /// that contains a marker, answers to nobody.
    pub(super) fn spans(&self, conversation: &Conversation, text: &str) -> Option<Vec<Range<usize>>> {
        if conversation.tools.is_some() || !conversation.variables.is_empty() {
            return None;
        }
        let mut turns = 0;
        let mut before = "";
        for message in &conversation.messages {
            let fields = message.as_object()?;
            let (role, content) = (message["role"].as_str()?, message["content"].as_str()?);
            let in_order = match role {
                "system" => before.is_empty(),
                "user" => before != "user",
                "assistant" => before == "user",
                _ => false,
            };
            if !in_order
                || fields.len() != 2
                || content.contains(&self.end_of_turn)
                || content.contains(&self.header)
            {
                return None;
            }
            turns += usize::from(role == "assistant");
            before = role;
        }
        let mut spans = Vec::with_capacity(turns);
        let mut at = 0;
        while let Some(found) = text[at..].find(&self.header) {
            let start = at + found + self.header.len();
            at = start + text[start..].find(&self.end_of_turn)? + self.end_of_turn.len();
            spans.push(start..at);
        }
        (spans.len() == turns).then_some(spans)
    }
}

/// The byte ranges of `text`, the rendered `conversation`, that are the assistant's: from behind the header that
/// `add_generation_prompt` writes up to and with the end-of-turn token.
///
/// # Errors
/// A turn whose place cannot be told, because the template neither shows it where the prompt ends nor at one place.
pub(super) fn assistant_spans(
    template: &ChatTemplate,
    conversation: &Conversation,
    text: &str,
    end_of_turn: Option<&str>,
) -> Result<Vec<Range<usize>>> {
    let messages = &conversation.messages;
    let options = RenderOptions {
        tools: conversation.tools.as_ref(),
        variables: Some(&conversation.variables),
        ..Default::default()
    };
    let mut spans: Vec<Range<usize>> = Vec::new();
    for (i, _) in messages.iter().enumerate().filter(|(_, message)| message["role"] == "assistant") {
        let prompt = template
            .render(&messages[..i], &RenderOptions { add_generation_prompt: true, ..options })
            .unwrap_or_default();
        let start = Some(prompt.len()).filter(|length| *length > 0 && text.starts_with(&prompt));
        let end = if i + 1 == messages.len() {
            Some(text.len())
        } else {
            let closed = template.render(&messages[..=i], &options).ok();
            closed.filter(|closed| text.starts_with(closed)).map(|closed| closed.len())
        };
        let shown = match (start, end) {
            (Some(start), Some(end)) => start..end,
            _ => match changed_by(template, messages, i, &options, text) {
                Some(shown) => {
                    start.unwrap_or_else(|| behind_prompt(text, shown.start, &prompt))
                        ..end.unwrap_or(shown.end)
                }
                None => bail!(
                    "chat template {}: cannot tell where message {} (assistant) stands in the rendered text; mark it \
                     in the template with {{% generation %}} .. {{% endgeneration %}}, or train on all tokens",
                    template.origin(),
                    i + 1
                ),
            },
        };
        let span = shown.start..behind_end_of_turn(text, &shown, end.is_some(), end_of_turn);
        // Templates that repeat a turn's header in front of the next one could make ranges overlap.
        let start = span.start.max(spans.last().map_or(0, |last| last.end));
        if start < span.end {
            spans.push(start..span.end);
        }
    }
    Ok(spans)
}

/// Content starts at `at`; the space before it is the assistant's as well if a prompt ends without it.
fn behind_prompt(text: &str, at: usize, prompt: &str) -> usize {
    let tail = prompt.char_indices().rev().nth(7).map_or(prompt, |(from, _)| &prompt[from..]);
    let header = text[..at].trim_end();
    let spaces = text[header.len()..at].char_indices().map(|(space, _)| header.len() + space);
    spaces.rev().find(|end| !tail.is_empty() && text[..*end].ends_with(tail)).unwrap_or(at)
}

/// The part of `text` that changes with message `i`.
fn changed_by(
    template: &ChatTemplate,
    messages: &[Value],
    i: usize,
    options: &RenderOptions,
    text: &str,
) -> Option<Range<usize>> {
    let mut changed = messages.to_vec();
    changed[i] = json!({"role": "assistant", "content": PROBE});
    let other = template.render(&changed, options).ok().or_else(|| {
        // A tool's answer may be refused without its call.
        changed[i] = messages[i].clone();
        changed[i]["content"] = Value::from(PROBE);
        template.render(&changed, options).ok()
    })?;
    let (probe, _) = other.split_once(PROBE)?;
    let same: usize =
        text.chars().zip(probe.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
    let rest = &other[probe.len() + PROBE.len()..];
    let tail: usize = text[same..]
        .chars()
        .rev()
        .zip(rest.chars().rev())
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum();
    Some(same..text.len() - tail)
}

/// Where a turn really ends: behind its last end-of-turn token. What follows (a line break, as a rule) belongs to the
/// header of the next turn: no model is asked to write it.
fn behind_end_of_turn(text: &str, shown: &Range<usize>, whole: bool, end_of_turn: Option<&str>) -> usize {
    let Some(token) = end_of_turn else { return shown.end };
    if whole {
        return text[shown.clone()].rfind(token).map_or(shown.end, |at| shown.start + at + token.len());
    }
    let rest = &text[shown.end..];
    let space = rest.len() - rest.trim_start().len();
    if rest[space..].starts_with(token) { shown.end + space + token.len() } else { shown.end }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use rand::Rng;
    use rand::seq::IndexedRandom;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;

    const PIECES: [&str; 12] = [
        "yes",
        " ",
        "\n",
        "\n\n",
        "ü",
        "<think>",
        "</think>",
        "assistant",
        "\n<|im_start|>",
        "<|im_end|>",
        "[/INST]",
        "#",
    ];

    fn text(rng: &mut ChaCha8Rng) -> String {
        (0..rng.random_range(0..6)).map(|_| *PIECES.choose(rng).unwrap()).collect()
    }

    /// Wherever the markers give an answer, it is that of the slow way.
    #[test]
    fn markers_and_renderings_show_the_same_turns() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
        let cases: Value =
            serde_json::from_str(&fs::read_to_string(golden.join("cases.json")).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_dir(&golden.join("bpe")).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut fast = 0;
        for (name, source) in cases["templates"].as_object().unwrap() {
            let template = ChatTemplate::new(source.as_str().unwrap(), name).unwrap();
            let Some(end) = end_of_turn(&tokenizer, &template) else { continue };
            let Some(markers) = TurnMarkers::detect(&template, &end.content) else { continue };
            for _ in 0..300 {
                let mut messages = Vec::new();
                if rng.random_bool(0.3) {
                    messages.push(json!({"role": "system", "content": text(&mut rng)}));
                }
                for _ in 0..rng.random_range(1..4) {
                    messages.push(json!({"role": "user", "content": text(&mut rng)}));
                    messages.push(json!({"role": "assistant", "content": text(&mut rng)}));
                }
                let conversation = Conversation { messages, ..Default::default() };
                let Ok(rendered) = template.render(&conversation.messages, &RenderOptions::default()) else {
                    continue;
                };
                if let Some(spans) = markers.spans(&conversation, &rendered) {
                    fast += 1;
                    let slow =
                        assistant_spans(&template, &conversation, &rendered, Some(&end.content)).unwrap();
                    assert_eq!(spans, slow, "{name}: {rendered:?}");
                }
            }
        }
        assert!(fast > 300, "{fast}");
    }
}
