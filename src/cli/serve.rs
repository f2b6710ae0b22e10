//! `ferrotune serve`: an OpenAI-compatible server.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use super::engine_args::EngineArgs;
use super::model_args::ModelArgs;
use super::{signals, sources};
use crate::device;
use crate::error::Error;
use crate::generate::Engine;
use crate::models::FastLanguageModel;
use crate::serve::{Limits, ServeOptions, ServedModel, Server, Shared, Worker};
use crate::train::Size;

const EXAMPLES: &str = "Examples:
  ferrotune serve --model DIR
  ferrotune serve --model DIR --lora-modules de=runs/german fr=runs/french --address 0.0.0.0:8000 --api-key KEY
  curl localhost:8000/v1/chat/completions -d '{\"messages\": [{\"role\": \"user\", \"content\": \"Hi\"}]}'";

/// Serves a model over HTTP as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics, and
/// a chat page at /.
///
/// What a request does not say is as the model's generation_config.json says, or else greedy. Ctrl-C ends it when the
/// running answers have ended.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ServeArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Adapters beside the model, chosen by the `model` of a request
    #[arg(long, value_name = "NAME=DIR|ID", num_args = 1.., help_heading = "Model")]
    pub lora_modules: Vec<String>,
    #[command(flatten)]
    pub engine: EngineArgs,
    #[command(flatten)]
    pub http: HttpArgs,
    /// Address and port to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8000", help_heading = "Server")]
    pub address: SocketAddr,
}

/// The flags of the HTTP side.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Server")]
pub struct HttpArgs {
    /// Name that requests call the model by [default: the last part of --model]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Key that clients of /v1 must show [default: FERROTUNE_API_KEY, or none]
    #[arg(long, value_name = "KEY", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub api_key: Option<String>,
    /// Let clients load and unload adapters from this machine's folders
    #[arg(long)]
    pub allow_runtime_lora: bool,
    /// Longest answer in tokens [default: what the model's context leaves]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// Requests that may wait beside those that run; more are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_queue: u32,
    /// Largest body of a request
    #[arg(long, value_name = "SIZE", default_value = "8MiB")]
    pub max_body: Size,
    /// Connections that are open at once; others wait
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_connections: u32,
    /// Time after which a connection is closed that sends no whole head of a request, or takes nothing of its answer, in
    /// seconds
    #[arg(long, value_name = "S", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    pub idle_timeout: u32,
    /// Longest time of an answer, in seconds
    #[arg(long, value_name = "S", default_value_t = 600, value_parser = clap::value_parser!(u32).range(1..))]
    pub request_timeout: u32,
    /// Time that running answers have after Ctrl-C, in seconds
    #[arg(long, value_name = "S", default_value_t = 30)]
    pub stop_timeout: u32,
}

impl HttpArgs {
    pub fn options(&self, engine: &EngineArgs) -> ServeOptions {
        let environment = || std::env::var("FERROTUNE_API_KEY").ok().filter(|key| !key.is_empty());
        ServeOptions {
            limits: Limits {
                max_body: self.max_body.0 as usize,
                max_tokens: self.max_tokens.map_or(usize::MAX, |tokens| tokens as usize),
                max_open: (engine.max_num_seqs as usize).saturating_add(self.max_queue as usize),
                max_samples: engine.max_num_seqs as usize,
                max_connections: self.max_connections as usize,
                idle_time: Duration::from_secs(self.idle_timeout.into()),
                request_time: Duration::from_secs(self.request_timeout.into()),
                stop_time: Duration::from_secs(self.stop_timeout.into()),
            },
            api_key: self.api_key.clone().or_else(environment),
            runtime_lora: self.allow_runtime_lora,
        }
    }

    /// What requests call the model of `--model`.
    pub fn name(&self, model: &str) -> String {
        let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model);
        self.served_model_name.clone().unwrap_or_else(|| last.to_string())
    }
}

/// Runs until the process is told to stop.
pub fn run(args: ServeArgs) -> Result<()> {
    let adapters = args.lora_modules.iter().map(|module| lora_module(module)).collect::<Result<Vec<_>>>()?;
    let mut model = args.model.load(None)?;
    model.for_inference()?;
    let mut engine = Engine::new(&model.decoder, args.engine.options(&model.decoder)?)?;
    let name = args.http.name(&args.model.model);
    for (adapter, folder) in adapters {
        if adapter == name || engine.lora(&adapter).is_some() {
            bail!(Error::Usage(format!("--lora-modules: the name {adapter} is taken")));
        }
        engine.load_lora(&adapter, model.read_adapter(&folder).context("--lora-modules")?);
    }
    let (commands, received) = mpsc::channel();
    let shared = Arc::new(Shared::default());
    let served = ServedModel::new(&name, &model, &engine)?;
    let options = args.http.options(&args.engine);
    warn_if_open(args.address, &options);
    let server =
        Server::bind(args.address, served, options, commands, shared.clone()).context("--address")?;
    println!("{name} at http://{} (Ctrl-C stops)", server.address()?);
    let stop = signals::stop_flag()?;
    let worker = Worker::new(engine, received, shared);
    // libtorch's threads belong to the one that computes; the model's tensors go with it.
    serve(server, worker, model, stop)
}

/// Says that anybody may ask.
pub fn warn_if_open(address: SocketAddr, options: &ServeOptions) {
    if !address.ip().is_loopback() && options.api_key.is_none() {
        tracing::warn!(
            "{address} is open to the network and needs no key: give --api-key, or FERROTUNE_API_KEY"
        );
    }
}

/// Raises the flag however its scope is left.
struct Raise(Arc<AtomicBool>);

impl Drop for Raise {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

fn serve(server: Server, worker: Worker, model: FastLanguageModel, stop: Arc<AtomicBool>) -> Result<()> {
    std::thread::scope(|scope| {
        // An engine that has failed serves nobody.
        let stopping = Raise(stop.clone());
        let engine = scope.spawn(move || {
            let _stopping = stopping;
            device::use_on_this_thread(model.decoder.device).and_then(|()| worker.run(&model))
        });
        let served = server.run(stop);
        let ran = engine.join().map_err(|_| anyhow!("the engine's thread panicked"))?;
        served.and(ran)
    })
}

fn lora_module(module: &str) -> Result<(String, PathBuf)> {
    let Some((name, place)) =
        module.split_once('=').filter(|(name, place)| !name.is_empty() && !place.is_empty())
    else {
        bail!(Error::Usage(format!("--lora-modules: {module:?}, expected NAME=DIR or NAME=ID")));
    };
    Ok((name.to_string(), sources::model_dir(place, None).context("--lora-modules")?))
}
