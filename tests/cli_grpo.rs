//! `ferrotune grpo`, end to end on the embedded model.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::golden::shared_data;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny").join(name)
}

/// Two steps on each generation batch, and each of its completions used twice.
const OFF_POLICY: [&str; 8] = [
    "--per-device-train-batch-size",
    "4",
    "--steps-per-generation",
    "2",
    "--num-iterations",
    "2",
    "--num-generations",
    "4",
];

fn command(output: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.args(["grpo", "--threads", "1", "--device", "cpu", "--r", "4"]);
    let unless = |flag: &str, values: &[&str]| -> Vec<String> {
        let words = [&[flag], values].concat();
        if flags.contains(&flag) { Vec::new() } else { words.into_iter().map(str::to_owned).collect() }
    };
    command.args(unless("--reward-funcs", &["exact", "format:think-answer"]));
    command.args(unless("--learning-rate", &["1e-3"]));
    command.args(unless("--dataset", &[example("heldout.jsonl").to_str().unwrap()]));
    command.arg("--model").arg(example("model"));
    command.args(unless("--max-completion-length", &["8"]));
    command.arg("--output-dir").arg(output).args(flags);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn succeeded(output: Output) -> String {
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    stdout
}

fn run(output: &Path, flags: &[&str]) -> String {
    succeeded(command(output, flags).output().unwrap())
}

fn refused(flags: &[&str], expected: &str) {
    let folder = tempfile::tempdir().unwrap();
    let output = command(&folder.path().join("out"), flags).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && stderr.contains(expected), "{stderr}");
    assert!(!folder.path().join("out").exists(), "{flags:?}");
}

fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn adapter(output: &Path) -> Vec<u8> {
    fs::read(output.join("adapter_model.safetensors")).unwrap()
}

/// What a run shows and leaves.
#[test]
fn a_run_shows_rewards_and_leaves_its_records() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let flags = ["--max-steps", "3", "--log-completions-steps", "2", "--num-completions-to-print", "1"];
    let flags = [&flags[..], &["--beta", "0.01", "--num-generations", "4"]].concat();
    let shown = run(&output, &flags);
    for part in
        ["rewards    exact, format", "2 prompts x 4 completions", "reward ", "(exact ", "| KL ", "length "]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert_eq!(shown.matches("completions of step").count(), 1, "{shown}");
    let metrics = lines(&output.join("metrics.jsonl"));
    assert_eq!(metrics.len(), 3);
    for key in [
        "reward",
        "reward_std",
        "rewards/exact/mean",
        "rewards/format/mean",
        "kl",
        "entropy",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "rollout_tokens_per_second",
        "training_tokens_per_second",
    ] {
        assert!(metrics.iter().all(|step| step[key].is_number()), "{key}: {metrics:?}");
    }
    // The engine that writes and the model that trains are one.
    for step in &metrics {
        let difference = step["sampling/sampling_logp_difference/max"].as_f64().unwrap();
        assert!(difference < 1e-3, "{difference}");
    }
    let completions = lines(&output.join("completions.jsonl"));
    assert_eq!(completions.len(), 8, "all of step 2");
    assert!(completions.iter().all(|row| row["step"] == 2 && row["rewards"].as_array().unwrap().len() == 2));
    for picture in ["loss.svg", "reward.svg", "completions_mean_length.svg"] {
        assert!(fs::read_to_string(output.join(picture)).unwrap().contains("<svg"), "{picture}");
    }
    // The same run from what it wrote.
    let again = folder.path().join("again");
    let config = output.join("run.yaml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.args(["grpo", "--config"]).arg(config).arg("--output-dir").arg(&again);
    succeeded(command.output().unwrap());
    assert_eq!(adapter(&again), adapter(&output));
}

/// Stopped in the middle of a generation batch, with completions of older weights to come.
#[test]
fn a_run_that_goes_on_ends_with_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let [whole, parts] = ["whole", "parts"].map(|name| folder.path().join(name));
    let flags =
        [&OFF_POLICY[..], &["--max-steps", "6", "--save-steps", "1", "--temperature", "0.9"]].concat();
    run(&whole, &flags);
    fs::create_dir(&parts).unwrap();
    for step in [1, 3] {
        // As if it had been killed after this step.
        let from = whole.join(format!("checkpoint-{step}"));
        let resumed = [&flags[..], &["--resume-from-checkpoint", from.to_str().unwrap()]].concat();
        let shown = run(&parts, &resumed);
        assert!(shown.contains(&format!("continues after step {step} of 6")), "{shown}");
        assert_eq!(adapter(&parts), adapter(&whole), "from step {step}");
        fs::remove_dir_all(&parts).unwrap();
    }
}

