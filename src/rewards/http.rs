//! A server as a reward.

use std::io::Read;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ureq::Agent;
use ureq::http::StatusCode;

use super::judge::{answer, question, shortened};
use super::{Reward, Sample, Stop};

/// Samples that are asked about at the same time.
const AT_ONCE: usize = 8;
/// No answer is longer, in bytes.
const LONGEST_ANSWER: u64 = 1 << 20;

/// Posts each sample as JSON, `{"id", "prompt", "completion", "truncated", "columns"}`, eight at a time, and reads a number, null
/// (does not apply), `{"reward": number or null}` or `{"error": text}`. Where there is no answer in time, or one with status 429
/// or 5xx, it asks once more.
pub struct Http {
    url: String,
    timeout: Duration,
    stop: Stop,
    agent: Agent,
}

/// Why there is no answer.
struct Refusal {
    error: anyhow::Error,
    may_pass: bool,
}

impl Http {
    /// Asks `url`, with `timeout` for each request as a whole. Nothing is sent yet.
    pub fn new(url: &str, timeout: Duration) -> Http {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(timeout))
            .user_agent(concat!("ferrotune/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Http { url: url.to_owned(), timeout, stop: Stop::default(), agent }
    }

    /// The same, asking no more once `stop` is raised.
    pub fn until(self, stop: Stop) -> Http {
        Http { stop, ..self }
    }

    fn ask(&self, id: u64, sample: &Sample) -> Result<Option<f64>> {
        self.stop.check()?;
        let body = serde_json::to_vec(&question(id, sample))?;
        let reply = self.post(&body).or_else(|refusal| match refusal.may_pass {
            true => self.post(&body).map_err(|refusal| refusal.error.context("asked twice")),
            false => Err(refusal.error),
        });
        answer(id, &reply.with_context(|| self.url.clone())?)
    }

    fn reason(&self, error: ureq::Error) -> anyhow::Error {
        match error {
            ureq::Error::Timeout(_) => anyhow!("no answer within {} s", self.timeout.as_secs_f64()),
            other => other.into(),
        }
    }

    fn post(&self, body: &[u8]) -> Result<Vec<u8>, Refusal> {
        let lost = |error: ureq::Error| Refusal { error: self.reason(error), may_pass: true };
        let request = self.agent.post(&self.url).header("content-type", "application/json");
        let mut response = request.send(body).map_err(lost)?;
        let mut text = Vec::new();
        let reader = response.body_mut().as_reader();
        reader.take(LONGEST_ANSWER).read_to_end(&mut text).map_err(|error| lost(error.into()))?;
        let status = response.status();
        if !status.is_success() {
            let said = shortened(&String::from_utf8_lossy(&text));
            return Err(Refusal {
                error: anyhow!("status {status}: {said}"),
                may_pass: status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS,
            });
        }
        Ok(text)
    }
}

impl Reward for Http {
    fn name(&self) -> &str {
        "http"
    }

    fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>> {
        let ask = |(id, sample): (usize, &Sample)| self.ask(id as u64, sample);
        let mut results: Vec<Result<Option<f64>>> = Vec::with_capacity(samples.len());
        for part in samples.iter().enumerate().collect::<Vec<_>>().chunks(AT_ONCE) {
            thread::scope(|scope| {
                let asked: Vec<_> = part.iter().map(|&item| scope.spawn(move || ask(item))).collect();
                results.extend(asked.into_iter().map(|thread| match thread.join() {
                    Ok(result) => result,
                    Err(_) => bail!("the request panicked"),
                }));
            });
        }
        results
    }
}
