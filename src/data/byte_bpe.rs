//! A fast path for tokenizers of byte-level BPE: the ids and offsets of the tokenizers library, without its copies.
//!
//! The library keeps, for each piece of a text, the piece, its bytes as letters, and the place of each letter in the
//! text. Here pieces are slices of the text, and a piece that was seen before is one look-up: its tokens are what the
//! library's model made of it the first time. All else is left to the library: other pipelines, text that is not in
//! the form NFC already, vocabularies that lack a byte.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Mutex;

use aho_corasick::{AhoCorasick, MatchKind};
use serde_json::Value;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::utils::SysRegex;
use tokenizers::{AddedToken, Model, ModelWrapper, NormalizerWrapper, SplitDelimiterBehavior};
use unicode_normalization::{IsNormalized, is_nfc_quick};

use super::Offsets;

/// GPT-2's pattern (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>), which `ByteLevel` uses by itself.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// What a thread remembers of pieces, in bytes: beyond it everything is forgotten.
const CACHE_BYTES: usize = 32 << 20;
/// A piece in the cache beside its text and tokens.
const ENTRY_BYTES: usize = 64;

pub(super) struct ByteBpe {
    nfc: bool,
    /// Tokens that are found before normalisation, and those found after it.
    added: [AddedTokens; 2],
    /// Each cuts the pieces of the one before.
    cuts: Vec<Cut>,
    /// Offsets leave out a token's spaces; whether the one space at the start of the text stays.
    trims: Option<bool>,
    /// What the post-processor puts before and behind a text.
    around: [Vec<u32>; 2],
    letters: [char; 256],
    /// One for each thread that encodes at the time.
    caches: Mutex<Vec<Cache>>,
}

/// What becomes a piece of its own.
enum Cut {
    Matches(SysRegex),
    /// Every character that is a number.
    Digits,
}

/// Ids and offsets as they are found.
#[derive(Default)]
struct Tokens {
    ids: Vec<u32>,
    offsets: Vec<Offsets>,
}

/// The tokens of pieces, by their ids and bytes.
#[derive(Default)]
struct Cache {
    places: HashMap<Box<str>, Range<usize>>,
    tokens: Vec<(u32, usize)>,
    bytes: usize,
}

