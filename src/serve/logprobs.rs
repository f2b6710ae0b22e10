//! Log-probabilities in the forms of OpenAI's API.

use std::borrow::Cow;
use std::fmt::Write;

use serde_json::{Map, Value, json};

/// What OpenAI's API says for less.
const LEAST: f32 = -9999.0;

/// A token of an answer beside those that might have stood in its place.
pub(super) struct TokenLogprobs {
    pub(super) bytes: Vec<u8>,
    /// Where it begins in the answer's text, in characters.
    pub(super) offset: usize,
    pub(super) logprob: f32,
    /// Id, bytes and log-probability of each.
    pub(super) top: Vec<(i64, Vec<u8>, f32)>,
}

/// Of `/v1/chat/completions`.
pub(super) fn of_chat(tokens: &[TokenLogprobs]) -> Value {
    let one = |bytes: &[u8], logprob: f32| json!({"token": name(bytes, ""), "logprob": logprob.max(LEAST), "bytes": bytes});
    let content = tokens.iter().map(|token| {
        let mut entry = one(&token.bytes, token.logprob);
        entry["top_logprobs"] = token.top.iter().map(|(_, bytes, logprob)| one(bytes, *logprob)).collect();
        entry
    });
    json!({"content": content.collect::<Vec<_>>(), "refusal": null})
}

/// Of `/v1/completions`.
pub(super) fn of_text(tokens: &[TokenLogprobs]) -> Value {
    const PREFIX: &str = "bytes:";
    let top = |token: &TokenLogprobs| -> Value {
        let mut top = Map::new();
        for (id, bytes, logprob) in &token.top {
            // A byte may have a token of its own beside that of its character: the second has vLLM's name for any token.
            let key = name(bytes, PREFIX);
            let key = if top.contains_key(&*key) { format!("token_id:{id}").into() } else { key };
            top.insert(key.into_owned(), json!(logprob.max(LEAST)));
        }
        Value::Object(top)
    };
    json!({
        "tokens": tokens.iter().map(|token| name(&token.bytes, PREFIX)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().map(|token| token.logprob.max(LEAST)).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().map(top).collect::<Vec<_>>(),
        "text_offset": tokens.iter().map(|token| token.offset).collect::<Vec<_>>(),
    })
}

/// A token as text; one that is no UTF-8 by its bytes, `\\xe2\\x9c`, behind `prefix`.
fn name<'a>(bytes: &'a [u8], prefix: &str) -> Cow<'a, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => bytes
            .iter()
            .fold(prefix.to_string(), |mut name, byte| {
                let _ = write!(name, "\\x{byte:02x}");
                name
            })
            .into(),
    }
}

/// Counts the characters of a text that comes in pieces of bytes.
#[derive(Default)]
pub(super) struct Characters {
    whole: usize,
    /// The beginning of one more.
    part: Vec<u8>,
}

impl Characters {
    /// Adds a piece; the number of characters before the one that it begins in.
    pub(super) fn add(&mut self, piece: &[u8]) -> usize {
        let before = self.whole;
        self.part.extend_from_slice(piece);
        let mut left = Vec::new();
        for chunk in self.part.utf8_chunks() {
            // Bytes that are no character are shown as one.
            self.whole += usize::from(!left.is_empty()) + chunk.valid().chars().count();
            left = chunk.invalid().to_vec();
        }
        if std::str::from_utf8(&left).is_err_and(|error| error.error_len().is_some()) {
            self.whole += 1;
            left.clear();
        }
        self.part = left;
        before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_begin_at_characters() {
        let starts = |pieces: &[&[u8]]| -> Vec<usize> {
            let mut characters = Characters::default();
            pieces.iter().map(|piece| characters.add(piece)).collect()
        };
        assert_eq!(starts(&[b"The", b" sky", "\u{e9}t\u{e9}".as_bytes(), b"!"]), [0, 3, 7, 10]);
        // A character of three bytes in three tokens, and the next.
        assert_eq!(starts(&[b"a", b"\xe6", b"\x9d", b"\xb1", b"b", b"c"]), [0, 1, 1, 1, 2, 3]);
        // Bytes that are none.
        assert_eq!(starts(&[b"\xff", b"\xe6", b"a", b"\x9d\x9d", b""]), [0, 1, 1, 3, 5]);
    }

    #[test]
    fn no_token_hides_another() {
        let top = vec![
            (68, vec![0x41], -0.5),
            (400, b"A".to_vec(), -1.0),
            (5, vec![0xe2, 0x9c], -2.0),
            (6, vec![0xe2, 0x9d], f32::NEG_INFINITY),
        ];
        let tokens = [TokenLogprobs { bytes: b" A".to_vec(), offset: 3, logprob: -0.25, top }];
        let text = of_text(&tokens);
        let expected =
            json!({"A": -0.5, "token_id:400": -1.0, "bytes:\\xe2\\x9c": -2.0, "bytes:\\xe2\\x9d": -9999.0});
        assert_eq!(text["top_logprobs"], json!([expected]));
        assert_eq!((&text["tokens"], &text["text_offset"]), (&json!([" A"]), &json!([3])));
        let chat = of_chat(&tokens);
        let third = json!({"token": "\\xe2\\x9c", "logprob": -2.0, "bytes": [0xe2, 0x9c]});
        assert_eq!(chat["content"][0]["top_logprobs"][2], third);
    }
}
