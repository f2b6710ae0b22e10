//! `ferrotune train --serve`: what its server answers while the weights change.

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferrotune::cli::train_serve::ServeBetweenSteps;
use ferrotune::data::{BatchOptions, BatchStream, DatasetOptions, prepare};
use ferrotune::models::FastLanguageModel;
use ferrotune::train::observer::TrainObserver;
use ferrotune::train::{Sft, Trainer, TrainingArguments};
use serde_json::{Value, json};
use tch::Tensor;

use crate::golden::root;
use crate::server::tiny;

const PROMPT: &str = "The opposite of hot is cold and the opposite of big is";
const STEPS: u64 = 16;
const SAMPLES: usize = 8;

type Weights = Vec<(String, Tensor)>;

/// Serves, and keeps the weights after each step.
struct Keeping {
    inner: ServeBetweenSteps,
    /// Raised when the client has seen a token.
    asked: Arc<AtomicBool>,
    weights: Rc<RefCell<Vec<Weights>>>,
}

impl TrainObserver for Keeping {
    fn between_steps(&mut self, model: &FastLanguageModel, last: bool) -> anyhow::Result<()> {
        let copies =
            model.decoder.adapter_state().into_iter().map(|(name, tensor)| (name, tensor.detach().copy()));
        self.weights.borrow_mut().push(copies.collect());
        // However late the client is, its answers begin with the first weights.
        while !self.asked.load(Ordering::Relaxed) {
            self.inner.between_steps(model, false)?;
            std::thread::sleep(Duration::from_micros(100));
        }
        self.inner.between_steps(model, last)
    }
}

