//! Rewards: the rules, commands that hang, crash and talk nonsense, servers, reward models, and how they are named.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ferrotune::data::Tokenizer;
use ferrotune::io::{Weights, write_safetensors};
use ferrotune::models::{FastLanguageModel, SequenceClassifier};
use ferrotune::ops::save_script;
use ferrotune::rewards::{Command, Http, RewardOptions, RewardSpec, Rewards, Sample, Scores, Stop, build};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::golden::{rel, root};

/// Scores `completions` of one prompt; tokens are words.
fn scores(reward: &mut Rewards, columns: Value, completions: &[&str]) -> Scores {
    let (prompt, columns) = (json!("Q"), columns.as_object().cloned().unwrap_or_default());
    let ids: Vec<Vec<i64>> =
        completions.iter().map(|text| (0..text.split_whitespace().count() as i64).collect()).collect();
    let samples: Vec<Sample> = completions
        .iter()
        .zip(&ids)
        .map(|(completion, ids)| Sample {
            prompt: &prompt,
            completion,
            completion_ids: ids,
            truncated: false,
            columns: &columns,
        })
        .collect();
    reward.score(&samples)
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(Path::new("examples/tiny/model")).unwrap()
}

fn built(specs: &[&str], weights: &[f64]) -> anyhow::Result<Rewards> {
    let specs: Vec<RewardSpec> = specs.iter().map(|text| text.parse()).collect::<anyhow::Result<_>>()?;
    let options = RewardOptions {
        stop: &Stop::default(),
        timeout: Duration::from_secs(20),
        device: Device::Cpu,
        kind: Kind::Float,
        tokenizer: &tokenizer(),
    };
    build(&specs, weights, options)
}

fn of_rule(spec: &str, columns: Value, completions: &[&str]) -> Vec<Option<f64>> {
    let scores = scores(&mut built(&[spec], &[]).unwrap(), columns, completions);
    assert!(scores.failures.is_empty(), "{:?}", scores.failures);
    scores.total
}

#[test]
fn rules() {
    let some = |values: &[f64]| values.iter().copied().map(Some).collect::<Vec<_>>();
    let answer = json!({"answer": "Paris", "n": 12, "gsm": "3*4=<<3*4=12>>12\n#### 12"});
    assert_eq!(
        of_rule("exact", answer.clone(), &["paris.", "<answer>Paris</answer>", "Rome", ""]),
        some(&[1., 1., 0., 0.])
    );
    assert_eq!(of_rule("exact:n", answer.clone(), &["12"]), some(&[1.]));
    assert_eq!(of_rule("exact:other", answer.clone(), &["12"]), [None]);
    assert_eq!(of_rule("numeric:n", answer.clone(), &["is 12.0", "13", "none"]), some(&[1., 0., 0.]));
    assert_eq!(of_rule("numeric:gsm=2", answer.clone(), &[r"\boxed{12}"]), some(&[2.]));
    assert_eq!(of_rule("regex:(?i)^the\\b", json!({}), &["The end", "then"]), some(&[1., 0.]));
    let format = [
        "<think>a</think><answer>b</answer>",
        " <think>a</think>\n<answer>b</answer>\n",
        "<think>a</think><answer>b</answer> c",
        "<think></think><answer>b</answer>",
        "<think>a<think>b</think><answer>c</answer>",
        "<answer>b</answer><think>a</think>",
        "b",
    ];
    assert_eq!(of_rule("format:think-answer", json!({}), &format), some(&[1., 1., 0., 0., 0., 0., 0.]));
    assert_eq!(
        of_rule("length:2-4", json!({}), &["a", "a b", "a b c d e f", "a b c d e f g h i"]),
        some(&[0.5, 1., 0.5, 0.])
    );
    assert_eq!(of_rule("keyword:cat,dog", json!({}), &["A Cat", "cat dog", "x"]), some(&[0.5, 1., 0.]));
    assert_eq!(
        of_rule("json", json!({}), &["{\"a\": [1]}", "```json\n[]\n```", "{a}", "[1] and"]),
        some(&[1., 1., 0., 0.])
    );
    assert_eq!(
        of_rule("repetition:2", json!({}), &["a b c", "a b a b a b", "a", ""]),
        some(&[0., 2. / 5. - 1., 0., 0.])
    );

    let mut wrong = built(&["numeric"], &[]).unwrap();
    let scores = scores(&mut wrong, json!({"answer": "none"}), &["1"]);
    assert_eq!((scores.total[0], scores.failures.len()), (None, 1));
    assert!(format!("{:#}", scores.failures[0].error).contains("column answer"), "{:?}", scores.failures);
}

