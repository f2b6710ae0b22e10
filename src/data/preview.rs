use anyhow::Result;

use super::{TokenDataset, Tokenizer};

/// A stretch of a sample's text, all of it trained or all of it not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PreviewSpan {
    /// Decoded tokens, special ones included.
    pub text: String,
    /// Whether they are labels.
    pub trained: bool,
}

/// The text of `sample` as its tokens decode, in stretches of one mask, to show before a run.
pub fn preview(tokenizer: &Tokenizer, data: &TokenDataset, sample: usize) -> Result<Vec<PreviewSpan>> {
    let ids = data.ids(sample);
    let trained: Vec<bool> = data.trained(sample).collect();
    let mut spans = Vec::new();
    let mut shown = String::new();
    let mut end = 0;
    for run in trained.chunk_by(|a, b| a == b) {
        end += run.len();
        // Decoding from the start keeps the spaces that some tokenizers drop at the start of a text.
        let decoded = tokenizer.decode(&ids[..end], false)?;
        let same = shown.bytes().zip(decoded.bytes()).take_while(|(a, b)| a == b).count();
        let from = (0..=same).rev().find(|at| decoded.is_char_boundary(*at)).unwrap_or(0);
        spans.push(PreviewSpan { text: decoded[from..].to_owned(), trained: run[0] });
        shown = decoded;
    }
    Ok(spans)
}
