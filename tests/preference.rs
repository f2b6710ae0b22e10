//! Preference training: losses and gradients beside TRL, data forms, reference log-probabilities, and the command.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use ferrotune::data::{
    Batch, BatchOptions, BatchStream, Preference, PreferenceKind, PreferenceOptions, TokenDataset, Tokenizer,
    prepare_preferences, preview,
};
use ferrotune::models::FastLanguageModel;
use ferrotune::ops::Pass;
use ferrotune::train::objective::means;
use ferrotune::train::preference::{LossType, PreferenceArguments, PreferenceLoss, reference_log_probs};
use ferrotune::train::{Objective, Stepper, TrainingArguments};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::cli_train::{Workplace, failed, succeeded, wait_for_step};
use crate::golden::{assert_close, ids, rel, root, tensors};

fn model(kind: Kind) -> FastLanguageModel {
    let mut model = FastLanguageModel::from_pretrained(&root().join("llama"), kind, Device::Cpu).unwrap();
    model.load_adapter(&root().join("adapters/llama_rslora")).unwrap();
    model
}

/// The arguments of a case of TRL's golden, beside what training needs.
fn arguments(words: &Value) -> PreferenceArguments {
    let mut all = Map::new();
    all.insert("model".into(), "m".into());
    all.insert("dataset".into(), "d".into());
    all.extend(words.as_object().unwrap().clone());
    serde_json::from_value::<PreferenceArguments>(Value::Object(all)).unwrap().resolved().unwrap()
}

/// The golden's pairs, or examples with the completion of the one before, as the data of `args` has them.
fn golden_data(args: &PreferenceArguments) -> Arc<TokenDataset> {
    let golden = tensors(&root().join("preference/trl.safetensors"));
    let rows = |name: &str| -> Vec<Vec<u32>> {
        let lengths = ids(&golden[&format!("{name}_lengths")]);
        let row = |(row, length): (i64, &i64)| {
            ids(&golden[&format!("{name}s")].get(row).slice(0, 0, *length, 1))
                .iter()
                .map(|id| *id as u32)
                .collect()
        };
        (0..).zip(&lengths).map(row).collect()
    };
    let (prompts, chosen, rejected) = (rows("prompt"), rows("chosen"), rows("rejected"));
    let labels = ids(&golden["labels"]);
    let mut data = TokenDataset::new();
    for n in 0..prompts.len() {
        let (options, prompt_len) = (args.data(), prompts[n].len());
        let labelled = options.kind == PreferenceKind::Labelled;
        let other = if labelled { &chosen[(n + prompts.len() - 1) % prompts.len()] } else { &rejected[n] };
        let is_chosen = !labelled || labels[n] == 1;
        let sample = |completion: &[u32], is_chosen: bool| {
            let tokens = [&prompts[n], completion].concat();
            let trained = (0..tokens.len())
                .map(|n| n >= prompt_len || options.train_prompt && is_chosen)
                .collect::<Vec<_>>();
            (
                tokens,
                trained,
                Preference { prompt_len: prompt_len as u32, chosen: is_chosen, reference: None },
            )
        };
        let pair = [sample(&chosen[n], is_chosen), sample(other, false)];
        data.push_pair(pair.each_ref().map(|(tokens, trained, known)| (&tokens[..], &trained[..], *known)));
    }
    Arc::new(data)
}

fn batches(data: &Arc<TokenDataset>, batch_size: usize) -> Vec<Batch> {
    let options =
        BatchOptions { batch_size, max_seq_length: usize::MAX, packing: false, shuffle: false, seed: 0 };
    let mut stream = BatchStream::new(Arc::clone(data), options).unwrap();
    std::iter::from_fn(|| stream.next_batch().unwrap()).collect()
}

