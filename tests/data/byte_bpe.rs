//! The fast path of byte-level tokenizers gives what the tokenizers library gives: ids and offsets.

use std::fs;
use std::path::{Path, PathBuf};

use ferrotune::data::Tokenizer;
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::test_data;

fn same(tokenizer: &Tokenizer, text: &str) {
    for special in [false, true] {
        let found = tokenizer.encode_with_offsets(text, special).unwrap();
        let expected = tokenizer.inner().encode(text, special).unwrap();
        let name = tokenizer.dir().display();
        assert_eq!(found.0, expected.get_ids(), "{name}, special tokens {special}: {text:?}");
        assert_eq!(found.1, expected.get_offsets(), "{name}, special tokens {special}: {text:?}");
    }
}

/// What the patterns and the normalisation of real tokenizers tell apart.
const PIECES: [&str; 48] = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\u{a0}",
    "\u{85}",
    "\u{2028}",
    "\u{3000}",
    "'s",
    "'LL",
    "'",
    "a",
    "heron",
    "The",
    "É",
    "e\u{301}",
    "\u{301}",
    "\u{327}\u{301}",
    "\u{301}\u{327}",
    "ſ",
    "K",
    "Å",
    "1",
    "12345",
    "٣",
    "Ⅷ",
    "½",
    "水",
    "한",
    "\u{1112}\u{1161}\u{11ab}",
    "क्षि",
    "😀",
    "👩\u{200d}🚀",
    "🏳\u{fe0f}",
    "שלום",
    "ابن",
    "\u{0}",
    "\u{7f}",
    "_",
    "...",
    "=>",
    "</",
    "\u{feff}",
    "Ġ",
    "\u{fb01}",
    "\u{10ffff}",
    "\u{d7a3}",
];

fn random_text(rng: &mut ChaCha8Rng, added: &[String]) -> String {
    let mut text = String::new();
    for _ in 0..rng.random_range(0..24) {
        match rng.random_range(0..10) {
            0..6 => text.push_str(PIECES.choose(rng).unwrap()),
            6 => text.push_str(added.choose(rng).unwrap()),
            7 => text.extend((0..4).map(|_| rng.random_range('a'..='z'))),
            8 => text.push(rng.random_range('\0'..='\u{ffff}')),
            _ => text.push(rng.random()),
        }
    }
    text
}

fn same_on_random_texts(tokenizer: &Tokenizer, texts: usize) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let added = tokenizer.inner().get_added_tokens_decoder();
    let mut added: Vec<String> = added.into_values().map(|token| token.content).collect();
    added.sort();
    for _ in 0..texts {
        same(tokenizer, &random_text(&mut rng, &added));
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data")
}

/// The golden tokenizer after `change`.
fn changed(change: impl FnOnce(&mut Value)) -> Tokenizer {
    let folder = TempDir::new().unwrap();
    let text = fs::read_to_string(golden().join("bpe/tokenizer.json")).unwrap();
    let mut value = serde_json::from_str(&text).unwrap();
    change(&mut value);
    fs::write(folder.path().join("tokenizer.json"), value.to_string()).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

#[test]
fn as_the_library_on_random_unicode() {
    let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let trims = |prefix: bool| json!({"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true});
    let template = json!({"type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                   {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}});
    let sequence = |steps: Value| json!({"type": "Sequence", "pretokenizers": steps});
    let flags = |flag: &'static str| {
        move |value: &mut Value| {
            for token in value["added_tokens"].as_array_mut().unwrap() {
                token[flag] = json!(true);
            }
        }
    };
    let key = |key: &'static str, new: Value| move |value: &mut Value| value[key] = new;
    let gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    let tokenizers = [
        changed(|_| {}),
        changed(key("normalizer", json!({"type": "NFC"}))),
        changed(key("normalizer", json!({"type": "NFKC"}))),
        changed(key("pre_tokenizer", bytes(true))),
        changed(key("pre_tokenizer", bytes(false))),
        changed(key("pre_tokenizer", sequence(json!([split(r"\p{N}"), split(gpt2), bytes(false)])))),
        changed(key("pre_tokenizer", sequence(json!([split("水|(?=e)"), bytes(true)])))),
        changed(key("post_processor", trims(true))),
        changed(key("post_processor", trims(false))),
        changed(key("post_processor", template.clone())),
        changed(key(
            "post_processor",
            json!({"type": "Sequence", "processors": [trims(true), template.clone()]}),
        )),
        changed(key("post_processor", json!({"type": "Sequence", "processors": [template, trims(true)]}))),
        changed(flags("lstrip")),
        changed(flags("rstrip")),
        changed(flags("single_word")),
        changed(flags("normalized")),
        changed(|value| {
            flags("lstrip")(value);
            flags("rstrip")(value);
            value["added_tokens"][0]["normalized"] = json!(true);
            value["normalizer"] = json!({"type": "NFC"});
            value["post_processor"] =
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true});
        }),
        changed(|value| {
            value["model"]["ignore_merges"] = json!(true);
            value["model"]["unk_token"] = json!("<s>");
        }),
    ];
    for tokenizer in &tokenizers {
        same_on_random_texts(tokenizer, 1500);
    }
    same_on_random_texts(&Tokenizer::from_dir(&golden().join("spm")).unwrap(), 200);
}

fn strings(value: &Value, texts: &mut Vec<String>) {
    match value {
        Value::String(text) => texts.push(text.clone()),
        Value::Array(items) => items.iter().for_each(|item| strings(item, texts)),
        Value::Object(fields) => fields.values().for_each(|field| strings(field, texts)),
        _ => {}
    }
}

/// The strings of the data sets; a file that is not JSON as a whole and line by line.
fn texts(folder: &Path) -> Vec<String> {
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()) {
        if entry.is_dir() {
            texts.extend(self::texts(&entry));
        } else if let Ok(text) = fs::read_to_string(&entry) {
            let lines: Vec<&str> = text.lines().collect();
            match serde_json::from_str(&text) {
                Ok(value) => strings(&value, &mut texts),
                Err(_) => texts.extend(lines.iter().map(|line| (*line).to_owned())),
            }
            texts.extend(lines.chunks(40).map(|lines| lines.join("\n")).take(20));
        }
    }
    texts
}

#[test]
fn as_the_library_on_real_texts() {
    let tiny =
        Tokenizer::from_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/tiny/model")).unwrap();
    same_on_random_texts(&tiny, 1000);
    let Some(data) = test_data("tokenizers") else { return };
    let texts = texts(&data.join("datasets"));
    assert!(texts.len() > 10_000);
    let mut tokenizers = vec![tiny];
    for folder in ["tokenizers", "models"] {
        for entry in fs::read_dir(data.join(folder)).unwrap().flatten() {
            if entry.path().join("tokenizer.json").is_file() {
                tokenizers.push(Tokenizer::from_dir(&entry.path()).unwrap());
            }
        }
    }
    for (tokenizer, number) in tokenizers.iter().zip(0..) {
        same_on_random_texts(tokenizer, 500);
        // A share of the texts each: all of them take minutes.
        for text in texts.iter().skip(number % 5).step_by(5) {
            same(tokenizer, text);
        }
    }
}
