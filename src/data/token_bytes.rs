//! What a single token adds to a text.

use std::collections::HashMap;

use tokenizers::DecoderWrapper;

use super::Tokenizer;
use super::byte_bpe::letters;

/// The bytes of single tokens, which may be less than a character.
pub struct TokenBytes {
    /// Bytes by their letters, where the vocabulary is written in those.
    letters: Option<HashMap<char, u8>>,
    /// Whether `<0x41>` stands for a byte.
    byte_fallback: bool,
    /// A token to decode others behind, and its text: the spaces before a text's first token are lost.
    before: Option<(u32, String)>,
}

impl TokenBytes {
    /// For the tokens of `tokenizer`.
    pub fn new(tokenizer: &Tokenizer) -> TokenBytes {
        let decoders = match tokenizer.inner().get_decoder() {
            Some(DecoderWrapper::Sequence(sequence)) => sequence.get_decoders(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        let has = |wanted: fn(&DecoderWrapper) -> bool| decoders.iter().any(wanted);
        let before = || {
            let id = *tokenizer.encode("a", false).ok()?.last()?;
            Some((id, tokenizer.decode(&[id], false).ok()?))
        };
        TokenBytes {
            letters: has(|decoder| matches!(decoder, DecoderWrapper::ByteLevel(_)))
                .then(|| letters().into_iter().zip(0..=u8::MAX).collect()),
            byte_fallback: has(|decoder| matches!(decoder, DecoderWrapper::ByteFallback(_))),
            before: before(),
        }
    }

    /// The bytes of `id`, of a special token those of its name; none for an id without a token.
    pub fn of(&self, tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
        let inner = tokenizer.inner();
        let Some(token) = inner.id_to_token(id) else { return Vec::new() };
        if inner.get_added_vocabulary().get_added_tokens_decoder().contains_key(&id) {
            return token.into_bytes();
        }
        if let Some(letters) = &self.letters {
            let bytes: Option<Vec<u8>> = token.chars().map(|letter| letters.get(&letter).copied()).collect();
            return bytes.unwrap_or_else(|| token.into_bytes());
        }
        if let Some(byte) = fallback_byte(&token).filter(|_| self.byte_fallback) {
            return vec![byte];
        }
        let behind = self.before.as_ref().and_then(|(before, shown)| {
            let text = tokenizer.decode(&[*before, id], false).ok()?;
            text.strip_prefix(shown.as_str()).map(str::to_owned)
        });
        behind.or_else(|| tokenizer.decode(&[id], false).ok()).unwrap_or_default().into_bytes()
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let named = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u8::from_str_radix(digits, 16).ok().filter(|_| named)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn tokens_joined_are_the_text() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let text = "The sky é 🦀  is\tblue, 東京.";
        for folder in ["examples/tiny/model", "tests/golden/data/bpe", "tests/golden/data/spm"] {
            let tokenizer = Tokenizer::from_dir(&root.join(folder)).unwrap();
            let bytes = TokenBytes::new(&tokenizer);
            let ids = tokenizer.encode(text, false).unwrap();
            let joined: Vec<u8> = ids.iter().flat_map(|&id| bytes.of(&tokenizer, id)).collect();
            let joined = String::from_utf8(joined).unwrap();
            // A sentencepiece tokenizer puts a space before the text.
            assert_eq!(joined.strip_prefix(' ').unwrap_or(&joined), text, "{folder}");
        }
    }

    #[test]
    fn bytes_have_names() {
        assert_eq!(fallback_byte("<0xE2>"), Some(0xE2));
        for other in ["<0x>", "<0x1>", "<0xZZ>", "0xE2", "<0x+1>"] {
            assert_eq!(fallback_byte(other), None, "{other}");
        }
    }
}
