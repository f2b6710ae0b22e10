//! The loop: logits, a token, its text, until something ends it.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::{Sampler, SamplingParams, Sequence, TextStream};
use crate::data::Tokenizer;
use crate::models::Decoder;

/// Room that a cache gets beforehand, in tokens; longer answers grow it.
const ROOM: usize = 1024;

/// What ended an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// A stop string.
    StopString,
    /// `max_new_tokens`, or the model's context is full.
    Length,
}

impl FinishReason {
    /// As in OpenAI's API: `stop` or `length`.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop | FinishReason::StopString => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// One token of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub id: i64,
    /// The text that became certain with this token; empty without a tokenizer.
    pub text: String,
}

/// A finished answer.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The new tokens, with the stop token that ended them.
    pub token_ids: Vec<i64>,
    /// Their text, up to the stop string; special tokens left out.
    pub text: String,
    pub finish_reason: FinishReason,
    pub prompt_tokens: usize,
    /// Time to read the prompt; 0 for samples that share the reading of another.
    pub prefill_seconds: f64,
    /// Time to choose and feed the new tokens.
    pub decode_seconds: f64,
}

/// Generates token by token: an iterator that ends after a stop token, a stop string or the last allowed token.
pub struct Generator<'s, 'a> {
    sequence: &'s mut Sequence<'a>,
    sampler: Sampler,
    text: Option<TextStream<'s>>,
    stop_token_ids: Vec<i64>,
    /// Length of the sequence at which `Length` ends it.
    end: usize,
    prompt_tokens: usize,
    finish_reason: Option<FinishReason>,
    failed: bool,
    /// `[V]`: the logits of the next token, if they are there already.
    row: Vec<f32>,
    row_is_next: bool,
    prefill_seconds: f64,
}

impl<'s, 'a> Generator<'s, 'a> {
    /// Continues `prompt_ids` on `sequence`, which keeps the cache of what it has in common with its last tokens. Without
    /// a tokenizer there is no text.
    ///
    /// # Errors
    /// Parameters without meaning, an empty prompt, one that fills the model's context, an id out of the vocabulary,
    /// stop strings without a tokenizer.
    pub fn new(
        sequence: &'s mut Sequence<'a>,
        tokenizer: Option<&'s Tokenizer>,
        prompt_ids: &[i64],
        params: &SamplingParams,
    ) -> Result<Generator<'s, 'a>> {
        Generator::stream(sequence, tokenizer, prompt_ids, params, 0)
    }

    /// As [`Generator::new`], drawing the stream of random numbers that `stream` names.
    fn stream(
        sequence: &'s mut Sequence<'a>,
        tokenizer: Option<&'s Tokenizer>,
        prompt_ids: &[i64],
        params: &SamplingParams,
        stream: u64,
    ) -> Result<Generator<'s, 'a>> {
        params.check()?;
        let (prompt_tokens, context) = (prompt_ids.len(), sequence.context());
        if prompt_tokens == 0 {
            bail!("the prompt is empty, and a model needs at least one token to continue");
        }
        if prompt_tokens >= context {
            bail!(
                "the prompt has {prompt_tokens} tokens, the model's context (max_position_embeddings) is {context}: \
                 shorten the prompt"
            );
        }
        sequence.set(prompt_ids)?;
        let end = context.min(prompt_tokens.saturating_add(params.max_new_tokens));
        sequence.reserve(end.min(prompt_tokens + ROOM))?;
        let text = tokenizer.map(|tokenizer| TextStream::new(tokenizer, prompt_ids, &params.stop));
        if text.is_none() && !params.stop.is_empty() {
            bail!("stop strings need a tokenizer, and this model has none");
        }
        let vocab_size = sequence.decoder().config.vocab_size as usize;
        Ok(Generator {
            sampler: Sampler::new(params, stream, prompt_ids, vocab_size),
            text: text.transpose()?,
            stop_token_ids: params.stop_token_ids.clone(),
            end,
            prompt_tokens,
            finish_reason: None,
            failed: false,
            row: vec![0.0; vocab_size],
            row_is_next: false,
            prefill_seconds: 0.0,
            sequence,
        })
    }

