//! Requests run to their end.

use std::collections::{HashMap, VecDeque};

use anyhow::{Context, Result};

use super::request::{Collected, EventKind, FinishReason, Generation, RequestId, Token};
use super::{Engine, ModelRef, Request, SamplingParams};

impl Engine {
    /// Runs the requests to their end, in any order beside each other; the samples of each in order. `on_token` sees every
    /// token as it comes, with the numbers of its request and sample.
    ///
    /// # Errors
    /// Those of [`submit`](Engine::submit), and the first that a request ends with.
    pub fn run<'a>(
        &mut self,
        model: impl Into<ModelRef<'a>>,
        requests: impl IntoIterator<Item = Request>,
        mut on_token: impl FnMut(usize, usize, &Token),
    ) -> Result<Vec<Vec<Generation>>> {
        let mut finished = Vec::new();
        let mut place = |at: usize, generations| {
            if finished.len() <= at {
                finished.resize_with(at + 1, Vec::new);
            }
            finished[at] = generations;
            Ok(())
        };
        self.run_each(model, requests.into_iter().map(Ok), usize::MAX, &mut on_token, &mut place)?;
        Ok(finished)
    }

    /// As [`run`](Engine::run) for requests that are made as they are needed, at most `ahead` that are not finished; each
    /// answer goes to `on_finished` when its last sample ends.
    pub fn run_each<'a>(
        &mut self,
        model: impl Into<ModelRef<'a>>,
        requests: impl IntoIterator<Item = Result<Request>>,
        ahead: usize,
        on_token: &mut dyn FnMut(usize, usize, &Token),
        on_finished: &mut dyn FnMut(usize, Vec<Generation>) -> Result<()>,
    ) -> Result<()> {
        let model = model.into();
        let mut requests = requests.into_iter().enumerate();
        let mut open: HashMap<RequestId, Open> = HashMap::new();
        let result = (|| {
            loop {
                while open.len() < ahead {
                    let Some((at, request)) = requests.next() else { break };
                    let request = request?;
                    let samples = (0..request.n).map(|_| Sample::default()).collect();
                    let prompt_tokens = request.prompt_ids.len();
                    open.insert(self.submit(model, request)?, Open { at, prompt_tokens, samples });
                }
                if open.is_empty() {
                    return Ok(());
                }
                for event in self.step(model)? {
                    let Some(of) = open.get_mut(&event.request) else { continue };
                    let sample = &mut of.samples[event.sample];
                    match event.kind {
                        EventKind::Token(token) => {
                            on_token(of.at, event.sample, &token);
                            sample.collected.add(token);
                        }
                        EventKind::Finished(reason) => sample.reason = Some(reason),
                        EventKind::Failed(error) => return Err(error),
                    }
                    if of.samples.iter().all(|sample| sample.reason.is_some()) {
                        let Open { at, prompt_tokens, samples } =
                            open.remove(&event.request).context("a finished request is not open")?;
                        let generations = samples.into_iter().map(|sample| sample.finish(prompt_tokens));
                        on_finished(at, generations.collect::<Result<_>>()?)?;
                    }
                }
            }
        })();
        for id in open.into_keys() {
            self.cancel(id);
        }
        result
    }
}

struct Open {
    at: usize,
    prompt_tokens: usize,
    samples: Vec<Sample>,
}

#[derive(Default)]
struct Sample {
    collected: Collected,
    reason: Option<FinishReason>,
}

impl Sample {
    fn finish(self, prompt_tokens: usize) -> Result<Generation> {
        let reason = self.reason.context("a sample ended without a reason")?;
        Ok(self.collected.finish(reason, prompt_tokens))
    }
}

/// The tokens of one request as they come: an iterator that ends after a stop token, a stop string or the last allowed
/// token. Where it is dropped, the request ends.
pub struct TokenStream<'e, 'a> {
    engine: &'e mut Engine,
    model: ModelRef<'a>,
    request: RequestId,
    ready: VecDeque<Token>,
    finish_reason: Option<FinishReason>,
    over: bool,
}

impl Engine {
    /// Starts one request, and steps the engine (with all that runs on it, whose events are lost) as the iterator is asked.
    /// Errors as [`submit`](Engine::submit).
    pub fn stream<'a>(
        &mut self,
        model: impl Into<ModelRef<'a>>,
        prompt_ids: &[i64],
        params: &SamplingParams,
    ) -> Result<TokenStream<'_, 'a>> {
        let model = model.into();
        let request = self.submit(model, Request::new(prompt_ids, params))?;
        Ok(TokenStream {
            engine: self,
            model,
            request,
            ready: VecDeque::new(),
            finish_reason: None,
            over: false,
        })
    }
}

impl TokenStream<'_, '_> {
    /// What ended the answer; none while there is more to come.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finish_reason
    }

    fn fill(&mut self) -> Result<()> {
        while self.ready.is_empty() && !self.over {
            for event in
                self.engine.step(self.model)?.into_iter().filter(|event| event.request == self.request)
            {
                match event.kind {
                    EventKind::Token(token) => self.ready.push_back(token),
                    EventKind::Finished(reason) => {
                        self.finish_reason = Some(reason);
                        self.over = true;
                    }
                    EventKind::Failed(error) => {
                        self.over = true;
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Iterator for TokenStream<'_, '_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Result<Token>> {
        match self.fill() {
            Ok(()) => self.ready.pop_front().map(Ok),
            Err(error) => {
                self.over = true;
                Some(Err(error))
            }
        }
    }
}

impl Drop for TokenStream<'_, '_> {
    fn drop(&mut self) {
        self.engine.cancel(self.request);
    }
}

/// Continues `prompt_ids` on an engine of its own. Errors as [`Engine::submit`].
pub fn generate<'a>(
    model: impl Into<ModelRef<'a>>,
    prompt_ids: &[i64],
    params: &SamplingParams,
) -> Result<Generation> {
    let model = model.into();
    let mut engine = Engine::for_request(model.decoder, prompt_ids.len(), params, 1)?;
    let mut answers = engine.run(model, [Request::new(prompt_ids, params)], |_, _, _| ())?;
    answers.pop().and_then(|mut samples| samples.pop()).context("the engine gave no answer")
}
