//! From the engine's answers to the bodies of OpenAI's API, whole or chunk by chunk.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Bytes, Frame};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Sleep;

use super::error::ApiError;
use super::http::App;
use super::logprobs::{self, Characters, TokenLogprobs};
use super::response::{Body, json_response};
use super::tool_calls;
use super::worker::{Answer, AnswerKind};
use crate::generate::{FinishReason, Token};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Chat {
        /// Tool calls are looked for.
        tools: bool,
    },
    Text,
}

/// One reply: all samples of all prompts of a request.
pub(super) struct Reply {
    app: Arc<App>,
    id: String,
    created: i64,
    model: String,
    kind: Kind,
    n: usize,
    prompt_tokens: usize,
    include_usage: bool,
    samples: Vec<Sample>,
    started: Instant,
    first_token: bool,
}

#[derive(Default)]
struct Sample {
    text: String,
    /// Bytes of the text that were streamed.
    sent: usize,
    tokens: usize,
    tokens_with_logprobs: Vec<TokenLogprobs>,
    characters: Characters,
    reason: Option<FinishReason>,
}

impl Reply {
    pub(super) fn new(
        app: &Arc<App>,
        kind: Kind,
        model: &str,
        n: usize,
        prompts: &[usize],
        include_usage: bool,
    ) -> Reply {
        let prefix = if kind == Kind::Text { "cmpl" } else { "chatcmpl" };
        Reply {
            app: app.clone(),
            id: format!("{prefix}-{:016x}{:016x}", rand::random::<u64>(), rand::random::<u64>()),
            created: chrono::Utc::now().timestamp(),
            model: model.to_string(),
            kind,
            n,
            prompt_tokens: prompts.iter().sum(),
            include_usage,
            samples: (0..n * prompts.len()).map(|_| Sample::default()).collect(),
            started: Instant::now(),
            first_token: true,
        }
    }

    fn is_over(&self) -> bool {
        self.samples.iter().all(|sample| sample.reason.is_some())
    }

