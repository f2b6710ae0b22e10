//! The command, end to end.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{test_data, write};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/data/bpe");

fn run(folder: &TempDir, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ferrotune")).arg("data").args(args).current_dir(folder).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn succeeds(folder: &TempDir, args: &[&str]) -> String {
    let output = run(folder, args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    stdout(&output)
}

fn rows(folder: &TempDir, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(folder.path().join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn chat(question: &str, answer: &str) -> Value {
    json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

#[test]
fn names_of_nothing_are_refused() {
    let folder = TempDir::new().unwrap();
    write(&folder, "rows.jsonl", lines(&[chat("a", "b")]));
    let apply =
        ["apply-chat-template", "--dataset", "rows.jsonl", "--model", MODEL, "--output", "texts.jsonl"];
    let shuffle = ["shuffle", "--dataset", "rows.jsonl", "--output", "texts.jsonl"];
    for (args, expected) in [
        (vec!["inspect", "--dataset", "nothere.jsonl"], "--dataset: nothere.jsonl: no such file"),
        ([&apply[..], &["--chat-template", "chatlm"]].concat(), "none of the known formats: chatml, "),
        (
            [&shuffle[..], &["--rank", "4", "--world-size", "4"]].concat(),
            "--rank 4: expected one below --world-size",
        ),
        ([&shuffle[..], &["--buffer-rows", "0"]].concat(), "--buffer-rows 0: "),
    ] {
        let output = run(&folder, &args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && error.contains(expected), "{args:?}: {error}");
    }
    assert!(!folder.path().join("texts.jsonl").exists());
}

#[test]
fn lint_fails_fixes_and_reports() {
    let folder = TempDir::new().unwrap();
    let broken = lines(&[chat("a", "b"), chat("c", ""), chat("a", "b"), chat("d", "e")]) + "{\n";
    write(&folder, "rows.jsonl", broken);
    let lint = ["lint", "--dataset", "rows.jsonl", "--model", MODEL, "--report", "report.jsonl"];
    let output = run(&folder, &lint);
    assert_eq!(output.status.code(), Some(1));
    let text = stdout(&output);
    assert!(text.contains("error: empty-answer, 1 rows") && text.contains("rows.jsonl, line 2"), "{text}");
    assert!(
        text.contains("warning: duplicate, 1 rows") && text.contains("the same as rows.jsonl, line 1"),
        "{text}"
    );
    assert!(text.contains("5 rows, 2 without findings; 2 errors, 1 warnings"), "{text}");
    let report = rows(&folder, "report.jsonl");
    assert_eq!(report.len(), 3);
    assert_eq!(report[0]["rule"], "empty-answer");
    assert_eq!((&report[0]["number"], &report[0]["unit"]), (&json!(2), &json!("line")));

    let text =
        succeeds(&folder, &["lint", "--dataset", "rows.jsonl", "--model", MODEL, "--fix", "clean.jsonl"]);
    assert!(text.contains("2 rows -> clean.jsonl"), "{text}");
    assert_eq!(rows(&folder, "clean.jsonl"), [chat("a", "b"), chat("d", "e")]);
    let dropped = rows(&folder, "clean.jsonl.dropped.jsonl");
    assert_eq!(dropped.len(), 3);
    assert_eq!(dropped[0]["row"], chat("c", ""));
    succeeds(&folder, &["lint", "--dataset", "clean.jsonl", "--model", MODEL, "--strict"]);

    write(&folder, "twice.jsonl", lines(&[chat("a", "b"), chat("a", "b")]));
    succeeds(&folder, &["lint", "--dataset", "twice.jsonl"]);
    assert_eq!(run(&folder, &["lint", "--dataset", "twice.jsonl", "--strict"]).status.code(), Some(1));
    succeeds(&folder, &["lint", "--dataset", "twice.jsonl", "--strict", "--allow", "duplicate"]);
    for usage in [
        &["lint", "--dataset", "twice.jsonl", "--allow", "nothing"][..],
        &["lint"],
        &["lint", "--dataset", "twice.jsonl", "--near-duplicates", "2"],
    ] {
        assert_eq!(run(&folder, usage).status.code(), Some(2), "{usage:?}");
    }
    let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "{left:?}");
}

#[test]
fn inspect_shows_a_sample_with_its_mask() {
    let folder = TempDir::new().unwrap();
    write(&folder, "rows.jsonl", lines(&[chat("What?", "That.")]));
    let args = [
        "inspect",
        "--dataset",
        "rows.jsonl",
        "--model",
        MODEL,
        "--assistant-only-loss",
        "--histogram",
        "h.svg",
    ];
    let text = succeeds(&folder, &args);
    assert!(text.contains("<|im_start|>assistant\n[[That.<|im_end|>]]"), "{text}");
    assert!(text.contains("roles     ") && text.contains("assistant 1, user 1"), "{text}");
    assert!(fs::read_to_string(folder.path().join("h.svg")).unwrap().contains("<svg"));
}

#[test]
fn the_titanic_becomes_a_chat_dataset() {
    let Some(data) = test_data("datasets/titanic/titanic.csv") else { return };
    let folder = TempDir::new().unwrap();
    let table = data.join("datasets/titanic/titanic.csv");
    let prompt = "A passenger of class {Pclass}, {Sex}.[[ Age {Age}.]][[ Cabin {Cabin}.]] Did they survive (1) or not (0)?";
    let args = [
        "to-sharegpt",
        "--dataset",
        table.to_str().unwrap(),
        "--merged-prompt",
        prompt,
        "--output-column-name",
        "Survived",
        "--dialogue-extension",
        "3",
        "--output",
        "titanic.jsonl",
    ];
    succeeds(&folder, &args);
    let rows = rows(&folder, "titanic.jsonl");
    assert_eq!(rows.len(), 891);
    let turns = rows[0]["conversations"].as_array().unwrap();
    assert_eq!(turns.len(), 6);
    assert_eq!(turns[0]["value"], "A passenger of class 3, male. Age 22. Did they survive (1) or not (0)?");
    assert_eq!(turns[1], json!({"from": "gpt", "value": "0"}));
    succeeds(&folder, &["standardize", "--dataset", "titanic.jsonl", "--output", "chats.jsonl"]);
    succeeds(
        &folder,
        &[
            "lint",
            "--dataset",
            "chats.jsonl",
            "--model",
            MODEL,
            "--assistant-only-loss",
            "--allow",
            "duplicate",
        ],
    );
}

#[test]
fn templates_and_labels() {
    let folder = TempDir::new().unwrap();
    write(&folder, "rows.jsonl", lines(&[chat("What?", "That."), chat("Who?", "He.")]));
    let apply =
        ["apply-chat-template", "--dataset", "rows.jsonl", "--model", MODEL, "--output", "texts.jsonl"];
    succeeds(&folder, &apply);
    let expected = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n";
    assert_eq!(rows(&folder, "texts.jsonl")[0], json!({"text": expected}));
    let named = ["--chat-template", "zephyr", "--output", "named.jsonl"];
    succeeds(&folder, &[&apply[..5], &named].concat());
    assert_eq!(rows(&folder, "named.jsonl")[1]["text"], "<|user|>\nWho?</s>\n<|assistant|>\nHe.</s>\n");
    let example = "{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}</s>\nQ: {INPUT}\nA: {OUTPUT}</s>";
    let args = [
        "apply-chat-template",
        "--dataset",
        "rows.jsonl",
        "--model",
        MODEL,
        "--example-template",
        example,
        "--default-system-message",
        "Be terse.",
        "--keep-columns",
        "--output",
        "own.jsonl",
    ];
    succeeds(&folder, &args);
    assert_eq!(rows(&folder, "own.jsonl")[1]["text"], "Be terse.\nQ: Who?\nA: He.</s>");
    assert_eq!(rows(&folder, "own.jsonl")[1]["messages"], chat("Who?", "He.")["messages"]);
    // The labels are found in the rendered texts as in the conversations.
    for dataset in ["texts.jsonl", "rows.jsonl"] {
        succeeds(
            &folder,
            &["train-on-responses-only", "--dataset", dataset, "--model", MODEL, "--output", "labels.jsonl"],
        );
        let rows = rows(&folder, "labels.jsonl");
        let (ids, labels) = (rows[0]["input_ids"].as_array().unwrap(), rows[0]["labels"].as_array().unwrap());
        assert_eq!(ids.len(), labels.len());
        let trained: Vec<u32> =
            labels.iter().filter_map(|label| u32::try_from(label.as_i64().unwrap()).ok()).collect();
        let tokenizer = ferrotune::data::Tokenizer::from_dir(Path::new(MODEL)).unwrap();
        assert_eq!(tokenizer.decode(&trained, false).unwrap(), "That.<|im_end|>\n");
        // What was written is a dataset.
        let text = succeeds(&folder, &["inspect", "--dataset", "labels.jsonl", "--model", MODEL]);
        assert!(text.contains("shape    tokens 2") && text.contains("[[That.<|im_end|>\n]]"), "{text}");
        succeeds(&folder, &["lint", "--dataset", "labels.jsonl", "--model", MODEL, "--strict"]);
    }
    let none = [
        "train-on-responses-only",
        "--dataset",
        "rows.jsonl",
        "--model",
        MODEL,
        "--instruction-part",
        "Q:",
        "--response-part",
        "A:",
        "--output",
        "none.jsonl",
    ];
    let output = run(&folder, &none);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("all labels of all rows are masked"));
}

#[test]
fn split_dedup_mix_sample_convert_and_chunk() {
    let folder = TempDir::new().unwrap();
    let all: Vec<Value> = (0..20).map(|n| json!({"text": format!("text {}", n % 15), "n": n})).collect();
    write(&folder, "rows.jsonl", lines(&all));
    succeeds(&folder, &["dedup", "--dataset", "rows.jsonl", "--output", "unique.jsonl"]);
    assert_eq!(rows(&folder, "unique.jsonl"), all[..15]);
    let split = [
        "split",
        "--dataset",
        "unique.jsonl",
        "--test-size",
        "5",
        "--output",
        "a.jsonl",
        "--test-output",
        "b.jsonl",
    ];
    succeeds(&folder, &split);
    assert_eq!((rows(&folder, "a.jsonl").len(), rows(&folder, "b.jsonl").len()), (10, 5));
    succeeds(&folder, &["sample", "--dataset", "a.jsonl,b.jsonl", "--rows", "7", "--output", "c.jsonl"]);
    assert_eq!(rows(&folder, "c.jsonl").len(), 7);
    let mix =
        ["mix", "--dataset", "a.jsonl,b.jsonl", "--weights", "1,1", "--rows", "4", "--output", "d.jsonl"];
    succeeds(&folder, &mix);
    assert_eq!(rows(&folder, "d.jsonl").len(), 4);
    succeeds(&folder, &["convert", "--dataset", "rows.jsonl", "--output", "rows.parquet"]);
    succeeds(&folder, &["convert", "--dataset", "rows.parquet", "--output", "back.jsonl"]);
    assert_eq!(rows(&folder, "back.jsonl"), all);
    write(&folder, "book.txt", "A heron stood in the water. ".repeat(50));
    let chunk = [
        "chunk",
        "--documents",
        "book.txt",
        "--model",
        MODEL,
        "--chunk-size",
        "64",
        "--overlap",
        "8",
        "--output",
        "chunks.jsonl",
    ];
    succeeds(&folder, &chunk);
    assert!(rows(&folder, "chunks.jsonl").len() > 5);
    assert_eq!(rows(&folder, "chunks.jsonl")[1]["chunk"], 2);
    assert_eq!(
        run(&folder, &["mix", "--dataset", "a.jsonl", "--weights", "1,1", "--output", "e.jsonl"])
            .status
            .code(),
        Some(2)
    );
    assert_eq!(
        run(&folder, &["convert", "--dataset", "a.jsonl", "--output", "e.txt"]).status.code(),
        Some(2)
    );
}

/// It reads the dataset once for each of its outputs, so none of them may take the dataset's place.
#[test]
fn split_does_not_write_over_what_it_reads() {
    let folder = TempDir::new().unwrap();
    let all: Vec<Value> = (0..10).map(|n| chat(&format!("q{n}"), "a")).collect();
    write(&folder, "rows.jsonl", lines(&all));
    for (dataset, output, test_output, reason) in [
        (
            "rows.jsonl",
            "./rows.jsonl",
            "test.jsonl",
            "--output: ./rows.jsonl is a file of the dataset itself",
        ),
        ("*.jsonl", "train.jsonl", "rows.jsonl", "--test-output: rows.jsonl is a file of the dataset itself"),
        ("rows.jsonl", "a.jsonl", "./a.jsonl", "name one file"),
    ] {
        let args = [
            "split",
            "--dataset",
            dataset,
            "--test-size",
            "3",
            "--output",
            output,
            "--test-output",
            test_output,
        ];
        let output = run(&folder, &args);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(reason), "{error}");
    }
    assert_eq!(rows(&folder, "rows.jsonl"), all);
}
