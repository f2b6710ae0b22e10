//! Broken input of every kind: no panic, no hang, no memory beyond what the input explains.
//!
//! Each parser gets good inputs with bytes changed, cut, doubled and swapped. FERROTUNE_FUZZ_SECONDS=600 lets each run
//! for so long (a second if not set); the seed is printed, and FERROTUNE_FUZZ_SEED repeats it.

use std::collections::BTreeSet;
use std::env::var;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ferrotune::data::{
    ChatTemplate, ChunkOptions, ExampleTemplate, ImageSource, Lint, LintOptions, MergedPrompt, Records,
    RenderOptions, RowStream, StreamOptions, chunks, read_document,
};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::tokenizer;

/// What one input may cost, on a machine that has other things to do.
const LONGEST: Duration = Duration::from_secs(60);

/// Pieces that parsers care about.
const PIECES: [&[u8]; 20] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\n",
    b"\r\n",
    b"\\",
    b"\\u0000",
    b"\xff",
    b"\xef\xbb\xbf",
    b"null",
    b"1e999",
    b"{{",
    b"[[",
    b"]]",
    b"{a}",
    b"<image>",
];

fn mutated(rng: &mut ChaCha8Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = seeds.choose(rng).unwrap().clone();
    for _ in 0..rng.random_range(1..8) {
        let at = rng.random_range(0..=bytes.len());
        let end = (at + rng.random_range(0..64)).min(bytes.len());
        match rng.random_range(0..6) {
            0 if at < bytes.len() => bytes[at] = rng.random(),
            1 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            2 => bytes.truncate(at),
            3 => {
                bytes.drain(at..end);
            }
            4 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                bytes.splice(at..at, PIECES.choose(rng).unwrap().iter().copied());
            }
        }
    }
    bytes
}

/// Runs `parse` on changed `seeds`; what it returns does not matter, only that it does.
fn fuzz(seeds: &[Vec<u8>], mut parse: impl FnMut(&[u8])) {
    let seconds = var("FERROTUNE_FUZZ_SECONDS").map_or(1.0, |seconds| seconds.parse().unwrap());
    let seed = var("FERROTUNE_FUZZ_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let begun = Instant::now();
    let mut inputs = 0u64;
    while begun.elapsed().as_secs_f64() < seconds {
        let input = mutated(&mut rng, seeds);
        let begun = Instant::now();
        parse(&input);
        let took = begun.elapsed();
        assert!(took < LONGEST, "{took:?} for {:?}", String::from_utf8_lossy(&input));
        inputs += 1;
    }
    println!("{inputs} inputs");
}

fn rows() -> Vec<Value> {
    let turn = |role: &str, content: Value| json!({"role": role, "content": content});
    vec![
        json!({"messages": [turn("user", json!("a\n\"b\"")), turn("assistant", json!("c <|im_end|>"))], "images": ["x.png"]}),
        json!({"messages": [turn("user", json!([{"type": "image", "image": "data:image/png;base64,iVBORw0KGgo="}])), turn("assistant", json!("é"))]}),
        json!({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{\"name\": \"f\"}"}], "tools": "[]"}),
        json!({"instruction": "i", "input": null, "output": "o", "history": [["a", "b"]]}),
        json!({"prompt": "p", "completion": " c"}),
        json!({"text": "t", "n": [1, -2.5, 1e10, true]}),
    ]
}

fn lines() -> Vec<u8> {
    rows().iter().map(|row| format!("{row}\n")).collect::<String>().into_bytes()
}

/// Lints `bytes` as a file of that name, and streams it.
fn lint(folder: &TempDir, name: &str, bytes: &[u8]) {
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    let source = path.to_str().unwrap().to_owned();
    let options = LintOptions { near_duplicates: Some(0.8), ..Default::default() };
    if let Ok(records) = Records::open(&[&source]) {
        // A row may take a byte, but no more rows come than there are bytes.
        let rows = Lint::new(records, None, &options).unwrap().take_while(Result::is_ok).count();
        assert!(rows <= bytes.len() + 1, "{rows} rows of {} bytes", bytes.len());
    }
    if let Ok(mut stream) = RowStream::open(&[&source], StreamOptions { seed: Some(1), ..Default::default() })
    {
        for _ in 0..100 {
            let _ = stream.next_row();
        }
    }
}

#[test]
fn json_lines() {
    let folder = TempDir::new().unwrap();
    fuzz(&[lines()], |bytes| lint(&folder, "rows.jsonl", bytes));
}