    /// Takes an answer; gives the chunks that a stream shows for it.
    fn take(&mut self, answer: Answer) -> Result<Vec<Value>, ApiError> {
        let index = answer.at * self.n + answer.sample;
        match answer.kind {
            AnswerKind::Token(token) => {
                if std::mem::take(&mut self.first_token) {
                    self.app.metrics.first_token(self.started.elapsed());
                }
                self.add(index, token)
            }
            AnswerKind::Finished(reason) => {
                self.samples[index].reason = Some(reason);
                if self.is_over() {
                    self.app.metrics.finished(self.started.elapsed());
                }
                Ok(self.last_chunks(index))
            }
            AnswerKind::Refused(message) => Err(ApiError::bad(message)),
            AnswerKind::Failed(message) => Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)),
        }
    }

    fn add(&mut self, index: usize, token: Token) -> Result<Vec<Value>, ApiError> {
        let model = &self.app.model;
        let sample = &mut self.samples[index];
        sample.tokens += 1;
        sample.text += &token.text;
        let with_logprobs = token.logprobs.is_some();
        if let Some(found) = token.logprobs {
            let bytes = |id| model.token_bytes.of(&model.tokenizer, id as u32);
            // Special tokens have no place in the text, nor has the space of a token with nothing before it.
            let mut shown = bytes(token.id);
            let begins = sample.tokens == 1
                && !token.text.starts_with(' ')
                && (!token.text.is_empty() || shown == b" ");
            if model.tokenizer.is_special(token.id as u32) {
                shown.clear();
            } else if begins && shown.starts_with(b" ") {
                shown.remove(0);
            }
            sample.tokens_with_logprobs.push(TokenLogprobs {
                bytes: bytes(token.id),
                offset: sample.characters.add(&shown),
                logprob: found.logprob,
                top: found.top.iter().map(|&(id, logprob)| (id, bytes(id), logprob)).collect(),
            });
        }
        let certain = match self.kind {
            Kind::Chat { tools: true } => tool_calls::certain(&sample.text).max(sample.sent),
            _ => sample.text.len(),
        };
        let piece = sample.text[sample.sent..certain].to_string();
        sample.sent = certain;
        if piece.is_empty() && !with_logprobs {
            return Ok(Vec::new());
        }
        let last = sample.tokens_with_logprobs.len().saturating_sub(usize::from(with_logprobs));
        let logprobs = self.logprobs(&self.samples[index].tokens_with_logprobs[last..]);
        let choice = match self.kind {
            Kind::Text => json!({"index": index, "text": piece, "logprobs": logprobs, "finish_reason": null}),
            Kind::Chat { .. } => {
                json!({"index": index, "delta": {"content": piece}, "logprobs": logprobs, "finish_reason": null})
            }
        };
        Ok(vec![self.chunk(choice)])
    }

    /// What is left of a sample that has ended.
    fn last_chunks(&mut self, index: usize) -> Vec<Value> {
        let sample = &mut self.samples[index];
        let reason = sample.reason.map(FinishReason::name);
        let rest = sample.text[sample.sent..].to_string();
        sample.sent = sample.text.len();
        match self.kind {
            Kind::Text => {
                vec![
                    self.chunk(
                        json!({"index": index, "text": rest, "logprobs": null, "finish_reason": reason}),
                    ),
                ]
            }
            Kind::Chat { .. } => {
                let (rest, calls) = self.calls(&rest);
                let mut deltas = Vec::new();
                if !rest.is_empty() {
                    deltas.push(json!({"content": rest}));
                }
                let reason = reason_with(&calls, reason);
                if !calls.is_empty() {
                    deltas.push(json!({"tool_calls": calls}));
                }
                let choice = |delta: Value, reason: Option<&str>| json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": reason});
                let mut chunks: Vec<Value> =
                    deltas.into_iter().map(|delta| self.chunk(choice(delta, None))).collect();
                chunks.push(self.chunk(choice(json!({}), reason)));
                chunks
            }
        }
    }

    fn calls(&self, text: &str) -> (String, Vec<Value>) {
        if self.kind != (Kind::Chat { tools: true }) {
            return (text.to_string(), Vec::new());
        }
        let (outside, calls) = tool_calls::split(text);
        (outside, calls.iter().enumerate().map(|(index, call)| call.json(index)).collect())
    }

    fn chunk(&self, choice: Value) -> Value {
        let object = if self.kind == Kind::Text { "text_completion" } else { "chat.completion.chunk" };
        let mut chunk = json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": [choice]
        });
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    /// Before the first answer.
    fn first_chunks(&self) -> Vec<Value> {
        if self.kind == Kind::Text {
            return Vec::new();
        }
        let role = |index| {
            let delta = json!({"role": "assistant", "content": ""});
            self.chunk(json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null}))
        };
        (0..self.samples.len()).map(role).collect()
    }

    fn usage(&self) -> Value {
        let new: usize = self.samples.iter().map(|sample| sample.tokens).sum();
        json!({"prompt_tokens": self.prompt_tokens, "completion_tokens": new, "total_tokens": self.prompt_tokens + new})
    }

    fn usage_chunk(&self) -> Value {
        let mut chunk = self.chunk(Value::Null);
        chunk["choices"] = json!([]);
        chunk["usage"] = self.usage();
        chunk
    }

    /// The body of a reply that is not streamed.
    fn whole(&self) -> Value {
        let choices: Vec<Value> =
            self.samples.iter().enumerate().map(|(index, sample)| self.choice(index, sample)).collect();
        let object = if self.kind == Kind::Text { "text_completion" } else { "chat.completion" };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices,
            "usage": self.usage()
        })
    }

    fn choice(&self, index: usize, sample: &Sample) -> Value {
        let reason = sample.reason.map(FinishReason::name);
        let logprobs = self.logprobs(&sample.tokens_with_logprobs);
        if self.kind == Kind::Text {
            return json!({"index": index, "text": sample.text, "logprobs": logprobs, "finish_reason": reason});
        }
        let (content, calls) = self.calls(&sample.text);
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        let reason = reason_with(&calls, reason);
        if !calls.is_empty() {
            let calls = calls.into_iter().map(|mut call| {
                call.as_object_mut().map(|call| call.shift_remove("index"));
                call
            });
            message["tool_calls"] = calls.collect();
            if content.is_empty() {
                message["content"] = Value::Null;
            }
        }
        json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
    }

    fn logprobs(&self, tokens: &[TokenLogprobs]) -> Value {
        match self.kind {
            _ if tokens.is_empty() => Value::Null,
            Kind::Text => logprobs::of_text(tokens),
            Kind::Chat { .. } => logprobs::of_chat(tokens),
        }
    }
}

