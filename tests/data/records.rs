//! Data files: every format, compression and way to name them; and what is said about broken ones.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use ferrotune::data::{Record, Records, RowStream, StreamOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::write;

fn read(source: &str) -> anyhow::Result<Vec<Record>> {
    Records::open(&[source])?.collect()
}

fn rows(source: &str) -> Vec<Value> {
    read(source).unwrap().into_iter().map(|record| Value::Object(record.row)).collect()
}

/// The whole message about `source`, which must name the file and hold each of `parts`.
fn assert_fails(source: &str, parts: &[&str]) {
    let error = format!("{:#}", read(source).unwrap_err());
    for part in parts.iter().chain([&source]) {
        assert!(error.contains(part), "expected {part:?} in: {error}");
    }
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn json_in_its_forms() {
    let folder = TempDir::new().unwrap();
    let expected = vec![json!({"a": 1, "b": "x"}), json!({"a": 2.5, "b": null})];
    let lines = "{\"a\": 1, \"b\": \"x\"}\n\n  {\"a\": 2.5, \"b\": null}";
    let array = "\u{feff}[ {\"a\": 1, \"b\": \"x\"},\n {\"a\": 2.5, \"b\": null}\n]\n";
    let object = "{\"version\": 1, \"data\": [{\"a\": 1, \"b\": \"x\"}, {\"a\": 2.5, \"b\": null}]}";
    for (name, text) in [("l.jsonl", lines), ("l.json", lines), ("a.json", array), ("o.json", object)] {
        assert_eq!(rows(&write(&folder, name, text)), expected, "{name}");
        assert_eq!(rows(&write(&folder, &format!("{name}.gz"), gzip(text))), expected, "{name}.gz");
        let zst = zstd::encode_all(text.as_bytes(), 1).unwrap();
        assert_eq!(rows(&write(&folder, &format!("{name}.ZST"), zst)), expected, "{name}.ZST");
    }
    // Two gzip members one after another are one file.
    let two = [gzip("{\"a\": 1}\n"), gzip("{\"a\": 2}\n")].concat();
    assert_eq!(rows(&write(&folder, "two.jsonl.gz", two)), [json!({"a": 1}), json!({"a": 2})]);
    assert_eq!(rows(&write(&folder, "none.json", "[]")), Vec::<Value>::new());
    assert_eq!(rows(&write(&folder, "none.jsonl", "")), Vec::<Value>::new());
}

#[test]
fn csv_with_quotes_and_line_breaks() {
    let folder = TempDir::new().unwrap();
    let file = write(&folder, "t.csv", "prompt,completion\n\"a, \"\"b\"\"\nc\",\n1,ü\r\n");
    let records = read(&file).unwrap();
    assert_eq!(Value::Object(records[0].row.clone()), json!({"prompt": "a, \"b\"\nc", "completion": ""}));
    assert_eq!(Value::Object(records[1].row.clone()), json!({"prompt": "1", "completion": "ü"}));
    assert_eq!(records[1].place.to_string(), format!("{file}, line 4"));
}

#[test]
fn parquet_row_groups() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data");
    let cases: Value = serde_json::from_str(&fs::read_to_string(golden.join("cases.json")).unwrap()).unwrap();
    let plain = golden.join("rows.parquet");
    let folder = TempDir::new().unwrap();
    let bytes = fs::read(&plain).unwrap();
    let packed = write(&folder, "rows.parquet.zst", zstd::encode_all(&bytes[..], 1).unwrap());
    for source in [plain.to_str().unwrap(), &packed] {
        let records = read(source).unwrap();
        assert_eq!(records.len(), 5);
        for (record, (name, messages)) in records.iter().zip(cases["conversations"].as_object().unwrap()) {
            assert_eq!(record.row["name"], *name);
            // Fields that are null in a message are left out: the templates would see them as present.
            assert_eq!(record.row["messages"], *messages, "{name}");
        }
        assert_eq!(records[3].row["weight"], json!(0.75));
        assert_eq!(records[3].row["count"], json!(3));
        assert_eq!(records[3].row["label"], json!(false));
        assert!(records[3].row["when"].as_str().unwrap().starts_with("2025-01-04"));
        assert!(records[3].place.to_string().ends_with("row 4"), "{}", records[3].place);
    }
}