/// Where rollouts fall between the steps that are told of: rewards of all steps are in the records, each generation's
/// completions at most once, and the numbers of several steps are their means.
#[test]
fn steps_that_share_a_rollout_show_its_rewards() {
    let folder = tempfile::tempdir().unwrap();
    let [each, some] = ["each", "some"].map(|name| folder.path().join(name));
    // Four steps on each generation batch.
    let flags = [&OFF_POLICY[..], &["--max-steps", "8", "--log-completions-steps", "2"]].concat();
    let shown = run(&each, &flags);
    assert_eq!(shown.matches("completions of step").count(), 2, "{shown}");
    let rows = lines(&each.join("completions.jsonl"));
    let steps: Vec<u64> = rows.iter().map(|row| row["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [[2; 8], [6; 8]].concat());
    let shown = run(&some, &[&flags[..], &["--logging-steps", "4"]].concat());
    assert_eq!(
        shown.lines().filter(|line| line.starts_with("step ") && line.contains("reward ")).count(),
        2,
        "{shown}"
    );
    let (each, some) = (lines(&each.join("metrics.jsonl")), lines(&some.join("metrics.jsonl")));
    assert_eq!(some.iter().map(|step| step["step"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 8]);
    for (window, record) in each.chunks(4).zip(&some) {
        for key in ["reward", "completions/mean_length", "clip_ratio/region_mean"] {
            let values: Vec<f64> = window.iter().filter_map(|step| step[key].as_f64()).collect();
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            assert!((record[key].as_f64().unwrap() - mean).abs() < 1e-9, "{key}: {record} of {values:?}");
        }
    }
    // Every record's reward is a point of the picture.
    assert!(fs::read_to_string(folder.path().join("some/reward.svg")).unwrap().contains("<svg"));
}

/// What a checkpoint counts by must be what the run that goes on counts by.
#[test]
fn another_batch_is_not_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    run(&output, &[&OFF_POLICY[..], &["--max-steps", "4", "--save-steps", "1"]].concat());
    let resumed = |step: u64, flags: &[&str]| {
        let from = output.join(format!("checkpoint-{step}"));
        let other = folder.path().join("other");
        let flags = [flags, &["--resume-from-checkpoint", from.to_str().unwrap()]].concat();
        let ended = command(&other, &flags).output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    };
    let beta = [&OFF_POLICY[..], &["--max-steps", "6", "--beta", "0.3"]].concat();
    for flags in [
        &beta[..],
        &[
            "--max-steps",
            "6",
            "--num-generations",
            "4",
            "--gradient-accumulation-steps",
            "2",
            "--per-device-train-batch-size",
            "4",
        ],
    ] {
        let (code, said) = resumed(3, flags);
        assert!(
            code == Some(1) && said.contains("within a generation batch") && said.contains("--beta"),
            "{said}"
        );
    }
    let (code, said) = resumed(4, &["--max-steps", "6", "--num-generations", "4"]);
    assert!(code == Some(0), "behind a generation batch, as many prompts at once: {said}");
    let (code, said) = resumed(4, &["--max-steps", "6", "--num-generations", "8"]);
    assert!(code == Some(1) && said.contains("2 prompts at once and now would ask 1"), "{said}");
}

/// What a run gives that gets Ctrl-C while something behind its first step takes its time: the step is saved.
fn interrupted_behind_a_step(output: &Path, flags: &[&str]) -> Output {
    let mut child = command(output, flags).spawn().unwrap();
    let started = Instant::now();
    while fs::read_to_string(output.join("metrics.jsonl")).map_or(0, |text| text.lines().count()) < 1 {
        assert!(started.elapsed() < Duration::from_secs(120) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));
    let checkpoint = ferrotune::train::checkpoint::latest(output).unwrap().unwrap();
    assert_eq!(checkpoint.state.global_step, 1);
    ended
}

/// A judge that hangs does not hold up the end of a run, and the step that it was to judge is not made.
#[test]
fn ctrl_c_ends_a_reward_that_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let judge =
        "command:n=0; while read l; do n=$((n+1)); [ $n -gt 8 ] && exec sleep 600; echo $((n%2)); done";
    let flags = [
        "--max-steps",
        "5",
        "--save-steps",
        "100",
        "--reward-timeout",
        "600",
        "--num-generations",
        "4",
        "--reward-funcs",
        judge,
    ];
    let started = Instant::now();
    interrupted_behind_a_step(&output, &flags);
    assert!(started.elapsed() < Duration::from_secs(300), "{:?}", started.elapsed());
}

/// Of an evaluation that is cut off nothing is in the records: its means would be those of what was judged by then.
#[test]
fn ctrl_c_leaves_an_evaluation_out() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let held_out = folder.path().join("held_out.jsonl");
    let text = fs::read_to_string(example("heldout.jsonl")).unwrap();
    fs::write(&held_out, text.lines().take(5).collect::<Vec<_>>().join("\n")).unwrap();
    // Eight completions of the first step, two of the evaluation behind it.
    let judge =
        "command:n=0; while read l; do n=$((n+1)); [ $n -gt 10 ] && exec sleep 600; echo $((n%2)); done";
    let flags =
        ["--max-steps", "5", "--eval-steps", "1", "--reward-timeout", "600", "--num-generations", "4"];
    let given = ["--reward-funcs", judge, "--eval-dataset", held_out.to_str().unwrap()];
    let ended = interrupted_behind_a_step(&output, &[&flags[..], &given].concat());
    assert!(!String::from_utf8(ended.stdout).unwrap().contains("evaluation after step"));
    let metrics = lines(&output.join("metrics.jsonl"));
    assert!(metrics.len() == 1 && metrics[0].get("eval_reward").is_none(), "{metrics:?}");
}