/// Sends a streamed request, and gives the events of its answers once they are whole.
fn ask(address: SocketAddr, request: &Value, asked: &AtomicBool) -> Vec<Value> {
    let mut stream = TcpStream::connect(address).unwrap();
    let body = request.to_string();
    // By version 1.0 the events come as they are, not in chunks.
    let head =
        format!("POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).unwrap();
    let (mut reply, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let count = stream.read(&mut piece).unwrap();
        reply.extend_from_slice(&piece[..count]);
        if count == 0 || reply.windows(6).any(|bytes| bytes == b"data: ") {
            asked.store(true, Ordering::Relaxed);
        }
        if count == 0 {
            break;
        }
    }
    let reply = String::from_utf8(reply).unwrap();
    let (head, events) = reply.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 ") && events.trim_end().ends_with("data: [DONE]"), "{reply}");
    let events = events.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
    events.filter(|event| *event != "[DONE]").map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// Tokens and their log-probabilities of each sample. What the text of a token does not name ends its sample.
fn answers(model: &FastLanguageModel, events: &[Value]) -> Vec<(Vec<i64>, Vec<f64>)> {
    let tokenizer = model.tokenizer().unwrap();
    let mut ids: HashMap<String, Vec<i64>> = HashMap::new();
    for id in 0..model.decoder.config.vocab_size {
        ids.entry(tokenizer.decode(&[id as u32], false).unwrap()).or_default().push(id);
    }
    let mut samples = vec![(Vec::new(), Vec::new(), true); SAMPLES];
    for choice in events.iter().map(|event| &event["choices"][0]) {
        let Some(tokens) = choice["logprobs"]["tokens"].as_array() else { continue };
        let (found, logprobs, named) = &mut samples[choice["index"].as_u64().unwrap() as usize];
        for (token, logprob) in tokens.iter().zip(choice["logprobs"]["token_logprobs"].as_array().unwrap()) {
            // Part of a character stands as its bytes, which are no token's text.
            let meant = ids.get(token.as_str().unwrap()).filter(|meant| meant.len() == 1);
            *named &= meant.is_some();
            if let (true, Some(meant)) = (*named, meant) {
                found.push(meant[0]);
                logprobs.push(logprob.as_f64().unwrap());
            }
        }
    }
    samples.into_iter().map(|(ids, logprobs, _)| (ids, logprobs)).collect()
}

/// Each token of an answer that goes on over many steps has the log-probability that the weights after one step give it behind all
/// before it, and the steps follow one another.
#[test]
fn no_token_over_http_comes_from_torn_weights() {
    let folder = tempfile::tempdir().unwrap();
    let example = root().join("../../examples/tiny");
    let mut model = tiny();
    let arguments = TrainingArguments {
        model: example.join("model").display().to_string(),
        dataset: vec![example.join("train.jsonl").display().to_string()],
        max_steps: Some(STEPS),
        learning_rate: Some(4e-3),
        gradient_accumulation_steps: 1,
        output_dir: folder.path().to_path_buf(),
        ..TrainingArguments::default()
    }
    .resolved()
    .unwrap();
    model.get_peft_model(arguments.adapter_config("tiny"), 1).unwrap();
    let (data, _) =
        prepare(&arguments.dataset, model.tokenizer().unwrap(), &DatasetOptions::default()).unwrap();
    let options = BatchOptions { batch_size: 1, max_seq_length: 64, packing: false, shuffle: true, seed: 1 };
    let inner = ServeBetweenSteps::start("127.0.0.1:0".parse().unwrap(), "tiny", &model).unwrap();
    let (address, asked) = (inner.address(), Arc::new(AtomicBool::new(false)));
    let weights = Rc::new(RefCell::new(Vec::new()));
    let client = {
        let asked = asked.clone();
        let request = json!({"prompt": PROMPT, "n": SAMPLES, "max_tokens": 200, "temperature": 1.0, "top_k": 0,
            "top_p": 1.0, "seed": 7, "logprobs": 0, "ignore_eos": true, "stream": true});
        std::thread::spawn(move || ask(address, &request, &asked))
    };
    let mut observer = Keeping { inner, asked, weights: weights.clone() };
    Trainer {
        model: &mut model,
        objective: &Sft,
        arguments: &arguments,
        train: Box::new(BatchStream::new(Arc::new(data), options).unwrap()),
        eval: None,
        observer: &mut observer,
        plan: None,
        stop: &AtomicBool::new(false),
    }
    .run(None)
    .unwrap();
    let answers = answers(&model, &client.join().unwrap());

    let prompt = model.prompt_ids(PROMPT).unwrap();
    let weights = weights.borrow();
    assert_eq!(weights.len(), STEPS as usize);
    // [step][sample]: the log-probabilities of its tokens.
    let expected: Vec<Vec<Vec<f64>>> = weights
        .iter()
        .map(|kept| {
            let _no_grad = tch::no_grad_guard();
            for ((_, mut own), (_, kept)) in model.decoder.adapter_state().into_iter().zip(kept) {
                own.copy_(kept);
            }
            let of = |ids: &Vec<i64>| {
                let all = model.decoder.log_probs(&[&prompt[..], ids].concat()).unwrap();
                let new = all.narrow(0, prompt.len() as i64 - 1, ids.len() as i64);
                Vec::<f64>::try_from(new.to_kind(tch::Kind::Double)).unwrap()
            };
            answers.iter().map(|(ids, _)| of(ids)).collect()
        })
        .collect();
    let (mut tokens, mut certain) = (0, BTreeSet::new());
    for (sample, (ids, logprobs)) in answers.iter().enumerate() {
        let mut step = 0;
        for (at, found) in logprobs.iter().enumerate() {
            let like = |step: &usize| (expected[*step][sample][at] - found).abs() < 1e-4;
            let of: Vec<usize> = (0..expected.len()).filter(like).collect();
            let next = of.iter().find(|&&of| of >= step);
            step =
                *next.unwrap_or_else(|| panic!("sample {sample}, token {at}: of {of:?}, behind step {step}"));
            if of.len() == 1 {
                certain.insert(step);
            }
        }
        tokens += ids.len();
    }
    println!("{tokens} tokens; steps that alone explain one: {certain:?}");
    assert!(tokens > SAMPLES * 100, "only {tokens} tokens have a name");
    assert!(certain.len() >= 3, "answers of steps {certain:?}");
}
