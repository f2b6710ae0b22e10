//! The command itself, end to end on a model of a few thousand weights: interrupted, killed, resumed, rerun.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ferrotune::train::checkpoint::{OPTIMIZER, latest};
use rustix::process::{Pid, Signal, kill_process};

const WORDS: [&str; 12] =
    ["a", "red", "blue", "small", "cat", "dog", "bird", "sees", "likes", "the", "house", "tree"];

/// A folder with a tokenizer of whole words, a dataset, and the config of a model that is made at random.
pub struct Workplace(tempfile::TempDir);

impl Workplace {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let seed = place.path("seed");
        fs::create_dir(&seed).unwrap();
        let config = serde_json::json!({
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true,
            "hidden_act": "silu", "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 1
        });
        fs::write(seed.join("config.json"), config.to_string()).unwrap();
        let vocab: serde_json::Map<String, serde_json::Value> = ["<unk>", "</s>"]
            .iter()
            .chain(&WORDS)
            .zip(0..)
            .map(|(word, id)| (word.to_string(), id.into()))
            .collect();
        let tokenizer = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [{"id": 1, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false}],
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        });
        fs::write(seed.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        fs::write(seed.join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).unwrap();
        let rows: String = (0..60)
            .map(|i| {
                let words: Vec<&str> =
                    (0..4 + i % 9).map(|j| WORDS[(i * 7 + j * j + i / 5) % WORDS.len()]).collect();
                format!("{{\"text\": \"{}\"}}\n", words.join(" "))
            })
            .collect();
        fs::write(place.path("data.jsonl"), rows).unwrap();
        place
    }

    /// The base model of LoRA runs: trained from random weights for a few steps.
    pub fn with_model() -> Self {
        let place = Self::new();
        place.train("seed", "model", &["--from-scratch", "--max-steps", "4", "--learning-rate", "1e-3"]);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, model: &str, output: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        command.args(["train", "--threads", "1", "--device", "cpu", "--max-seq-length", "64"]);
        command.arg("--model").arg(self.path(model)).arg("--dataset").arg(self.path("data.jsonl"));
        command.arg("--output-dir").arg(self.path(output)).args(flags);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn train(&self, model: &str, output: &str, flags: &[&str]) -> String {
        succeeded(self.command(model, output, flags).output().unwrap())
    }

    pub fn adapter(&self, output: &str) -> Vec<u8> {
        fs::read(self.path(output).join("adapter_model.safetensors")).unwrap()
    }

    /// (step, loss) of every step in metrics.jsonl.
    pub fn losses(&self, output: &str) -> Vec<(u64, f64)> {
        let text = fs::read_to_string(self.path(output).join("metrics.jsonl")).unwrap();
        let record = |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap();
        let losses =
            text.lines().map(record).filter_map(|r| Some((r["step"].as_u64()?, r["loss"].as_f64()?)));
        losses.collect()
    }
}

pub fn succeeded(output: Output) -> String {
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    stdout
}

pub fn failed(command: &mut Command, code: i32, expected: &str) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(expected), "{stderr}");
}

