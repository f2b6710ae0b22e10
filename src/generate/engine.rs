//! The engine: many requests at once on one decoder.

use std::collections::{BTreeMap, HashMap, VecDeque};

use anyhow::{Context, Result, bail};
use tch::Tensor;

use super::ahead::Ahead;
use super::graphs::DecodeGraphs;
use super::pages::PagePool;
use super::request::RequestId;
use super::sequence::Sequence;
use super::step::MOST_PROMPT_ROWS;
use super::{ModelRef, Request, SamplingParams};
use crate::models::{Adapter, Decoder};
use crate::nn::{KvPages, PAGE_SIZE, RopeTables};

/// Memory for keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBudget {
    Tokens(usize),
    Bytes(u64),
}

/// Pages that `n` samples of a prompt fill together: whole pages of the prompt are the same ones.
pub fn pages_of_samples(prompt_tokens: usize, new_tokens: usize, n: usize) -> usize {
    let shared = prompt_tokens / PAGE_SIZE;
    shared + n * ((prompt_tokens + new_tokens).div_ceil(PAGE_SIZE) - shared)
}

fn pages_of(options: EngineOptions, decoder: &Decoder) -> usize {
    let pages = match options.kv_budget {
        KvBudget::Tokens(tokens) => tokens.div_ceil(PAGE_SIZE),
        KvBudget::Bytes(bytes) => bytes as usize / (decoder.kv_bytes_per_token() * PAGE_SIZE),
    };
    // No more than all sequences can fill.
    let context = (decoder.config.max_position_embeddings.max(1) as usize).div_ceil(PAGE_SIZE);
    pages.min(context.saturating_mul(options.max_num_seqs))
}

/// What an engine may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    pub kv_budget: KvBudget,
    /// Sequences that are decoded at once; others wait.
    pub max_num_seqs: usize,
    /// Rows of one forward pass, at least 1: new tokens of sequences that decode, and as much of prompts as fits beside them. On the CPU in f32
    /// at most 64, which the kernels give the same bits in any company.
    pub max_num_batched_tokens: usize,
}

impl EngineOptions {
    /// With passes of [`MOST_PROMPT_ROWS`].
    pub fn new(kv_budget: KvBudget, max_num_seqs: usize) -> EngineOptions {
        EngineOptions { kv_budget, max_num_seqs, max_num_batched_tokens: MOST_PROMPT_ROWS }
    }
}

/// What an engine holds and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences in the batch, and requests (or preempted sequences) that wait.
    pub running: usize,
    pub waiting: usize,
    /// Pages that sequences hold, and pages in all.
    pub pages_held: usize,
    pub pages: usize,
    pub steps: u64,
    /// Tokens of prompts that were read, and that were found in the pages.
    pub prompt_tokens: u64,
    pub found_tokens: u64,
    pub new_tokens: u64,
    /// Sequences that gave up their pages to older ones and were read again.
    pub preemptions: u64,
    /// Time of steps that read prompts.
    pub prefill_seconds: f64,
    /// Time of steps that did not, and the tokens that these chose.
    pub decode_seconds: f64,
    pub decode_tokens: u64,
}

pub(super) struct LoadedAdapter {
    pub(super) adapter: Adapter,
    pub(super) weights: u64,
}

/// Runs requests by continuous batching: each [`step`](Engine::step) admits what fits, reads prompts in pieces, and chooses
/// one token for every sequence that has been read, all as one batch. Keys and values lie in pages (arXiv:2309.06180):
/// samples of one prompt share them and copy the last when they part, and full pages of finished sequences are found again
/// by their content. A sequence that finds no page makes the youngest give up its own, to be read again later. On the CPU
/// in f32 none of this changes a single bit of an answer; elsewhere products of other sizes round otherwise.
///
/// The engine holds no model; each call takes the same one. Its weights may change between two steps.
pub struct Engine {
    pub(super) options: EngineOptions,
    pub(super) pages: KvPages,
    pub(super) pool: PagePool,
    pub(super) ropes: RopeTables,
    pub(super) graphs: DecodeGraphs,
    /// The pass after the last one, launched before its tokens were known here.
    pub(super) ahead: Option<Ahead>,
    /// Logits of a pass that tokens are chosen from here, kept for its memory.
    pub(super) host_rows: Vec<f32>,
    pub(super) waiting: VecDeque<Sequence>,
    /// In the order of their admission.
    pub(super) running: Vec<Sequence>,
    pub(super) adapters: BTreeMap<u64, LoadedAdapter>,
    names: BTreeMap<String, u64>,
    /// The present number of the model's own weights.
    pub(super) weights: u64,
    /// Starts of page chains, by weights and regime.
    pub(super) roots: HashMap<(u64, Vec<i64>), u64>,
    /// Numbers given so far: of requests, adapters and weights.
    numbers: u64,
    pub(super) stats: EngineStats,
}

