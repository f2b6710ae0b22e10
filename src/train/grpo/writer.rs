//! The engine that writes completions.

use anyhow::{Context, Result};

use crate::device;
use crate::generate::{Engine, EngineOptions, Generation, KvBudget, Request, pages_of_samples};
use crate::models::FastLanguageModel;
use crate::nn::PAGE_SIZE;

/// Sequences that are decoded at once.
const MOST_AT_ONCE: usize = 512;

/// Writes answers with the weights as they are. Its pages and recorded steps go when an answer is there, so that training has their
/// memory, or stay for the next one.
pub(super) struct Writer {
    /// Bytes of keys and values at most.
    kv_bytes: u64,
    stays: bool,
    /// Sequences that are decoded at once.
    at_once: usize,
    engine: Option<Engine>,
}

impl Writer {
    pub(super) fn new(kv_bytes: u64) -> Writer {
        Writer { kv_bytes, stays: false, at_once: MOST_AT_ONCE, engine: None }
    }

    /// The same with `sequences` that are decoded at once, if that is less.
    pub(super) fn at_most(self, sequences: usize) -> Writer {
        Writer { at_once: sequences.min(self.at_once), ..self }
    }

    pub(super) fn staying(self) -> Writer {
        Writer { stays: true, ..self }
    }

    /// Whether it takes memory of the device anew for each answer.
    pub(super) fn needs_device(&self) -> bool {
        !self.stays
    }

    /// The samples of each request.
    pub(super) fn answers(
        &mut self,
        model: &FastLanguageModel,
        requests: Vec<Request>,
    ) -> Result<Vec<Vec<Generation>>> {
        let decoder = &model.decoder;
        let options = self.options(&requests, decoder.kv_bytes_per_token());
        let mut engine = match self.engine.take() {
            Some(mut engine) if engine.has_room_for(options, decoder) => {
                // Steps on the model have changed its weights.
                engine.weights_changed();
                engine
            }
            // The old one goes before the new one comes.
            old => {
                drop(old);
                Engine::new(decoder, options)?
            }
        };
        let answers = engine.run(model, requests, |_, _, _| ()).context("writing completions")?;
        if self.stays {
            self.engine = Some(engine);
        } else {
            drop(engine);
            device::empty_cache(decoder.device)?;
        }
        Ok(answers)
    }

    /// Room for as many requests as are written at once, each as long as the longest.
    fn options(&self, requests: &[Request], bytes_per_token: usize) -> EngineOptions {
        let pages = |request: &Request| {
            pages_of_samples(request.prompt_ids.len(), request.params.max_new_tokens, request.n)
        };
        let most = requests.iter().map(pages).max().unwrap_or(1);
        let group = requests.iter().map(|request| request.n).max().unwrap_or(1);
        let all: usize = requests.iter().map(|request| request.n).sum();
        let max_num_seqs = all.min(self.at_once.max(group));
        let wanted = (max_num_seqs.div_ceil(group) * most * PAGE_SIZE * bytes_per_token) as u64;
        EngineOptions::new(KvBudget::Bytes(wanted.min(self.kv_bytes)), max_num_seqs)
    }
}
