//! The server's details of OpenAI's and vLLM's API, and of HTTP.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use ferrotune::generate::{Engine, EngineOptions, Grammars, KvBudget, Request, SamplingParams};
use ferrotune::io::adapter::{AdapterConfig, InitLoraWeights};
use ferrotune::models::FastLanguageModel;
use ferrotune::serve::ServeOptions;
use rustix::fs::{CWD, Mode, mkfifoat};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::server::{CHAT, Running, TEXT, limits, question, response, tiny};

fn options() -> ServeOptions {
    ServeOptions { limits: limits(), api_key: None, runtime_lora: true }
}

/// Head and body as they came.
fn raw(server: &Running, method: &str, path: &str, headers: &str) -> (u16, String, String) {
    let mut bytes = Vec::new();
    server.send(method, path, headers, b"").read_to_end(&mut bytes).unwrap();
    let head = String::from_utf8_lossy(&bytes).split("\r\n\r\n").next().unwrap().to_lowercase();
    let (status, body) = response(&bytes);
    (status, head + "\r\n", body)
}

#[test]
fn methods_and_keys_are_as_http_has_them() {
    let server = Running::start(ServeOptions { api_key: Some("secret".into()), ..options() });
    let (_, whole, body) = raw(&server, "GET", "/health", "");
    let (status, head, nothing) = raw(&server, "HEAD", "/health", "");
    assert_eq!((status, nothing.as_str()), (200, ""));
    let length = format!("content-length: {}\r\n", body.len());
    assert!(whole.contains(&length) && head.contains(&length), "{whole}\n{head}");
    for (method, path, allow) in
        [("POST", "/health", "get, head"), ("GET", CHAT, "post"), ("DELETE", "/v1/models/tiny", "get, head")]
    {
        let (status, head, _) = raw(&server, method, path, "");
        assert!(status == 405 && head.contains(&format!("allow: {allow}\r\n")), "{status} {head}");
    }
    let (status, head, _) = raw(&server, "GET", "/v1/models", "");
    assert!(status == 401 && head.contains("www-authenticate: bearer\r\n"), "{status} {head}");
    for (key, status) in [
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("BEARER  secret", 200),
        ("Basic secret", 401),
        ("secret", 401),
        ("Bearer secret2", 401),
    ] {
        let header = format!("Authorization: {key}\r\n");
        assert_eq!(raw(&server, "GET", "/v1/models", &header).0, status, "{key}");
    }
    server.stop();
}

#[test]
fn fields_that_cannot_be_meant_are_named() {
    let server = Running::start(options());
    let ok = question("Hi");
    let schema = json!({"type": "json_object"});
    for (path, body, param, needle) in [
        (
            TEXT,
            json!({"prompt": "a", "stop_token_ids": [512]}),
            "stop_token_ids",
            "512 is outside the vocabulary",
        ),
        (CHAT, json!({"messages": ok, "stop_token_ids": [3, -1]}), "stop_token_ids", "-1 is outside"),
        (
            CHAT,
            json!({"messages": ok, "response_format": schema, "ignore_eos": true}),
            "ignore_eos",
            "not with response_format",
        ),
        (
            "/v1/load_lora_adapter",
            json!({"lora_name": "a", "lora_path": "/no/such"}),
            "lora_path",
            "/no/such",
        ),
        ("/v1/load_lora_adapter", json!({"lora_name": "tiny", "lora_path": "/a"}), "lora_name", "\"tiny\""),
    ] {
        let (status, reply) = server.post(path, &body);
        assert_eq!((status, &reply["error"]["param"]), (400, &json!(param)), "{reply}");
        assert!(reply["error"]["message"].as_str().unwrap().contains(needle), "{reply}");
    }
    server.stop();

    // In a program, too: without a stop token an answer in a grammar would have no end.
    let model = tiny();
    let grammar = Grammars::new(model.tokenizer().unwrap()).unwrap().json_schema(&json!({"type": "object"}));
    let request =
        Request { grammar: Some(grammar.unwrap()), ..Request::new(&[5], &SamplingParams::default()) };
    let options = EngineOptions::new(KvBudget::Tokens(512), 1);
    let refused = Engine::new(&model.decoder, options).unwrap().submit(&model, request);
    assert!(refused.unwrap_err().to_string().starts_with("stop_token_ids is empty"));
}

