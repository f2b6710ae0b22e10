//! Rows streamed from files: every row once an epoch, in an order of the seed, from any place, to every rank.

use std::collections::BTreeSet;

use ferrotune::data::{RowCursor, RowStream, StreamOptions, write_rows};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::write;

/// 3000 lines with empty ones between, 1100 rows of Parquet in a few groups, 10 lines.
fn sources(folder: &TempDir) -> Vec<String> {
    let line = |n: u64| format!("{}\n{}", json!({"n": n}), if n.is_multiple_of(9) { "\n" } else { "" });
    let first = write(folder, "a.jsonl", (0..3000).map(line).collect::<String>());
    let parquet = folder.path().join("b.parquet");
    let rows = (3000..4100u64).map(|n| {
        let Value::Object(row) = json!({"n": n}) else { unreachable!() };
        Ok(row)
    });
    write_rows(&parquet, rows).unwrap();
    let last = write(folder, "c.jsonl", (4100..4110).map(line).collect::<String>());
    vec![first, parquet.to_str().unwrap().to_owned(), last]
}

fn epoch(stream: &mut RowStream) -> Vec<u64> {
    std::iter::from_fn(|| stream.next_row().unwrap())
        .map(|record| record.row["n"].as_u64().unwrap())
        .collect()
}

#[test]
fn every_row_once_in_an_order_of_the_seed() {
    let folder = TempDir::new().unwrap();
    let sources = sources(&folder);
    let mut in_order = RowStream::open(&sources, StreamOptions::default()).unwrap();
    assert_eq!(epoch(&mut in_order), (0..4110).collect::<Vec<_>>());
    let options = StreamOptions { seed: Some(1), buffer_rows: 2000, ..Default::default() };
    let open = |options| RowStream::open(&sources, options).unwrap();
    let mut stream = open(options);
    let (first, second) = (epoch(&mut stream), epoch(&mut stream));
    for order in [&first, &second] {
        assert_eq!(order.iter().collect::<BTreeSet<_>>().len(), 4110);
        assert!(order.windows(2).filter(|pair| pair[0] + 1 == pair[1]).count() < 50);
    }
    assert_ne!(first, second);
    assert_eq!(epoch(&mut open(options)), first);
    assert_ne!(epoch(&mut open(StreamOptions { seed: Some(2), ..options })), first);
}

#[test]
fn a_stream_goes_on_from_any_cursor() {
    let folder = TempDir::new().unwrap();
    let sources = sources(&folder);
    let options = StreamOptions { seed: Some(1), buffer_rows: 1500, ..Default::default() };
    let mut stream = RowStream::open(&sources, options).unwrap();
    let whole = [epoch(&mut stream), epoch(&mut stream)];
    for (at, row) in [(0, 0), (0, 1), (0, 1499), (0, 2048), (1, 3333), (1, 4110)] {
        let mut stream = RowStream::open(&sources, options).unwrap();
        let cursor = RowCursor { epoch: at, row };
        stream.seek(cursor).unwrap();
        assert_eq!(stream.cursor(), cursor);
        assert_eq!(epoch(&mut stream), whole[at as usize][row as usize..], "{cursor:?}");
    }
    // A cursor taken in the middle, as a checkpoint does.
    let mut stream = RowStream::open(&sources, options).unwrap();
    for _ in 0..777 {
        stream.next_row().unwrap();
    }
    let cursor: RowCursor = serde_json::from_value(serde_json::to_value(stream.cursor()).unwrap()).unwrap();
    let mut resumed = RowStream::open(&sources, options).unwrap();
    resumed.seek(cursor).unwrap();
    assert_eq!(epoch(&mut resumed), epoch(&mut stream));
    assert!(resumed.seek(RowCursor { epoch: 0, row: 5000 }).is_err());
}

#[test]
fn ranks_share_the_rows() {
    let folder = TempDir::new().unwrap();
    let sources = sources(&folder);
    let options = StreamOptions { seed: Some(1), buffer_rows: 2000, ..Default::default() };
    let whole = epoch(&mut RowStream::open(&sources, options).unwrap());
    let parts: Vec<Vec<u64>> = (0..4)
        .map(|rank| {
            let mut stream =
                RowStream::open(&sources, StreamOptions { rank, world_size: 4, ..options }).unwrap();
            assert_eq!(stream.rows_per_epoch(), 1027);
            epoch(&mut stream)
        })
        .collect();
    let woven: Vec<u64> = (0..4108).map(|row| parts[row % 4][row / 4]).collect();
    assert_eq!(woven, whole[..4108]);
}

#[test]
fn what_cannot_be_streamed_is_said() {
    let folder = TempDir::new().unwrap();
    let error = |name: &str, text: &str, options| {
        let file = write(&folder, name, text);
        format!("{:#}", RowStream::open(&[file], options).err().unwrap())
    };
    let options = StreamOptions::default();
    assert!(error("a.json", "[]", options).contains("ferrotune data convert"));
    assert!(error("a.jsonl", "\n\n", options).contains("0 rows"));
    let alone = StreamOptions { rank: 1, ..options };
    assert!(error("b.jsonl", "{}\n", alone).contains("rank 1 of 1"));
    // A broken line is named, and the stream goes on behind it.
    let file = write(&folder, "c.jsonl", "{\"n\": 1}\n{\n{\"n\": 2}\n");
    let mut stream = RowStream::open(&[file], options).unwrap();
    assert!(stream.next_row().unwrap().is_some());
    let error = format!("{:#}", stream.next_row().unwrap_err());
    assert!(error.contains("c.jsonl, line 2"), "{error}");
    assert_eq!(stream.next_row().unwrap().unwrap().row["n"], 2);
}
