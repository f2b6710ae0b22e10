//! Flags, `--config` and the effective configuration are one set of words.

use std::path::Path;

use clap::Parser;
use ferrotune::cli::config_file::Configured;
use ferrotune::io::adapter::TargetModules;
use ferrotune::train::schedule::SchedulerType;
use ferrotune::train::{EvalStrategy, GradientCheckpointing, Size, TrainingArguments};

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    arguments: Configured<TrainingArguments>,
}

fn parse(flags: &[&str]) -> Result<TrainingArguments, String> {
    Cli::try_parse_from(std::iter::once(&"train").chain(flags))
        .map(|cli| cli.arguments.0)
        .map_err(|error| error.to_string())
}

fn with_file(yaml: &str, flags: &[&str]) -> Result<TrainingArguments, String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("run.yaml");
    std::fs::write(&file, yaml).unwrap();
    parse(&[&["--config", file.to_str().unwrap()], flags].concat())
}

#[test]
fn defaults_are_those_of_the_issue() {
    let arguments = parse(&[]).unwrap();
    assert_eq!(arguments, TrainingArguments::default());
    assert_eq!(arguments.per_device_train_batch_size, 4);
    assert_eq!(arguments.gradient_accumulation_steps, 2);
    assert_eq!((arguments.weight_decay, arguments.warmup_ratio), (0.001, 0.1));
    assert_eq!(arguments.lr_scheduler_type, SchedulerType::Linear);
    assert_eq!((arguments.r, arguments.lora_alpha, arguments.lora_dropout), (16, 16.0, 0.0));
    assert_eq!(arguments.target_modules, TargetModules::AllLinear);
    assert_eq!((arguments.seed, arguments.adam_epsilon), (3407, 1e-8));
    let base = ["--model", "m", "--dataset", "d"];
    let rate = |flags: &[&str]| parse(&[&base, flags].concat()).unwrap().resolved().unwrap().learning_rate;
    assert_eq!(rate(&[]), Some(2e-4));
    assert_eq!(rate(&["--full-finetuning"]), Some(2e-5));
    assert_eq!(rate(&["--from-scratch", "--learning-rate", "1e-3"]), Some(1e-3));
}

#[test]
fn flags_go_before_the_file() {
    let yaml = "model: here\nlearning_rate: 1e-4\npacking: true\nseed: 7\neval_strategy: no\n\
                target_modules: q_proj, v_proj\ndataset: [a.jsonl, b.jsonl]\nlr-scheduler-type: cosine\n";
    let arguments = with_file(yaml, &["--seed", "8", "--packing=false", "--r", "8"]).unwrap();
    assert_eq!(arguments.model, "here");
    assert_eq!(arguments.learning_rate, Some(1e-4));
    assert_eq!((arguments.seed, arguments.packing, arguments.r), (8, false, 8));
    assert_eq!(arguments.eval_strategy, Some(EvalStrategy::No));
    assert_eq!(arguments.dataset, ["a.jsonl", "b.jsonl"]);
    assert_eq!(arguments.lr_scheduler_type, SchedulerType::Cosine);
    assert_eq!(arguments.target_modules, TargetModules::Suffixes(vec!["q_proj".into(), "v_proj".into()]));
    // A flag that repeats its default still goes before the file.
    assert_eq!(with_file(yaml, &["--seed", "3407"]).unwrap().seed, 3407);
    assert!(with_file("train_on_responses_only: true", &[]).unwrap().assistant_only_loss);
    assert_eq!(with_file("", &[]).unwrap(), TrainingArguments::default());
}

#[test]
fn gradient_checkpointing_is_a_word_or_yes_or_no() {
    use GradientCheckpointing::{Auto, Off, On, Unsloth};
    let key = "use_gradient_checkpointing";
    for (word, expected) in
        [("true", On), ("false", Off), ("on", On), ("off", Off), ("unsloth", Unsloth), ("auto", Auto)]
    {
        let flag = parse(&["--use-gradient-checkpointing", word]).unwrap();
        let file = with_file(&format!("{key}: {word}\n"), &[]).unwrap();
        assert_eq!(
            [flag.use_gradient_checkpointing, file.use_gradient_checkpointing],
            [expected; 2],
            "{word}"
        );
    }
    assert_eq!(parse(&["--use-gradient-checkpointing", "--packing"]).unwrap().use_gradient_checkpointing, On);
    assert_eq!(parse(&[]).unwrap().use_gradient_checkpointing, Auto);
    let error = with_file(&format!("{key}: sometimes\n"), &[]).unwrap_err();
    assert!(error.contains(key) && error.contains("unsloth"), "{error}");
}