#[test]
fn weights_and_what_does_not_apply() {
    let mut rewards = built(&["exact", "format:answer=0.5", "keyword:x", "keyword:y"], &[]).unwrap();
    assert_eq!(rewards.names(), ["exact", "format", "keyword", "keyword#2"]);
    let found = scores(&mut rewards, json!({}), &["<answer>x</answer>"]);
    assert_eq!(found.values, [[None, Some(1.0), Some(1.0), Some(0.0)]]);
    assert_eq!(found.total, [Some(1.5)]);
    let mut rewards = built(&["exact", "json"], &[2.0, -1.0]).unwrap();
    assert_eq!(scores(&mut rewards, json!({"answer": "1"}), &["1"]).total, [Some(1.0)]);
    assert_eq!(scores(&mut built(&["exact"], &[]).unwrap(), json!({}), &["1"]).total, [None]);
}

#[test]
fn specs_that_cannot_be() {
    for (spec, reason) in [
        ("exakt", "unknown; known are exact"),
        ("numeric=much", "the weight \"much\" behind = is no number"),
        ("regex:(", "the pattern"),
        ("regex", "expected regex:PATTERN"),
        ("format:", "format:think-answer"),
        ("format:a--b", "names of tags"),
        ("length:9-3", "is above the longest"),
        ("length:x", "expected a number"),
        ("keyword:a,,b", "a word is empty"),
        ("json:x", "json takes no"),
        ("http:x", "unknown"),
        ("model:nowhere.pt", "nowhere.pt: no such file or folder"),
    ] {
        let error = built(&[spec], &[]).err().unwrap_or_else(|| panic!("{spec} was taken"));
        assert!(format!("{error:#}").contains(reason), "{spec}: {error:#}");
    }
    let error = |specs: &[&str], weights: &[f64]| format!("{:#}", built(specs, weights).err().unwrap());
    assert!(error(&["json"], &[1.0, 2.0]).contains("2 reward weights for 1 rewards"));
    assert!(error(&["json=2"], &[1.0]).contains("in one place"));
    assert!(error(&[], &[]).contains("no reward is given"));
    // As a configuration has them.
    let spec: RewardSpec = serde_json::from_value(json!("command:python3 a.py --x=1")).unwrap();
    assert_eq!(serde_json::to_value(&spec).unwrap(), json!("command:python3 a.py --x=1"));
}

/// A command that answers each line by what the completion says.
const JUDGE: &str = r#"while IFS= read -r line; do case "$line" in
  *'"completion":"hang"'*) sleep 60 ;;
  *'"completion":"crash"'*) echo 'cannot go on' >&2; exit 3 ;;
  *'"completion":"nan"'*) echo NaN ;;
  *'"completion":"null"'*) echo null ;;
  *'"completion":"two"'*) printf '1\n2\n' ;;
  *'"completion":"bytes"'*) printf '\377\n' ;;
  *'"completion":"words"'*) echo 'very good' ;;
  *'"completion":"error"'*) echo '{"error": "no idea"}' ;;
  *'"completion":"id"'*) echo '{"id": 99, "reward": 1}' ;;
  *'"completion":"silent"'*) exec sleep 60 ;;
  *) echo '{"reward": 0.5}' ;;