impl Engine {
    /// An engine for `decoder`, which takes the memory of its budget at once (on the CPU, as it is needed).
    ///
    /// # Errors
    /// A budget of less than a page, no sequence or passes of no row.
    pub fn new(decoder: &Decoder, options: EngineOptions) -> Result<Engine> {
        if options.max_num_batched_tokens == 0 {
            bail!("max_num_batched_tokens is 0, expected at least 1");
        }
        let pages = pages_of(options, decoder);
        if pages == 0 || options.max_num_seqs == 0 {
            bail!(
                "{:?} for keys and values and {} sequences: expected at least {} bytes, a page of {PAGE_SIZE} tokens, and \
                 one sequence",
                options.kv_budget,
                options.max_num_seqs,
                decoder.kv_bytes_per_token() * PAGE_SIZE
            );
        }
        Ok(Engine {
            options,
            pages: decoder.kv_pages(pages)?,
            pool: PagePool::new(pages),
            ropes: RopeTables::default(),
            graphs: DecodeGraphs::new(decoder),
            ahead: None,
            host_rows: Vec::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            adapters: BTreeMap::new(),
            names: BTreeMap::new(),
            weights: 0,
            roots: HashMap::new(),
            numbers: 0,
            stats: EngineStats::default(),
        })
    }

    /// Whether an engine with these options would have no more room.
    pub fn has_room_for(&self, options: EngineOptions, decoder: &Decoder) -> bool {
        pages_of(options, decoder) <= self.pages.pages() && options.max_num_seqs <= self.options.max_num_seqs
    }

    /// Most tokens of a prompt and its answer that have pages.
    pub fn room(&self) -> usize {
        self.pages.pages() * PAGE_SIZE
    }

    /// An engine with just the room that `n` answers to a prompt of `prompt_tokens` need.
    pub(super) fn for_request(
        decoder: &Decoder,
        prompt_tokens: usize,
        params: &SamplingParams,
        n: usize,
    ) -> Result<Engine> {
        let context = decoder.config.max_position_embeddings.max(1) as usize;
        let tokens = prompt_tokens.saturating_add(params.max_new_tokens).clamp(1, context);
        let each = tokens.div_ceil(PAGE_SIZE) * PAGE_SIZE;
        Engine::new(decoder, EngineOptions::new(KvBudget::Tokens(n * each), n))
    }

