//! One growing answer: its tokens, what is cached of them, and how the next one is chosen.

use anyhow::{Context, Result};

use super::pages::PagePool;
use super::request::{EventKind, FinishReason, RequestId, Token};
use super::sampler::{NO_LOGITS, logprobs};
use super::{Grammar, Logprobs, ModelRef, Request, Sampler, TextStream};
use crate::nn::PAGE_SIZE;
use crate::ops::Drawn;

/// A sequence in the engine's queue or batch.
#[derive(Clone)]
pub(super) struct Sequence {
    pub(super) request: RequestId,
    pub(super) sample: usize,
    /// Number of a loaded adapter.
    pub(super) adapter: Option<u64>,
    pub(super) ids: Vec<i64>,
    pub(super) prompt_tokens: usize,
    /// Samples to start from this one when the prompt has been read.
    pub(super) forks: usize,
    /// Tokens whose keys and values are in `pages`.
    pub(super) cached: usize,
    pub(super) pages: Vec<i32>,
    /// Pages that are known by their content, and the serial of the last.
    known_pages: usize,
    serial: u64,
    /// The weights, and the regime of the ropes, that the cached keys come from; no regime where nothing is cached yet.
    pub(super) weights: u64,
    pub(super) regime: Vec<i64>,
    /// Length of the sequence at which `Length` ends it.
    pub(super) end: usize,
    stop_token_ids: Vec<i64>,
    top_logprobs: Option<usize>,
    sampler: Sampler,
    text: Option<TextStream>,
    grammar: Option<Grammar>,
}

impl Sequence {
    /// The first sample of a request that has been checked.
    pub(super) fn new(
        model: ModelRef,
        id: RequestId,
        adapter: Option<u64>,
        request: Request,
    ) -> Result<Sequence> {
        let Request { prompt_ids, params, n, grammar, .. } = request;
        let context = model.decoder.config.max_position_embeddings.max(0) as usize;
        let prompt_tokens = prompt_ids.len();
        let text = model.tokenizer.map(|tokenizer| TextStream::new(tokenizer, &prompt_ids, &params.stop));
        Ok(Sequence {
            request: id,
            sample: 0,
            adapter,
            prompt_tokens,
            forks: n - 1,
            cached: 0,
            pages: Vec::new(),
            known_pages: 0,
            serial: 0,
            weights: 0,
            regime: Vec::new(),
            end: context.min(prompt_tokens.saturating_add(params.max_new_tokens)),
            stop_token_ids: params.stop_token_ids.clone(),
            top_logprobs: params.logprobs,
            sampler: Sampler::new(&params, 0, &prompt_ids, model.decoder.config.vocab_size as usize),
            text: text.transpose()?,
            grammar,
            ids: prompt_ids,
        })
    }

    /// Another sample of the same prompt, on the same pages.
    pub(super) fn fork(&self, sample: usize, pool: &mut PagePool) -> Sequence {
        for &page in &self.pages {
            pool.share(page);
        }
        Sequence { sample, forks: 0, sampler: self.sampler.stream(sample as u64), ..self.clone() }
    }

    /// Tokens to feed before the next one can be chosen.
    pub(super) fn pending(&self) -> usize {
        self.ids.len() - self.cached
    }

    /// Gives its pages back; all of it must be read again.
    pub(super) fn release(&mut self, pool: &mut PagePool) {
        // The first page last: what stands behind a page is of no use without it.
        for page in self.pages.drain(..).rev() {
            pool.release(page);
        }
        (self.cached, self.known_pages) = (0, 0);
        self.regime.clear();
    }

    /// Takes the pages that are known to hold its first tokens, behind `root`; the last token is always fed.
    pub(super) fn find_pages(&mut self, root: u64, pool: &mut PagePool) {
        self.serial = root;
        let whole = self.ids.len().saturating_sub(1) / PAGE_SIZE;
        for tokens in self.ids.chunks_exact(PAGE_SIZE).take(whole) {
            let Some((page, serial)) = pool.find(self.serial, tokens) else { break };
            self.pages.push(page);
            self.serial = serial;
        }
        self.known_pages = self.pages.len();
        self.cached = self.known_pages * PAGE_SIZE;
    }

    /// Counts `rows` as fed, and makes pages known that are full now.
    pub(super) fn fed(&mut self, rows: usize, pool: &mut PagePool) {
        self.cached += rows;
        while (self.known_pages + 1) * PAGE_SIZE <= self.cached {
            let first = self.known_pages * PAGE_SIZE;
            let tokens = &self.ids[first..first + PAGE_SIZE];
            self.serial = pool.register(self.pages[self.known_pages], self.serial, tokens);
            self.known_pages += 1;
        }
    }

    /// Chooses the next token from the logits `[V]`, which are changed.
    pub(super) fn choose(&mut self, row: &mut [f32]) -> Result<(i64, Option<Logprobs>)> {
        let raw = self.top_logprobs.map(|_| row.to_vec());
        if let Some(grammar) = &mut self.grammar {
            grammar.mask(row, &self.stop_token_ids)?;
        }
        let id = self.sampler.sample(row)?;
        Ok((id, raw.zip(self.top_logprobs).map(|(raw, top)| logprobs(&raw, id, top))))
    }

    /// The sampler, where a GPU can draw for it: it knows no grammar and no other tokens' log-probabilities, and those of the
    /// token only before penalties.
    pub(super) fn sampler_on_device(&mut self) -> Option<&mut Sampler> {
        let whole_row = self.grammar.is_some()
            || self.top_logprobs.is_some_and(|top| top > 0 || self.sampler.penalises());
        (!whole_row).then_some(&mut self.sampler)
    }

    /// Takes what the GPU drew.
    pub(super) fn chosen_on_device(&mut self, drawn: Drawn) -> Result<(i64, Option<Logprobs>)> {
        let id = drawn.id.context(NO_LOGITS)?;
        self.sampler.take(id, drawn.sampling_logprob);
        let logprobs = self.top_logprobs.map(|_| Logprobs { logprob: drawn.logprob, top: Vec::new() });
        Ok((id, logprobs))
    }

    /// Appends the chosen token.
    pub(super) fn advance(
        &mut self,
        model: ModelRef,
        (id, logprobs): (i64, Option<Logprobs>),
    ) -> Result<(Token, Option<FinishReason>)> {
        self.ids.push(id);
        let is_stop = self.stop_token_ids.contains(&id);
        if let Some(grammar) = self.grammar.as_mut().filter(|_| !is_stop) {
            grammar.accept(id)?;
        }
        let mut text = String::new();
        let mut stopped = false;
        let full = self.ids.len() >= self.end;
        if let Some(stream) = &mut self.text {
            let tokenizer = model.tokenizer.context("the engine's model has lost its tokenizer")?;
            if !is_stop {
                text = stream.push(tokenizer, id)?;
            }
            if is_stop || stream.stopped() || full {
                text += &stream.finish(tokenizer)?;
            }
            // The last piece may complete a stop string.
            stopped = stream.stopped() && !is_stop;
        }
        let reason = match (is_stop, stopped, full) {
            (true, ..) => Some(FinishReason::Stop),
            (_, true, _) => Some(FinishReason::StopString),
            (.., true) => Some(FinishReason::Length),
            _ => None,
        };
        let sampling_logprob = self.sampler.logprob() as f32;
        Ok((Token { id, text, logprobs, sampling_logprob, weights: self.weights }, reason))
    }

    pub(super) fn event(&self, kind: EventKind) -> super::Event {
        super::Event { request: self.request, sample: self.sample, kind }
    }
}