esac; done"#;

#[test]
fn a_command_that_fails_costs_the_sample_only() {
    let command = |timeout: u64| Command::new(JUDGE, Duration::from_millis(timeout));
    let mut rewards = Rewards::new(vec![(Box::new(command(20_000)), 1.0)]);
    let completions =
        ["good", "crash", "good", "nan", "null", "bytes", "words", "error", "id", "good", "two", "good"];
    let found = scores(&mut rewards, json!({}), &completions);
    let good = [true, false, true, false, false, false, false, false, false, true, false, true];
    for ((name, good), total) in completions.iter().zip(good).zip(&found.total) {
        assert_eq!(*total, good.then_some(0.5), "{name}: {:?}", found.failures);
    }
    let expected = [
        (1, "exit status: 3) without an answer: cannot go on"),
        (3, "expected a finite number"),
        (5, "not UTF-8"),
        (6, "\"very good\" is not JSON"),
        (7, "no idea"),
        (8, "has the id 99, the question"),
        (10, "more than one line"),
    ];
    assert_eq!(found.failures.len(), expected.len(), "{:?}", found.failures);
    for (failure, (sample, reason)) in found.failures.iter().zip(expected) {
        assert_eq!((failure.sample, failure.reward.as_str()), (sample, "command"));
        assert!(format!("{:#}", failure.error).contains(reason), "{:#}", failure.error);
    }
    // After the crash, and after each line that may not have been the answer: the next could come late.
    assert_eq!(rewards.restarts(), 5);

    let started = Instant::now();
    let mut rewards = Rewards::new(vec![(Box::new(command(1000)), 1.0)]);
    let found = scores(&mut rewards, json!({}), &["good", "hang", "good", "silent", "good"]);
    assert_eq!(found.total, [Some(0.5), None, Some(0.5), None, Some(0.5)], "{:?}", found.failures);
    assert!(format!("{:#}", found.failures[0].error).contains("no answer within 1 s"));
    assert_eq!(rewards.restarts(), 2);
    assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());

    let mut rewards = built(&["command:no-such-program-here"], &[]).unwrap();
    let found = scores(&mut rewards, json!({}), &["a", "b"]);
    assert_eq!((found.total, found.failures.len()), (vec![None, None], 2));
    let flood = "command:head -c 3000000 /dev/zero | tr '\\0' x";
    let found = scores(&mut built(&[flood], &[]).unwrap(), json!({}), &["a"]);
    assert!(
        format!("{:#}", found.failures[0].error).contains("without a line's end"),
        "{:?}",
        found.failures
    );
}

/// A greeting before the first answer, which comes behind it: no sample gets the answer to another.
#[test]
fn a_greeting_moves_no_answer() {
    let line = r#"command:echo loading; while IFS= read -r l; do sleep 0.02; case "$l" in *'"completion":"a"'*) echo 1;; *) echo 2;; esac; done"#;
    let found = scores(&mut built(&[line], &[]).unwrap(), json!({}), &["a", "b", "a"]);
    assert_eq!(found.total, [None, None, None]);
    let said = format!("{:#}", found.failures[1].error);
    assert!(said.contains("\"loading\" is not JSON"), "{said}");
}

/// Once asked to stop, nobody waits for what hangs.
#[test]
fn a_stop_ends_the_wait() {
    let stop = Stop::default();
    let judge = Command::new("exec sleep 600", Duration::from_secs(600)).until(stop.clone());
    let mut rewards = Rewards::new(vec![(Box::new(judge), 1.0)]);
    let raise = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        stop.0.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let started = Instant::now();
    let found = scores(&mut rewards, json!({}), &["a", "b"]);
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
    assert!(found.failures.iter().all(|failure| format!("{:#}", failure.error).contains("asked to stop")));
    raise.join().unwrap();
}