#[test]
fn sizes_are_the_same_on_the_command_line_and_in_a_file() {
    for (word, bytes) in
        [("8GiB", 8 << 30), ("1.5gib", 3 << 29), ("24GB", 24_000_000_000), ("500 MiB", 500 << 20)]
    {
        let flag = parse(&["--max-memory", word]).unwrap();
        let file = with_file(&format!("max_memory: {word}\n"), &[]).unwrap();
        assert_eq!([flag.max_memory, file.max_memory], [Some(Size(bytes)); 2], "{word}");
        let again = TrainingArguments::from_yaml(&flag.to_yaml().unwrap(), "run.yaml".as_ref()).unwrap();
        assert_eq!(again.max_memory, flag.max_memory, "{word}");
    }
    assert!(parse(&["--max-host-memory", "12"]).unwrap_err().contains("expected a size such as"));
}

#[test]
fn a_wrong_file_is_refused_with_its_key() {
    let refused = |yaml: &str, expected: &str| {
        let message = with_file(yaml, &[]).unwrap_err();
        assert!(message.contains(expected), "{yaml:?}: {message}");
        assert!(message.contains("run.yaml"), "{message}");
    };
    refused("learning_rat: 1", r#"unknown key "learning_rat" (did you mean "learning_rate"?)"#);
    refused("zzzzzzzz: 1", r#"unknown key "zzzzzzzz""#);
    refused("seed: many", "seed: ");
    refused("dtype: f64", "dtype: ");
    refused("r: -3", "r: ");
    refused("assistant_only_loss: true\ntrain_on_responses_only: true", "mean the same");
    refused("- a\n- b", "not a YAML file of keys and values");
    refused("seed: 1\nseed: 2", "not a YAML file of keys and values");
    assert!(parse(&["--config", "no/such.yaml"]).unwrap_err().contains("no/such.yaml"));
}

#[test]
fn the_effective_configuration_reruns_the_run() {
    let flags = [
        "--model",
        "a/b",
        "--dataset",
        "x.jsonl,y z.jsonl",
        "--learning-rate",
        "3.3e-5",
        "--r",
        "3",
        "--rank-pattern",
        r#"{"q_proj": 4, "layers.1.*": 5}"#,
        "--alpha-pattern",
        r#"{"k": 0.1}"#,
        "--adam-epsilon",
        "1e-6",
        "--target-modules",
        r".*\.(q|v)_proj",
        "--init-lora-weights",
        "gaussian",
        "--completion-only-loss=false",
        "--test-size",
        "0.1",
        "--load-best-model-at-end",
        "--template",
        "Q: {q}\nA: \"{a}\" # no\n",
        "--revision",
        "1.0",
        "--resume-from-checkpoint",
        "--modules-to-save",
        "lm_head",
        "--layers-to-transform",
        "0,2",
    ];
    let arguments = parse(&flags).unwrap().resolved().unwrap();
    assert_eq!(arguments.eval_strategy, Some(EvalStrategy::Epoch));
    assert_eq!(arguments.resume_from_checkpoint.as_deref(), Some("auto"));
    let yaml = arguments.to_yaml().unwrap();
    assert_eq!(with_file(&yaml, &[]).unwrap(), arguments, "{yaml}");
    assert_eq!(TrainingArguments::from_yaml(&yaml, Path::new("run.yaml")).unwrap(), arguments);
    assert!(arguments.differences(&arguments).is_empty());
    let other = TrainingArguments { seed: 1, output_dir: "elsewhere".into(), ..arguments.clone() };
    assert_eq!(arguments.differences(&other), ["seed: 3407 -> 1"]);
}

#[test]
fn senseless_values_are_refused_with_their_flag() {
    let refused = |flags: &[&str], expected: &str| {
        let arguments = parse(&[&["--model", "m", "--dataset", "d"], flags].concat()).unwrap();
        let message = format!("{:#}", arguments.resolved().unwrap_err());
        assert!(message.contains(expected), "{flags:?}: {message}");
    };
    refused(&["--gradient-accumulation-steps", "0"], "--gradient-accumulation-steps");
    refused(&["--warmup-ratio", "1.5"], "--warmup-ratio 1.5");
    refused(&["--lora-dropout", "1"], "--lora-dropout 1");
    refused(&["--learning-rate", "NaN"], "--learning-rate NaN");
    refused(&["--num-train-epochs", "0"], "--num-train-epochs 0");
    refused(&["--r", "0"], "LoRA rank 0");
    refused(&["--eval-strategy", "epoch"], "--eval-dataset");
    refused(&["--early-stopping-patience", "2"], "--early-stopping-patience");
    refused(&["--test-size", "0.1", "--eval-dataset", "e"], "--test-size");
    refused(&["--overwrite-output-dir", "--resume-from-checkpoint"], "--overwrite-output-dir");
    assert!(TrainingArguments::default().resolved().unwrap_err().to_string().contains("--model"));

    let warned = |flags: &[&str]| parse(flags).unwrap().warnings();
    assert!(warned(&["--learning-rate", "1e-8"])[0].contains("--learning-rate"));
    assert!(warned(&["--learning-rate", "2"])[0].contains("diverge"));
    assert!(warned(&["--full-finetuning", "--r", "8"])[0].contains("LoRA"));
    assert!(warned(&["--learning-rate", "1e-4"]).is_empty());
}