    /// Queues a request. Its events come from [`step`](Engine::step).
    ///
    /// # Errors
    /// Parameters without meaning; a prompt that is empty, fills the model's context or has ids out of the vocabulary; stop
    /// strings or a grammar without a tokenizer, a grammar without a stop token; an adapter that is not loaded; what could never fit the budget.
    pub fn submit<'a>(&mut self, model: impl Into<ModelRef<'a>>, request: Request) -> Result<RequestId> {
        let model = model.into();
        request.params.check()?;
        let (prompt_tokens, context) =
            (request.prompt_ids.len(), model.decoder.config.max_position_embeddings.max(0) as usize);
        if prompt_tokens == 0 {
            bail!("the prompt is empty, and a model needs at least one token to continue");
        }
        if prompt_tokens >= context {
            bail!(
                "the prompt has {prompt_tokens} tokens, the model's context (max_position_embeddings) is {context}: \
                 shorten the prompt"
            );
        }
        model.decoder.check_ids(&request.prompt_ids)?;
        if model.tokenizer.is_none() && !request.params.stop.is_empty() {
            bail!("stop strings need a tokenizer, and this model has none");
        }
        if request.n == 0 || request.n > self.options.max_num_seqs {
            bail!("n is {}, expected 1 to {} (max_num_seqs)", request.n, self.options.max_num_seqs);
        }
        let adapter = match &request.adapter {
            Some(name) => {
                Some(*self.names.get(name).with_context(|| format!("no adapter named {name} is loaded"))?)
            }
            None => None,
        };
        let longest = context.min(prompt_tokens.saturating_add(request.params.max_new_tokens));
        if longest.div_ceil(PAGE_SIZE) > self.pages.pages() {
            bail!(
                "the prompt and max_new_tokens may need {longest} tokens, the engine has room for {}: lower \
                 max_new_tokens or raise the memory for keys and values",
                self.room()
            );
        }
        if request.grammar.is_some() && request.params.stop_token_ids.is_empty() {
            bail!("stop_token_ids is empty, and an answer in a grammar ends by one of them");
        }
        let id = RequestId(self.number());
        self.waiting.push_back(Sequence::new(model, id, adapter, request)?);
        Ok(id)
    }

    /// Drops a request; it has no more events. False if it is not here (any more).
    pub fn cancel(&mut self, request: RequestId) -> bool {
        let before = self.waiting.len() + self.running.len();
        let pool = &mut self.pool;
        let mut keep = |sequence: &mut Sequence| {
            let stays = sequence.request != request;
            if !stays {
                sequence.release(pool);
            }
            stays
        };
        self.waiting.retain_mut(&mut keep);
        self.running.retain_mut(keep);
        self.drop_unused_adapters();
        self.waiting.len() + self.running.len() < before
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    pub fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            pages_held: self.pool.held(),
            pages: self.pages.pages(),
            ..self.stats
        }
    }

    /// Puts an adapter beside the model, for requests that name it. One of that name is replaced; requests on it end with it.
    pub fn load_lora(&mut self, name: &str, adapter: Adapter) {
        let (number, weights) = (self.number(), self.number());
        self.adapters.insert(number, LoadedAdapter { adapter, weights });
        self.names.insert(name.to_string(), number);
        self.drop_unused_adapters();
    }

    /// Forgets an adapter; requests that run on it keep it to their end. False if there is none of that name.
    pub fn unload_lora(&mut self, name: &str) -> bool {
        let found = self.names.remove(name).is_some();
        self.drop_unused_adapters();
        found
    }

    /// Names of the loaded adapters.
    pub fn loras(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// A loaded adapter, to read its tensors.
    pub fn lora(&self, name: &str) -> Option<&Adapter> {
        self.names.get(name).and_then(|number| self.adapters.get(number)).map(|loaded| &loaded.adapter)
    }

    /// Copies `value` over a matrix of a loaded adapter, by peft's name. What runs on it is read again with the new weights
    /// before its next token.
    pub fn set_lora_tensor(&mut self, adapter: &str, tensor: &str, value: &Tensor) -> Result<()> {
        let weights = self.number();
        let number =
            self.names.get(adapter).with_context(|| format!("no adapter named {adapter} is loaded"))?;
        let loaded = self.adapters.get_mut(number).context("a named adapter is not loaded")?;
        loaded.adapter.set(tensor, value).with_context(|| format!("adapter {adapter}"))?;
        loaded.weights = weights;
        Ok(())
    }

    /// Says that the model's own weights were changed in place: what runs on them is read again with the new ones before its
    /// next token, so that no token comes from a mixture. Returns the number that tokens of the new weights carry.
    pub fn weights_changed(&mut self) -> u64 {
        self.weights = self.number();
        self.weights
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Adapters that have no name any more go with the last sequence on them.
    pub(super) fn drop_unused_adapters(&mut self) {
        let (names, sequences) = (&self.names, || self.running.iter().chain(&self.waiting));
        self.adapters.retain(|number, _| {
            names.values().any(|named| named == number)
                || sequences().any(|sequence| sequence.adapter == Some(*number))
        });
        self.graphs.retain(|number| self.adapters.contains_key(&number));
    }
}