#[test]
fn a_command_sees_prompt_and_columns() {
    let line = r#"command:while IFS= read -r l; do case "$l" in *'"prompt":"Q"'*'"truncated":false'*'"columns":{"answer":7}'*) echo true;; *) echo false;; esac; done"#;
    let mut rewards = built(&[line], &[]).unwrap();
    assert_eq!(scores(&mut rewards, json!({"answer": 7}), &["x"]).total, [Some(1.0)]);
    assert_eq!(scores(&mut rewards, json!({"answer": 8}), &["x"]).total, [Some(0.0)]);
}

/// Answers requests as `judge` says: of the completion and how often it was asked about, a status and a body; no answer for 0.
fn serve(judge: fn(&str, usize) -> (u16, &'static str)) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/judge", listener.local_addr().unwrap());
    thread::spawn(move || {
        let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::<String>::new()));
        for stream in listener.incoming().flatten() {
            let asked = asked.clone();
            thread::spawn(move || {
                let Some(completion) = completion_of(&stream) else { return };
                let times = {
                    let mut asked = asked.lock().unwrap();
                    asked.push(completion.clone());
                    asked.iter().filter(|other| **other == completion).count()
                };
                let (status, body) = judge(&completion, times);
                if status == 0 {
                    thread::sleep(Duration::from_secs(60));
                }
                let mut stream = &stream;
                let length = body.len();
                let _ = write!(
                    stream,
                    "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                );
            });
        }
    });
    url
}

fn completion_of(stream: &TcpStream) -> Option<String> {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().ok()?;
            }
            None if line.trim_end().is_empty() => break,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    let body: Value = serde_json::from_slice(&body).ok()?;
    Some(body["completion"].as_str()?.to_owned())
}

#[test]
fn a_server_is_asked_once_more() {
    let url = serve(|completion, times| match (completion, times) {
        ("slow", _) => (0, ""),
        ("busy", 1) => (503, "wait"),
        ("refused", _) => (400, "no such column"),
        ("broken", _) => (500, "oh"),
        ("nonsense", _) => (200, "<html>"),
        ("null", _) => (200, "null"),
        _ => (200, "{\"reward\": 0.25}"),
    });
    let mut rewards = Rewards::new(vec![(Box::new(Http::new(&url, Duration::from_secs(1))), 2.0)]);
    let completions = ["a", "busy", "slow", "refused", "broken", "nonsense", "null", "b", "c", "d"];
    let found = scores(&mut rewards, json!({}), &completions);
    let half = Some(0.5);
    assert_eq!(
        found.total,
        [half, half, None, None, None, None, None, half, half, half],
        "{:?}",
        found.failures
    );
    let reasons: Vec<(usize, String)> =
        found.failures.iter().map(|failure| (failure.sample, format!("{:#}", failure.error))).collect();
    for ((sample, reason), (expected, part)) in reasons.iter().zip([
        (2, "asked twice"),
        (3, "status 400 Bad Request: \"no such column\""),
        (4, "asked twice"),
        (5, "is not JSON"),
    ]) {
        assert!(*sample == expected && reason.contains(part), "{sample}: {reason}");
    }
    assert_eq!(reasons.len(), 4, "{reasons:?}");
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mut rewards = built(&[&format!("http://{nobody}/")], &[]).unwrap();
    assert_eq!(scores(&mut rewards, json!({}), &["a"]).failures.len(), 1);
}

#[test]
fn classifiers_give_transformers_scores() {
    let mut distances = Vec::new();
    for name in ["llama_classifier", "qwen2_classifier"] {
        let dir = root().join("reward_models").join(name);
        let model = SequenceClassifier::from_pretrained(&dir, Kind::Float, Device::Cpu).unwrap();
        let golden = Weights::open_files(&[dir.join("golden.safetensors")]).unwrap();
        let get = |name: &str| golden.get(name).unwrap();
        let lengths: Vec<i64> = get("lengths").try_into().unwrap();
        let rows: Vec<Vec<i64>> = get("input_ids").try_into().unwrap();
        let ours: Vec<f64> = rows
            .iter()
            .zip(lengths)
            .map(|(row, length)| model.score(&row[..length as usize]).unwrap())
            .collect();
        distances.push((name.to_string(), rel(&Tensor::from_slice(&ours), &get("scores"))));
    }
    crate::golden::assert_close(1e-5, distances);
}