    /// What ended the answer; none while there is more to come.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    /// The tokens generated so far.
    pub fn token_ids(&self) -> &[i64] {
        &self.sequence.ids()[self.prompt_tokens..]
    }

    /// Reads the prompt, so that the first token comes at once.
    fn prefill(&mut self) -> Result<()> {
        let start = Instant::now();
        self.fill_row()?;
        self.prefill_seconds = start.elapsed().as_secs_f64();
        Ok(())
    }

    fn fill_row(&mut self) -> Result<()> {
        let logits = self.sequence.logits()?;
        logits.f_copy_data(&mut self.row, logits.numel())?;
        self.row_is_next = true;
        Ok(())
    }

    fn advance(&mut self) -> Result<Token> {
        if !self.row_is_next {
            self.fill_row()?;
        }
        self.row_is_next = false;
        let id = self.sampler.sample(&mut self.row)?;
        self.sequence.push(id);
        let is_stop = self.stop_token_ids.contains(&id);
        let mut text = String::new();
        if let Some(stream) = &mut self.text
            && !is_stop
        {
            text = stream.push(id)?;
        }
        let stopped = self.text.as_ref().is_some_and(TextStream::stopped);
        self.finish_reason = if is_stop {
            Some(FinishReason::Stop)
        } else if stopped {
            Some(FinishReason::StopString)
        } else if self.sequence.ids().len() >= self.end {
            Some(FinishReason::Length)
        } else {
            None
        };
        if let Some(stream) = &mut self.text
            && self.finish_reason.is_some()
        {
            text += &stream.finish()?;
            // The last piece may complete a stop string.
            if stream.stopped() && !is_stop {
                self.finish_reason = Some(FinishReason::StopString);
            }
        }
        Ok(Token { id, text })
    }

    /// Runs to the end, showing every token to `on_token`.
    fn run(mut self, mut on_token: impl FnMut(&Token)) -> Result<Generation> {
        if !self.row_is_next {
            self.prefill()?;
        }
        let start = Instant::now();
        let mut text = String::new();
        for token in self.by_ref() {
            let token = token?;
            text.push_str(&token.text);
            on_token(&token);
        }
        Ok(Generation {
            token_ids: self.token_ids().to_vec(),
            text,
            finish_reason: self.finish_reason.context("generation ended without a reason")?,
            prompt_tokens: self.prompt_tokens,
            prefill_seconds: self.prefill_seconds,
            decode_seconds: start.elapsed().as_secs_f64(),
        })
    }
}

impl Iterator for Generator<'_, '_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        if self.failed || self.finish_reason.is_some() {
            return None;
        }
        let token = self.advance();
        self.failed = token.is_err();
        Some(token)
    }
}

/// Continues `prompt_ids`, showing every token to `on_token` as it comes. Errors as [`Generator::new`].
pub fn generate(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    prompt_ids: &[i64],
    params: &SamplingParams,
    on_token: impl FnMut(&Token),
) -> Result<Generation> {
    let mut sequence = Sequence::new(decoder)?;
    Generator::new(&mut sequence, tokenizer, prompt_ids, params)?.run(on_token)
}

/// `n` continuations of one prompt, which is read once. The first is the one that [`generate`] gives; `on_token` gets
/// the number of the sample with each token.
pub fn generate_several(
    decoder: &Decoder,
    tokenizer: Option<&Tokenizer>,
    prompt_ids: &[i64],
    params: &SamplingParams,
    n: usize,
    mut on_token: impl FnMut(usize, &Token),
) -> Result<Vec<Generation>> {
    let mut sequence = Sequence::new(decoder)?;
    let mut prompt_row = Vec::new();
    let mut generations = Vec::with_capacity(n);
    for sample in 0..n {
        // One after the other: the cache of the prompt stays as it is, so nothing needs copying.
        let mut generator = Generator::stream(&mut sequence, tokenizer, prompt_ids, params, sample as u64)?;
        if sample == 0 {
            generator.prefill()?;
            prompt_row.clone_from(&generator.row);
        } else {
            generator.row.copy_from_slice(&prompt_row);
            generator.row_is_next = true;
        }
        generations.push(generator.run(|token| on_token(sample, token))?);
    }
    Ok(generations)
}
