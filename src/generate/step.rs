//! One step of the engine, from the queue to the tokens.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::{Result, anyhow};
use tch::{Device, Kind, Tensor};

use super::ModelRef;
use super::ahead::LaunchedRows;
use super::engine::Engine;
use super::graphs::Row;
use super::request::{Event, EventKind, Logprobs, RequestId};
use super::sequence::Sequence;
use crate::device;
use crate::models::{Decoder, NewRows};
use crate::nn::PAGE_SIZE;
use crate::ops::{self, Draws, LoraRun};

/// New rows for the sequence at a place of the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Feed {
    pub(super) at: usize,
    pub(super) rows: usize,
}

/// A sequence that a pass brought to its end: its place in the batch, and its row of the logits.
pub(super) type End = (usize, usize);

/// Rows of one forward pass where nothing else is asked for: enough for the products to be limited by arithmetic.
pub const MOST_PROMPT_ROWS: usize = 2048;

/// Adapters of a step that have a recorded pass each; of more there would be too many graphs.
const MOST_APART: usize = 8;

impl Engine {
    fn most_rows(&self, decoder: &Decoder) -> usize {
        let exact = decoder.device == Device::Cpu && decoder.decode_kind() == Kind::Float;
        let most = self.options.max_num_batched_tokens;
        if exact { most.min(64) } else { most }
    }

