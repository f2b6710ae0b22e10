//! What makes two rows the same.

use std::io::{self, Write};

use sha2::{Digest, Sha256};

use super::lint::texts;
use super::{Example, Row};

/// SHA-256, cut to 16 bytes: among 10^9 rows two differing ones share it with a chance below 10^-20.
pub(super) type Fingerprint = u128;

struct Hasher(Sha256);

impl Write for Hasher {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn finish(hasher: Sha256) -> Fingerprint {
    let digest = hasher.finalize();
    u128::from_le_bytes(digest[..16].try_into().expect("a digest has 32 bytes"))
}

/// What is trained on: two rows of one fingerprint make the same sample, whatever their other columns.
pub(super) fn fingerprint(example: &Example) -> Fingerprint {
    let mut hasher = Hasher(Sha256::new());
    let value = match example {
        Example::Text(text) => return finish(Sha256::new().chain_update(b"t").chain_update(text)),
        Example::PromptCompletion { prompt, completion } => {
            let lengths = (prompt.len() as u64).to_le_bytes();
            let hasher = Sha256::new().chain_update(b"p").chain_update(lengths);
            return finish(hasher.chain_update(prompt).chain_update(completion));
        }
        Example::Tokens { input_ids, trained } => {
            let hasher = Sha256::new().chain_update(b"i").chain_update(bytemuck::cast_slice(input_ids));
            return finish(
                hasher.chain_update(trained.iter().map(|trained| u8::from(*trained)).collect::<Vec<_>>()),
            );
        }
        Example::Conversation(conversation) => (&conversation.messages, &conversation.tools),
    };
    serde_json::to_writer(&mut hasher, &value)
        .expect("JSON values always serialise, and the hasher takes all");
    finish(hasher.0)
}

/// The question of a row, without regard to case and space: what must not stand in both training and evaluation set.
pub(super) fn prompt_fingerprint(example: &Example) -> Fingerprint {
    let mut hasher = Sha256::new();
    let mut add = |text: &str| {
        for word in text.split_whitespace() {
            hasher.update(word.to_lowercase());
            hasher.update(b" ");
        }
    };
    match example {
        Example::Text(text) => add(text),
        Example::PromptCompletion { prompt, .. } => add(prompt),
        Example::Tokens { input_ids, trained } => {
            // Of tokens that are all trained, as of a text, all.
            let prompt = trained.iter().position(|trained| *trained).filter(|start| *start > 0);
            input_ids[..prompt.unwrap_or(input_ids.len())].iter().for_each(|id| add(&id.to_string()));
        }
        Example::Conversation(conversation) => {
            let messages = &conversation.messages;
            let last = messages.iter().rposition(|message| message["role"] == "assistant");
            messages[..last.unwrap_or(messages.len())].iter().flat_map(texts).for_each(add);
        }
    }
    finish(hasher)
}

/// All that a row says, for comparing rows word by word.
pub(super) fn whole_text(example: &Example) -> String {
    match example {
        Example::Text(text) => text.clone(),
        Example::PromptCompletion { prompt, completion } => format!("{prompt} {completion}"),
        Example::Tokens { input_ids, .. } => {
            input_ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" ")
        }
        Example::Conversation(conversation) => {
            let texts: Vec<&str> = conversation.messages.iter().flat_map(texts).collect();
            texts.join(" ")
        }
    }
}

/// A whole row, all columns in their order.
pub(super) fn row_fingerprint(row: &Row) -> Fingerprint {
    let mut hasher = Hasher(Sha256::new());
    serde_json::to_writer(&mut hasher, row).expect("JSON values always serialise, and the hasher takes all");
    finish(hasher.0)
}

/// The texts of all columns.
pub(super) fn row_text(row: &Row) -> String {
    let texts: Vec<String> =
        row.values().map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned)).collect();
    texts.join(" ")
}