#[test]
fn json_arrays_and_objects() {
    let folder = TempDir::new().unwrap();
    let array = serde_json::to_vec(&rows()).unwrap();
    let pretty = serde_json::to_vec_pretty(&rows()).unwrap();
    let object = serde_json::to_vec(&json!({"version": 1, "data": rows()})).unwrap();
    fuzz(&[array, pretty, object, lines()], |bytes| lint(&folder, "rows.json", bytes));
    let deep = |open: &str| open.repeat(100_000).into_bytes();
    for bytes in [deep("["), deep("[{\"a\":"), deep("{\"a\":[")] {
        lint(&folder, "rows.json", &bytes);
    }
}

#[test]
fn csv_and_compressed_files() {
    let folder = TempDir::new().unwrap();
    let csv = b"text,n\n\"a, \"\"b\"\"\nc\",1\n\xc3\xa9,\n".to_vec();
    fuzz(&[csv], |bytes| lint(&folder, "rows.csv", bytes));
    let zst = zstd::encode_all(&lines()[..], 1).unwrap();
    fuzz(&[zst], |bytes| lint(&folder, "rows.jsonl.zst", bytes));
}

#[test]
fn parquet() {
    let folder = TempDir::new().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/rows.parquet");
    // The library's own panics on broken pages are caught by what reads them.
    fuzz(&[fs::read(golden).unwrap()], |bytes| lint(&folder, "rows.parquet", bytes));
}

#[test]
fn documents() {
    let folder = TempDir::new().unwrap();
    let read = |name: &str, bytes: &[u8]| {
        let path: PathBuf = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let _ = read_document(&path);
    };
    let html = b"<html><body><table><tr><td>a<td>b</table><p>x &amp; y &#x21; <ul><li>z</ul></body>".to_vec();
    fuzz(&[html], |bytes| read("a.html", bytes));
    fuzz(
        &[super::documents::docx(
            "<w:document><w:p><w:r><w:t>a &amp; b</w:t><w:br/></w:r></w:p></w:document>",
        )],
        |bytes| {
            read("a.docx", bytes);
        },
    );
    fuzz(&[super::documents::pdf("A heron stood there.")], |bytes| read("a.pdf", bytes));
}

#[test]
fn texts_of_users() {
    let columns: BTreeSet<String> = ["a".to_owned()].into();
    let Value::Object(row) = json!({"a": "x {b}"}) else { unreachable!() };
    fuzz(&[b"A {a}[[ and {a}]] {{x}} [[[{a}]]]".to_vec()], |bytes| {
        if let Ok(prompt) = MergedPrompt::new(&String::from_utf8_lossy(bytes), &columns) {
            prompt.render(&row);
        }
    });
    let example = b"{SYSTEM}\nQ: {INPUT}\nA: {OUTPUT}</s>\nQ: {INPUT}\nA: {OUTPUT}</s>".to_vec();
    let talk = [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "a"})];
    fuzz(&[example], |bytes| {
        if let Ok(example) = ExampleTemplate::new(&String::from_utf8_lossy(bytes), "</s>") {
            // Whatever the example holds, its Jinja text is one.
            let template = example.chat_template("s'\\").unwrap();
            let text = template.render(&talk, &RenderOptions::default()).unwrap();
            let expected = format!("{}q{}a{}", example.user, example.assistant, example.end);
            assert!(
                text.replace("s'\\", "{SYSTEM}").ends_with(&expected.replace("s'\\", "{SYSTEM}")),
                "{text:?} {example:?}"
            );
        }
    });
    let jinja = tokenizer("chatml").chat_template().unwrap().source().as_bytes().to_vec();
    fuzz(&[jinja], |bytes| {
        if let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(bytes), "fuzz") {
            let _ = template.render(&talk, &RenderOptions::default());
        }
    });
}

#[test]
fn pictures_and_chunks() {
    let picture = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).into_owned();
        if let Ok(image) = ImageSource::new(&json!(text), None)
            && !matches!(image, ImageSource::Path(_))
        {
            let _ = image.info();
        }
        let _ = ImageSource::Bytes(bytes.to_vec()).info();
    };
    let png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x03\x08\x02\0\0\0".to_vec();
    let jpeg =
        b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0\xff\xc0\0\x11\x08\0\x02\0\x03\x03\x01"
            .to_vec();
    fuzz(
        &[png, jpeg, b"data:image/png;base64,iVBORw0KGgo=".to_vec(), b"RIFF\0\0\0\0WEBPVP8 ".to_vec()],
        picture,
    );
    let tokenizer = tokenizer("chatml");
    let options = ChunkOptions { chunk_size: 16, overlap: 5 };
    fuzz(&["A heron stood.\n\nü😀 in water ".repeat(8).into_bytes()], |bytes| {
        let text = String::from_utf8_lossy(bytes);
        let found = chunks(&tokenizer, &text, &options).unwrap();
        let mut covered = 0;
        for chunk in found {
            assert!(chunk.start <= covered && text.get(chunk.clone()).is_some());
            covered = chunk.end;
        }
        assert!(covered == text.len() || text.is_empty());
    });
}