#[test]
fn several_files_folders_and_globs() {
    let folder = TempDir::new().unwrap();
    let b = write(&folder, "b.jsonl", "{\"n\": 2}\n{\"n\": 3}\n");
    let a = write(&folder, "a.json", "[{\"n\": 1}]");
    write(&folder, "notes.txt", "not data");
    let numbers = |sources: &[&str]| -> Vec<i64> {
        Records::open(sources).unwrap().map(|record| record.unwrap().row["n"].as_i64().unwrap()).collect()
    };
    let root = folder.path().to_str().unwrap();
    assert_eq!(numbers(&[&b, &a]), [2, 3, 1], "in the order given");
    assert_eq!(numbers(&[root]), [1, 2, 3], "a folder by name");
    assert_eq!(numbers(&[&format!("{root}/*.json*")]), [1, 2, 3], "a glob by name");
    assert_eq!(numbers(&[&format!("{root}/?.jsonl"), &a]), [2, 3, 1]);
}

#[test]
fn sources_that_are_no_data() {
    let folder = TempDir::new().unwrap();
    let root = folder.path().to_str().unwrap();
    assert_fails(&write(&folder, "x.txt", "hello"), &["unknown kind", ".jsonl"]);
    assert_fails(&format!("{root}/absent.jsonl"), &["no such file"]);
    assert_fails(&format!("{root}/*.parquet"), &["no data file"]);
    assert_fails(root, &["no data file", ".parquet"]);
    assert!(Records::open::<&str>(&[]).is_err());
}

#[test]
fn broken_files_are_named_with_the_line() {
    let folder = TempDir::new().unwrap();
    let jsonl = |name: &str, text: &str| write(&folder, name, text);
    assert_fails(&jsonl("a.jsonl", "{\"a\": 1}\n\n{\"a\": \n"), &["line 3", "one JSON object a line"]);
    assert_fails(&jsonl("b.jsonl", "{\"a\": 1}\n[1, 2]\n"), &["line 2", "object"]);
    assert_fails(&jsonl("a.json", "[{\"a\": 1},\n {\"a\": 2},\n {\"a\" 3}]"), &["line 3"]);
    assert_fails(&jsonl("b.json", "[{\"a\": 1}\n {\"a\": 2}]"), &["line 2", "expected ,"]);
    assert_fails(&jsonl("c.json", "[{\"a\": 1},\n {\"a\": 2}"), &["line 2", "does not end"]);
    assert_fails(&jsonl("d.json", "[{\"a\": 1}, 7]"), &["line 1", "objects"]);
    assert_fails(&jsonl("e.json", "[{\"a\": 1}] x"), &["after the end"]);
    assert_fails(&jsonl("f.json", "{\"a\": 1}"), &["array of objects"]);
    assert_fails(&jsonl("g.json", "hello"), &["array of objects"]);
    assert_fails(&jsonl("h.json", "{\"train\": [{}], \"test\": [{}]}"), &["more than one", "train, test"]);
    assert_fails(&jsonl("a.csv", "a,b\n1,2\n3\n"), &["line 3", "1 cells", "header has 2"]);
    assert_fails(&jsonl("b.csv", "a,b,a\n1,2,3\n"), &["twice"]);
    let bytes = [b"a,b\n1,".as_slice(), &[0xff, 0xfe], b"\n"].concat();
    assert_fails(&write(&folder, "c.csv", bytes), &["UTF-8"]);
    assert_fails(&write(&folder, "c.jsonl", [0xff, 0xfe, b'\n']), &["line 1", "UTF-8"]);
    let whole = gzip(&"{\"a\": 1}\n".repeat(100));
    assert_fails(&write(&folder, "cut.jsonl.gz", &whole[..whole.len() / 2]), &["line"]);
    assert_fails(&write(&folder, "not.jsonl.gz", "plain"), &["line 1"]);
    let golden = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/rows.parquet");
    let bytes = fs::read(golden).unwrap();
    assert_fails(&write(&folder, "cut.parquet", &bytes[..bytes.len() / 2]), &["Parquet"]);
    assert_fails(&write(&folder, "empty.parquet", ""), &["Parquet"]);
    // A flipped byte in the data is an error of its row, or is caught with the file; it is never a panic.
    let mut flipped = bytes.clone();
    for byte in &mut flipped[60..90] {
        *byte ^= 0x55;
    }
    assert!(read(&write(&folder, "flipped.parquet", flipped)).is_err());
}

/// A column chunk of a negative length, on which the Parquet library panics: an error with file and row.
#[test]
fn a_file_on_which_the_parquet_library_panics_is_named() {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/data/broken/negative_length.parquet");
    let error = Records::open(&[golden]).unwrap().find_map(Result::err).unwrap();
    let error = format!("{error:#}");
    assert!(error.contains("negative_length.parquet") && error.contains("gives up"), "{error}");
    let mut stream = RowStream::open(&[golden], StreamOptions::default()).unwrap();
    let error = std::iter::repeat_with(|| stream.next_row()).take(100).find_map(Result::err).unwrap();
    assert!(format!("{error:#}").contains("negative_length.parquet"), "{error:#}");
}