/// Where the engine has pages for less than the model's context, that is what the server says and takes.
#[test]
fn the_room_is_what_the_pages_hold() {
    let server = Running::on(tiny(), KvBudget::Tokens(64), options());
    let (_, models) = server.request("GET", "/v1/models", "", b"");
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!(models["data"][0]["max_model_len"], json!(64));
    let ask = |more: Value| {
        let mut body = json!({"messages": question("Hi"), "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post(CHAT, &body)
    };
    let (status, reply) = ask(json!({}));
    assert_eq!((status, &reply["choices"][0]["finish_reason"]), (200, &json!("length")), "{reply}");
    assert_eq!(reply["usage"]["total_tokens"], json!(64));
    let (status, reply) = ask(json!({"max_tokens": 100}));
    let message = reply["error"]["message"].as_str().unwrap();
    assert_eq!((status, &reply["error"]["code"]), (400, &json!("context_length_exceeded")), "{reply}");
    let room = "room for 64 tokens (its --kv-cache-memory; the model's context is 512)";
    assert!(message.contains(room) && message.contains("the answer may have 100"), "{message}");
    let (status, reply) = server.post(TEXT, &json!({"prompt": "word ".repeat(80)}));
    assert!(status == 400 && reply["error"]["message"].as_str().unwrap().contains(room), "{reply}");
    server.settle();
    server.stop();
}

#[test]
fn log_probabilities_name_each_token() {
    // Byte-level BPE: the tokens are the text, and offsets count its characters.
    let server = Running::start(options());
    let prompts = json!({"prompt": "The sky", "max_tokens": 60, "temperature": 1.8, "seed": 3, "logprobs": 20,
        "ignore_eos": true, "n": 4});
    let (_, reply) = server.post(TEXT, &prompts);
    for choice in reply["choices"].as_array().unwrap() {
        let logprobs = &choice["logprobs"];
        let tokens: Vec<&str> =
            logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
        assert_eq!(tokens.len(), 60);
        let offsets: Vec<usize> = serde_json::from_value(logprobs["text_offset"].clone()).unwrap();
        let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
        for ((token, &offset), next) in
            tokens.iter().zip(&offsets).zip(offsets[1..].iter().chain([&text.len()]))
        {
            let shown: String = text[offset..*next].iter().collect();
            if next > &offset && !token.starts_with("bytes:") && !shown.contains('\u{fffd}') {
                assert_eq!(shown, *token, "{tokens:?}");
            }
        }
        assert_eq!(offsets[0], 0);
        for top in logprobs["top_logprobs"].as_array().unwrap() {
            assert_eq!(top.as_object().unwrap().len(), 20, "{top}");
        }
    }
    server.stop();

    // Sentencepiece with a token for each byte: a random model likes those as much as others.
    let folder = tempfile::tempdir().unwrap();
    let golden = crate::golden::root().join("data/spm");
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden.join(name), folder.path().join(name)).unwrap();
    }
    let config = json!({
        "model_type": "llama", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128
    });
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::write(
        folder.path().join("chat_template.jinja"),
        "{% for message in messages %}{{ message.content }}{% endfor %}",
    )
    .unwrap();
    let random = FastLanguageModel::from_scratch(folder.path(), Kind::Float, Device::Cpu, 5).unwrap();
    let server = Running::on(random, KvBudget::Tokens(512), options());
    let sampled = json!({"max_tokens": 60, "temperature": 1, "seed": 1, "ignore_eos": true});
    let with = |more: Value| -> Value {
        let mut body = sampled.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let (_, reply) = server.post(TEXT, &with(json!({"prompt": "The sky", "logprobs": 20})));
    let logprobs = &reply["choices"][0]["logprobs"];
    for top in logprobs["top_logprobs"].as_array().unwrap() {
        let top = top.as_object().unwrap();
        assert!(top.len() == 20 && top.keys().all(|key| !key.contains('\u{fffd}')), "{top:?}");
    }
    let tops = logprobs["top_logprobs"].to_string();
    assert!(tops.contains("\"bytes:\\\\x") && tops.contains("\" "), "{tops}");
    // The first word of a text stands without the space that its token has.
    let mut seen = 0;
    for seed in 0..50 {
        let body =
            json!({"prompt": "", "logprobs": 0, "max_tokens": 2, "seed": seed, "n": 4, "temperature": 1});
        let (_, reply) = server.post(TEXT, &body);
        for choice in reply["choices"].as_array().unwrap() {
            let (tokens, offsets) = (&choice["logprobs"]["tokens"], &choice["logprobs"]["text_offset"]);
            let first = tokens[0].as_str().unwrap();
            if first.starts_with(' ') && first.is_ascii() && !offsets[1].is_null() {
                assert_eq!(offsets[1], json!(first.len() - 1), "{choice}");
                seen += 1;
            }
        }
    }
    assert!(seen > 0);
    let (status, reply) = server
        .post(CHAT, &with(json!({"messages": question("The sky"), "logprobs": true, "top_logprobs": 20})));
    assert_eq!(status, 200, "{reply}");
    for token in reply["choices"][0]["logprobs"]["content"].as_array().unwrap() {
        for one in token["top_logprobs"].as_array().unwrap().iter().chain([token]) {
            let bytes: Vec<u8> = serde_json::from_value(one["bytes"].clone()).unwrap();
            let expected = match String::from_utf8(bytes.clone()) {
                Ok(text) => text,
                Err(_) => bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect(),
            };
            assert_eq!(one["token"], json!(expected));
        }
    }
    server.stop();
}

fn adapter(folder: &Path, seed: u64) {
    let mut model = tiny();
    let config =
        AdapterConfig { init_lora_weights: InitLoraWeights::Random, lora_alpha: 800.0, ..Default::default() };
    model.get_peft_model(config, seed).unwrap();
    model.save_trained(folder).unwrap();
}

#[test]
fn adapters_are_replaced_and_found_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let (one, other) = (folder.path().join("one"), folder.path().join("other"));
    adapter(&one, 1);
    adapter(&other, 2);
    let server = Running::start(options());
    let name = "org/wild";
    let load = |path: &Path, more: Value| {
        let mut body = json!({"lora_name": name, "lora_path": path, "lora_int_id": 7});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/load_lora_adapter", &body)
    };
    let ask = || {
        let body =
            json!({"model": name, "messages": question("What is the opposite of hot?"), "max_tokens": 12});
        let (status, reply) = server.post(CHAT, &body);
        assert_eq!(status, 200, "{reply}");
        reply["choices"][0]["message"]["content"].clone()
    };
    // In place of none it is the first.
    assert_eq!(load(&one, json!({"load_inplace": true})).0, 200);
    let first = ask();
    let (status, reply) = load(&other, json!({"load_inplace": false}));
    assert_eq!((status, &reply["error"]["param"]), (400, &json!("lora_name")), "{reply}");
    assert!(reply["error"]["message"].as_str().unwrap().contains("load_inplace"), "{reply}");
    assert_eq!(load(Path::new("/no/such"), json!({"load_inplace": true})).0, 400);
    assert_eq!(ask(), first, "what cannot be read replaces nothing");
    assert_eq!(load(&other, json!({"load_inplace": true})).0, 200);
    assert_ne!(ask(), first);

    for path in ["/v1/models/org/wild", "/v1/models/org%2Fwild"] {
        let (status, body) = server.request("GET", path, "", b"");
        let model: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &model["id"], &model["parent"]), (200, &json!(name), &json!("tiny")), "{model}");
    }
    let (status, body) = server.request("GET", "/v1/models/tiny", "", b"");
    assert!(status == 200 && body.contains("\"parent\":null"), "{body}");
    let (status, body) = server.request("GET", "/v1/models/org", "", b"");
    assert!(status == 404 && body.contains("model_not_found"), "{body}");
    let (_, metrics) = server.request("GET", "/metrics", "", b"");
    assert!(metrics.contains("path=\"/v1/models/{model}\",status=\"200\"} 3"), "{metrics}");
    let unload = json!({"lora_name": name, "lora_int_id": 7});
    assert_eq!(server.post("/v1/unload_lora_adapter", &unload).0, 200);
    server.stop();
}

/// An adapter on a slow disk: its configuration is a pipe that nobody has written to yet.
#[test]
fn answers_do_not_wait_for_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let slow = folder.path().join("slow");
    adapter(&slow, 1);
    let path = slow.join("adapter_config.json");
    let config = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    mkfifoat(CWD, &path, Mode::from(0o600)).unwrap();
    let server = Running::start(options());
    std::thread::scope(|scope| {
        let load = scope
            .spawn(|| server.post("/v1/load_lora_adapter", &json!({"lora_name": "slow", "lora_path": slow})));
        // Opens once the server reads.
        let mut pipe = fs::OpenOptions::new().write(true).open(&path).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        for _ in 0..3 {
            assert_eq!(server.post(CHAT, &json!({"messages": question("Hi"), "max_tokens": 8})).0, 200);
        }
        assert!(!load.is_finished());
        std::io::Write::write_all(&mut pipe, &config).unwrap();
        drop(pipe);
        assert_eq!(load.join().unwrap().0, 200);
    });
    let body = json!({"model": "slow", "messages": question("Hi"), "max_tokens": 3});
    assert_eq!(server.post(CHAT, &body).0, 200);
    server.stop();
}
