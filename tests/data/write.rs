//! Rows into files and back.

use std::path::Path;

use ferrotune::data::{Records, Row, write_rows};
use serde_json::{Value, json};
use tempfile::TempDir;

fn row(value: Value) -> Row {
    let Value::Object(row) = value else { panic!("not an object") };
    row
}

fn round_trip(folder: &TempDir, name: &str, rows: &[Value]) -> Vec<Value> {
    let path = folder.path().join(name);
    let count = write_rows(&path, rows.iter().map(|value| Ok(row(value.clone())))).unwrap();
    assert_eq!(count, rows.len() as u64);
    let records = Records::open(&[path.to_str().unwrap()]).unwrap();
    let rows = records.map(|record| Value::Object(record.unwrap().row)).collect();
    let left: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "{left:?}");
    rows
}

#[test]
fn json_keeps_every_value() {
    let folder = TempDir::new().unwrap();
    let rows = [json!({"a": 1, "b": [1, "x", {"c": null}]}), json!({"z": "ü\n\"", "a": 0.1})];
    for name in ["r.jsonl", "r.json", "r.jsonl.gz", "r.json.zst"] {
        assert_eq!(round_trip(&folder, name, &rows), rows, "{name}");
        assert_eq!(round_trip(&folder, name, &[]), Vec::<Value>::new(), "{name}");
    }
}

#[test]
fn parquet_keeps_columns_of_one_type() {
    let folder = TempDir::new().unwrap();
    let rows: Vec<Value> = (0..3000)
        .map(|n| {
            let mut message = json!({"role": "user", "content": format!("ü {n}")});
            if n % 2 == 1 {
                message["tool_calls"] = json!([{"name": "f", "weights": [0.5, n as f64]}]);
            }
            let score = if n % 3 == 0 { Value::Null } else { json!(n as f64 / 4.0) };
            json!({"messages": [message], "n": n, "ok": n % 2 == 0, "score": score, "none": null, "big": i64::MAX - n})
        })
        .collect();
    let back = round_trip(&folder, "r.parquet", &rows);
    assert_eq!(back, rows);
    // Columns that only some rows have are null in the others.
    let back = round_trip(&folder, "s.parquet", &[json!({"a": "x"}), json!({"b": [1]})]);
    assert_eq!(back, [json!({"a": "x", "b": null}), json!({"a": null, "b": [1]})]);
}

#[test]
fn csv_cells_are_strings() {
    let folder = TempDir::new().unwrap();
    let rows = [json!({"a": "x, \"y\"\n", "b": 1}), json!({"a": null, "b": {"k": [1]}, "c": "z"})];
    let expected =
        [json!({"a": "x, \"y\"\n", "b": "1", "c": ""}), json!({"a": "", "b": "{\"k\":[1]}", "c": "z"})];
    assert_eq!(round_trip(&folder, "r.csv", &rows), expected);
    assert_eq!(round_trip(&folder, "r.csv.gz", &rows), expected);
}

#[test]
fn what_cannot_be_written_is_said() {
    let folder = TempDir::new().unwrap();
    let fails = |name: &str, rows: &[Value]| {
        let path = folder.path().join(name);
        let error = write_rows(&path, rows.iter().map(|value| Ok(row(value.clone())))).unwrap_err();
        assert!(!path.exists(), "nothing torn is left");
        format!("{error:#}")
    };
    let mixed = [json!({"m": [{"content": "x"}]}), json!({"m": [{"content": [1]}]})];
    let error = fails("r.parquet", &mixed);
    assert!(error.contains("m[].content") && error.contains("strings and lists"), "{error}");
    // No float holds 2^53 + 1: a column of both would lose it without a word.
    let (large, fraction) = (json!({"n": (1i64 << 53) + 1}), json!({"n": 0.5}));
    for rows in [[large.clone(), fraction.clone()], [fraction, large]] {
        let error = fails("r.parquet", &rows);
        assert!(error.contains("column n holds") && error.contains("integers beyond 2^53"), "{error}");
    }
    assert!(fails("r.parquet", &[json!({"n": u64::MAX})]).contains("integers beyond 2^63"));
    assert!(fails("r.parquet", &[json!({"m": {}})]).contains("column m holds only empty objects"));
    assert!(fails("r.txt", &[]).contains("names no format"));
    assert!(fails("r.parquet.gz", &[]).contains("compressed inside"));
    let broken = write_rows(Path::new("r.jsonl"), [Err(anyhow::anyhow!("row 3"))]);
    assert!(format!("{:#}", broken.unwrap_err()).contains("row 3"));
    assert!(!Path::new("r.jsonl").exists());
}
