//! The server over loopback: what it answers, what it refuses, and that nothing of a request stays behind.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferrotune::generate::SamplingParams;
use ferrotune::serve::{Limits, ServeOptions};
use serde_json::{Value, json};

use crate::server::{CHAT, Running, TEXT, endless, limits, question, response, tiny};

#[test]
fn answers_are_those_of_the_engine_whole_and_streamed() {
    let server = Running::with(limits());
    let model = tiny();
    let messages = question("What is the opposite of hot?");
    let ids = model.chat_ids(messages.as_array().unwrap()).unwrap();
    let own = model.generate(&ids, &model.generation_params().unwrap(), |_| ()).unwrap();

    let (status, reply) = server.post(CHAT, &json!({"model": "tiny", "messages": messages}));
    assert_eq!(status, 200, "{reply}");
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], json!(own.text));
    assert_eq!((&choice["finish_reason"], &reply["object"]), (&json!("stop"), &json!("chat.completion")));
    let usage = json!({
        "prompt_tokens": ids.len(), "completion_tokens": own.token_ids.len(),
        "total_tokens": ids.len() + own.token_ids.len()
    });
    assert_eq!(reply["usage"], usage);

    let options = json!({"include_usage": true});
    let chunks =
        server.stream(CHAT, &json!({"messages": messages, "stream": true, "stream_options": options}));
    let text: String =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, own.text);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], json!("assistant"));
    assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], json!("stop"));
    assert_eq!(chunks.last().unwrap()["usage"], usage);
    assert!(chunks.len() > 5, "token by token");

    // Samples by their seed, alone and beside each other, whole and streamed.
    let sampled = json!({"messages": messages, "temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 12});
    let texts = |reply: &Value| -> Vec<String> {
        let choices = reply["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["message"]["content"].as_str().unwrap().to_string()).collect()
    };
    let three = texts(&server.post(CHAT, &sampled).1);
    assert_eq!(three, texts(&server.post(CHAT, &sampled).1));
    assert!(three[0] != three[1] || three[1] != three[2]);
    let mut streamed = sampled.clone();
    streamed["stream"] = json!(true);
    let mut pieces = vec![String::new(); 3];
    for chunk in server.stream(CHAT, &streamed) {
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        pieces[index] += choice["delta"]["content"].as_str().unwrap_or("");
    }
    assert_eq!(pieces, three);

    // Log-probabilities, stop strings, other limits.
    let request =
        json!({"messages": messages, "logprobs": true, "top_logprobs": 3, "stop": " is", "max_tokens": 9});
    let (_, reply) = server.post(CHAT, &request);
    let choice = &reply["choices"][0];
    assert_eq!(choice["message"]["content"], json!("The opposite of hot"));
    let content = choice["logprobs"]["content"].as_array().unwrap();
    assert!(content.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 3));
    assert!(content[0]["logprob"].as_f64().unwrap() <= 0.0);

    // Several prompts, as text and as ids.
    let prompt = model.prompt_ids("The sky").unwrap();
    let (_, reply) =
        server.post(TEXT, &json!({"prompt": ["The sky", prompt], "n": 2, "max_tokens": 5, "logprobs": 1}));
    let choices = reply["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    assert!(choices.iter().all(|choice| choice["text"] == choices[0]["text"]));
    assert_eq!(choices[3]["logprobs"]["token_logprobs"].as_array().unwrap().len(), 5);
    let expected = SamplingParams { max_new_tokens: 5, ..model.generation_params().unwrap() };
    assert_eq!(choices[0]["text"], json!(model.generate(&prompt, &expected, |_| ()).unwrap().text));
    server.settle();
    let (status, metrics) = server.request("GET", "/metrics", "", b"");
    assert_eq!(status, 200);
    for line in
        ["ferrotune_requests_open 0", "ferrotune_kv_pages_held 0", "ferrotune_generation_tokens_total "]
    {
        assert!(metrics.contains(line), "{metrics}");
    }
    assert_eq!(server.request("GET", "/health", "", b"").0, 200);
    let (_, page) = server.request("GET", "/", "", b"");
    assert!(page.contains("<!doctype html>"));
    server.stop();
}

#[test]
fn a_schema_binds_the_answer() {
    let server = Running::with(limits());
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
        "properties": {
            "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "minItems": 1, "maxItems": 2}
        },
        "$defs": {"tag": {"enum": ["red", "blue"]}}
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "person", "schema": schema}});
    for seed in 0..5 {
        let request = json!({
            "messages": question("Who is Ann?"), "response_format": format, "temperature": 1, "seed": seed,
            "max_tokens": 200
        });
        let (status, reply) = server.post(CHAT, &request);
        assert_eq!((status, &reply["choices"][0]["finish_reason"]), (200, &json!("stop")), "{reply}");
        let text = reply["choices"][0]["message"]["content"].as_str().unwrap();
        let person: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert!((1..=99).contains(&person["age"].as_i64().unwrap()), "{text}");
        assert!(person["name"].as_str().unwrap().chars().count() <= 8, "{text}");
        let tags = person["tags"].as_array().unwrap();
        assert!(!tags.is_empty() && tags.iter().all(|tag| tag == "red" || tag == "blue"), "{text}");
    }
    let bad = json!({"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}});
    let (status, reply) = server.post(CHAT, &json!({"messages": question("a"), "response_format": bad}));
    assert_eq!((status, &reply["error"]["param"]), (400, &json!("response_format")), "{reply}");
    server.stop();
}

#[test]
fn what_is_wrong_is_refused_with_its_status() {
    let server = Running::with(limits());
    let ok = question("Hi");
    let long = "word ".repeat(2000);
    for (path, body, status, needle) in [
        (CHAT, json!({}), 400, "messages: the field is missing"),
        (CHAT, json!([1]), 400, "no object"),
        (CHAT, json!({"messages": []}), 400, "the list is empty"),
        (CHAT, json!({"messages": "a"}), 400, "messages"),
        (CHAT, json!({"messages": [{"role": "user"}]}), 400, "content is missing"),
        (CHAT, json!({"messages": [{"role": "robot", "content": "a"}]}), 400, "robot"),
        (CHAT, json!({"messages": ok, "model": "gpt"}), 404, "does not exist"),
        (CHAT, json!({"messages": ok, "temperature": -1}), 400, "temperature is -1"),
        (CHAT, json!({"messages": ok, "temperature": "hot"}), 400, "temperature"),
        (CHAT, json!({"messages": ok, "max_tokens": 100_000}), 400, "max_tokens: 100000, expected 1 to 400"),
        (CHAT, json!({"messages": ok, "n": 5}), 400, "n is 5, expected 1 to 4"),
        (CHAT, json!({"messages": ok, "stream": true, "n": 5}), 400, "n is 5"),
        (CHAT, json!({"messages": ok, "n": 10_000_000_000_000_u64}), 400, "expected 1 to 4"),
        (TEXT, json!({"prompt": ["a", "b", "c", "d"], "n": 1_u64 << 62}), 400, "expected 1 to 4"),
        (TEXT, json!({"prompt": vec!["a"; 9]}), 400, "9 prompts, this server takes 8 at once"),
        (CHAT, json!({"messages": ok, "temperature": 1e-50, "top_p": 0.9}), 400, "temperature is"),
        (CHAT, json!({"messages": ok, "presence_penalty": -1e300}), 400, "presence_penalty is"),
        (CHAT, json!({"messages": ok, "top_k": -5}), 400, "top_k: -5"),
        (CHAT, json!({"messages": ok, "stream_options": {"foo": 1}}), 400, "foo"),
        (CHAT, json!({"messages": ok, "tools": [1]}), 400, "tools: 1, expected"),
        (CHAT, json!({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}), 400, "tool_calls: \"x\""),
        (CHAT, json!({"messages": [{"role": "assistant", "tool_calls": "x"}]}), 400, "tool_calls: \"x\""),
        (CHAT, json!({"messages": ok, "max_completion_tokens": 0}), 400, "max_completion_tokens: 0"),
        (CHAT, json!({"messages": ok, "tool_choice": "required"}), 400, "tool_choice"),
        (CHAT, json!({"messages": ok, "frobnicate": 1}), 400, "frobnicate"),
        (CHAT, json!({"messages": ok, "top_logprobs": 50, "logprobs": true}), 400, "top_logprobs"),
        (CHAT, json!({"messages": question(&long)}), 400, "context is 512 tokens"),
        (TEXT, json!({"prompt": long}), 400, "context is 512 tokens"),
        (TEXT, json!({"prompt": [1, 99_999]}), 400, "99999"),
        (TEXT, json!({"prompt": []}), 400, "empty"),
        (TEXT, json!({"prompt": "a", "echo": true}), 400, "echo"),
        ("/v1/load_lora_adapter", json!({"lora_name": "a", "lora_path": "/no/such"}), 400, "/no/such"),
        ("/v1/unload_lora_adapter", json!({"lora_name": "a"}), 400, "no adapter named a"),
        ("/v2/nothing", json!({}), 404, "nothing at /v2/nothing"),
    ] {
        let (found, reply) = server.post(path, &body);
        let message = reply["error"]["message"].as_str().unwrap_or_default().to_string();
        assert!(
            found == status && message.contains(needle),
            "{body}: {found} {reply}, expected {status} {needle}"
        );
    }
    let raw = |body: &[u8]| server.request("POST", CHAT, "", body).0;
    assert_eq!(raw(b"{\"messages\": ["), 400);
    assert_eq!(raw(b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}"), 400);
    assert_eq!(raw(&vec![b' '; (1 << 20) + 1]), 413);
    assert_eq!(server.request("GET", CHAT, "", b"").0, 405);
    assert_eq!(server.request("POST", CHAT, "Origin: http://evil.example\r\n", b"{}").0, 403);
    // Half a request, and then nothing.
    let mut torn = server.connect();
    torn.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        .unwrap();
    drop(torn);
    let mut garbage = server.connect();
    garbage.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer);
    let mut elsewhere = server.connect();
    elsewhere
        .write_all(b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    elsewhere.read_to_end(&mut answer).unwrap();
    assert_eq!(response(&answer).0, 403, "a name that others made point here");
    assert_eq!(server.post(CHAT, &json!({"messages": ok, "max_tokens": 2})).0, 200, "it still answers");
    server.settle();
    server.stop();

    let options = ServeOptions { limits: limits(), api_key: Some("secret".into()), runtime_lora: false };
    let server = Running::start(options);
    let models = |headers: &str| server.request("GET", "/v1/models", headers, b"");
    assert_eq!(models("").0, 401);
    assert_eq!(models("Authorization: Bearer secreT\r\n").0, 401);
    let (status, text) = models("Authorization: Bearer secret\r\n");
    assert!(status == 200 && text.contains("\"tiny\""), "{text}");
    assert_eq!(server.request("GET", "/health", "", b"").0, 200);
    let key = "Authorization: Bearer secret\r\n";
    assert_eq!(server.request("POST", "/v1/load_lora_adapter", key, b"{}").0, 404, "off unless enabled");
    server.stop();
}

#[test]
fn who_leaves_frees_the_place_and_who_is_slow_holds_none() {
    let server = Running::with(limits());
    let mut gone = server.send("POST", TEXT, "", endless(400).to_string().as_bytes());
    let mut some = [0; 200];
    gone.read_exact(&mut some).unwrap();
    assert_eq!(server.shared.open(), 1);
    drop(gone);
    server.settle();
    let cut = server.shared.stats().new_tokens;
    assert!(cut < 400, "{cut} tokens for a client that left");
    // One that waits for a whole reply and leaves.
    let mut whole = endless(400);
    whole["stream"] = json!(false);
    drop(server.send("POST", TEXT, "", whole.to_string().as_bytes()));
    // Readers that never read: the engine does not wait for them.
    let slow: Vec<TcpStream> =
        (0..3).map(|_| server.send("POST", TEXT, "", endless(300).to_string().as_bytes())).collect();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(server.post(CHAT, &json!({"messages": question("Hi"), "max_tokens": 3})).0, 200);
    server.settle();
    drop(slow);
    server.stop();
}

#[test]
fn too_many_are_told_to_come_again() {
    let server = Running::with(Limits { max_open: 5, ..limits() });
    // Each takes the whole batch: one runs and four wait.
    let mut whole_batch = endless(400);
    whole_batch["n"] = json!(4);
    let body = whole_batch.to_string();
    let mut open: Vec<TcpStream> = (0..5).map(|_| server.send("POST", TEXT, "", body.as_bytes())).collect();
    while server.shared.open() < 5 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let (status, reply) = server.post(TEXT, &endless(400));
    assert_eq!((status, &reply["error"]["type"]), (429, &json!("rate_limit_error")), "{reply}");
    open.pop();
    drop(open);
    server.settle();
    assert_eq!(server.post(TEXT, &json!({"prompt": "a", "max_tokens": 2})).0, 200);

    let slow = Running::with(Limits { request_time: Duration::from_millis(30), ..limits() });
    let mut whole = endless(400);
    whole["stream"] = json!(false);
    whole["n"] = json!(4);
    let (status, reply) = slow.post(TEXT, &whole);
    assert_eq!(status, 504, "{reply}");
    slow.settle();
    slow.stop();
    server.stop();
}

/// `ferrotune bench serve` counts what the server sends, and says what the server refuses.
#[test]
fn its_clients_are_measured() {
    let server = Running::with(limits());
    let bench = |arguments: &[&str]| {
        let url = format!("http://{}/v1/", server.address);
        let fixed = ["bench", "serve", "--url", &url, "--clients", "3", "--json"];
        Command::new(env!("CARGO_BIN_EXE_ferrotune")).args(fixed).args(arguments).output().unwrap()
    };
    let output = bench(&[
        "--requests",
        "7",
        "--warm-up",
        "2",
        "--prompt",
        "20",
        "--new",
        "9",
        "--shared-prefix",
        "16",
    ]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report}"));
    assert_eq!((&report["model"], number("requests")), (&json!("tiny"), 7.0));
    let tokens = number("tokens_per_second") * number("seconds");
    assert!((tokens - 63.0).abs() < 1e-6, "{tokens}");
    assert!(
        0.0 < number("first_token_ms_p50") && number("first_token_ms_p50") <= number("first_token_ms_p99")
    );
    assert!(0.0 < number("ms_per_token_p50") && number("ms_per_token_p50") <= number("ms_per_token_p99"));
    server.settle();
    let stats = server.shared.stats();
    assert_eq!(stats.new_tokens, 9 * 9);
    // All but the first prompt found their first page.
    assert!(stats.found_tokens >= 16 * 6, "{stats:?}");
    for (arguments, message) in [
        (["--vocab-size", "100000"], "outside the vocabulary"),
        (["--model", "nobody"], "404 Not Found"),
        (["--shared-prefix", "500"], "--shared-prefix: longer than --prompt"),
    ] {
        let output = bench(&arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(message), "{error}");
    }
    server.stop();
}

#[test]
fn a_stop_lets_answers_end() {
    let server = Running::with(limits());
    let mut running = server.send("POST", TEXT, "", endless(200).to_string().as_bytes());
    running.read_exact(&mut [0; 50]).unwrap();
    server.stop.store(true, Ordering::Relaxed);
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    server.stop();
}

#[test]
fn adapters_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = folder.path().join("wild");
    let mut model = tiny();
    let config = ferrotune::io::adapter::AdapterConfig {
        init_lora_weights: ferrotune::io::adapter::InitLoraWeights::Random,
        lora_alpha: 800.0,
        ..Default::default()
    };
    model.get_peft_model(config, 1).unwrap();
    model.save_trained(&adapter).unwrap();
    let server = Running::with(limits());
    let ask = |model: &str| {
        let body =
            json!({"model": model, "messages": question("What is the opposite of hot?"), "max_tokens": 8});
        server.post(CHAT, &body)
    };
    let own = ask("tiny").1["choices"][0]["message"]["content"].clone();
    assert_eq!(ask("wild").0, 404);
    let load =
        |path: &Path| server.post("/v1/load_lora_adapter", &json!({"lora_name": "wild", "lora_path": path}));
    assert_eq!(load(&adapter), (200, json!("Success: LoRA adapter 'wild' added successfully.")));
    assert_eq!(load(&adapter).0, 400, "twice");
    let (status, reply) = ask("wild");
    assert!(status == 200 && reply["choices"][0]["message"]["content"] != own, "{reply}");
    assert_eq!(ask("tiny").1["choices"][0]["message"]["content"], own);
    let (_, models) = server.request("GET", "/v1/models", "", b"");
    assert!(models.contains("\"id\":\"wild\"") && models.contains("\"parent\":\"tiny\""), "{models}");
    assert_eq!(server.post("/v1/unload_lora_adapter", &json!({"lora_name": "wild"})).0, 200);
    assert_eq!(ask("wild").0, 404);
    server.stop();
}

/// Many requests of every kind from several clients; afterwards nothing is held.
#[test]
fn a_soak_leaves_nothing_behind() {
    let server = Running::with(limits());
    std::thread::scope(|scope| {
        for client in 0..6usize {
            let server = &server;
            scope.spawn(move || {
                for round in 0..12usize {
                    match (client + round) % 6 {
                        0 => {
                            let mut stream = server.send("POST", TEXT, "", endless(300).to_string().as_bytes());
                            let _ = stream.read(&mut [0; 64]);
                        }
                        1 => drop(server.send("POST", TEXT, "", endless(300).to_string().as_bytes())),
                        2 => drop(server.request("POST", CHAT, "", b"{\"messages\": [")),
                        3 => {
                            let body = json!({"messages": question("Hi"), "n": 2, "temperature": 1, "max_tokens": 20});
                            assert!([200, 429].contains(&server.post(CHAT, &body).0));
                        }
                        4 => {
                            let body = json!({"prompt": "a b c ".repeat(30), "max_tokens": 20, "logprobs": 2});
                            assert!([200, 429].contains(&server.post(TEXT, &body).0));
                        }
                        _ => assert_eq!(server.post(CHAT, &json!({"messages": question(&"x ".repeat(900))})).0, 400),
                    }
                }
            });
        }
    });
    server.settle();
    let stats = server.shared.stats();
    assert!(stats.new_tokens > 0 && stats.pages_held == 0, "{stats:?}");
    assert_eq!(server.post(TEXT, &json!({"prompt": "a", "max_tokens": 2})).0, 200);
    server.stop();
}