/// Loss and LoRA gradients of a step over `batches`, by name.
fn loss_and_gradients(
    model: &FastLanguageModel,
    objective: &PreferenceLoss,
    batches: &[Batch],
) -> Vec<(String, Tensor)> {
    let decoder = &model.decoder;
    objective.start_step(decoder, batches).unwrap();
    let targets: usize = batches.iter().map(|batch| objective.targets(batch)).sum();
    let mut total = Tensor::from(0.0).to_kind(decoder.kind);
    for batch in batches {
        let uploaded = objective.upload(decoder, batch).unwrap();
        let loss = objective.loss_sum(decoder, &uploaded, Pass::INFERENCE).unwrap() / targets as f64;
        loss.backward();
        total += loss.detach();
    }
    let mut found = vec![("loss".to_string(), total)];
    for mut parameter in decoder.trainable() {
        let key = parameter.name.trim_start_matches("base_model.model.").to_string();
        found.push((format!("grad.{key}"), parameter.tensor.grad().copy()));
        parameter.tensor.zero_grad();
    }
    found
}

fn cases() -> Map<String, Value> {
    let text = fs::read_to_string(root().join("preference/cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let (golden, model) = (tensors(&root().join("preference/trl.safetensors")), model(Kind::Float));
    let mut distances = Vec::new();
    for (case, words) in cases() {
        let args = arguments(&words);
        let objective = PreferenceLoss::new(&args, &model.decoder).unwrap();
        for (name, found) in loss_and_gradients(&model, &objective, &batches(&golden_data(&args), 4)) {
            distances.push((format!("{case} {name}"), rel(&found, &golden[&format!("{case}.{name}")])));
        }
        let measured = means(objective.measured().unwrap());
        assert!(measured["rewards/margins"].is_finite(), "{case}: {measured:?}");
        if case == "kto" {
            assert!(measured["kl"] > 0.0, "z is not tested: {measured:?}");
        }
    }
    assert_close(1e-5, distances);
}

#[test]
fn micro_batches_and_precomputed_references_change_nothing() {
    let mut distances = Vec::new();
    for (case, words) in cases() {
        let (model, args) = (model(Kind::Double), arguments(&words));
        let data = golden_data(&args);
        let objective = PreferenceLoss::new(&args, &model.decoder).unwrap();
        let whole = loss_and_gradients(&model, &objective, &batches(&data, 4));
        let measured = means(objective.measured().unwrap());
        // LoRA's gradients are f32.
        let mut compare = |what: &str, limit: f64, found: Vec<(String, Tensor)>| {
            for ((name, found), (_, whole)) in found.iter().zip(&whole) {
                distances.push((format!("{case}, {what}: {name}"), rel(found, whole) / limit));
            }
        };
        compare("3 and 1", 2e-6, loss_and_gradients(&model, &objective, &batches(&data, 3)));
        for (name, mean) in means(objective.measured().unwrap()) {
            assert!((mean - measured[&name]).abs() <= 1e-11 * mean.abs().max(1.0), "{case}: {name}");
        }
        compare("one by one", 2e-6, loss_and_gradients(&model, &objective, &batches(&data, 1)));
        if args.has_reference() {
            let args = PreferenceArguments { precompute_ref_log_probs: true, ..args.clone() };
            let mut data = (*data).clone();
            let fingerprint = data.fingerprint();
            let log_probs =
                reference_log_probs(&model.decoder, &Arc::new(data.clone()), 3, &mut |_| ()).unwrap();
            data.set_references(&log_probs);
            assert_eq!(data.fingerprint(), fingerprint);
            let objective = PreferenceLoss::new(&args, &model.decoder).unwrap();
            // Kept in f32.
            compare(
                "precomputed",
                1e-5,
                loss_and_gradients(&model, &objective, &batches(&Arc::new(data), 3)),
            );
        }
    }
    assert_close(1.0, distances);
}

/// A few steps raise the margin of every loss.
#[test]
fn every_loss_learns() {
    for (case, words) in cases() {
        let mut args = arguments(&words);
        args.train.learning_rate = Some(3e-3);
        let model = model(Kind::Float);
        let batches = batches(&golden_data(&args), 2);
        let objective = PreferenceLoss::new(&args, &model.decoder).unwrap();
        let mut stepper = Stepper::new(&objective, &args.train, &model.decoder).unwrap();
        let mut run = |step| {
            let loss = stepper.run(&model.decoder, &batches, step, 3e-3).unwrap().loss;
            (loss, means(objective.measured().unwrap())["rewards/margins"])
        };
        let first = run(0);
        let last = (1..=20).map(&mut run).last().unwrap();
        assert!(last.0 < first.0 && last.1 > first.1, "{case}: {first:?} {last:?}");
    }
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir("examples/tiny/model".as_ref()).unwrap()
}

/// `[prompt|completion, ..]` of the samples that rows become, and what their file is called in errors.
fn samples(rows: &[Value], options: PreferenceOptions) -> anyhow::Result<(Vec<String>, TokenDataset)> {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("rows.jsonl");
    fs::write(&file, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    let (data, report) =
        prepare_preferences(&[file.display().to_string()], &tokenizer(), options, &mut |_| ())?;
    assert_eq!(report.samples, data.len() as u64);
    let shown = |sample: usize| {
        let spans = preview(&tokenizer(), &data, sample).unwrap();
        spans.iter().map(|span| span.text.as_str()).collect::<Vec<_>>().join("|")
    };
    Ok(((0..data.len()).map(shown).collect(), data))
}

const PAIRS: PreferenceOptions =
    PreferenceOptions { kind: PreferenceKind::Pairs, max_length: 64, train_prompt: false };
const LABELLED: PreferenceOptions = PreferenceOptions { kind: PreferenceKind::Labelled, ..PAIRS };

#[test]
fn rows_of_every_form() {
    let user = |text: &str| json!({"role": "user", "content": text});
    let assistant = |text: &str| json!({"role": "assistant", "content": text});
    let eos = tokenizer().eos_token().unwrap().content.clone();
    let of = |rows: &[Value], options| samples(rows, options).unwrap().0;
    // Where tokens join across the edge, the completion begins before it, as in TRL.
    let plain = [format!("say:| yes{eos}"), format!("say:| no{eos}")];
    assert_eq!(of(&[json!({"prompt": "say: ", "chosen": "yes", "rejected": "no"})], PAIRS), plain);
    // The space goes with the word behind it.
    assert_eq!(of(&[json!({"chosen": "say: yes", "rejected": "say: no"})], PAIRS), plain);

    let template = tokenizer().chat_template().unwrap().clone();
    let chat = |answer: &str| {
        let text = |messages: &[Value], open| {
            let options =
                ferrotune::data::RenderOptions { add_generation_prompt: open, ..Default::default() };
            template.render(messages, &options).unwrap()
        };
        let alone = text(&[user("1+1?")], true);
        let whole = text(&[user("1+1?"), assistant(answer)], false);
        format!("{alone}|{}", whole.strip_prefix(&alone).unwrap())
    };
    let explicit =
        json!({"prompt": [user("1+1?")], "chosen": [assistant("2")], "rejected": [assistant("3")]});
    let both = json!({"chosen": [user("1+1?"), assistant("2")], "rejected": [user("1+1?"), assistant("3")]});
    let mut with_text = both.clone();
    with_text["prompt"] = json!("1+1?");
    for row in [explicit.clone(), both, with_text] {
        assert_eq!(of(&[row], PAIRS), [chat("2"), chat("3")]);
    }

    let rows = [
        json!({"prompt": "a:", "completion": " x", "label": true}),
        json!({"prompt": "b:", "completion": " y", "label": 0}),
        json!({"prompt": "b:", "completion": " z", "label": "True"}),
        json!({"prompt": "c:", "chosen": " p", "rejected": " q"}),
    ];
    let (found, data) = samples(&rows, LABELLED).unwrap();
    // Each with the completion of the nearest row before that has another prompt.
    let expected = ["a:| x", "a:| q", "b:| y", "b:| x", "b:| z", "b:| x", "c:| p", "c:| z", "c:| q", "c:| z"];
    assert_eq!(found, expected.map(|text| format!("{text}{eos}")));
    let desirable: Vec<bool> = data.preferences().iter().step_by(2).map(|known| known.chosen).collect();
    assert_eq!(desirable, [true, false, true, true, false]);

    // Only the end is cut off; a row whose prompt alone is too long is left out.
    let long = json!({"prompt": "say: ", "chosen": "a b c d e f g h i j k", "rejected": "a"});
    let (found, data) = samples(
        &[long.clone(), json!({"prompt": "a b c d e f g h i j k l m n", "chosen": "a", "rejected": "b"})],
        PreferenceOptions { max_length: 8, ..PAIRS },
    )
    .unwrap();
    assert_eq!((found.len(), data.sample_len(0)), (2, 8), "{found:?}");
    let whole = samples(&[long], PreferenceOptions { train_prompt: true, ..PAIRS }).unwrap().1;
    assert!(whole.trained(0).all(|trained| trained) && !whole.trained(1).all(|trained| trained));
}

#[test]
fn rows_that_cannot_be_understood_are_named() {
    for (row, options, reason) in [
        (json!({"prompt": "a", "chosen": "b"}), PAIRS, "a pair needs the columns chosen and rejected"),
        (json!({"prompt": "a", "chosen": 3, "rejected": "c"}), PAIRS, "column chosen: expected a string"),
        (json!({"chosen": "b", "rejected": []}), PAIRS, "two strings or two lists of messages"),
        (
            json!({"prompt": "a", "completion": "b", "label": "maybe"}),
            LABELLED,
            "expected true or false, found \"maybe\"",
        ),
        (json!({"prompt": "a", "completion": "b"}), LABELLED, "there is no column label"),
        (
            json!({"prompt": [{"role": "user", "content": "a"}], "completion": "b", "label": true}),
            LABELLED,
            "must all be strings",
        ),
    ] {
        let good = json!({"prompt": "a", "chosen": "b", "rejected": "c"});
        let error = format!("{:#}", samples(&[good, row], options).err().unwrap());
        assert!(error.contains("rows.jsonl, line 2") && error.contains(reason), "{error}");
    }
    let short = PreferenceOptions { max_length: 2, ..PAIRS };
    let error =
        samples(&[json!({"prompt": "a b c d e", "chosen": "b", "rejected": "c"})], short).err().unwrap();
    assert!(format!("{error:#}").contains("max_length cuts off the whole completion (1 rows)"), "{error:#}");
}

#[test]
fn pairs_stay_together_in_every_order() {
    let mut data = TokenDataset::new();
    for n in 0..10u32 {
        let known = Preference { prompt_len: 1, ..Default::default() };
        data.push_pair([(&[2 * n, 0], &[false, true], known), (&[2 * n + 1, 0], &[false, true], known)]);
    }
    let (train, eval) = data.split(0.3, 1);
    assert_eq!((train.len(), eval.len(), train.preferences().len()), (14, 6, 14));
    let options = BatchOptions { batch_size: 3, max_seq_length: 8, packing: false, shuffle: true, seed: 3 };
    let mut stream = BatchStream::new(Arc::new(data.clone()), options).unwrap();
    assert_eq!((stream.batches_per_epoch(), stream.most_tokens()), (4, 12));
    let mut seen = Vec::new();
    while let Some(batch) = stream.next_batch().unwrap() {
        for pair in batch.input_ids.chunks(4) {
            assert_eq!((pair[0] % 2, pair[2]), (0, pair[0] + 1));
            seen.push(pair[0]);
        }
    }
    assert_ne!(seen, (0..10).map(|n| 2 * n).collect::<Vec<i64>>());
    seen.sort();
    assert_eq!(seen, (0..10).map(|n| 2 * n).collect::<Vec<i64>>());
    let packed = BatchOptions { packing: true, ..options };
    assert!(BatchStream::new(Arc::new(data), packed).is_err());
}

#[test]
fn words_that_make_no_sense_are_refused() {
    let with = |words: Value| {
        let mut all = json!({"model": "m", "dataset": ["d"]});
        all.as_object_mut().unwrap().extend(words.as_object().unwrap().clone());
        serde_json::from_value::<PreferenceArguments>(all).unwrap().resolved()
    };
    for (words, reason) in [
        (json!({"loss_type": ["kto", "ipo"]}), "give it alone"),
        (json!({"loss_type": "ipo", "loss_weights": [1.0, 2.0]}), "--loss-weights: 2 for 1 losses"),
        (json!({"label_smoothing": 0.1}), "a word of the losses robust, cpo and simpo"),
        (json!({"loss_type": "robust", "label_smoothing": 0.5}), "below 0.5"),
        (json!({"simpo_gamma": 2.0}), "--simpo-gamma is a word of --loss-type simpo"),
        (json!({"cpo_alpha": 1.0}), "--cpo-alpha is a word of --loss-type cpo and simpo"),
        (json!({"desirable_weight": 2.0}), "--desirable-weight is a word of --loss-type kto"),
        (
            json!({"loss_type": "orpo", "precompute_ref_log_probs": true}),
            "none of these losses has a reference",
        ),
        (json!({"beta": 0.0}), "--beta 0: must be above 0"),
        (json!({"packing": true}), "--packing means nothing in preference training"),
        (json!({"max_seq_length": 512}), "use --max-length"),
        (json!({"learning_rate": -1.0}), "--learning-rate"),
    ] {
        let error = format!("{:#}", with(words).err().unwrap());
        assert!(error.contains(reason), "{error}");
    }
    let args = with(json!({})).unwrap();
    assert_eq!((args.train.learning_rate, args.beta, args.max_length), (Some(1e-6), 0.1, 1024));
    assert_eq!((args.loss_type.as_slice(), args.precomputes()), (&[LossType::Sigmoid][..], false));
    // An adapter alone can be left out of a pass.
    assert!(with(json!({"full_finetuning": true})).unwrap().precomputes());
    assert!(with(json!({"modules_to_save": ["lm_head"]})).unwrap().precomputes());
    assert!(!with(json!({"full_finetuning": true, "loss_type": "orpo"})).unwrap().precomputes());
    let simpo = with(json!({"loss_type": "simpo,cpo", "cpo_alpha": 0.5})).unwrap();
    assert_eq!(simpo.nll_weights(), (1.0, 0.0));
    // What a run writes is read back.
    let yaml = TrainingArguments::default().to_yaml().unwrap() + &simpo.own_yaml().unwrap();
    let read: PreferenceArguments = serde_saphyr::from_str(&yaml).unwrap();
    assert_eq!(simpo.own_differences(&read), Vec::<String>::new());
    let other = PreferenceArguments { beta: 0.5, ..simpo.clone() };
    assert_eq!(simpo.own_differences(&other), ["beta: 0.1 -> 0.5"]);
}

/// A place with pairs and labelled rows in the words of its tokenizer.
fn workplace() -> Workplace {
    let place = Workplace::with_model();
    let words = ["red", "blue", "small"];
    let pairs: String = (0..24)
        .map(|n| {
            let prompt = format!("a {} cat", words[n % 3]);
            json!({"prompt": prompt, "chosen": " sees the house", "rejected": " likes dog"}).to_string()
                + "\n"
        })
        .collect();
    fs::write(place.path("pairs.jsonl"), pairs).unwrap();
    place
}

fn dpo(place: &Workplace, output: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.args(["dpo", "--threads", "1", "--device", "cpu", "--r", "4", "--learning-rate", "3e-3"]);
    command.args(["--save-steps", "3", "--max-steps", "12"]);
    command.arg("--model").arg(place.path("model")).arg("--dataset").arg(place.path("pairs.jsonl"));
    command.arg("--output-dir").arg(place.path(output)).args(flags);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn a_run_shows_learns_and_resumes_to_the_bit() {
    let place = workplace();
    let stdout =
        succeeded(dpo(&place, "whole", &["--test-size", "0.25", "--eval-steps", "4"]).output().unwrap());
    for expected in ["8 x 1 pairs", "step 12/12", "margin", "accuracy 1.000", "evaluation after step 4"] {
        assert!(stdout.contains(expected), "{expected}: {stdout}");
    }
    for file in ["rewards_margins.svg", "rewards_accuracies.svg", "loss.svg", "adapter_config.json"] {
        assert!(place.path("whole").join(file).is_file(), "{file}");
    }
    let metrics = fs::read_to_string(place.path("whole/metrics.jsonl")).unwrap();
    let records: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let margin = |record: &Value| record["rewards/margins"].as_f64();
    // Adapter and reference begin as the same model.
    assert!(margin(&records[0]).unwrap().abs() < 1e-5, "{:?}", records[0]);
    let last = records.iter().rev().find_map(margin).unwrap();
    assert!(last > 0.1, "{last}");
    assert!(records.iter().any(|record| record["eval_rewards/accuracies"] == 1.0));

    // run.yaml has the words of both; interrupted and resumed it ends with the same bytes.
    let config = place.path("whole/run.yaml");
    let again = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        command.arg("dpo").arg("--config").arg(&config).arg("--output-dir").arg(place.path("again"));
        command.args(flags).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let mut child = again(&[]).spawn().unwrap();
    wait_for_step(&place.path("again/metrics.jsonl"), 5, &mut child);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    child.wait().unwrap();
    let output = again(&["--resume-from-checkpoint", "--beta", "0.1"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("other settings"), "{output:?}");
    succeeded(output);
    assert!(place.adapter("again") == place.adapter("whole"), "the adapters differ");
    let changed = again(&["--resume-from-checkpoint", "--beta", "0.2"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&changed.stderr).into_owned();
    assert!(stderr.contains("other settings: beta: 0.1 -> 0.2"), "{stderr}");
    fs::write(place.path("pairs.jsonl"), "{\"chosen\": \"a cat\", \"rejected\": \"a dog\"}\n".repeat(8))
        .unwrap();
    failed(&mut again(&["--resume-from-checkpoint"]), 1, "the dataset is not the one");
}

#[test]
fn precomputed_references_are_kept_for_a_resumed_run() {
    let place = workplace();
    let reference = |output: &str| -> PathBuf { place.path(output).join("reference_log_probs.safetensors") };
    // All weights train, so the reference is computed before.
    let flags = ["--full-finetuning", "--learning-rate", "1e-4"];
    let run = |output: &str, more: &[&str]| {
        let mut command = dpo(&place, output, &[&flags[..], more].concat());
        // The last of a flag that is given twice is not taken: the first is removed.
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let kept =
            arguments.iter().enumerate().filter(|(n, _)| !(7..9).contains(n)).map(|(_, argument)| argument);
        command = Command::new(command.get_program());
        command.args(kept).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    succeeded(run("whole", &[]).output().unwrap());
    let weights = |output: &str| fs::read(place.path(output).join("model.safetensors")).unwrap();
    let mut child = run("part", &[]).spawn().unwrap();
    wait_for_step(&place.path("part/metrics.jsonl"), 4, &mut child);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    child.wait().unwrap();
    let written = fs::metadata(reference("part")).unwrap().modified().unwrap();
    succeeded(run("part", &["--resume-from-checkpoint"]).output().unwrap());
    assert_eq!(fs::metadata(reference("part")).unwrap().modified().unwrap(), written);
    assert!(weights("part") == weights("whole"), "the weights differ");
    // Of an adapter the reference is the same either way.
    succeeded(dpo(&place, "off", &[]).output().unwrap());
    succeeded(dpo(&place, "before", &["--precompute-ref-log-probs"]).output().unwrap());
    assert!(reference("before").is_file() && !reference("off").exists());
    for ((_, off), (_, before)) in place.losses("off").iter().zip(place.losses("before")) {
        assert!((off - before).abs() < 1e-5, "{off} {before}");
    }
}

#[test]
fn kto_and_a_dry_run_from_the_command_line() {
    let place = workplace();
    let stdout = succeeded(
        dpo(&place, "kto", &["--loss-type", "kto", "--lr-scheduler-type", "constant"]).output().unwrap(),
    );
    assert!(stdout.contains("step 12/12") && stdout.contains("margin"), "{stdout}");
    assert!(place.path("kto/kl.svg").is_file());
    let shown = succeeded(dpo(&place, "dry", &["--dry-run"]).output().unwrap());
    assert!(shown.contains("The first pair") && shown.matches("[[").count() == 3, "{shown}");
    assert!(!place.path("dry").exists());
    failed(&mut dpo(&place, "no", &["--loss-type", "dpo"]), 2, "sigmoid, hinge, ipo");
    failed(&mut dpo(&place, "no", &["--packing"]), 2, "--packing means nothing");
}