impl ByteBpe {
    /// `None` if `inner` is anything but, in this order: NFC or nothing, cuts by patterns, bytes as letters, BPE without
    /// dropout.
    pub fn new(inner: &tokenizers::Tokenizer) -> Option<ByteBpe> {
        let letters = letters();
        let ModelWrapper::BPE(model) = inner.get_model() else { return None };
        let empty = |text: &Option<String>| text.as_ref().is_none_or(String::is_empty);
        let plain = model.dropout.is_none_or(|dropout| dropout == 0.0)
            && empty(&model.continuing_subword_prefix)
            && empty(&model.end_of_word_suffix)
            && letters.iter().all(|letter| model.token_to_id(letter.encode_utf8(&mut [0; 4])).is_some());
        if !plain || inner.get_encode_special_tokens() {
            return None;
        }
        let nfc = match inner.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            _ => return None,
        };
        let (trims, around) = post_processor(inner)?;
        let added = inner.get_added_tokens_decoder();
        let found = |normalized: bool| {
            let tokens = added.iter().filter(|(_, token)| token.normalized == normalized);
            AddedTokens::new(tokens.map(|(id, token)| (*id, token.clone())).collect(), nfc && normalized)
        };
        Some(ByteBpe {
            nfc,
            added: [found(false)?, found(true)?],
            cuts: cuts(inner.get_pre_tokenizer()?)?,
            trims,
            around,
            letters,
            caches: Mutex::default(),
        })
    }

    /// What `inner`, for which this was made, gives for `text`; `None` if only it can say.
    pub fn encode(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        add_special_tokens: bool,
    ) -> Option<(Vec<u32>, Vec<Offsets>)> {
        // No character below U+0300 composes or is out of order.
        let normal =
            || text.chars().all(|c| c < '\u{300}') || matches!(is_nfc_quick(text.chars()), IsNormalized::Yes);
        if self.nfc && !normal() {
            return None;
        }
        let mut cache = self.caches.lock().ok()?.pop().unwrap_or_default();
        let mut tokens = Tokens::default();
        let whole = self.text(inner, text, &mut cache, &mut tokens);
        self.caches.lock().ok()?.push(cache);
        whole?;
        let Tokens { mut ids, mut offsets } = tokens;
        if add_special_tokens {
            let [before, behind] = &self.around;
            ids.splice(0..0, before.iter().copied());
            offsets.splice(0..0, before.iter().map(|_| (0, 0)));
            ids.extend(behind);
            offsets.extend(behind.iter().map(|_| (0, 0)));
        }
        Some((ids, offsets))
    }

    fn text(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        cache: &mut Cache,
        tokens: &mut Tokens,
    ) -> Option<()> {
        for (outer, id) in self.added[0].parts(text, 0..text.len()) {
            let parts = if id.is_some() { vec![(outer, id)] } else { self.added[1].parts(text, outer) };
            for (part, id) in parts {
                if let Some(id) = id {
                    let (spaces, space) = (&text[part.clone()], |c: &char| *c == 'Ġ' || c.is_whitespace());
                    let around = [
                        spaces.chars().take_while(space).count(),
                        spaces.chars().rev().take_while(space).count(),
                    ];
                    self.push(id, (part.start, part.end), around, tokens);
                } else {
                    self.pieces(0, text, part, &mut |piece| self.piece(inner, text, piece, cache, tokens))?;
                }
            }
        }
        Some(())
    }

    /// Gives `each` the pieces of the `range` of `text` into which the cuts from `level` on take it apart.
    fn pieces(
        &self,
        level: usize,
        text: &str,
        range: Range<usize>,
        each: &mut dyn FnMut(Range<usize>) -> Option<()>,
    ) -> Option<()> {
        let part = &text[range.clone()];
        // A pattern sees only this part of the text, also where it looks ahead.
        let matches: Vec<Offsets> = match self.cuts.get(level) {
            None => return each(range),
            Some(Cut::Matches(pattern)) => pattern.find_iter(part).collect(),
            Some(Cut::Digits) => {
                let digits = part.char_indices().filter(|(_, c)| c.is_numeric());
                digits.map(|(start, c)| (start, start + c.len_utf8())).collect()
            }
        };
        let mut done = range.start;
        for (start, end) in matches {
            for piece in [done..range.start + start, range.start + start..range.start + end] {
                if !piece.is_empty() {
                    self.pieces(level + 1, text, piece, each)?;
                }
            }
            done = range.start + end;
        }
        if done < range.end { self.pieces(level + 1, text, done..range.end, each) } else { Some(()) }
    }

    fn piece(
        &self,
        inner: &tokenizers::Tokenizer,
        text: &str,
        piece: Range<usize>,
        cache: &mut Cache,
        tokens: &mut Tokens,
    ) -> Option<()> {
        let found = cache.find(&text[piece.clone()], |piece| {
            let letters: String = piece.bytes().map(|byte| self.letters[byte as usize]).collect();
            let found = inner.get_model().tokenize(&letters).ok()?;
            let bytes = |(start, end): Offsets| Some(letters.get(start..end)?.chars().count());
            let found: Option<Vec<_>> =
                found.iter().map(|token| Some((token.id, bytes(token.offsets)?))).collect();
            found.filter(|tokens| tokens.iter().map(|(_, bytes)| bytes).sum::<usize>() == piece.len())
        })?;
        let mut start = piece.start;
        for &(id, bytes) in found {
            let end = start + bytes;
            let spaces = match self.trims {
                Some(_) => {
                    let token = &text.as_bytes()[start..end];
                    let space = |byte: &&u8| **byte == b' ';
                    [token.iter().take_while(space).count(), token.iter().rev().take_while(space).count()]
                }
                None => [0, 0],
            };
            // A token that ends within a character stands for all of it.
            let (mut first, mut last) = (start, end);
            while !text.is_char_boundary(first) {
                first -= 1;
            }
            while !text.is_char_boundary(last) {
                last += 1;
            }
            self.push(id, (first, last), spaces, tokens);
            start = end;
        }
        Some(())
    }

    /// `spaces` are how many characters of the token are spaces, at its start and at its end.
    fn push(
        &self,
        id: u32,
        (mut start, mut end): Offsets,
        [mut leading, trailing]: [usize; 2],
        tokens: &mut Tokens,
    ) {
        if let Some(keeps_first) = self.trims {
            let first = tokens.ids.is_empty() || start == 0;
            if first && keeps_first && leading == 1 {
                leading = 0;
            }
            start = (start + leading).min(end);
            if trailing > 0 && end >= trailing {
                end = (end - trailing).max(start);
            }
        }
        tokens.ids.push(id);
        tokens.offsets.push((start, end));
    }
}

