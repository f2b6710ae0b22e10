//! What is asked of the engine, and what it answers.

use anyhow::Error;

use super::{Grammar, SamplingParams};
use crate::data::Tokenizer;
use crate::models::{Decoder, FastLanguageModel};

/// What the engine runs: it holds no model itself, so that its weights can change between two steps.
#[derive(Clone, Copy)]
pub struct ModelRef<'a> {
    pub decoder: &'a Decoder,
    /// Without one there is no text.
    pub tokenizer: Option<&'a Tokenizer>,
}

impl<'a> From<&'a Decoder> for ModelRef<'a> {
    fn from(decoder: &'a Decoder) -> ModelRef<'a> {
        ModelRef { decoder, tokenizer: None }
    }
}

impl<'a> From<&'a FastLanguageModel> for ModelRef<'a> {
    fn from(model: &'a FastLanguageModel) -> ModelRef<'a> {
        ModelRef { decoder: &model.decoder, tokenizer: model.tokenizer().ok() }
    }
}

/// A prompt to continue.
#[derive(Debug, Clone)]
pub struct Request {
    pub prompt_ids: Vec<i64>,
    pub params: SamplingParams,
    /// Continuations of the prompt, which is read once. Sample i draws the stream i of the seed, whatever `n` is.
    pub n: usize,
    /// Name of a loaded adapter; without one the model as it is, with its own adapter if it has one.
    pub adapter: Option<String>,
    /// What the text must be.
    pub grammar: Option<Grammar>,
}

impl Request {
    /// One continuation by the model as it is.
    pub fn new(prompt_ids: &[i64], params: &SamplingParams) -> Request {
        Request {
            prompt_ids: prompt_ids.to_vec(),
            params: params.clone(),
            n: 1,
            adapter: None,
            grammar: None,
        }
    }

    /// `n` continuations.
    pub fn samples(prompt_ids: &[i64], params: &SamplingParams, n: usize) -> Request {
        Request { n, ..Request::new(prompt_ids, params) }
    }
}

/// Names a request of one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

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

/// Log-probabilities at one place, natural logarithms.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub logprob: f32,
    /// The likeliest tokens, the first the likeliest.
    pub top: Vec<(i64, f32)>,
}

/// One token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    pub id: i64,
    /// The text that became certain with this token; empty without a tokenizer.
    pub text: String,
    /// Where the request asked for them.
    pub logprobs: Option<Logprobs>,
    /// Its log-probability in the distribution that it was drawn from: after penalties, temperature and filters.
    pub sampling_logprob: f32,
    /// Which weights it comes from: those after [`Engine::weights_changed`](super::Engine::weights_changed) have another
    /// number.
    pub weights: u64,
}

/// What happened to one sample of a request.
#[derive(Debug)]
pub struct Event {
    pub request: RequestId,
    pub sample: usize,
    pub kind: EventKind,
}

#[derive(Debug)]
pub enum EventKind {
    Token(Token),
    /// After the sample's last token.
    Finished(FinishReason),
    /// The whole request is gone.
    Failed(Error),
}

/// A finished answer.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The new tokens, with the stop token that ended them.
    pub token_ids: Vec<i64>,
    /// Their text, up to the stop string; special tokens left out.
    pub text: String,
    /// One for each token, where the parameters asked for them.
    pub logprobs: Vec<Logprobs>,
    /// One for each token: [`Token::sampling_logprob`].
    pub sampling_logprobs: Vec<f32>,
    pub finish_reason: FinishReason,
    pub prompt_tokens: usize,
}

/// Collects the events of one sample.
#[derive(Debug, Default)]
pub(super) struct Collected {
    token_ids: Vec<i64>,
    text: String,
    logprobs: Vec<Logprobs>,
    sampling_logprobs: Vec<f32>,
}

impl Collected {
    pub(super) fn add(&mut self, token: Token) {
        self.token_ids.push(token.id);
        self.text += &token.text;
        self.logprobs.extend(token.logprobs);
        self.sampling_logprobs.push(token.sampling_logprob);
    }

    pub(super) fn finish(self, finish_reason: FinishReason, prompt_tokens: usize) -> Generation {
        let Collected { token_ids, text, logprobs, sampling_logprobs } = self;
        Generation { token_ids, text, logprobs, sampling_logprobs, finish_reason, prompt_tokens }
    }
}
