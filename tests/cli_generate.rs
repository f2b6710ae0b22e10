//! `ferrotune generate`, `chat` and `score` as a user runs them, on a random model that knows a dozen words.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use ferrotune::io::Weights;
use ferrotune::models::{Config, Decoder, FastLanguageModel};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const WORDS: [&str; 14] = [
    "<unk>", "</s>", "[user]", "[system]", "[bot]", "a", "red", "cat", "sees", "the", "blue", "dog", "and",
    "house",
];
const TEMPLATE: &str = "{% for m in messages %}[{{ 'bot' if m.role == 'assistant' else m.role }}] {{ m.content }} \
                        {% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}\
                        {% if add_generation_prompt %}[bot]{% endif %}";

/// A model folder with random weights; with a chat template if asked for.
fn model(chat: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let config = json!({
        "model_type": "llama", "vocab_size": 14, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.4,
        "eos_token_id": 1
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let vocab: serde_json::Map<String, Value> =
        WORDS.iter().zip(0..).map(|(word, id)| (word.to_string(), id.into())).collect();
    let special = |id: usize| {
        json!({"id": id, "content": WORDS[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
        "added_tokens": [special(1), special(2), special(3), special(4)],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    });
    fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).unwrap();
    if chat {
        fs::write(dir.join("chat_template.jinja"), TEMPLATE).unwrap();
    }
    let model = FastLanguageModel::from_scratch(dir, Kind::Float, Device::Cpu, 11).unwrap();
    model.save_pretrained(dir, Kind::Float).unwrap();
    folder
}

fn started(command: &str, dir: &Path, flags: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_ferrotune"))
        .args([command, "--device", "cpu", "--threads", "1", "--model"])
        .arg(dir)
        .args(flags)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(command: &str, dir: &Path, flags: &[&str], stdin: impl AsRef<[u8]>) -> Output {
    let mut child = started(command, dir, flags);
    // The program may refuse before it reads.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_ref());
    child.wait_with_output().unwrap()
}

fn succeeded(output: Output) -> String {
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{errors}");
    String::from_utf8(output.stdout).unwrap()
}

fn refused(output: Output, code: i32, expected: &str) {
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(code) && errors.contains(expected), "{:?}: {errors}", output.status);
    assert!(!errors.contains("panicked"), "{errors}");
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The flags after those that make short answers of a fixed length.
fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["--max-new-tokens", "6", "--ignore-eos"], more].concat()
}

#[test]
fn generate_answers_one_prompt_or_many() {
    let folder = model(true);
    let dir = folder.path();

    let raw = succeeded(run("generate", dir, &with(&["--raw", "--prompt", "the red cat"]), ""));
    assert!(raw.ends_with('\n') && raw.trim().split(' ').count() <= 6, "{raw:?}");
    assert_eq!(succeeded(run("generate", dir, &with(&["--raw"]), "the red cat\n")), raw, "from stdin");
    let chat = succeeded(run("generate", dir, &with(&["--prompt", "the red cat"]), ""));
    assert_ne!(chat, raw, "the chat template makes another prompt");

    // Samples are JSON lines; the same seed gives the same ones, and the first is the one that streams.
    let sampled = ["--prompt", "the dog", "--temperature", "1.5", "--seed", "5"];
    let three = succeeded(run(
        "generate",
        dir,
        &with(&[&sampled[..], &["--num-return-sequences", "3"]].concat()),
        "",
    ));
    let rows = lines(&three);
    assert_eq!(rows.len(), 3);
    let streamed = succeeded(run("generate", dir, &with(&sampled), ""));
    assert_eq!(rows[0]["completion"].as_str().unwrap(), streamed.strip_suffix('\n').unwrap());
    assert_eq!((&rows[2]["finish_reason"], &rows[2]["completion_tokens"]), (&json!("length"), &json!(6)));

    // A data file's other columns stay beside the answers, in a file that is written whole.
    let prompts = dir.join("prompts.jsonl");
    let conversation =
        json!([{"role": "user", "content": "the red cat"}, {"role": "assistant", "content": "a house"}]);
    let text = format!(
        "{}\n{}\n",
        json!({"prompt": "the red cat", "id": 7}),
        json!({"messages": conversation, "id": 8})
    );
    fs::write(&prompts, text).unwrap();
    let answers: PathBuf = dir.join("answers.jsonl");
    let paths = ["--prompt-file", prompts.to_str().unwrap(), "--output", answers.to_str().unwrap()];
    assert_eq!(succeeded(run("generate", dir, &with(&paths), "")), "");
    let rows = lines(&fs::read_to_string(&answers).unwrap());
    assert_eq!((&rows[0]["id"], &rows[1]["id"]), (&json!(7), &json!(8)));
    for row in &rows {
        assert_eq!(row["completion"].as_str().unwrap(), chat.strip_suffix('\n').unwrap());
    }
    let plain = dir.join("prompts.txt");
    fs::write(&plain, "the red cat\n\na dog\n").unwrap();
    let rows = lines(&succeeded(run(
        "generate",
        dir,
        &with(&["--raw", "--prompt-file", plain.to_str().unwrap()]),
        "",
    )));
    assert_eq!((rows.len(), &rows[0]["completion"]), (2, &json!(raw.strip_suffix('\n').unwrap())));
}

#[test]
fn generate_refuses_what_makes_no_sense() {
    let (folder, plain) = (model(true), model(false));
    let dir = folder.path();
    refused(
        run("generate", dir, &["--prompt", "a", "--num-return-sequences", "0"], ""),
        2,
        "--num-return-sequences",
    );
    refused(run("generate", dir, &["--prompt", "a", "--raw", "--system", "b"], ""), 2, "--raw");
    refused(run("generate", dir, &["--prompt", "a", "--temperature", "-1"], ""), 2, "--temperature is -1");
    refused(run("generate", dir, &["--prompt", "a", "--stop", ""], ""), 2, "--stop has an empty text");
    refused(run("generate", dir, &["--prompt", "a", "--n", "1000000000000"], ""), 2, "expected 1 to 65536");
    refused(run("generate", dir, &["--raw", "--prompt", ""], ""), 1, "no bos_token");
    refused(
        run("generate", dir, &["--raw", "--prompt", &"a ".repeat(100)], ""),
        1,
        "the prompt has 100 tokens",
    );
    refused(run("generate", dir, &["--prompt-file", "/no/such/file.txt"], ""), 1, "/no/such/file.txt");
    refused(run("generate", plain.path(), &["--chat", "--prompt", "a"], ""), 1, "no chat template");
    refused(run("generate", &dir.join("nowhere"), &["--prompt", "a"], ""), 1, "nowhere");
    refused(run("generate", dir, &["--adapter", "/no/such", "--prompt", "a"], ""), 1, "--adapter: /no/such");
    refused(run("chat", plain.path(), &[], "a\n"), 1, "no chat template");
    let bad = dir.join("bad.jsonl");
    fs::write(&bad, "{\"prompt\": \"a\"}\n{\"question\": \"a\"}\n").unwrap();
    let file = bad.to_str().unwrap();
    refused(run("generate", dir, &["--prompt-file", file], ""), 1, "bad.jsonl, line 2");
    refused(
        run("generate", dir, &["--prompt-file", file, "--output", file], ""),
        2,
        "--output is the file of",
    );
    // Before the first answer.
    let long = json!({"prompt": "a ".repeat(100)});
    fs::write(&bad, format!("{{\"prompt\": \"a\"}}\n{long}\n")).unwrap();
    refused(
        run("generate", dir, &["--raw", "--prompt-file", file], ""),
        1,
        "bad.jsonl, line 2: the prompt has 100",
    );
}

#[test]
fn chat_keeps_what_was_said() {
    let folder = model(true);
    let (dir, saved) = (folder.path(), folder.path().join("chat.json"));
    let input = format!(
        "the red cat\n/nonsense\na dog and a house\n/save {0}\n/system the cat sees\nthe red cat\n/save {0}.2\n/exit\nnever",
        saved.display()
    );
    let output = run("chat", dir, &["--temperature", "0", "--max-new-tokens", "5"], &input);
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonsense is no command"));
    let shown = succeeded(output);
    let read = |path: &Path| -> Value { serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap() };
    let first = read(&saved)["messages"].as_array().unwrap().clone();
    let roles = |messages: &[Value]| -> Vec<String> {
        messages.iter().map(|message| message["role"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(roles(&first), ["user", "assistant", "user", "assistant"]);
    for message in first.iter().filter(|message| message["role"] == "assistant") {
        assert!(shown.contains(message["content"].as_str().unwrap()));
    }
    let second = read(&saved.with_extension("json.2"))["messages"].as_array().unwrap().clone();
    assert_eq!(roles(&second), ["system", "user", "assistant"]);

    // The second answer is the one that the whole conversation gives in one go: the cache changes nothing.
    let prompts = dir.join("prompts.jsonl");
    fs::write(&prompts, format!("{}\n", json!({"messages": first}))).unwrap();
    let flags = ["--prompt-file", prompts.to_str().unwrap(), "--temperature", "0", "--max-new-tokens", "5"];
    // One answer is streamed as text.
    let again = succeeded(run("generate", dir, &flags, ""));
    assert_eq!(again.strip_suffix('\n').unwrap(), first[3]["content"].as_str().unwrap());
}

#[test]
fn chat_says_what_it_cannot_read_and_ends_with_its_reader() {
    let folder = model(true);
    let dir = folder.path();
    let flags = ["--temperature", "0", "--max-new-tokens", "5"];
    let output = run("chat", dir, &flags, b"the red cat\n/help\nthe \xff\xfe\n");
    assert!(String::from_utf8_lossy(&output.stdout).contains("/reset"));
    refused(output, 1, "stdin, line 3: expected text in UTF-8");
    for input in ["the red cat\na dog\n", "/help\n/help\n"] {
        let mut child = started("chat", dir, &flags);
        drop(child.stdout.take());
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

#[test]
fn score_prints_the_log_probabilities() {
    let folder = model(true);
    let dir = folder.path();
    let text = succeeded(run("score", dir, &["--text", "the red cat sees a dog"], ""));
    let found: Value = serde_json::from_str(&text).unwrap();
    let ids: Vec<i64> = serde_json::from_value(found["input_ids"].clone()).unwrap();
    assert_eq!(ids, [9, 6, 7, 8, 5, 11]);
    let logprobs: Vec<f64> = serde_json::from_value(found["logprobs"].clone()).unwrap();
    let load = || Decoder::load(Config::from_dir(dir)?, &Weights::open(dir)?, Kind::Double, Device::Cpu);
    let expected =
        Vec::<f64>::try_from(load().unwrap().log_probs(&ids).unwrap().to_kind(Kind::Double)).unwrap();
    let rel = (Tensor::from_slice(&logprobs) - Tensor::from_slice(&expected)).norm().double_value(&[])
        / Tensor::from_slice(&expected).norm().double_value(&[]);
    assert!(logprobs.len() == 5 && rel < 1e-5, "{logprobs:?}, {expected:?}");
    assert_eq!(succeeded(run("score", dir, &["--input-ids", "[9,6,7,8,5,11]"], "")), text);
    assert_eq!(
        succeeded(run("score", dir, &["--input-ids", "[9]"], "")),
        "{\"input_ids\":[9],\"logprobs\":[]}\n"
    );
    refused(run("score", dir, &["--input-ids", "[]"], ""), 1, "the list is empty");
    refused(run("score", dir, &["--input-ids", "[1, 99]"], ""), 1, "token id 99");
    refused(run("score", dir, &["--input-ids", "1 2"], ""), 1, "not a JSON list");
    refused(run("score", dir, &[], ""), 2, "--text");
}

/// Killed and started again, a job gives the file that it would have given.
#[test]
fn a_killed_job_goes_on_after_its_last_row() {
    let folder = model(true);
    let dir = folder.path();
    let prompts = dir.join("prompts.jsonl");
    let text: String = (0..400)
        .map(|i| {
            format!("{}\n", json!({"prompt": "the red cat ".repeat(1 + i % 5), "id": i, "completion": "old"}))
        })
        .collect();
    fs::write(&prompts, text).unwrap();
    let flags = |answers: &Path| -> Vec<String> {
        let (prompts, answers) = (prompts.display().to_string(), answers.display().to_string());
        let sampled = ["--max-new-tokens", "40", "--ignore-eos", "--temperature", "1", "--n", "2"];
        let files = ["--prompt-file".to_string(), prompts, "--output".to_string(), answers];
        sampled.iter().map(ToString::to_string).chain(files).collect()
    };
    let start = |answers: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        command
            .args(["generate", "--device", "cpu", "--threads", "1", "--model"])
            .arg(dir)
            .args(flags(answers));
        command.stderr(Stdio::piped()).stdin(Stdio::null());
        command
    };
    let answers = dir.join("answers.jsonl");
    let unfinished = dir.join("answers.jsonl.unfinished");
    let mut child = start(&answers).spawn().unwrap();
    let rows = || fs::read_to_string(&unfinished).unwrap_or_default().lines().count();
    while rows() < 40 {
        assert!(child.try_wait().unwrap().is_none(), "the job ended before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!answers.exists());
    // The second answer to a prompt is missing, and a line is torn, as a full disk or a lost machine leaves them.
    let whole = fs::read_to_string(&unfinished).unwrap();
    let kept: Vec<&str> = whole.lines().take(1 + 2 * 17 + 1).collect();
    fs::write(&unfinished, format!("{}\n{{\"prompt\": \"the r", kept.join("\n"))).unwrap();
    let header = fs::read_to_string(&unfinished).unwrap().lines().next().unwrap().to_string();
    let seed = serde_json::from_str::<Value>(&header).unwrap()["seed"].as_u64().unwrap().to_string();

    // Other settings do not mix with what is there.
    let other = start(&answers).args(["--top-k", "3"]).output().unwrap();
    refused(other, 1, "was begun with other settings");
    let output = start(&answers).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("continues after row 17 of 400"));
    succeeded(output);
    assert!(!unfinished.exists());
    let again = dir.join("again.jsonl");
    succeeded(start(&again).args(["--seed", &seed]).output().unwrap());
    let found = fs::read_to_string(&answers).unwrap();
    assert_eq!(found.lines().count(), 800);
    assert!(found == fs::read_to_string(&again).unwrap(), "not what one run gives");
}
