//! Generation for a whole checkpoint: text in, text out.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Engine, Generation, GenerationConfig, Request, SamplingParams, Token};
use crate::data::{RenderOptions, end_of_turn};
use crate::models::FastLanguageModel;

/// Sequences that `fast_generate` decodes at once.
const MOST_AT_ONCE: usize = 256;

impl FastLanguageModel {
    /// The parameters that the checkpoint suggests (`generation_config.json`), stopping at every token that ends an answer:
    /// `eos_token_id` of both configs, the tokenizer's, and the chat template's end of turn.
    pub fn generation_params(&self) -> Result<SamplingParams> {
        let mut params = GenerationConfig::from_dir(&self.dir)?.params();
        let mut stop = std::mem::take(&mut params.stop_token_ids);
        stop.extend(&self.decoder.config.eos_token_ids);
        if let Ok(tokenizer) = self.tokenizer() {
            stop.extend(tokenizer.eos_token_id().map(i64::from));
            let template = tokenizer.chat_template();
            let ends = template.and_then(|template| end_of_turn(tokenizer, template));
            stop.extend(ends.map(|token| i64::from(token.id)));
        }
        stop.sort_unstable();
        stop.dedup();
        params.stop_token_ids = stop;
        Ok(params)
    }

    /// The ids of a plain text to be continued. An empty one becomes the token that starts a text.
    ///
    /// # Errors
    /// No tokenizer; an empty text for a model without a `bos_token`.
    pub fn prompt_ids(&self, text: &str) -> Result<Vec<i64>> {
        let tokenizer = self.tokenizer()?;
        let ids: Vec<i64> = tokenizer.encode(text, true)?.into_iter().map(i64::from).collect();
        if !ids.is_empty() {
            return Ok(ids);
        }
        match tokenizer.bos_token_id().map(i64::from).or(self.decoder.config.bos_token_id) {
            Some(bos) => Ok(vec![bos]),
            None => bail!("the prompt is empty, and the model has no bos_token to start from"),
        }
    }

    /// The ids of a conversation in the chat template's form, up to where the assistant speaks.
    ///
    /// # Errors
    /// No tokenizer or no chat template; messages that the template refuses.
    pub fn chat_ids(&self, messages: &[Value]) -> Result<Vec<i64>> {
        let tokenizer = self.tokenizer()?;
        let Some(template) = tokenizer.chat_template() else {
            bail!("{}: the checkpoint has no chat template", self.dir.display());
        };
        let options = RenderOptions { add_generation_prompt: true, ..Default::default() };
        // The template writes the special tokens itself.
        let ids = tokenizer.encode(&template.render(messages, &options)?, false)?;
        Ok(ids.into_iter().map(i64::from).collect())
    }

    /// Continues `prompt_ids`, showing every token to `on_token` as it comes.
    pub fn generate(
        &self,
        prompt_ids: &[i64],
        params: &SamplingParams,
        mut on_token: impl FnMut(&Token),
    ) -> Result<Generation> {
        let mut samples = self.generate_several(prompt_ids, params, 1, |_, token| on_token(token))?;
        samples.pop().context("the engine gave no answer")
    }

    /// `n` continuations of one prompt, which is read once; `on_token` gets the number of the sample with each token.
    pub fn generate_several(
        &self,
        prompt_ids: &[i64],
        params: &SamplingParams,
        n: usize,
        mut on_token: impl FnMut(usize, &Token),
    ) -> Result<Vec<Generation>> {
        let mut engine = Engine::for_request(&self.decoder, prompt_ids.len(), params, n)?;
        let requests = [Request::samples(prompt_ids, params, n)];
        let mut answers = engine.run(self, requests, |_, sample, token| on_token(sample, token))?;
        answers.pop().context("the engine gave no answer")
    }

    /// Continues plain texts, all as one batch, with the checkpoint's own parameters where none are given.
    ///
    /// ```
    /// use ferrotune::generate::{Engine, EngineOptions, KvBudget};
    /// use ferrotune::models::FastLanguageModel;
    /// use tch::{Device, Kind};
    ///
    /// let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny/model");
    /// let model = FastLanguageModel::from_pretrained(&dir, Kind::Float, Device::Cpu)?;
    /// let answers = model.fast_generate(&["Hello! How are you?", "The sky is"], None)?;
    /// assert_eq!(answers.len(), 2);
    ///
    /// // Token by token, from an engine that stays; adapters go beside it with `engine.load_lora(name, model.read_adapter(folder)?)`.
    /// let options = EngineOptions::new(KvBudget::Tokens(512), 1);
    /// let mut engine = Engine::new(&model.decoder, options)?;
    /// let prompt = model.prompt_ids("The sky is")?;
    /// let mut text = String::new();
    /// for token in engine.stream(&model, &prompt, &model.generation_params()?)? {
    ///     text += &token?.text;
    /// }
    /// assert_eq!(text, answers[1].text);
    /// # anyhow::Ok(())
    /// ```
    pub fn fast_generate<S: AsRef<str>>(
        &self,
        prompts: &[S],
        params: Option<&SamplingParams>,
    ) -> Result<Vec<Generation>> {
        let own;
        let params = match params {
            Some(params) => params,
            None => {
                own = self.generation_params()?;
                &own
            }
        };
        let ids =
            prompts.iter().map(|prompt| self.prompt_ids(prompt.as_ref())).collect::<Result<Vec<_>>>()?;
        let Some(longest) = ids.iter().map(Vec::len).max() else { return Ok(Vec::new()) };
        let at_once = ids.len().min(MOST_AT_ONCE);
        let mut engine = Engine::for_request(&self.decoder, longest, params, at_once)?;
        let answers = engine.run(self, ids.iter().map(|ids| Request::new(ids, params)), |_, _, _| ())?;
        Ok(answers.into_iter().flatten().collect())
    }
}
