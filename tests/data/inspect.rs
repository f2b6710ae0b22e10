//! What is shown of a dataset.

use ferrotune::data::{DatasetOptions, Histogram, Records, inspect};
use serde_json::json;
use tempfile::TempDir;

use super::{test_data, tokenizer, write};

#[test]
fn rows_columns_roles_and_tokens_are_counted() {
    let folder = TempDir::new().unwrap();
    let row = |n: usize| {
        let words = "word ".repeat(n);
        json!({"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}], "id": n})
    };
    let mut text: String = [1, 2, 60].map(|n| format!("{}\n", row(n))).concat();
    text += "{\"text\": \"plain\"}\n{\n";
    let file = write(&folder, "rows.jsonl", text);
    let chatml = tokenizer("chatml");
    let options = DatasetOptions { max_seq_length: 40, assistant_only_loss: true, ..Default::default() };
    let mut seen = 0;
    let found =
        inspect(Records::open(&[&file]).unwrap(), Some(&chatml), &options, 2, &mut |rows| seen = rows)
            .unwrap();
    assert_eq!((found.rows, seen), (5, 5));
    let (broken, reason) = found.broken.unwrap();
    assert_eq!(broken, 1);
    assert!(reason.contains("rows.jsonl, line 5"), "{reason}");
    assert_eq!(found.roles.into_iter().collect::<Vec<_>>(), [("assistant".into(), 3), ("user".into(), 3)]);
    assert_eq!(found.formats.into_iter().collect::<Vec<_>>(), [("messages".into(), 3), ("text".into(), 1)]);
    let columns = [
        ("messages".to_owned(), "lists of {role, content}".to_owned()),
        ("id".to_owned(), "integers".to_owned()),
        ("text".to_owned(), "strings".to_owned()),
    ];
    assert_eq!(found.columns, columns);
    let tokens = found.tokens.unwrap();
    assert_eq!(tokens.truncated, 1);
    assert_eq!(tokens.lengths.count(), 4);
    assert_eq!(tokens.examples.len(), 2);
    // Of each of the first two answers: its tokens and the end of turn.
    let answer = chatml.encode("Yes.", false).unwrap().len() as u64 + 1;
    let text = chatml.encode("plain", true).unwrap().len() as u64;
    assert_eq!(tokens.trained, 2 * answer + text);
}

#[test]
fn histograms_hold_every_length() {
    let mut lengths = Histogram::default();
    assert_eq!((lengths.quantile(0.5), lengths.max(), lengths.mean()), (0, 0, 0.0));
    for n in 0..1000 {
        lengths.add(n);
    }
    lengths.add(90_000);
    let bins = lengths.bins(12);
    assert!(bins.len() <= 12 && bins.iter().map(|bin| bin.2).sum::<u64>() == 1001, "{bins:?}");
    assert_eq!((lengths.quantile(0.5), lengths.quantile(1.0)), (500, 90_000));
    assert_eq!(bins.last().unwrap().1, 90_001);
    let picture = lengths.picture("lengths", 512).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("lengths"));
}

#[test]
fn real_files_of_all_shapes() {
    let Some(data) = test_data("datasets") else { return };
    let options = DatasetOptions::default();
    for (name, format, rows) in [
        ("datasets/alpaca/alpaca_small.json", "alpaca", 2252),
        ("datasets/llama-factory/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("datasets/llama-factory/c4_demo.jsonl", "text", 300),
        ("datasets/llama-factory/reason_tool_use_demo_50.jsonl", "messages", 50),
    ] {
        let file = data.join(name);
        let found =
            inspect(Records::open(&[file.to_str().unwrap()]).unwrap(), None, &options, 0, &mut |_| {})
                .unwrap();
        assert!(found.broken.is_none(), "{name}: {:?}", found.broken);
        assert_eq!(found.formats.keys().collect::<Vec<_>>(), [format], "{name}");
        assert!(found.rows >= rows.min(50), "{name}: {}", found.rows);
    }
}