/// Before the first step there is nothing to save.
#[test]
fn ctrl_c_while_the_model_is_loaded_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let (output, calibration) = (folder.path().join("out"), folder.path().join("calibration.jsonl"));
    // Judging the modules by it takes many seconds.
    let row = serde_json::json!({"text": "The sky is blue and the sun is hot. ".repeat(60)}).to_string();
    fs::write(&calibration, vec![row; 256].join("\n")).unwrap();
    let flags = ["--load-in-4bit", "--quant", "dynamic-nf4", "--calibration-dataset"];
    let mut child =
        command(&output, &[&flags[..], &[calibration.to_str().unwrap()]].concat()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(child.try_wait().unwrap().is_none());
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.signal(), Some(2), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn ctrl_c_saves() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut child = command(&output, &["--max-steps", "500"]).spawn().unwrap();
    let started = Instant::now();
    while fs::read_to_string(output.join("metrics.jsonl")).map_or(0, |text| text.lines().count()) < 1 {
        assert!(started.elapsed() < Duration::from_secs(120) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{}", String::from_utf8_lossy(&ended.stderr));
    let checkpoint = ferrotune::train::checkpoint::latest(&output).unwrap().unwrap();
    assert!(checkpoint.state.global_step >= 1);
}

#[test]
fn a_dry_run_shows_a_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let shown = run(&output, &["--dry-run", "--system-prompt", "Think first."]);
    assert!(shown.contains("516 prompts") && shown.contains("rewards: exact, format"), "{shown}");
    assert!(shown.contains("Think first.") && shown.contains("Calculate 0+0."), "{shown}");
    assert!(!output.exists());
}

/// Questions of GSM8K, whose answers end in `#### 18`, through system prompt, chat template, rewards and metrics.
#[test]
fn gsm8k_runs() {
    let Some(data) = shared_data("datasets/gsm8k/test.jsonl") else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.args([
        "grpo",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--max-steps",
        "1",
        "--max-completion-length",
        "8",
    ]);
    command.args(["--prompt-column", "question", "--system-prompt", "Think."]);
    command.args(["--reward-funcs", "numeric=2", "format:think-answer", "--num-generations", "4"]);
    command.arg("--model").arg(example("model")).arg("--dataset").arg(data).arg("--output-dir").arg(&output);
    succeeded(command.output().unwrap());
    let metrics = &lines(&output.join("metrics.jsonl"))[0];
    let numeric = metrics["rewards/numeric/mean"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&numeric) && metrics["reward_failures"] == 0.0, "{metrics}");
}

/// A judge that fails with every other sample: these have no reward, and are not compared with the others.
#[test]
fn a_reward_that_fails_costs_its_sample() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let judge = "command:i=0; while read line; do i=$((i+1)); case $((i % 4)) in 1) echo 1;; 2) echo nan;; 3) echo 0;; 0) echo oops;; esac; done";
    let flags =
        ["--max-steps", "2", "--log-completions-steps", "1", "--num-generations", "4", "--reward-funcs"];
    let ended = command(&output, &[&flags[..], &[judge]].concat()).output().unwrap();
    let warnings = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(
        ended.status.success() && warnings.contains("failed for 4 of 8 completions, which count nothing"),
        "{warnings}"
    );
    let rows = lines(&output.join("completions.jsonl"));
    assert_eq!(rows.len(), 16);
    for (n, row) in rows.iter().enumerate() {
        let error = row["errors"][0].as_str().unwrap_or_default();
        match n % 4 {
            1 => assert_eq!(error, "command: the answer is nan, expected a finite number"),
            3 => assert!(error.starts_with("command: the answer \"oops\" is not JSON"), "{row}"),
            _ => assert!(
                row.get("errors").is_none() && row["reward"].is_number() && row["advantage"] != 0.0,
                "{row}"
            ),
        }
        assert!(n % 2 == 0 || (row["reward"].is_null() && row["advantage"] == 0.0), "{row}");
    }
    assert!(lines(&output.join("metrics.jsonl")).iter().all(|step| step["reward_failures"] == 4.0));
}