/// A reward model's folder made of the embedded model.
fn reward_model() -> tempfile::TempDir {
    let (place, from) = (tempfile::tempdir().unwrap(), Path::new("examples/tiny/model"));
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), place.path().join(name)).unwrap();
    }
    let weights = Weights::open(from).unwrap();
    let mut tensors: Vec<(String, Tensor)> = weights
        .names()
        .filter(|name| *name != "lm_head.weight")
        .map(|name| (name.to_owned(), weights.get(name).unwrap()))
        .collect();
    let row: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin() / 16.0).collect();
    tensors.push(("score.weight".into(), Tensor::from_slice(&row).view([1, 256])));
    write_safetensors(&place.path().join("model.safetensors"), &tensors).unwrap();
    place
}

#[test]
fn models_as_rewards() {
    let place = reward_model();
    let spec = format!("model:{}", place.path().display());
    let mut rewards = built(&[&spec], &[]).unwrap();
    let prompt = json!([{"role": "user", "content": "What is 1+7?"}]);
    let columns = Map::new();
    let sample = |prompt, completion| Sample {
        prompt,
        completion,
        completion_ids: &[],
        truncated: false,
        columns: &columns,
    };
    let text = json!("What is 1+7?");
    let found = rewards.score(&[sample(&prompt, "8"), sample(&prompt, "9"), sample(&text, " 8")]);
    assert!(found.failures.is_empty(), "{:?}", found.failures);

    let model = SequenceClassifier::from_pretrained(place.path(), Kind::Float, Device::Cpu).unwrap();
    let score = |text: &str| {
        let ids: Vec<i64> = tokenizer().encode(text, false).unwrap().into_iter().map(i64::from).collect();
        Some(model.score(&ids).unwrap())
    };
    let language =
        FastLanguageModel::from_pretrained(Path::new("examples/tiny/model"), Kind::Float, Device::Cpu)
            .unwrap();
    let template = language.tokenizer().unwrap().chat_template().unwrap();
    let chat = |answer: &str| {
        let mut messages = prompt.as_array().unwrap().clone();
        messages.push(json!({"role": "assistant", "content": answer}));
        template.render(&messages, &Default::default()).unwrap()
    };
    assert_eq!(found.total, [score(&chat("8")), score(&chat("9")), score("What is 1+7? 8")]);
    assert_ne!(found.total[0], found.total[1]);

    // A TorchScript module, with the trained model's tokenizer: the mean of the ids.
    let path = tempfile::tempdir().unwrap();
    let file = path.path().join("mean.pt");
    let source = "def forward(self, input_ids, attention_mask):\n    return (input_ids * attention_mask).float().mean(1)\n";
    save_script(&file, source, &[]).unwrap();
    let mut rewards = built(&[&format!("model:{}", file.display())], &[]).unwrap();
    let ids = tokenizer().encode("What is 1+7? 8", false).unwrap();
    let mean = ids.iter().sum::<u32>() as f32 / ids.len() as f32;
    let found = rewards.score(&[sample(&text, " 8"), sample(&json!(3), "x")]);
    assert!((found.total[0].unwrap() as f32 - mean).abs() < 1e-3, "{found:?} {mean}");
    assert!(format!("{:#}", found.failures[0].error).contains("neither a string nor a list"));
    std::fs::write(path.path().join("torn.pt"), "x").unwrap();
    let error = built(&[&format!("model:{}", path.path().join("torn.pt").display())], &[]).err().unwrap();
    assert!(format!("{error:#}").contains("not a TorchScript module"), "{error:#}");
}