impl Cache {
    fn find(
        &mut self,
        piece: &str,
        tokenize: impl FnOnce(&str) -> Option<Vec<(u32, usize)>>,
    ) -> Option<&[(u32, usize)]> {
        // Not by `entry`, which wants a copy of the piece first.
        if let Some(place) = self.places.get(piece) {
            return Some(&self.tokens[place.clone()]);
        }
        let found = tokenize(piece)?;
        let bytes = ENTRY_BYTES + piece.len() + found.len() * size_of::<(u32, usize)>();
        if self.bytes + bytes > CACHE_BYTES {
            *self = Cache::default();
        }
        self.bytes += bytes;
        let start = self.tokens.len();
        self.tokens.extend(found);
        self.places.insert(piece.into(), start..self.tokens.len());
        Some(&self.tokens[start..])
    }
}

/// Texts that are one token each, whatever stands around them.
struct AddedTokens {
    matcher: Option<AhoCorasick>,
    tokens: Vec<(u32, AddedToken)>,
}

impl AddedTokens {
    /// `normalizes` says that the texts are normalised before they are looked for.
    fn new(tokens: Vec<(u32, AddedToken)>, normalizes: bool) -> Option<AddedTokens> {
        let plain = |token: &AddedToken| {
            let normal = !normalizes || matches!(is_nfc_quick(token.content.chars()), IsNormalized::Yes);
            normal && !token.single_word && !token.content.is_empty()
        };
        if !tokens.iter().all(|(_, token)| plain(token)) {
            return None;
        }
        let texts = tokens.iter().map(|(_, token)| &token.content);
        let matcher = match tokens.is_empty() {
            true => None,
            false => Some(AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(texts).ok()?),
        };
        Some(AddedTokens { matcher, tokens })
    }

    /// The `range` of `text` cut at these tokens, which may take the space beside them with them.
    fn parts(&self, text: &str, range: Range<usize>) -> Vec<(Range<usize>, Option<u32>)> {
        let mut parts = Vec::new();
        let mut done = range.start;
        let part = &text[range.clone()];
        for found in self.matcher.iter().flat_map(|matcher| matcher.find_iter(part)) {
            let (id, token) = &self.tokens[found.pattern().as_usize()];
            let (mut start, mut end) = (range.start + found.start(), range.start + found.end());
            if token.lstrip {
                start = (range.start + part[..found.start()].trim_end().len()).max(done);
            }
            if token.rstrip {
                end = range.end - part[found.end()..].trim_start().len();
            }
            if done < start {
                parts.push((done..start, None));
            }
            parts.push((start..end, Some(*id)));
            done = end;
        }
        if done < range.end {
            parts.push((done..range.end, None));
        }
        parts
    }
}