fn too_slow(limit: Duration) -> ApiError {
    let message = format!("the answer took longer than {} s, the server's limit", limit.as_secs());
    ApiError::new(StatusCode::GATEWAY_TIMEOUT, message)
}

fn gone() -> ApiError {
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine has stopped")
}

/// Waits for the whole reply.
pub(super) async fn whole(mut reply: Reply, mut answers: UnboundedReceiver<Answer>) -> Response<Body> {
    let limit = reply.app.limits.request_time;
    let collect = async {
        while !reply.is_over() {
            reply.take(answers.recv().await.ok_or_else(gone)?)?;
        }
        Ok(())
    };
    match tokio::time::timeout(limit, collect).await.unwrap_or_else(|_| Err(too_slow(limit))) {
        Ok(()) => json_response(StatusCode::OK, &reply.whole()),
        Err(error) => error.response(),
    }
}

/// Streams the reply as server-sent events. The first answer is waited for, so that a refusal has its status.
pub(super) async fn streamed(mut reply: Reply, mut answers: UnboundedReceiver<Answer>) -> Response<Body> {
    let limit = reply.app.limits.request_time;
    let first = tokio::time::timeout(limit, answers.recv()).await;
    let first = match first.map_err(|_| too_slow(limit)).and_then(|answer| answer.ok_or_else(gone)) {
        Ok(answer) => answer,
        Err(error) => return error.response(),
    };
    let mut ready: VecDeque<Bytes> = reply.first_chunks().iter().map(event).collect();
    match reply.take(first) {
        Ok(chunks) => ready.extend(chunks.iter().map(event)),
        Err(error) => return error.response(),
    }
    let deadline = Box::pin(tokio::time::sleep(limit));
    let events = EventStream { reply, answers, ready, deadline, over: false };
    let mut response = Response::new(events.boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}

/// The events of a streamed reply. Where the client leaves, it is dropped, and with it the channel that the worker watches.
struct EventStream {
    reply: Reply,
    answers: UnboundedReceiver<Answer>,
    ready: VecDeque<Bytes>,
    deadline: Pin<Box<Sleep>>,
    over: bool,
}

impl EventStream {
    fn end(&mut self, error: Option<ApiError>) {
        self.over = true;
        match error {
            Some(error) => self.ready.push_back(event(&error.json())),
            None if self.reply.include_usage => self.ready.push_back(event(&self.reply.usage_chunk())),
            None => {}
        }
        self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
    }
}

impl HttpBody for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        loop {
            if let Some(bytes) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(bytes))));
            }
            if this.over {
                return Poll::Ready(None);
            }
            if this.reply.is_over() {
                this.end(None);
                continue;
            }
            if this.deadline.as_mut().poll(context).is_ready() {
                let limit = this.reply.app.limits.request_time;
                this.answers.close();
                this.end(Some(too_slow(limit)));
                continue;
            }
            match this.answers.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => this.end(Some(gone())),
                Poll::Ready(Some(answer)) => match this.reply.take(answer) {
                    Ok(chunks) => this.ready.extend(chunks.iter().map(event)),
                    Err(error) => this.end(Some(error)),
                },
            }
        }
    }
}

/// An answer that the longest length cut may have been cut in another call.
fn reason_with<'a>(calls: &[Value], reason: Option<&'a str>) -> Option<&'a str> {
    if calls.is_empty() || reason == Some("length") { reason } else { Some("tool_calls") }
}
