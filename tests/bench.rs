//! `ferrotune bench`: its report on a small model, on the CPU.

use std::process::Command;

use crate::golden::{checkpoints, root};

#[test]
fn a_report_adds_up() {
    let model = root().join(&checkpoints()[0]);
    let output = Command::new(env!("CARGO_BIN_EXE_ferrotune"))
        .args(["bench", "train", "--batch", "2", "--packing", "9,7", "--steps", "3", "--json"])
        .args(["--device", "cpu", "--threads", "1", "--gradient-accumulation-steps", "2", "--model"])
        .arg(&model)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report}"));
    assert_eq!(number("tokens_per_step"), 64.0);
    assert_eq!(number("steps"), 3.0);
    assert!(report["gpu"].is_null());
    let ms = number("ms_per_step");
    assert!(number("ms_per_step_min") <= ms && ms <= number("ms_per_step_max"));
    assert!((number("tokens_per_second") - 64.0 / ms * 1e3).abs() < 1e-6 * number("tokens_per_second"));
    assert!(number("first_loss") > 0.0 && number("last_loss") > 0.0);
    assert!(number("peak_allocated") >= number("model_memory"));
    let terms = report["floor"]["terms"].as_array().unwrap();
    let sum: f64 = terms.iter().map(|term| term["ms"].as_f64().unwrap()).sum();
    assert!((sum - report["floor"]["ms"].as_f64().unwrap()).abs() < 1e-6 * sum);
    for name in ["qkv forward", "down input gradient", "lm_head forward", "attention forward and backward"] {
        assert!(terms.iter().any(|term| term["name"] == name), "{name}: {report}");
    }
}

fn report(arguments: &[&str]) -> serde_json::Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    let output = command.arg("bench").args(arguments).args(["--device", "cpu", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn grpo_is_measured_in_both_phases() {
    let model = root().join(&checkpoints()[0]);
    let flags = [
        "grpo",
        "--num-generations",
        "4",
        "--prompt",
        "5",
        "--completion",
        "6",
        "--steps",
        "3",
        "--warm-up",
        "1",
    ];
    let report = report(&[&flags[..], &["--beta", "0.1", "--model", model.to_str().unwrap()]].concat());
    let number = |key: &str| report[key].as_f64().unwrap_or_else(|| panic!("{key}: {report}"));
    let (rollout, training) = (number("rollout_seconds"), number("training_seconds"));
    assert!(number("first_step_seconds") < number("seconds_to_first_step"));
    assert!((number("rollout_tokens_per_second") * rollout - 24.0).abs() < 1e-6, "4 x 6 tokens: {report}");
    assert!((number("training_tokens_per_second") * training - 44.0).abs() < 1e-6, "4 x 11 tokens: {report}");
    assert!(number("sampling_logp_difference") < 1e-4, "{report}");
    assert!(number("peak_allocated") >= number("model_memory") && report["plan"].is_null());
}

/// All logits would be 500 MiB, chunks of them 64 MiB; freed ones stay with the process.
#[test]
fn the_loss_holds_chunks_of_logits() {
    let sizes = ["--tokens", "16384", "--hidden-size", "32", "--vocab-size", "8000"];
    for more in [&[][..], &["--without-entropy"]] {
        let report = report(&[&["loss"], &sizes[..], more].concat());
        let [beyond, logits] = ["beyond", "logits"].map(|key| report[key].as_u64().unwrap());
        assert!(logits == 16384 * 8000 * 4 && beyond < logits / 2, "{report}");
    }
}

#[test]
fn what_trains_is_chosen_and_the_cpu_has_no_budget() {
    let model = root().join(&checkpoints()[0]);
    for method in [
        &["--full-finetuning", "--optim", "adamw_8bit"][..],
        &["--lora-dropout", "0.1", "--modules-to-save", "embed_tokens,lm_head"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_ferrotune"))
            .args([
                "bench",
                "train",
                "--batch",
                "1",
                "--seq",
                "9",
                "--steps",
                "2",
                "--warm-up",
                "1",
                "--json",
            ])
            .args(["--device", "cpu", "--max-memory", "1GiB", "--model", model.to_str().unwrap()])
            .args(method)
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        assert!(
            errors.contains("--max-memory bounds runs on a GPU: on the CPU nothing is bounded"),
            "{errors}"
        );
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["full_finetuning"], method.contains(&"--full-finetuning"));
        let terms = report["floor"]["terms"].as_array().unwrap();
        let trains = terms.iter().any(|term| term["name"] == "down weight gradient");
        assert_eq!(trains, method.contains(&"--full-finetuning"), "{report}");
    }
}

#[test]
fn values_that_are_too_small_are_named() {
    for (arguments, message) in [
        (&["generate", "--shape", "llama-3.2-1b", "--batch", "0"][..], "--batch is 0, expected at least 1"),
        (&["train", "--shape", "llama-3.2-1b", "--packing", "9,1"], "--packing is 1, expected at least 2"),
        (
            &["grpo", "--shape", "llama-3.2-1b", "--num-generations", "1"],
            "--num-generations is 1, expected at least 2",
        ),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_ferrotune")).arg("bench").args(arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(message), "{arguments:?}: {error}");
    }
}