/// What cuts a text before its bytes become letters.
fn cuts(pre_tokenizer: &PreTokenizerWrapper) -> Option<Vec<Cut>> {
    let steps = match pre_tokenizer {
        PreTokenizerWrapper::Sequence(steps) => steps.as_ref(),
        one => std::slice::from_ref(one),
    };
    let (PreTokenizerWrapper::ByteLevel(bytes), steps) = steps.split_last()? else { return None };
    if bytes.add_prefix_space {
        return None;
    }
    let matches = |pattern: &str| SysRegex::new(pattern).ok().map(Cut::Matches);
    let cut = |step: &PreTokenizerWrapper| match step {
        PreTokenizerWrapper::Digits(digits) if digits.individual_digits => Some(Cut::Digits),
        PreTokenizerWrapper::Split(split) => match &split.pattern {
            SplitPattern::Regex(pattern)
                if split.behavior == SplitDelimiterBehavior::Isolated && !split.invert =>
            {
                matches(pattern)
            }
            _ => None,
        },
        _ => None,
    };
    steps.iter().map(cut).chain(bytes.use_regex.then(|| matches(GPT2))).collect()
}

type PostProcessor = (Option<bool>, [Vec<u32>; 2]);

/// [`ByteBpe::trims`] and [`ByteBpe::around`], of what comes as bytes' offsets first and a template second.
fn post_processor(inner: &tokenizers::Tokenizer) -> Option<PostProcessor> {
    let value = serde_json::to_value(inner.get_post_processor()).ok()?;
    let steps = match (&value, value["processors"].as_array()) {
        (Value::Null, _) => &[][..],
        (_, Some(steps)) => steps,
        (one, None) => std::slice::from_ref(one),
    };
    let (mut trims, mut around, mut templates) = (None, [Vec::new(), Vec::new()], 0);
    for step in steps {
        match step["type"].as_str()? {
            "ByteLevel" if templates == 0 && trims.is_none() => {
                if step["trim_offsets"].as_bool()? {
                    trims = Some(step["add_prefix_space"].as_bool()?);
                }
            }
            "TemplateProcessing" if templates == 0 => {
                for piece in step["single"].as_array()? {
                    if let Some(token) = piece["SpecialToken"]["id"].as_str() {
                        let ids = step["special_tokens"][token]["ids"].as_array()?;
                        let ids: Option<Vec<u32>> =
                            ids.iter().map(|id| id.as_u64()?.try_into().ok()).collect();
                        around[templates].extend(ids?);
                    } else if piece["Sequence"]["id"] == "A" && templates == 0 {
                        templates = 1;
                    } else {
                        return None;
                    }
                }
                if templates == 0 {
                    return None;
                }
            }
            _ => return None,
        }
    }
    Some((trims, around))
}

/// The letter for each byte: itself where it prints, or else the next one from U+0100 on.
pub(super) fn letters() -> [char; 256] {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = '\u{100}'..;
    std::array::from_fn(|byte| match byte as u8 {
        byte if prints(byte) => char::from(byte),
        _ => next.next().expect("there are 68 of these"),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn golden() -> tokenizers::Tokenizer {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/bpe/tokenizer.json");
        tokenizers::Tokenizer::from_file(path).unwrap()
    }

    /// tests/data/byte_bpe.rs compares the tokens, wherever they come from; here is where they come from.
    #[test]
    fn serves_what_it_can() {
        let mut inner = golden();
        inner.with_normalizer(Some(tokenizers::normalizers::NFC)).unwrap();
        let fast = ByteBpe::new(&inner).unwrap();
        for (text, served) in [("The heron's É 水", true), ("e\u{301}", false), ("", true)] {
            assert_eq!(fast.encode(&inner, text, true).is_some(), served, "{text:?}");
        }
        inner.with_normalizer(Some(tokenizers::normalizers::NFKC)).unwrap();
        assert!(ByteBpe::new(&inner).is_none());
    }

    #[test]
    fn what_it_remembers_is_bounded() {
        let mut cache = Cache::default();
        for n in 0..2_000_000 {
            let piece = format!("piece {n}");
            assert_eq!(cache.find(&piece, |_| Some(vec![(n, piece.len())])), Some(&[(n, piece.len())][..]));
            assert!(cache.bytes <= CACHE_BYTES && cache.places.len() <= CACHE_BYTES / ENTRY_BYTES);
        }
        assert!(cache.places.len() < 2_000_000);
    }
}