/// Prompts that are asked about and not trained on, greedily: the same twice where nothing is learned.
#[test]
fn held_out_prompts_are_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    let held_out = folder.path().join("held_out.jsonl");
    let text = fs::read_to_string(example("heldout.jsonl")).unwrap();
    fs::write(&held_out, text.lines().take(5).collect::<Vec<_>>().join("\n")).unwrap();
    let flags = ["--max-steps", "3", "--eval-steps", "2", "--learning-rate", "0", "--eval-dataset"];
    let shown = run(&output, &[&flags[..], &[held_out.to_str().unwrap()]].concat());
    assert!(shown.contains("5 prompts") && shown.contains("evaluation after step 2: reward "), "{shown}");
    let metrics = lines(&output.join("metrics.jsonl"));
    let found: Vec<&Value> = metrics.iter().filter(|record| record["eval_reward"].is_number()).collect();
    assert_eq!(found.iter().map(|record| record["step"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 3]);
    for key in ["eval_reward", "eval_rewards/exact/mean", "eval_completions/mean_length"] {
        assert!(found[0][key].is_number() && found[0][key] == found[1][key], "{key}: {metrics:?}");
    }
    assert!(found.iter().all(|record| record.get("eval_loss").is_none()), "{metrics:?}");
    assert!(fs::read_to_string(output.join("reward.svg")).unwrap().contains("eval"), "the picture has both");
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.jsonl");
    fs::write(&broken, "{\"prompt\": \"a\"}\n{\"prompt\": \n").unwrap();
    let broken = broken.to_str().unwrap();
    refused(&["--dataset", broken, "--max-completion-length", "600"], "broken.jsonl, line 2: ");
    refused(&["--eval-dataset", broken, "--eval-steps", "1"], "--eval-dataset: ");
    refused(&["--eval-steps", "1"], "--eval-steps: --eval-dataset is missing");
    refused(
        &["--reward-funcs", "exat"],
        "unknown; known are exact[:COLUMN], numeric[:COLUMN], regex:PATTERN",
    );
    refused(&["--test-size", "0.1"], "--test-size: has no meaning in grpo");
    refused(&["--num-generations", "3"], "--num-generations 3: the 8 completions");
    refused(&["--num-generations", "1"], "--num-generations 1: a group needs at least 2");
    refused(
        &["--gradient-accumulation-steps", "2", "--steps-per-generation", "3"],
        "--steps-per-generation 3",
    );
    refused(&["--temperature", "0"], "--temperature 0: must be a finite number above 0");
    refused(&["--beta", "0.1", "--full-finetuning"], "--beta: the reference is the model without its LoRA");
    refused(&["--packing"], "--packing: has no meaning in grpo");
    refused(&["--prompt-column", "question"], "heldout.jsonl, line 1: no column \"question\"");
    refused(&["--max-completion-length", "600"], "--max-completion-length 600");
    refused(&["--reward-weights", "1,2,3"], "--reward-weights: 3 weights for 2 rewards");
    refused(&["--reward-funcs", "exact:foo"], "--reward-funcs exact:foo: no row has a column \"foo\"");
    refused(&["--reward-timeout", "1e30"], "--reward-timeout 1000000000000000000000000000000: too long");
    refused(&["--reward-model", "nowhere.pt"], "--reward-model nowhere.pt: no such file or folder");
    refused(&["--beta", "-1"], "--beta -1: must be a finite number 0 or more");
    let empty = folder.path().join("empty.jsonl");
    fs::write(&empty, "").unwrap();
    refused(&["--dataset", empty.to_str().unwrap()], "empty.jsonl: no rows");
    fs::write(&empty, "{\"prompt\": [], \"answer\": \"1\"}\n").unwrap();
    refused(&["--dataset", empty.to_str().unwrap()], "empty.jsonl, line 1: the prompt has no messages");
    let config = folder.path().join("run.yaml");
    fs::write(&config, "reward_funcs: [exact, foo]\n").unwrap();
    refused(&["--config", config.to_str().unwrap()], "reward \"foo\": unknown; known are exact");
}
