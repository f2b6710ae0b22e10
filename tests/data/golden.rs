//! What transformers and TRL make of the same input: tests/golden/data, written by scripts/golden_data.py.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use ferrotune::data::{
    Batch, BatchOptions, BatchStream, ChatTemplate, DatasetOptions, IGNORE_INDEX, RenderOptions,
    TokenDataset, Tokenizer, prepare,
};
use serde_json::Value;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data")
}

fn cases() -> Value {
    serde_json::from_str(&fs::read_to_string(folder().join("cases.json")).unwrap()).unwrap()
}

fn tokenizer(cases: &Value, case: &Value) -> Tokenizer {
    let mut tokenizer = Tokenizer::from_dir(&folder().join(case["tokenizer"].as_str().unwrap())).unwrap();
    if let Some(name) = case["template"].as_str() {
        let source = cases["templates"][name].as_str().unwrap();
        tokenizer.set_chat_template(ChatTemplate::new(source, name).unwrap());
    }
    tokenizer
}

fn integers<T: TryFrom<i64>>(value: &Value) -> Vec<T> {
    let integer = |value: &Value| T::try_from(value.as_i64().unwrap()).unwrap_or_else(|_| panic!("{value}"));
    value.as_array().unwrap().iter().map(integer).collect()
}

#[test]
fn texts_ids_and_masks_of_conversations() {
    let cases = cases();
    for case in cases["chats"].as_array().unwrap() {
        let name = format!("{} {} {}", case["tokenizer"], case["template"], case["conversation"]);
        let tokenizer = tokenizer(&cases, case);
        let messages = cases["conversations"][case["conversation"].as_str().unwrap()].as_array().unwrap();
        let options = RenderOptions {
            tools: (case["tools"] == true).then_some(&cases["tools"]),
            add_generation_prompt: case["add_generation_prompt"] == true,
            ..Default::default()
        };
        let rendered = tokenizer.chat_template().unwrap().render_spans(messages, &options);
        let Some(text) = case["text"].as_str() else {
            let error = rendered.unwrap_err().to_string();
            let expected = case["error"].as_str().unwrap();
            let same =
                expected.strip_prefix("TemplateError: ").is_none_or(|message| error.ends_with(message));
            assert!(same, "{name}: expected {expected}, found {error}");
            continue;
        };
        let rendered = rendered.unwrap();
        assert_eq!(rendered.text, text, "{name}");
        let (ids, offsets) = tokenizer.encode_with_offsets(text, false).unwrap();
        if !case["ids"].is_null() {
            assert_eq!(ids, integers::<u32>(&case["ids"]), "{name}");
        }
        if !case["mask"].is_null() {
            let mask: Vec<i64> = offsets
                .iter()
                .map(|(start, end)| {
                    i64::from(rendered.generation.iter().any(|span| *start < span.end && *end > span.start))
                })
                .collect();
            assert_eq!(mask, integers::<i64>(&case["mask"]), "{name}");
        }
    }
}

#[test]
fn samples_of_trl() {
    let cases = cases();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.json");
    for case in cases["sft"].as_array().unwrap() {
        fs::write(&file, case["rows"].to_string()).unwrap();
        let options = DatasetOptions {
            max_seq_length: case["max_length"].as_u64().unwrap() as usize,
            assistant_only_loss: case["assistant_only_loss"] == true,
            ..Default::default()
        };
        let tokenizer = tokenizer(&cases, case);
        let (data, _) = prepare(&[file.to_str().unwrap()], &tokenizer, &options).unwrap();
        let stream =
            BatchOptions { batch_size: 1, max_seq_length: 24, packing: false, shuffle: false, seed: 0 };
        let mut stream = BatchStream::new(Arc::new(data), stream).unwrap();
        for sample in case["samples"].as_array().unwrap() {
            let (ids, labels) = (integers::<i64>(&sample["input_ids"]), integers::<i64>(&sample["labels"]));
            // A sample without a target teaches nothing and is dropped here.
            if labels.iter().skip(1).all(|label| *label == IGNORE_INDEX) {
                continue;
            }
            let batch = stream.next_batch().unwrap().unwrap();
            assert_eq!(batch, Batch::from_samples([(&ids[..], &labels[..])]), "{case}");
        }
        assert_eq!(stream.next_batch().unwrap(), None);
    }
}

#[test]
fn packs_of_trl() {
    for case in cases()["packs"].as_array().unwrap() {
        let max_seq_length = case["max_seq_length"].as_u64().unwrap() as usize;
        let mut data = TokenDataset::new();
        for length in integers::<u32>(&case["lengths"]) {
            data.push(&vec![0; length as usize], &vec![true; length as usize]);
        }
        let options =
            BatchOptions { batch_size: 1, max_seq_length, packing: true, shuffle: true, seed: 3407 };
        let mut stream = BatchStream::new(Arc::new(data), options).unwrap();
        let mut packs: Vec<Vec<i32>> = Vec::new();
        while let Some(batch) = stream.next_batch().unwrap() {
            let mut lengths: Vec<i32> = batch.cu_seqlens.windows(2).map(|ends| ends[1] - ends[0]).collect();
            lengths.sort();
            packs.push(lengths);
        }
        packs.sort();
        let expected: Vec<Vec<i32>> = case["packs"].as_array().unwrap().iter().map(integers::<i32>).collect();
        assert_eq!(packs, expected);
    }
}
