//! An OpenAI-compatible HTTP server over the engine.
//!
//! The engine runs on a thread of its own ([`Worker`]), or between the steps of a training run; HTTP runs on others. Between
//! them are channels: requests in, [`Answer`]s out. A client that leaves closes its channel, and the worker drops the
//! request.

mod adapters;
mod chat;
mod completions;
mod connections;
mod error;
mod fields;
mod http;
mod logprobs;
mod messages;
mod metrics;
mod respond;
mod response;
mod routes;
mod tool_calls;
mod worker;

pub use http::{Limits, ServeOptions, Server};
pub use messages::ServedModel;
pub use worker::{Answer, AnswerKind, Command, Shared, Worker};
