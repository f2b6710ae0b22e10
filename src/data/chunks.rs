//! Long texts into samples that overlap.

use std::ops::Range;

use anyhow::{Result, bail};

use super::Tokenizer;

/// How a text is cut.
#[derive(Clone, Copy, Debug)]
pub struct ChunkOptions {
    /// Tokens of a chunk at most.
    pub chunk_size: usize,
    /// Tokens that a chunk repeats of the one before.
    pub overlap: usize,
}

/// A chunk may end this share of its length early to end with a paragraph, a line, a sentence or a word.
const EARLY: usize = 4;

/// Cuts `text` into byte ranges of at most `chunk_size` tokens each, of which the first `overlap` tokens (about: a chunk
/// begins with a word) are the end of the one before. A chunk ends behind a paragraph if one ends in its last quarter, or
/// else behind a line, a sentence, a word. All of the text is in some chunk.
///
/// # Errors
/// A `chunk_size` of 0, or an `overlap` of half of it or more.
pub fn chunks(tokenizer: &Tokenizer, text: &str, options: &ChunkOptions) -> Result<Vec<Range<usize>>> {
    let ChunkOptions { chunk_size, overlap } = *options;
    if chunk_size == 0 || overlap * 2 >= chunk_size {
        bail!("an overlap of {overlap} tokens must be less than half of the {chunk_size} tokens of a chunk");
    }
    let (_, offsets) = tokenizer.encode_with_offsets(text, false)?;
    let mut found = Vec::new();
    let mut first = 0;
    while first < offsets.len() {
        let start = if found.is_empty() { 0 } else { character(text, offsets[first].0) };
        let last = first + chunk_size;
        if last >= offsets.len() {
            found.push(start..text.len());
            break;
        }
        let latest = character(text, offsets[last].0);
        let earliest = character(text, offsets[last - chunk_size / EARLY].0);
        let end = earliest + good_end(&text[earliest..latest]).unwrap_or(latest - earliest);
        found.push(start..end);
        let next = offsets.partition_point(|offset| offset.0 < end);
        first = word_start(text, &offsets, next.saturating_sub(overlap), next).max(first + 1);
    }
    Ok(found)
}

/// The start of the character that holds byte `at`: a token may be part of a character.
fn character(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0)
}

/// Behind the last paragraph, line, sentence or word of `text`, in this order.
fn good_end(text: &str) -> Option<usize> {
    ["\n\n", "\n", ". ", " "].iter().find_map(|end| text.rfind(end).map(|at| at + end.len()))
}

/// The first token from `from` on, and before `to`, that begins a word; `from` if there is none.
fn word_start(text: &str, offsets: &[(usize, usize)], from: usize, to: usize) -> usize {
    let begins_word = |token: &usize| {
        let at = character(text, offsets[*token].0);
        text[..at].ends_with(char::is_whitespace) || text[at..].starts_with(char::is_whitespace)
    };
    (from..to).find(begins_word).unwrap_or(from)
}
