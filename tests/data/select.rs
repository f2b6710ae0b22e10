//! Split, sample, dedup, mix.

use std::collections::BTreeSet;
use std::slice;

use ferrotune::data::{
    DatasetOptions, Dedup, Mix, Records, Row, RowOptions, StoppingStrategy, held_out, prepare, sample_rows,
    split_rows,
};
use serde_json::json;
use tempfile::TempDir;

use super::{tokenizer, write};

fn numbered(folder: &TempDir, name: &str, from: u64, to: u64) -> String {
    let rows: String =
        (from..to).map(|n| format!("{}\n", json!({"text": format!("row {n}"), "n": n}))).collect();
    write(folder, name, rows)
}

fn numbers(rows: impl Iterator<Item = anyhow::Result<Row>>) -> Vec<u64> {
    rows.map(|row| row.unwrap()["n"].as_u64().unwrap()).collect()
}

#[test]
fn a_split_is_whole_ordered_and_that_of_training() {
    let folder = TempDir::new().unwrap();
    let file = numbered(&folder, "rows.jsonl", 0, 100);
    let (train, test) = split_rows(slice::from_ref(&file), 0.2, 7).unwrap();
    let (train, test) = (numbers(train), numbers(test));
    assert_eq!((train.len(), test.len()), (80, 20));
    assert!(train.is_sorted() && test.is_sorted());
    assert_eq!(train.iter().chain(&test).collect::<BTreeSet<_>>().len(), 100);
    let again = split_rows(slice::from_ref(&file), 0.2, 7).unwrap();
    assert_eq!(numbers(again.1), test);
    assert_ne!(numbers(split_rows(slice::from_ref(&file), 0.2, 8).unwrap().1), test);
    assert_eq!(numbers(split_rows(slice::from_ref(&file), 3.0, 7).unwrap().1).len(), 3);
    // The same rows as ferrotune train --test-size sets aside.
    let tokenizer = tokenizer("chatml");
    let (data, _) = prepare(&[&file], &tokenizer, &DatasetOptions::default()).unwrap();
    let (_, eval) = data.split(0.2, 7);
    let texts: Vec<String> = (0..eval.len()).map(|n| tokenizer.decode(eval.ids(n), true).unwrap()).collect();
    assert_eq!(texts, test.iter().map(|n| format!("row {n}")).collect::<Vec<_>>());
    assert_eq!((held_out(10, 0.001), held_out(10, 1.0), held_out(2, 0.99)), (1, 1, 1));
    let one = numbered(&folder, "one.jsonl", 0, 1);
    assert!(split_rows(&[one], 0.5, 7).is_err());
}

#[test]
fn a_sample_has_the_rows_asked_for() {
    let folder = TempDir::new().unwrap();
    let file = numbered(&folder, "rows.jsonl", 0, 50);
    let some = numbers(sample_rows(slice::from_ref(&file), 10, 1).unwrap());
    assert_eq!(some.len(), 10);
    assert!(some.is_sorted_by(|a, b| a < b));
    assert_eq!(numbers(sample_rows(slice::from_ref(&file), 10, 1).unwrap()), some);
    assert_ne!(numbers(sample_rows(slice::from_ref(&file), 10, 2).unwrap()), some);
    assert_eq!(numbers(sample_rows(&[file], 99, 1).unwrap()).len(), 50);
}

fn new_rows(rows: &[serde_json::Value], near: Option<f64>) -> Vec<bool> {
    let folder = TempDir::new().unwrap();
    let file = write(&folder, "rows.jsonl", rows.iter().map(|row| format!("{row}\n")).collect::<String>());
    let mut dedup = Dedup::new(RowOptions::default(), near);
    Records::open(&[file]).unwrap().map(|record| dedup.is_new(&record.unwrap()).unwrap()).collect()
}

#[test]
fn duplicates_say_the_same_whatever_their_other_columns() {
    let rows = [
        json!({"text": "a b c", "id": 1}),
        json!({"text": "a b c", "id": 2}),
        json!({"text": "a b d", "id": 1}),
        json!({"question": "a", "answer": "b"}),
        json!({"question": "a", "answer": "c"}),
        json!({"question": "a", "answer": "b"}),
    ];
    assert_eq!(new_rows(&rows, None), [true, false, true, true, true, false]);
}

#[test]
fn near_duplicates_are_those_of_the_similarity_asked_for() {
    // Of n words, k replaced at the end: (n - k - 2) of (n + k - 2) shingles of three words are shared.
    let text = |n: usize, k: usize| {
        let word = |at: usize| if at < n - k { format!("w{at}") } else { format!("x{at}") };
        json!({"text": (0..n).map(word).collect::<Vec<_>>().join(" ")})
    };
    let similarity = |k: f64| (200.0 - k - 2.0) / (200.0 + k - 2.0);
    assert!(similarity(8.0) > 0.9 && similarity(80.0) < 0.5);
    let rows = [text(200, 0), text(200, 8), text(200, 80), json!({"text": "!!"}), json!({"text": "??"})];
    assert_eq!(new_rows(&rows, Some(0.8)), [true, false, true, true, true]);
    assert_eq!(new_rows(&rows, None), [true; 5]);
}

#[test]
fn a_mix_follows_its_weights_and_strategy() {
    let folder = TempDir::new().unwrap();
    let many = numbered(&folder, "many.jsonl", 0, 4000);
    let few = numbered(&folder, "few.jsonl", 10_000, 10_100);
    let mix = |strategy| {
        let datasets = vec![(vec![many.clone()], 3.0), (vec![few.clone()], 1.0)];
        numbers(Mix::new(datasets, 5, strategy).unwrap())
    };
    let first = mix(StoppingStrategy::FirstExhausted);
    let of_few = first.iter().filter(|n| **n >= 10_000).count();
    assert_eq!(of_few, 100);
    assert!((250..350).contains(&(first.len() - of_few)), "{}", first.len());
    assert_eq!(mix(StoppingStrategy::FirstExhausted), first);
    let all = mix(StoppingStrategy::AllExhausted);
    assert_eq!(all.iter().filter(|n| **n < 10_000).collect::<BTreeSet<_>>().len(), 4000);
    assert!(all.iter().filter(|n| **n >= 10_000).count() > 1000);
    assert!(Mix::new(vec![(vec![many], 0.0)], 5, StoppingStrategy::FirstExhausted).is_err());
}
