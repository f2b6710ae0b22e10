//! Tokens, and what a decoder has cached of them.

use anyhow::Result;
use tch::Tensor;

use crate::models::Decoder;
use crate::nn::KvCache;

/// One growing sequence of tokens with its KV cache: each token is fed to the decoder once.
pub struct Sequence<'a> {
    decoder: &'a Decoder,
    ids: Vec<i64>,
    cache: KvCache,
}

impl<'a> Sequence<'a> {
    /// An empty sequence.
    pub fn new(decoder: &'a Decoder) -> Result<Sequence<'a>> {
        Ok(Sequence { decoder, ids: Vec::new(), cache: decoder.kv_cache(0)? })
    }

    pub fn decoder(&self) -> &'a Decoder {
        self.decoder
    }

    /// The tokens.
    pub fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// Tokens whose keys and values are cached.
    pub fn cached(&self) -> usize {
        self.cache.len()
    }

    /// Most tokens that the model was made for: `max_position_embeddings`.
    pub fn context(&self) -> usize {
        self.decoder.config.max_position_embeddings.max(0) as usize
    }

    /// Makes the sequence `ids`. What it has in common with the tokens before stays cached.
    ///
    /// # Errors
    /// An id that is not in the model's vocabulary.
    pub fn set(&mut self, ids: &[i64]) -> Result<()> {
        self.decoder.check_ids(ids)?;
        let common = self.ids.iter().zip(ids).take_while(|(old, new)| old == new).count();
        self.cache.truncate(common);
        self.ids.clear();
        self.ids.extend_from_slice(ids);
        Ok(())
    }

    /// Appends a token.
    pub fn push(&mut self, id: i64) {
        self.ids.push(id);
    }

    /// Makes room for `tokens` in the cache at once, where the length is known beforehand.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.cache.grow(tokens)
    }

    /// Logits `[V]` in f32 of the token after the last one. Feeds the tokens that are not cached yet.
    pub fn logits(&mut self) -> Result<Tensor> {
        if self.cache.len() == self.ids.len() {
            // Only the states of tokens that are fed come out: the last one again.
            self.cache.truncate(self.ids.len().saturating_sub(1));
        }
        if self.ids.len() > self.cache.capacity() {
            self.cache.grow(2 * self.ids.len())?;
        }
        self.decoder.extend(&self.ids, &mut self.cache)
    }
}
