//! One step of the engine, from the queue to the tokens.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::{Result, anyhow};
use tch::{Device, Kind, Tensor};

use super::ModelRef;
use super::engine::Engine;
use super::request::{Event, EventKind, RequestId};
use super::sequence::Sequence;
use crate::device;
use crate::models::{Decoder, NewRows};
use crate::nn::PAGE_SIZE;
use crate::ops::LoraRun;

/// New rows for the sequence at a place of the batch.
#[derive(Debug, Clone, Copy)]
struct Feed {
    at: usize,
    rows: usize,
}

/// Rows of one forward pass. On the CPU in f32 what the kernels take that give a row the same bits in any company; else
/// enough for the products to be limited by arithmetic.
fn most_rows(decoder: &Decoder) -> usize {
    if decoder.device == Device::Cpu && decoder.kind == Kind::Float { 64 } else { 2048 }
}

impl Engine {
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
        for batch in self.batches(model.decoder, feeds) {
            if let Err(error) = self.pass(model, &batch, &mut events, &mut gone) {
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
        let most = most_rows(decoder);
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

    fn try_reserve(&mut self, Feed { at, rows }: Feed) -> Result<bool> {
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

    /// The feeds in passes; sequences of one adapter stand beside each other.
    fn batches(&self, decoder: &Decoder, mut feeds: Vec<Feed>) -> Vec<Vec<Feed>> {
        feeds.sort_by_key(|feed| self.running[feed.at].adapter);
        let most = most_rows(decoder);
        let mut batches: Vec<Vec<Feed>> = Vec::new();
        let mut rows = most;
        for feed in feeds {
            if rows + feed.rows > most {
                batches.push(Vec::new());
                rows = 0;
            }
            rows += feed.rows;
            batches.last_mut().expect("the first feed starts a batch").push(feed);
        }
        batches
    }

    /// One pass, and the tokens of the sequences that it brought to their end.
    fn pass(
        &mut self,
        model: ModelRef,
        batch: &[Feed],
        events: &mut Vec<Event>,
        gone: &mut HashSet<(RequestId, Option<usize>)>,
    ) -> Result<()> {
        let (mut rows, mut lora) = (Vec::new(), Vec::<LoraRun>::new());
        // Of the sequences that are at their end: their place, and their last row.
        let (mut ends, mut last_rows) = (Vec::new(), Vec::new());
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
            if fed == sequence.ids.len() {
                ends.push(feed.at);
                last_rows.push(row as i64 - 1);
            }
        }
        let lora = if lora.iter().all(|run| run.adapter.is_none()) { Vec::new() } else { joined(lora) };
        let hidden = model.decoder.decode(&rows, &self.pages, &mut self.ropes, &lora)?;
        for feed in batch {
            let sequence = &mut self.running[feed.at];
            let prompt_left = sequence.prompt_tokens.saturating_sub(sequence.cached);
            self.stats.prompt_tokens += prompt_left.min(feed.rows) as u64;
            sequence.fed(feed.rows, &mut self.pool);
        }
        if ends.is_empty() {
            return Ok(());
        }
        let mut logits = self.logits(model.decoder, &hidden, row, &last_rows)?;
        for (at, row) in ends.into_iter().zip(&mut logits) {
            self.choose(model, at, row, events, gone);
        }
        Ok(())
    }

    /// The logits `[V]` of some rows of `hidden` `[rows, C]`, on the host.
    fn logits(
        &self,
        decoder: &Decoder,
        hidden: &Tensor,
        rows: usize,
        wanted: &[i64],
    ) -> Result<Vec<Vec<f32>>> {
        let _no_grad = tch::no_grad_guard();
        let logits = if wanted.len() == rows {
            decoder.logits(hidden)?
        } else {
            decoder.logits(&hidden.f_index_select(0, &device::upload(wanted, decoder.device)?)?)?
        };
        let logits = logits.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
        let copy = |row: i64| -> Result<Vec<f32>> {
            let mut values = vec![0.0; decoder.config.vocab_size as usize];
            let count = values.len();
            logits.f_select(0, row)?.f_copy_data(&mut values, count)?;
            Ok(values)
        };
        (0..wanted.len() as i64).map(copy).collect()
    }

    /// Chooses the next token of the sequence at `at`, and first tokens of the samples that start from it.
    fn choose(
        &mut self,
        model: ModelRef,
        at: usize,
        row: &mut [f32],
        events: &mut Vec<Event>,
        gone: &mut HashSet<(RequestId, Option<usize>)>,
    ) {
        let forks = std::mem::take(&mut self.running[at].forks);
        let mut samples: Vec<Sequence> =
            (1..=forks).map(|sample| self.running[at].fork(sample, &mut self.pool)).collect();
        let rows: Vec<Vec<f32>> = samples.iter().map(|_| row.to_vec()).collect();
        let mut advance = |sequence: &mut Sequence, row: &mut [f32]| match sequence.advance(model, row) {
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
        };
        advance(&mut self.running[at], row);
        for (sample, mut row) in samples.iter_mut().zip(rows) {
            advance(sample, &mut row);
        }
        self.running.extend(samples);
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
