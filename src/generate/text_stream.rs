//! Tokens to text, piece by piece.

use anyhow::Result;

use crate::data::Tokenizer;

/// What a tokenizer puts for bytes that are not (yet) a character.
const REPLACEMENT: char = '\u{fffd}';
/// Tokens of the prompt that are decoded with the first new ones: a tokenizer strips the space of what it decodes first.
const CONTEXT: usize = 6;

/// Decodes a growing sequence; each call takes the same tokenizer. What it has given out is never taken back: half a character and what could be the start
/// of a stop string are held until more tokens come.
#[derive(Debug, Clone)]
pub struct TextStream {
    /// The last tokens; the text of the first `shown_ids` of them is `shown`.
    ids: Vec<u32>,
    shown_ids: usize,
    shown: String,
    /// Text that is decoded but held.
    held: String,
    stop: Vec<String>,
    stopped: bool,
}

impl TextStream {
    /// A stream of what follows `prompt`, up to the first of the `stop` strings.
    pub fn new(tokenizer: &Tokenizer, prompt: &[i64], stop: &[String]) -> Result<TextStream> {
        let ids: Vec<u32> =
            prompt[prompt.len().saturating_sub(CONTEXT)..].iter().map(|&id| id as u32).collect();
        let shown = tokenizer.decode(&ids, true)?;
        let (shown_ids, held, stop) = (ids.len(), String::new(), stop.to_vec());
        Ok(TextStream { ids, shown_ids, shown, held, stop, stopped: false })
    }

    /// Adds a token and gives the text that is certain by now, often none. Special tokens have no text.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: i64) -> Result<String> {
        self.ids.push(id as u32);
        let text = tokenizer.decode(&self.ids, true)?;
        if text.ends_with(REPLACEMENT) {
            return Ok(String::new());
        }
        self.advance(tokenizer, &text)?;
        Ok(self.release())
    }

    /// The rest: nothing more comes.
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String> {
        let text = tokenizer.decode(&self.ids, true)?;
        self.advance(tokenizer, &text)?;
        let certain = self.release();
        Ok(certain + &std::mem::take(&mut self.held))
    }

    /// Whether a stop string has ended the text.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// Moves what `text`, the decoded `ids`, adds to `shown` over to `held`.
    fn advance(&mut self, tokenizer: &Tokenizer, text: &str) -> Result<()> {
        let new = match text.strip_prefix(&self.shown) {
            Some(new) => new,
            // Some byte-fallback decoders change earlier characters when invalid bytes follow; those were given out.
            None => {
                let known = self.shown.chars().count();
                text.char_indices().nth(known).map_or("", |(at, _)| &text[at..])
            }
        };
        if new.is_empty() {
            return Ok(());
        }
        if !self.stopped {
            self.held.push_str(new);
        }
        self.ids.drain(..self.shown_ids);
        self.shown_ids = self.ids.len();
        self.shown = tokenizer.decode(&self.ids, true)?;
        Ok(())
    }

    /// Takes out of `held` what is before a stop string, or before what may become one.
    fn release(&mut self) -> String {
        let found = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = found {
            self.stopped = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let partial = |(at, _): &(usize, char)| {
            let rest = &self.held[*at..];
            self.stop.iter().any(|stop| stop.starts_with(rest))
        };
        let keep_from = self.held.char_indices().find(partial).map_or(self.held.len(), |(at, _)| at);
        let rest = self.held.split_off(keep_from);
        std::mem::replace(&mut self.held, rest)
    }
}