/// Waits until the run has written a step after `step` into its metrics.
pub fn wait_for_step(metrics: &Path, step: usize, child: &mut Child) {
    let started = Instant::now();
    while fs::read_to_string(metrics).map_or(0, |text| text.lines().count()) <= step {
        assert!(started.elapsed() < Duration::from_secs(120), "no step {step} after two minutes");
        if child.try_wait().unwrap().is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

const LORA: [&str; 10] = [
    "--r",
    "4",
    "--lora-dropout",
    "0.1",
    "--max-steps",
    "40",
    "--save-steps",
    "3",
    "--save-total-limit",
    "2",
];

#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() {
    killed_again_and_again(&LORA);
}

/// Of a rank at which tensors are large enough for moments in 8 bits.
#[test]
fn moments_in_8_bits_survive_kills_to_the_byte() {
    let mut flags = LORA.to_vec();
    flags[1] = "128";
    flags.extend(["--optim", "adamw_8bit"]);
    killed_again_and_again(&flags);
}

fn killed_again_and_again(flags: &[&str]) {
    let place = Workplace::with_model();
    place.train("model", "whole", flags);
    let metrics = place.path("killed/metrics.jsonl");
    let resumed = [flags, &["--resume-from-checkpoint"]].concat();
    for step in [2, 9, 20, 31] {
        let mut child = place.command("model", "killed", &resumed).spawn().unwrap();
        wait_for_step(&metrics, step, &mut child);
        // Any moment: between steps, inside one, inside a checkpoint.
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
        std::thread::sleep(Duration::from_micros(u64::from(nanos / 1000 % 30_000)));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let left = latest(&place.path("killed")).unwrap().expect("a checkpoint survived").state.global_step;
    assert!(left >= 3 && left.is_multiple_of(3), "{left}");
    place.train("model", "killed", &resumed);
    assert_eq!(place.losses("killed"), place.losses("whole"));
    assert!(place.adapter("killed") == place.adapter("whole"), "the adapters differ");
    let left: Vec<String> = fs::read_dir(place.path("killed"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("checkpoint-") || name.ends_with(".tmp"))
        .collect();
    assert_eq!(left.len(), 2, "{left:?}");
    let [whole, killed] = ["whole", "killed"].map(|run| {
        let folder = latest(&place.path(run)).unwrap().unwrap().folder;
        fs::read(folder.join(OPTIMIZER)).unwrap()
    });
    assert!(whole == killed, "the moments differ");
    let names = String::from_utf8_lossy(&whole);
    assert_eq!(names.contains("lora_A.weight.state1"), flags.contains(&"adamw_8bit"), "{flags:?}");
}

#[test]
fn ctrl_c_saves_and_the_written_configuration_reruns_the_run() {
    let place = Workplace::with_model();
    let stdout = place.train("model", "whole", &LORA);
    for expected in ["trains ", "LoRA r 4", "step 40/40", "grad norm", "tokens/s", "ETA", "Done", "memory "] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    assert!(!stdout.contains('\x1b') && !stdout.contains('\r'), "plain lines on a pipe: {stdout}");
    for file in [
        "run.yaml",
        "train_results.json",
        "loss.svg",
        "metrics.jsonl",
        "adapter_config.json",
        "tokenizer.json",
    ] {
        assert!(place.path("whole").join(file).is_file(), "{file}");
    }

    let config = place.path("whole/run.yaml");
    let rerun = |output: &str, flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        command
            .arg("train")
            .arg("--config")
            .arg(&config)
            .arg("--output-dir")
            .arg(place.path(output))
            .args(flags);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let mut child = rerun("again", &[]).spawn().unwrap();
    wait_for_step(&place.path("again/metrics.jsonl"), 5, &mut child);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let saved = latest(&place.path("again")).unwrap().expect("Ctrl-C saves").state.global_step;
    assert_eq!(place.losses("again").last().unwrap().0, saved);
    succeeded(rerun("again", &["--resume-from-checkpoint"]).output().unwrap());
    assert!(place.adapter("again") == place.adapter("whole"), "the adapters differ");
    // Nothing is left to do.
    succeeded(rerun("again", &["--resume-from-checkpoint"]).output().unwrap());
    assert!(place.adapter("again") == place.adapter("whole"), "the adapters differ");

    failed(&mut rerun("whole", &[]), 2, "--overwrite-output-dir");
    succeeded(rerun("whole", &["--overwrite-output-dir", "--max-steps", "2"]).output().unwrap());
    assert_eq!(place.losses("whole").len(), 2);
}

#[test]
fn qlora_by_flag_by_configuration_and_by_checkpoint_is_one_run() {
    let place = Workplace::with_model();
    let flags = ["--r", "4", "--lora-dropout", "0.1", "--max-steps", "6", "--use-gradient-checkpointing"];
    let stdout = place.train("model", "flag", &[&flags[..], &["--load-in-4bit"]].concat());
    assert!(stdout.contains("LoRA r 4, lora_alpha 16 on 4-bit weights"), "{stdout}");
    assert!(stdout.contains("adamw_8bit, moments in 8 bits"), "{stdout}");
    place.train("model", "dense", &flags);
    assert!(place.adapter("flag") != place.adapter("dense"), "nothing was quantised");

    let ferrotune = || Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    let mut rerun = ferrotune();
    rerun.args(["train", "--config"]).arg(place.path("flag/run.yaml"));
    succeeded(rerun.arg("--output-dir").arg(place.path("again")).output().unwrap());
    assert!(place.adapter("again") == place.adapter("flag"), "the adapters differ");

    let mut quantize = ferrotune();
    quantize.args(["quantize", "--device", "cpu", "--model"]).arg(place.path("model"));
    succeeded(quantize.arg("--output-dir").arg(place.path("nf4")).output().unwrap());
    place.train("nf4", "stored", &flags);
    for (run, optim) in [("flag", "adamw_8bit"), ("stored", "adamw_8bit"), ("dense", "adamw_torch")] {
        let written = fs::read_to_string(place.path(run).join("run.yaml")).unwrap();
        assert!(written.contains(&format!("optim: {optim}")), "{written}");
    }
    // The optimizer of a run is that of its checkpoint.
    let resumed = [&flags[..], &["--load-in-4bit", "--resume-from-checkpoint"]].concat();
    succeeded(place.command("model", "flag", &resumed).output().unwrap());
    let other = [&resumed[..], &["--optim", "adamw_torch"]].concat();
    failed(&mut place.command("model", "flag", &other), 2, "--optim: ");
    assert!(place.adapter("stored") == place.adapter("flag"), "the adapters differ");
}

#[test]
fn an_offloaded_embedding_a_4_bit_head_and_f16() {
    let place = Workplace::with_model();
    let flags = ["--r", "4", "--max-steps", "4", "--nf4-head"];
    place.train("model", "plain", &flags[..4]);
    place.train("model", "head", &flags);
    assert!(place.adapter("head") != place.adapter("plain"), "nothing was quantised");
    place.train("model", "both", &[&flags[..], &["--offload-embedding"]].concat());
    assert!(place.adapter("both") == place.adapter("head"), "the adapters differ");
    let all = ["--full-finetuning", "--offload-embedding"];
    failed(
        &mut place.command("model", "all", &all),
        2,
        "--offload-embedding, --nf4-head and --full-finetuning",
    );

    let narrow = [&flags[..4], &["--dtype", "f16", "--save-steps", "2"]].concat();
    let stdout = place.train("model", "f16", &narrow);
    assert!(stdout.contains(", f16"), "{stdout}");
    let metrics = fs::read_to_string(place.path("f16/metrics.jsonl")).unwrap();
    assert_eq!(metrics.matches("\"loss_scale\":65536.0").count(), 4, "{metrics}");
    // The scale is part of a checkpoint.
    let adapter = place.adapter("f16");
    fs::remove_dir_all(place.path("f16/checkpoint-4")).unwrap();
    let resumed = [&narrow[..], &["--resume-from-checkpoint"]].concat();
    succeeded(place.command("model", "f16", &resumed).output().unwrap());
    assert!(place.adapter("f16") == adapter, "the adapters differ");
}

#[test]
fn full_finetuning_evaluates_stops_early_and_resumes() {
    let place = Workplace::new();
    let flags = [
        "--from-scratch",
        "--learning-rate",
        "3e-3",
        "--max-steps",
        "30",
        "--test-size",
        "0.2",
        "--eval-steps",
        "5",
        "--early-stopping-patience",
        "2",
        "--early-stopping-threshold",
        "100",
        "--load-best-model-at-end",
        "--packing",
    ];
    let stdout = place.train("seed", "out", &flags);
    assert!(stdout.contains("evaluation after step 10") && stdout.contains("Stopped early"), "{stdout}");
    assert_eq!(place.losses("out").len(), 15);
    let results: serde_json::Value =
        serde_json::from_slice(&fs::read(place.path("out/train_results.json")).unwrap()).unwrap();
    assert_eq!(results["stop_reason"], "early_stopping");
    assert_eq!(results["best_step"], 15);
    assert!(place.path("out/model.safetensors").is_file() && place.path("out/config.json").is_file());
}

#[test]
fn a_full_disk_costs_checkpoints_and_not_the_run() {
    let place = Workplace::with_model();
    let flags = |steps| ["--r", "64", "--save-steps", "2", "--resume-from-checkpoint", "--max-steps", steps];
    place.train("model", "out", &flags("4"));
    // A limit on the size of files refuses writes as a full disk does, for one process alone.
    let ferrotune = place.command("model", "out", &flags("8"));
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$@\"", "bash"]);
    limited.arg(ferrotune.get_program()).args(ferrotune.get_args());
    let output = limited.output().unwrap();
    let (stdout, stderr) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(stdout.contains("step 8/8"), "{stdout}{stderr}");
    assert!(stderr.contains("training goes on without this one"), "{stderr}");
    assert_eq!(latest(&place.path("out")).unwrap().unwrap().state.global_step, 4);
}

#[test]
fn a_step_that_is_not_finite_is_not_applied_and_names_a_module() {
    let place = Workplace::new();
    let flags = ["--from-scratch", "--learning-rate", "1e30", "--max-steps", "10", "--warmup-ratio", "0"];
    failed(&mut place.command("seed", "out", &flags), 1, "the first non-finite value is in");
    let saved =
        latest(&place.path("out")).unwrap().expect("the state before the step is saved").state.global_step;
    assert_eq!(place.losses("out").last().map_or(0, |(step, _)| *step), saved);
}

#[test]
fn usage_errors_name_the_flag_and_end_with_code_2() {
    let place = Workplace::new();
    let train = |flags: &[&str]| place.command("seed", "out", flags);
    failed(&mut train(&["--lora-dropout", "2"]), 2, "--lora-dropout 2");
    failed(&mut train(&["--learning-rat", "2"]), 2, "--learning-rate");
    failed(&mut train(&["--resume-from-checkpoint", "nowhere"]), 1, "nowhere");
    failed(&mut train(&["--dataset-format", "csv"]), 2, "--dataset-format");
    let mut elsewhere = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    failed(elsewhere.args(["train", "--model", "m", "--dataset", "d", "--device", "tpu"]), 2, "--device");
    failed(&mut place.command("seed", "seed", &[]), 2, "the model itself");
    assert!(!place.path("out").exists());
    let shown = succeeded(train(&["--from-scratch", "--dry-run"]).output().unwrap());
    assert!(shown.contains("[[") && shown.contains("</s>"), "{shown}");
    let help = Command::new(env!("CARGO_BIN_EXE_ferrotune")).args(["train", "--help"]).output().unwrap();
    let help = succeeded(help);
    for expected in ["--per-device-train-batch-size", "[default: 4]", "LoRA:", "Optimisation:", "--config"] {
        assert!(help.contains(expected), "{expected}");
    }
}

/// Requests are answered while the run goes on, and told when it is over.
#[test]
fn a_run_answers_requests_between_its_steps() {
    use std::io::{BufRead, BufReader, Read, Write};
    let place = Workplace::with_model();
    let flags = ["--serve", "127.0.0.1:0", "--max-steps", "3000", "--save-steps", "0"];
    let mut child = place.command("model", "out", &flags).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.by_ref().find(|line| line.contains(" at http://")).unwrap();
    let address = line.split("http://").nth(1).unwrap().split(',').next().unwrap().to_string();
    let reader = std::thread::spawn(move || lines.collect::<Vec<_>>());
    for _ in 0..3 {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        let body = r#"{"prompt": "a red cat", "max_tokens": 5, "ignore_eos": true}"#;
        let length = body.len();
        let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length";
        stream.write_all(format!("{head}: {length}\r\n\r\n{body}").as_bytes()).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        assert!(reply.starts_with("HTTP/1.1 200") && reply.contains("\"completion_tokens\":5"), "{reply}");
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(reader.join().unwrap().iter().any(|line| line.contains("step ")));
    assert!(std::net::TcpStream::connect(&address).is_err(), "nobody listens any more");
}
