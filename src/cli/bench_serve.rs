//! `ferrotune bench serve`: what the clients of a server see.

use std::io::{BufRead, BufReader};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use serde_json::{Value, json};
use ureq::{Agent, RequestBuilder};

use super::banner::table;
use super::format::rate;
use crate::error::Error;

/// Measures a server that runs, of this program or another with OpenAI's API: clients that each send the next request when the last is
/// answered, to /v1/completions, streamed. Prompts are random token ids, so that they share nothing but what --shared-prefix says.
#[derive(Debug, Args)]
pub struct BenchServeArgs {
    /// The server, with or without /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Model or adapter to ask [default: the first of /v1/models]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Key of the server [default: FERROTUNE_API_KEY, or none]
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Clients at once
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub clients: u32,
    /// Requests in all [default: three for each client]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub requests: Option<u32>,
    /// Requests before the measured ones [default: three for each client]
    #[arg(long, value_name = "N")]
    pub warm_up: Option<u32>,
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// First tokens that all prompts share
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub shared_prefix: u32,
    /// Tokens of each answer; the end token is ignored
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub new: u32,
    /// Token ids are below this
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub vocab_size: u32,
    #[arg(long, help = "Sampling temperature; 0 takes the likeliest token", default_value_t = 1.0)]
    pub temperature: f64,
    #[arg(long, help = "Print the report as JSON")]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    url: String,
    model: String,
    clients: u32,
    requests: u32,
    prompt_tokens: u32,
    shared_prefix: u32,
    new_tokens: u32,
    seconds: f64,
    /// New tokens of all requests, as the server counted them, over the time from the first request to the last byte.
    tokens_per_second: f64,
    requests_per_second: f64,
    /// From sending a request to the first event of its answer.
    first_token_ms_p50: f64,
    first_token_ms_p99: f64,
    /// Of an answer, from its first event to its last, over its tokens but one.
    ms_per_token_p50: f64,
    ms_per_token_p99: f64,
}

/// What a client saw of one request.
struct Answer {
    tokens: u64,
    first_token: Duration,
    whole: Duration,
}

pub fn run(args: &BenchServeArgs) -> Result<()> {
    if args.shared_prefix > args.prompt {
        bail!(Error::Usage("--shared-prefix: longer than --prompt".into()));
    }
    let client = Client::new(args)?;
    let three_each = 3 * args.clients;
    client.requests(args.warm_up.unwrap_or(three_each), 0)?;
    let requests = args.requests.unwrap_or(three_each);
    let start = Instant::now();
    let answers = client.requests(requests, 1)?;
    let seconds = start.elapsed().as_secs_f64();
    let sorted = |of: &dyn Fn(&Answer) -> f64| {
        let mut values: Vec<f64> = answers.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let quantile = |values: &[f64], q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
    let first = sorted(&|answer| answer.first_token.as_secs_f64() * 1e3);
    let each = sorted(&|answer| {
        (answer.whole - answer.first_token).as_secs_f64() * 1e3
            / answer.tokens.saturating_sub(1).max(1) as f64
    });
    let tokens: u64 = answers.iter().map(|answer| answer.tokens).sum();
    let report = Report {
        url: args.url.clone(),
        model: client.model,
        clients: args.clients,
        requests,
        prompt_tokens: args.prompt,
        shared_prefix: args.shared_prefix,
        new_tokens: args.new,
        seconds,
        tokens_per_second: tokens as f64 / seconds,
        requests_per_second: f64::from(requests) / seconds,
        first_token_ms_p50: quantile(&first, 0.5),
        first_token_ms_p99: quantile(&first, 0.99),
        ms_per_token_p50: quantile(&each, 0.5),
        ms_per_token_p99: quantile(&each, 0.99),
    };
    super::show(&report, args.json, render)
}

struct Client<'a> {
    args: &'a BenchServeArgs,
    agent: Agent,
    key: Option<String>,
    model: String,
}

