//! Pictures of conversations, in the ways in which datasets hold them.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ferrotune::data::{
    DatasetOptions, ImageSource, Record, Records, RowOptions, images, inspect, write_rows,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{test_data, write};

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x03\x08\x02\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn found(folder: &TempDir, row: Value) -> anyhow::Result<Vec<ImageSource>> {
    let file = write(folder, "rows.jsonl", format!("{row}\n"));
    let record: Record = Records::open(&[file])?.next().unwrap()?;
    let example = RowOptions::default().example(&record.row, true)?;
    images(&record.row, &example, record.place.file.parent())
}

fn ask(content: Value) -> Value {
    json!([{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}])
}

#[test]
fn every_way_to_name_a_picture() {
    let folder = TempDir::new().unwrap();
    write(&folder, "a.png", PNG);
    let base64 = BASE64_STANDARD.encode(PNG);
    let path = ImageSource::Path(folder.path().join("a.png"));
    let bytes = ImageSource::Bytes(PNG.to_vec());
    let question = json!({"type": "text", "text": "what?"});
    let rows = [
        (json!({"messages": ask(json!([{"type": "image", "image": "a.png"}, question]))}), &path),
        (json!({"messages": ask(json!([{"type": "image", "path": "a.png"}, question]))}), &path),
        (json!({"messages": ask(json!([{"type": "image"}, question])), "images": ["a.png"]}), &path),
        (json!({"messages": ask(json!("<image>what?")), "image": "a.png"}), &path),
        (json!({"messages": ask(json!("what?")), "image": "a.png"}), &path),
        (json!({"messages": ask(json!([{"type": "image", "base64": base64}, question]))}), &bytes),
        (
            json!({"messages": ask(json!([{"type": "image"}, question])), "images": [{"bytes": base64, "path": null}]}),
            &bytes,
        ),
        (
            json!({"messages": ask(json!([{"type": "image_url", "image_url": {"url": format!("data:image/png;base64,{base64}")}}, question]))}),
            &bytes,
        ),
    ];
    for (row, expected) in rows {
        let sources = found(&folder, row.clone()).unwrap();
        assert_eq!(sources.as_slice(), std::slice::from_ref(expected), "{row}");
        let info = sources[0].info().unwrap().unwrap();
        assert_eq!((info.format, info.width, info.height), ("png", 2, 3));
    }
    let url = json!({"messages": ask(json!([{"type": "image_url", "image_url": "https://a.b/c.png"}]))});
    let sources = found(&folder, url).unwrap();
    assert_eq!(sources, [ImageSource::Url("https://a.b/c.png".to_owned())]);
    assert_eq!(sources[0].info().unwrap(), None);
}

#[test]
fn places_and_pictures_must_match() {
    let folder = TempDir::new().unwrap();
    let error = |row: Value| format!("{:#}", found(&folder, row).unwrap_err());
    let one_place = ask(json!([{"type": "image"}, {"type": "text", "text": "what?"}]));
    assert!(error(json!({"messages": one_place})).contains("missing from the row"));
    let two = json!({"messages": one_place, "images": ["a.png", "b.png"]});
    assert!(error(two).contains("shown by no message"));
    let texts = json!({"messages": ask(json!("<image><image>")), "images": ["a.png"]});
    assert!(error(texts).contains("more <image> than pictures"));
    let broken = json!({"messages": ask(json!([{"type": "image", "image": {"bytes": "!"}}]))});
    assert!(error(broken).contains("base64"));
    // Without the column, <image> is a text like any other.
    assert_eq!(found(&folder, json!({"messages": ask(json!("the <image> tag"))})).unwrap(), []);
}

#[test]
fn parquet_bytes() {
    let folder = TempDir::new().unwrap();
    let row = json!({"messages": ask(json!("<image>what?")), "images": [{"bytes": BASE64_STANDARD.encode(PNG), "path": "a.png"}]});
    let path = folder.path().join("rows.parquet");
    let Value::Object(row) = row else { unreachable!() };
    write_rows(&path, [Ok(row)]).unwrap();
    let found = inspect(
        Records::open(&[path.to_str().unwrap()]).unwrap(),
        None,
        &DatasetOptions::default(),
        0,
        &mut |_| {},
    );
    assert_eq!(found.unwrap().images.into_iter().collect::<Vec<_>>(), [("png 2x3".to_owned(), 1)]);
}

#[test]
fn real_pictures_with_captions() {
    let Some(data) = test_data("images/llava.json") else { return };
    let file = data.join("images/llava.json");
    let records = Records::open(&[file.to_str().unwrap()]).unwrap();
    let found = inspect(records, None, &DatasetOptions::default(), 0, &mut |_| {}).unwrap();
    assert!(found.broken.is_none(), "{:?}", found.broken);
    assert_eq!(found.images.values().sum::<u64>(), found.rows);
    assert!(found.rows > 40, "{}", found.rows);
}
