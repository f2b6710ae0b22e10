//! A server on a free port for the tests of what it answers, and a client that can do what no client should.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferrotune::generate::{Engine, EngineOptions, KvBudget};
use ferrotune::models::FastLanguageModel;
use ferrotune::serve::{Limits, ServeOptions, ServedModel, Server, Shared, Worker};
use serde_json::{Value, json};
use tch::{Device, Kind};

pub fn dir() -> PathBuf {
    crate::golden::root().join("../../examples/tiny/model")
}

pub fn tiny() -> FastLanguageModel {
    FastLanguageModel::from_pretrained(&dir(), Kind::Float, Device::Cpu).unwrap()
}

pub fn limits() -> Limits {
    Limits {
        max_body: 1 << 20,
        max_tokens: 400,
        max_samples: 4,
        max_open: 8,
        max_connections: 64,
        idle_time: Duration::from_secs(60),
        request_time: Duration::from_secs(60),
        stop_time: Duration::from_secs(20),
    }
}

/// A server on a free port.
pub struct Running {
    pub address: SocketAddr,
    pub shared: Arc<Shared>,
    pub stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<anyhow::Result<()>>>,
}

impl Running {
    pub fn start(options: ServeOptions) -> Running {
        Running::on(tiny(), KvBudget::Tokens(4096), options)
    }

    pub fn on(model: FastLanguageModel, kv_budget: KvBudget, options: ServeOptions) -> Running {
        let engine = Engine::new(&model.decoder, EngineOptions::new(kv_budget, 4)).unwrap();
        let served = ServedModel::new("tiny", &model, &engine).unwrap();
        let (commands, received) = mpsc::channel();
        let (shared, stop) = (Arc::new(Shared::default()), Arc::new(AtomicBool::new(false)));
        let any = "127.0.0.1:0".parse().unwrap();
        let server = Server::bind(any, served, options, commands, shared.clone()).unwrap();
        let address = server.address().unwrap();
        let worker = Worker::new(engine, received, shared.clone());
        let on_http = stop.clone();
        let engine = std::thread::spawn(move || worker.run(&model));
        let http = std::thread::spawn(move || server.run(on_http));
        Running { address, shared, stop, threads: vec![engine, http] }
    }

    pub fn with(limits: Limits) -> Running {
        Running::start(ServeOptions { limits, api_key: None, runtime_lora: true })
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends a request and returns the open connection.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}Content-Length: {}\r\n\r\n",
            self.address,
            body.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        // The server may refuse before it has read all of a body.
        let _ = stream.write_all(body);
        stream
    }

    pub fn request(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> (u16, String) {
        let mut bytes = Vec::new();
        let _ = self.send(method, path, headers, body).read_to_end(&mut bytes);
        response(&bytes)
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let (status, text) = self.request("POST", path, "", body.to_string().as_bytes());
        (status, serde_json::from_str(&text).unwrap_or_else(|_| json!(text)))
    }

    /// The chunks of a streamed reply.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let (status, text) = self.request("POST", path, "", body.to_string().as_bytes());
        assert_eq!(status, 200, "{text}");
        let mut events: Vec<&str> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
        assert_eq!(events.pop(), Some("data: [DONE]"));
        events
            .iter()
            .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
            .collect()
    }

    /// Waits until no request is open and no page held.
    pub fn settle(&self) {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let stats = self.shared.stats();
            if self.shared.open() == 0 && (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0) {
                return;
            }
            assert!(Instant::now() < end, "{} open, {stats:?}", self.shared.open());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn stop(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap().unwrap();
        }
    }
}

/// Status and body, chunks joined.
pub fn response(bytes: &[u8]) -> (u16, String) {
    let text = String::from_utf8_lossy(bytes);
    let (head, mut rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no response: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    if !head.to_lowercase().contains("transfer-encoding: chunked") {
        return (status, rest.to_string());
    }
    let mut body = String::new();
    while let Some((size, after)) = rest.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        body += &after[..size];
        rest = after[size..].strip_prefix("\r\n").unwrap_or("");
        if size == 0 {
            break;
        }
    }
    (status, body)
}

pub fn question(text: &str) -> Value {
    json!([{"role": "user", "content": text}])
}

pub const CHAT: &str = "/v1/chat/completions";
pub const TEXT: &str = "/v1/completions";

/// A request that runs until its last token.
pub fn endless(max_tokens: usize) -> Value {
    json!({"prompt": "The sky", "max_tokens": max_tokens, "ignore_eos": true, "stream": true})
}