impl Client<'_> {
    fn new(args: &BenchServeArgs) -> Result<Client<'_>> {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(10)))
            .max_idle_connections_per_host(args.clients as usize)
            .user_agent(concat!("ferrotune/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let environment = || std::env::var("FERROTUNE_API_KEY").ok().filter(|key| !key.is_empty());
        let key = args.api_key.clone().or_else(environment);
        let mut client = Client { args, agent, key, model: String::new() };
        client.model = match &args.model {
            Some(model) => model.clone(),
            None => client.first_model()?,
        };
        Ok(client)
    }

    fn address(&self, path: &str) -> String {
        let url = self.args.url.trim_end_matches('/');
        format!("{}{path}", url.strip_suffix("/v1").unwrap_or(url))
    }

    fn authorized<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        }
    }

    fn first_model(&self) -> Result<String> {
        let address = self.address("/v1/models");
        let request = self.authorized(self.agent.get(&address));
        let mut reply = request.call().with_context(|| format!("--url: {address}"))?;
        let body = reply.body_mut().read_to_string()?;
        ensure!(reply.status().is_success(), "{address}: {}: {body}", reply.status());
        let models: Value = serde_json::from_str(&body).with_context(|| format!("--url: {address}"))?;
        let name = models["data"][0]["id"].as_str();
        Ok(name.with_context(|| format!("{address} names no model: {body}"))?.to_string())
    }

    /// `count` requests by all clients; those of another `round` have other prompts. The first error ends all.
    fn requests(&self, count: u32, round: u64) -> Result<Vec<Answer>> {
        let (next, answers) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let client = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count as usize {
                    return Ok(());
                }
                let answer = self.ask((round << 32) + number as u64).inspect_err(|_| {
                    next.store(count as usize, Ordering::Relaxed);
                })?;
                answers.lock().map_err(|_| anyhow!("a client panicked"))?.push(answer);
            }
        };
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..self.args.clients).map(|_| scope.spawn(client)).collect();
            clients.into_iter().try_for_each(|one| one.join().map_err(|_| anyhow!("a client panicked"))?)
        })?;
        answers.into_inner().map_err(|_| anyhow!("a client panicked"))
    }

    fn ask(&self, number: u64) -> Result<Answer> {
        let args = self.args;
        let ids = |seed, count: u32| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            (0..count).map(move |_| random.random_range(0..args.vocab_size))
        };
        let prompt: Vec<u32> =
            ids(u64::MAX, args.shared_prefix).chain(ids(number, args.prompt - args.shared_prefix)).collect();
        let body = json!({
            "model": self.model, "prompt": prompt, "max_tokens": args.new, "temperature": args.temperature,
            "seed": number, "ignore_eos": true, "stream": true, "stream_options": {"include_usage": true}
        });
        let (address, start) = (self.address("/v1/completions"), Instant::now());
        let request = self.authorized(self.agent.post(&address)).header("content-type", "application/json");
        let mut reply =
            request.send(serde_json::to_vec(&body)?.as_slice()).with_context(|| address.clone())?;
        if !reply.status().is_success() {
            bail!("{address}: {}: {}", reply.status(), reply.body_mut().read_to_string()?);
        }
        let (mut first_token, mut tokens) = (None, 0);
        for line in BufReader::new(reply.into_body().into_reader()).lines() {
            let line = line.with_context(|| address.clone())?;
            let Some(data) = line.strip_prefix("data: ") else { continue };
            first_token.get_or_insert_with(|| start.elapsed());
            // Only the last event of an answer says how many tokens it has.
            if !data.contains("\"completion_tokens\"") && !data.starts_with("{\"error\"") {
                continue;
            }
            let event: Value = serde_json::from_str(data).with_context(|| format!("{address}: {data}"))?;
            ensure!(event.get("error").is_none(), "{address}: {data}");
            tokens = event["usage"]["completion_tokens"].as_u64().unwrap_or(tokens);
        }
        ensure!(tokens > 0, "{address}: the answer came without its usage");
        let whole = start.elapsed();
        Ok(Answer { tokens, first_token: first_token.unwrap_or(whole), whole })
    }
}

fn render(report: &Report) -> String {
    let shared = match report.shared_prefix {
        0 => String::new(),
        tokens => format!(" (the first {tokens} the same)"),
    };
    let rows = [
        ("model", report.model.clone()),
        (
            "requests",
            format!(
                "{} of {}{shared} + {} tokens, {} clients",
                report.requests, report.prompt_tokens, report.new_tokens, report.clients
            ),
        ),
        (
            "all",
            format!(
                "{} tokens/s, {} requests/s",
                rate(report.tokens_per_second),
                rate(report.requests_per_second)
            ),
        ),
        (
            "first token",
            format!(
                "{:.1} ms in the middle, {:.1} ms at 99 %",
                report.first_token_ms_p50, report.first_token_ms_p99
            ),
        ),
        (
            "a token after it",
            format!(
                "{:.2} ms in the middle, {:.2} ms at 99 %",
                report.ms_per_token_p50, report.ms_per_token_p99
            ),
        ),
    ];
    table(&report.url, &rows)
}