    /// Admits, reads, chooses a token for every sequence that has been read. Nothing to do gives no events; what goes wrong
    /// with a request is an event of it.
    pub fn step<'a>(&mut self, model: impl Into<ModelRef<'a>>) -> Result<Vec<Event>> {
        let model = model.into();
        let started = Instant::now();
        let before = self.stats;
        self.admit();
        self.refresh(model.decoder);
        let feeds = self.feeds(model.decoder);
        let feeds = self.reserve(feeds)?;
        if feeds.is_empty() {
            return Ok(Vec::new());
        }
        let (mut events, mut gone) = (Vec::new(), HashSet::new());
        let (launched, feeds) = self.launched(feeds);
        let batches = self.batches(model.decoder, feeds);
        // Several passes in turns would go on as several.
        let alone = usize::from(launched.is_some()) + batches.len() == 1;
        let passes = launched.map(|(batch, rows)| (batch, Some(rows)));
        for (batch, rows) in passes.into_iter().chain(batches.into_iter().map(|batch| (batch, None))) {
            if let Err(error) = self.pass(model, &batch, rows, alone, &mut events, &mut gone) {
                // No row of this pass can be trusted.
                for feed in &batch {
                    let sequence = &self.running[feed.at];
                    if gone.insert((sequence.request, None)) {
                        events.push(sequence.event(EventKind::Failed(anyhow!("{error:#}"))));
                    }
                }
            }
        }
        self.leave(&gone);
        let seconds = started.elapsed().as_secs_f64();
        self.stats.steps += 1;
        if self.stats.prompt_tokens > before.prompt_tokens {
            self.stats.prefill_seconds += seconds;
        } else {
            self.stats.decode_seconds += seconds;
            self.stats.decode_tokens += self.stats.new_tokens - before.new_tokens;
        }
        Ok(events)
    }

    /// Moves waiting sequences into the batch, in their order, while the batch and the free pages have room for them.
    fn admit(&mut self) {
        let slots = |sequence: &Sequence| 1 + sequence.forks;
        let mut taken: usize = self.running.iter().map(slots).sum();
        let mut promised = 0;
        while let Some(first) = self.waiting.front() {
            let needed = (first.ids.len() + 1).div_ceil(PAGE_SIZE);
            let fits = self.pool.available() >= promised + needed || self.running.is_empty();
            if taken + slots(first) > self.options.max_num_seqs || !fits {
                return;
            }
            taken += slots(first);
            promised += needed;
            self.running.extend(self.waiting.pop_front());
        }
    }

    /// Starts what is new, and starts anew what has keys of other weights or turned for another length.
    fn refresh(&mut self, decoder: &Decoder) {
        for at in 0..self.running.len() {
            let sequence = &self.running[at];
            let adapter = sequence.adapter.and_then(|number| self.adapters.get(&number));
            let weights = adapter.map_or(self.weights, |loaded| loaded.weights);
            let regime = decoder.rope_regime(sequence.ids.len());
            if sequence.regime == regime && sequence.weights == weights {
                continue;
            }
            let root = self.root(weights, &regime);
            let sequence = &mut self.running[at];
            sequence.release(&mut self.pool);
            (sequence.weights, sequence.regime) = (weights, regime);
            sequence.find_pages(root, &mut self.pool);
            self.stats.found_tokens += sequence.cached as u64;
        }
    }

    fn root(&mut self, weights: u64, regime: &[i64]) -> u64 {
        let adapters = &self.adapters;
        let own = self.weights;
        self.roots.retain(|(weights, _), _| {
            *weights == own || adapters.values().any(|loaded| loaded.weights == *weights)
        });
        let pool = &mut self.pool;
        *self.roots.entry((weights, regime.to_vec())).or_insert_with(|| pool.root())
    }

    /// What each running sequence is fed: one row where only the next token is missing, and pieces of the others as far as
    /// they fill a pass.
    fn feeds(&self, decoder: &Decoder) -> Vec<Feed> {
        let most = self.most_rows(decoder);
        let decoding = self.running.iter().filter(|sequence| sequence.pending() == 1).count();
        let mut left = most - decoding % most;
        let mut feeds = Vec::new();
        for (at, sequence) in self.running.iter().enumerate() {
            let rows = match sequence.pending() {
                1 => 1,
                pending => pending.min(left),
            };
            if sequence.pending() > 1 {
                left -= rows;
            }
            if rows > 0 {
                feeds.push(Feed { at, rows });
            }
        }
        feeds
    }

    /// Gets the pages that the feeds need, the oldest sequence first; where there are none, the youngest gives up its own and
    /// goes back to the queue.
    fn reserve(&mut self, feeds: Vec<Feed>) -> Result<Vec<Feed>> {
        let mut reserved = Vec::with_capacity(feeds.len());
        for feed in feeds {
            while feed.at < self.running.len() {
                if self.try_reserve(feed)? {
                    reserved.push(feed);
                    break;
                }
                if let Some(mut youngest) = self.running.pop() {
                    youngest.release(&mut self.pool);
                    self.waiting.push_front(youngest);
                    self.stats.preemptions += 1;
                }
            }
        }
        // A younger one that had been given its pages may have lost them since.
        reserved.retain(|feed| feed.at < self.running.len());
        Ok(reserved)
    }

    pub(super) fn try_reserve(&mut self, Feed { at, rows }: Feed) -> Result<bool> {
        let sequence = &mut self.running[at];
        // The page that its next token goes into may be shared with samples of the same prompt.
        let written = sequence.cached / PAGE_SIZE;
        if let Some(&page) = sequence.pages.get(written).filter(|&&page| self.pool.is_shared(page)) {
            let Some(own) = self.pool.allocate() else { return Ok(false) };
            self.pages.copy_page(page, own)?;
            self.pool.release(page);
            sequence.pages[written] = own;
        }
        while sequence.pages.len() < (sequence.cached + rows).div_ceil(PAGE_SIZE) {
            let Some(page) = self.pool.allocate() else { return Ok(false) };
            sequence.pages.push(page);
        }
        Ok(true)
    }

    /// The feeds in passes; sequences of one adapter stand beside each other. Where all have one new token and such steps are
    /// recorded, each adapter has a pass: a recorded one of an 8B takes 2.5 to 4.8 ms, one of two adapters, which is launched
    /// kernel by kernel, 24 to 39.
    fn batches(&self, decoder: &Decoder, mut feeds: Vec<Feed>) -> Vec<Vec<Feed>> {
        let adapter = |feed: &Feed| self.running[feed.at].adapter;
        feeds.sort_by_key(adapter);
        let most = self.most_rows(decoder);
        let single = feeds.iter().all(|feed| feed.rows == 1);
        let apart = self.graphs.are_recorded()
            && single
            && feeds.chunk_by(|a, b| adapter(a) == adapter(b)).count() <= MOST_APART;
        let mut batches: Vec<Vec<Feed>> = Vec::new();
        let (mut rows, mut last) = (most, None);
        for feed in feeds {
            let own = Some(adapter(&feed));
            if rows + feed.rows > most || (apart && last != own) {
                batches.push(Vec::new());
                rows = 0;
            }
            last = own;
            rows += feed.rows;
            batches.last_mut().expect("the first feed starts a batch").push(feed);
        }
        batches
    }

    /// One pass, unless its logits were `launched` before, and the tokens of the sequences that it brought to their end.
    fn pass(
        &mut self,
        model: ModelRef,
        batch: &[Feed],
        launched: Option<LaunchedRows>,
        alone: bool,
        events: &mut Vec<Event>,
        gone: &mut HashSet<(RequestId, Option<usize>)>,
    ) -> Result<()> {
        let (ends, logits) = match launched {
            Some(LaunchedRows { logits, ends }) => (ends, Some(logits)),
            None => self.logits(model.decoder, batch)?,
        };
        for feed in batch {
            let sequence = &mut self.running[feed.at];
            let prompt_left = sequence.prompt_tokens.saturating_sub(sequence.cached);
            self.stats.prompt_tokens += prompt_left.min(feed.rows) as u64;
            sequence.fed(feed.rows, &mut self.pool);
        }
        let Some(logits) = logits else { return Ok(()) };
        self.choose(model, &ends, &logits, alone, events, gone)
    }

    /// The sequences that a pass brings to their end, and the logits that their ends refer to.
    fn logits(&mut self, decoder: &Decoder, batch: &[Feed]) -> Result<(Vec<End>, Option<Tensor>)> {
        let (mut ends, mut last_rows) = (Vec::new(), Vec::new());
        let mut row = 0;
        for feed in batch {
            let sequence = &self.running[feed.at];
            row += feed.rows;
            if sequence.cached + feed.rows == sequence.ids.len() {
                ends.push((feed.at, ends.len()));
                last_rows.push(row as i64 - 1);
            }
        }
        if let Some(logits) = self.recorded_logits(decoder, batch)? {
            return Ok((ends, Some(logits)));
        }
        let hidden = self.hidden(decoder, batch)?;
        let _no_grad = tch::no_grad_guard();
        let wanted = if last_rows.is_empty() {
            None
        } else if last_rows.len() == row {
            Some(hidden)
        } else {
            Some(hidden.f_index_select(0, &device::upload(&last_rows, decoder.device)?)?)
        };
        Ok((ends, wanted.map(|hidden| decoder.logits(&hidden)).transpose()?))
    }

    /// The logits of a pass by a CUDA graph, if there is one for it: every sequence has one new token, on one adapter.
    fn recorded_logits(&mut self, decoder: &Decoder, batch: &[Feed]) -> Result<Option<Tensor>> {
        let sequences = || batch.iter().map(|feed| &self.running[feed.at]);
        let adapter = sequences().next().and_then(|sequence| sequence.adapter);
        if sequences().any(|sequence| sequence.pending() != 1 || sequence.adapter != adapter) {
            return Ok(None);
        }
        let rows: Vec<Row> = sequences()
            .map(|sequence| Row {
                id: sequence.ids[sequence.cached],
                length: sequence.ids.len(),
                pages: &sequence.pages,
            })
            .collect();
        let lora = adapter.and_then(|number| self.adapters.get(&number)).map(|loaded| loaded.adapter.lora());
        self.graphs.logits(decoder, &rows, (&self.pages, &mut self.ropes), (adapter, lora))
    }

    /// Hidden states `[rows, C]` of a pass.
    fn hidden(&mut self, decoder: &Decoder, batch: &[Feed]) -> Result<Tensor> {
        let (mut rows, mut lora) = (Vec::new(), Vec::<LoraRun>::new());
        let mut row = 0;
        for feed in batch {
            let sequence = &self.running[feed.at];
            let fed = sequence.cached + feed.rows;
            rows.push(NewRows {
                input_ids: &sequence.ids[sequence.cached..fed],
                past: sequence.cached,
                length: sequence.ids.len(),
                pages: &sequence.pages[..fed.div_ceil(PAGE_SIZE)],
            });
            let adapter = sequence.adapter.and_then(|number| self.adapters.get(&number));
            lora.push(LoraRun {
                rows: row..row + feed.rows,
                adapter: adapter.map(|loaded| loaded.adapter.lora()),
            });
            row += feed.rows;
        }
        let lora = if lora.iter().all(|run| run.adapter.is_none()) { Vec::new() } else { joined(lora) };
        decoder.decode(&rows, &self.pages, &mut self.ropes, &lora)
    }

    /// Chooses the next tokens of the sequences at their `ends`, and first tokens of the samples that
    /// start from them.
    fn choose(
        &mut self,
        model: ModelRef,
        ends: &[End],
        logits: &Tensor,
        alone: bool,
        events: &mut Vec<Event>,
        gone: &mut HashSet<(RequestId, Option<usize>)>,
    ) -> Result<()> {
        // The sequences that get a token, and their rows.
        let mut choosing: Vec<End> = Vec::with_capacity(ends.len());
        for &(at, row) in ends {
            choosing.push((at, row));
            let forks = std::mem::take(&mut self.running[at].forks);
            for sample in 1..=forks {
                let fork = self.running[at].fork(sample, &mut self.pool);
                choosing.push((self.running.len(), row));
                self.running.push(fork);
            }
        }
        let on_device = logits.device().is_cuda() && logits.kind() == Kind::Float;
        let (drawn, rest): (Vec<_>, Vec<_>) = choosing
            .into_iter()
            .partition(|&(at, _)| on_device && self.running[at].sampler_on_device().is_some());
        // Before the penalties change the logits.
        let width = self.read_rows(logits, &rest)?;
        let outcomes = match self.draw(logits, &drawn)? {
            Some(draws) => {
                if alone && rest.is_empty() {
                    self.launch_ahead(model.decoder, &drawn, draws.tokens())?;
                }
                draws.wait()?
            }
            None => Vec::new(),
        };
        for ((at, _), outcome) in drawn.into_iter().zip(outcomes) {
            let chosen = self.running[at].chosen_on_device(outcome);
            self.advance(model, at, chosen, events, gone);
        }
        let mut values = std::mem::take(&mut self.host_rows);
        for (number, &(at, row)) in rest.iter().enumerate() {
            let values = &mut values[row * width..][..width];
            // Samples of one prompt start from one row, and choosing changes it.
            let again = rest[number + 1..].iter().any(|&(_, other)| other == row);
            let mut copy = if again { values.to_vec() } else { Vec::new() };
            let chosen = self.running[at].choose(if again { &mut copy } else { values });
            self.advance(model, at, chosen, events, gone);
        }
        self.host_rows = values;
        Ok(())
    }

    /// Reads all rows of the logits up to the last of `choosing` into `host_rows`, `[V]` each; V.
    fn read_rows(&mut self, logits: &Tensor, choosing: &[End]) -> Result<usize> {
        let Some(&(_, last)) = choosing.iter().max_by_key(|(_, row)| row) else { return Ok(0) };
        let _no_grad = tch::no_grad_guard();
        let logits = logits.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        let width = logits.size()[1] as usize;
        self.host_rows.resize((last + 1) * width, 0.0);
        // One copy: each costs more than a short row.
        let count = self.host_rows.len();
        logits.f_narrow(0, 0, last as i64 + 1)?.f_copy_data(&mut self.host_rows, count)?;
        Ok(width)
    }

    /// Tokens for the sequences and rows of `choosing`, by the GPU.
    fn draw(&mut self, logits: &Tensor, choosing: &[End]) -> Result<Option<Draws>> {
        if choosing.is_empty() {
            return Ok(None);
        }
        let _no_grad = tch::no_grad_guard();
        let rows: Vec<i64> = choosing.iter().map(|&(_, row)| row as i64).collect();
        let in_order = rows.iter().enumerate().all(|(at, &row)| at as i64 == row);
        let vocab = logits.size()[1];
        let logits = if in_order {
            logits.f_narrow(0, 0, rows.len() as i64)?
        } else {
            logits.f_index_select(0, &device::upload(&rows, logits.device())?)?
        };
        let (mut draws, mut penalised, mut factors) = (Vec::new(), Vec::new(), Vec::new());
        for (&(at, _), row) in choosing.iter().zip(0_i64..) {
            let Some(sampler) = self.running[at].sampler_on_device() else { continue };
            draws.push(sampler.draw_elsewhere());
            for (id, divisor, taken) in sampler.penalties() {
                penalised.push(row * vocab + id);
                factors.extend([divisor.to_bits() as i64, taken.to_bits() as i64]);
            }
        }
        if !penalised.is_empty() {
            let places = device::upload(&penalised, logits.device())?;
            let factors = device::upload(&factors, logits.device())?.f_view_dtype(Kind::Double)?;
            let factors = factors.f_view([-1, 2])?.f_to_kind(Kind::Float)?;
            let (divisors, taken) = (factors.f_select(1, 0)?, factors.f_select(1, 1)?);
            let mut flat = logits.f_view([-1])?;
            let values = flat.f_index_select(0, &places)?;
            let scaled =
                values.f_mul(&divisors)?.f_where_self(&values.f_lt(0.0)?, &values.f_div(&divisors)?)?;
            let _ = flat.f_index_copy_(0, &places, &scaled.f_sub(&taken)?)?;
        }
        Ok(Some(ops::sample(&logits, &draws)?))
    }

    /// Appends what was chosen for the sequence at `at`.
    fn advance(
        &mut self,
        model: ModelRef,
        at: usize,
        chosen: Result<(i64, Option<Logprobs>)>,
        events: &mut Vec<Event>,
        gone: &mut HashSet<(RequestId, Option<usize>)>,
    ) {
        let sequence = &mut self.running[at];
        match chosen.and_then(|chosen| sequence.advance(model, chosen)) {
            Ok((token, reason)) => {
                self.stats.new_tokens += 1;
                events.push(sequence.event(EventKind::Token(token)));
                if let Some(reason) = reason {
                    events.push(sequence.event(EventKind::Finished(reason)));
                    gone.insert((sequence.request, Some(sequence.sample)));
                }
            }
            Err(error) => {
                if gone.insert((sequence.request, None)) {
                    events.push(sequence.event(EventKind::Failed(error)));
                }
            }
        }
    }

    /// Takes out the samples (all, for none) of the requests that are `gone`.
    fn leave(&mut self, gone: &HashSet<(RequestId, Option<usize>)>) {
        if gone.is_empty() {
            return;
        }
        let pool = &mut self.pool;
        let mut stay = |sequence: &mut Sequence| {
            let left = gone.contains(&(sequence.request, None))
                || gone.contains(&(sequence.request, Some(sequence.sample)));
            if left {
                sequence.release(pool);
            }
            !left
        };
        self.running.retain_mut(&mut stay);
        self.waiting.retain_mut(stay);
        self.drop_unused_adapters();
    }
}

/// Neighbours with the same adapter as one run.
fn joined(runs: Vec<LoraRun>) -> Vec<LoraRun> {
    let same = |a: &LoraRun, b: &LoraRun| match (a.adapter, b.adapter) {
        (Some(a), Some(b)) => std::ptr::eq(a, b),
        (a, b) => a.is_none() && b.is_none(),
    };
    let mut joined: Vec<LoraRun> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if same(last, &run) => last.rows.end = run.rows.end,
            _ => joined.push(run),
        }
    }
    joined
}
