//! Answers that must fit a grammar: which tokens may come next (crate llguidance).

use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory, token_bytes_from_tokenizer_json};
use serde_json::{Value, json};

use crate::data::Tokenizer;

/// Compiles grammars for one tokenizer. Made once: it sorts the whole vocabulary.
pub struct Grammars(ParserFactory);

/// Where an answer stands in its grammar.
#[derive(Clone)]
pub struct Grammar(Matcher);

impl Grammars {
    /// # Errors
    /// A tokenizer that does not say which bytes its tokens stand for, or without an `eos_token`.
    pub fn new(tokenizer: &Tokenizer) -> Result<Grammars> {
        let text = tokenizer.inner().to_string(false).map_err(|error| anyhow!("{error}"))?;
        let words = token_bytes_from_tokenizer_json(&serde_json::from_str(&text)?)
            .context("a grammar needs a tokenizer of bytes or with a byte fallback")?;
        let eos = tokenizer.eos_token_id().context("a grammar needs a tokenizer with an eos_token")?;
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos), &words);
        let mut factory = ParserFactory::new_simple(&(Arc::new(ApproximateTokEnv::new(trie)) as _))?;
        factory.quiet();
        Ok(Grammars(factory))
    }

    /// JSON that fits `schema`.
    ///
    /// # Errors
    /// A schema that is none, or that asks for what is not implemented.
    pub fn json_schema(&self, schema: &Value) -> Result<Grammar> {
        let mut schema = schema.clone();
        if let Some(object) = schema.as_object_mut() {
            // As json.dumps writes it: where any space may stand, a small model writes nothing else.
            let form = json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
            object.entry("x-guidance").or_insert(form);
        }
        let parser = self.0.create_parser(TopLevelGrammar::from_json_schema(schema));
        let matcher = Matcher::new(parser);
        match matcher.get_error() {
            Some(error) => bail!("json_schema: {error}"),
            None => Ok(Grammar(matcher)),
        }
    }
}

impl Grammar {
    /// Gives minus infinity to the logits of the tokens that may not come next. Where the answer may end, every one of
    /// `stop_token_ids` may come.
    pub(super) fn mask(&mut self, logits: &mut [f32], stop_token_ids: &[i64]) -> Result<()> {
        let allowed = self.0.compute_mask_or_eos()?;
        let may_end = self.0.is_stopped() || self.0.is_accepting()?;
        let stops = |id: usize| may_end && stop_token_ids.contains(&(id as i64));
        for (id, logit) in logits.iter_mut().enumerate() {
            let fits = id < allowed.len() && allowed.is_allowed(id as u32);
            if !fits && !stops(id) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    pub(super) fn accept(&mut self, id: i64) -> Result<()> {
        self.0.consume_token(id as u32)
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        formatter.debug_tuple("Grammar").finish()
    }
}
