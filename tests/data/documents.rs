//! Documents into texts, and texts into chunks.

use std::io::{Read, Write};

use ferrotune::data::{ChunkOptions, chunks, read_document};
use flate2::Compression;
use flate2::write::ZlibEncoder;
use tempfile::TempDir;

use super::{test_data, tokenizer, write};

fn read(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> anyhow::Result<String> {
    read_document(std::path::Path::new(&write(folder, name, bytes)))
}

pub(super) fn docx(xml: &str) -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    archive.start_file("word/document.xml", zip::write::SimpleFileOptions::default()).unwrap();
    archive.write_all(xml.as_bytes()).unwrap();
    archive.finish().unwrap().into_inner()
}

/// The objects of a PDF of one page with this content.
fn objects(content: &str) -> Vec<String> {
    vec![
        "<< /Type /Catalog /Pages 2 0 R >>".to_owned(),
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>".to_owned(),
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> \
         /XObject << /X 6 0 R >> >> >>"
            .to_owned(),
        stream("", content),
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>".to_owned(),
    ]
}

fn stream(keys: &str, content: &str) -> String {
    format!("<< {keys}/Length {} >>\nstream\n{content}\nendstream", content.len())
}

fn file_of(objects: &[String]) -> Vec<u8> {
    let mut text = "%PDF-1.4\n".to_owned();
    let mut places = Vec::new();
    for (object, number) in objects.iter().zip(1..) {
        places.push(text.len());
        text += &format!("{number} 0 obj\n{object}\nendobj\n");
    }
    let table = text.len();
    text += &format!("xref\n0 {}\n0000000000 65535 f \n", objects.len() + 1);
    for place in places {
        text += &format!("{place:010} 00000 n \n");
    }
    text += &format!("trailer\n<< /Size {} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n", objects.len() + 1);
    text.into_bytes()
}

/// A PDF of one page with one line.
pub(super) fn pdf(line: &str) -> Vec<u8> {
    file_of(&objects(&format!("BT /F1 12 Tf 72 720 Td ({line}) Tj ET")))
}

#[test]
fn documents_of_every_kind() {
    let folder = TempDir::new().unwrap();
    assert_eq!(read(&folder, "a.txt", "Grüße\n").unwrap(), "Grüße\n");
    assert_eq!(read(&folder, "a.md", "# Title\n*x*").unwrap(), "# Title\n*x*");
    let html = "<html><head><title>t</title><style>p {}</style></head><body><h1>Head</h1><p>One &amp; two.</p><p>Three</p></body></html>";
    let text = read(&folder, "a.HTML", html).unwrap();
    assert!(text.contains("Head") && text.contains("One & two.\n") && text.contains("Three"), "{text:?}");
    assert!(!text.contains("p {}"), "{text:?}");
    let table = "<table><tr><td>Name<td>Age</tr><tr><td>Ann<td>7</tr></table><hr><p>End";
    let text = read(&folder, "t.html", table).unwrap();
    assert!(
        text.len() < 100 && ["Name", "Age", "Ann", "7", "End"].iter().all(|cell| text.contains(cell)),
        "{text:?}"
    );
    let xml = "<?xml version=\"1.0\"?><w:document xmlns:w=\"w\"><w:body><w:p><w:r><w:t>One &amp; </w:t></w:r><w:r><w:t xml:space=\"preserve\">two</w:t>\
        <w:tab/><w:t>3&#x21;</w:t></w:r></w:p><w:p><w:r><w:instrText>no</w:instrText><w:t>Next</w:t><w:br/></w:r></w:p></w:body></w:document>";
    assert_eq!(read(&folder, "a.docx", docx(xml)).unwrap(), "One & two\t3!\nNext\n\n");
    assert_eq!(read(&folder, "a.pdf", pdf("A heron stood there.")).unwrap().trim(), "A heron stood there.");
}

#[test]
fn broken_documents_are_named() {
    let folder = TempDir::new().unwrap();
    let fails = |name: &str, bytes: &[u8]| {
        let error = format!("{:#}", read(&folder, name, bytes).unwrap_err());
        assert!(error.contains(name), "{error}");
        error
    };
    assert!(fails("a.odt", b"x").contains("unknown kind"));
    fails("b.txt", &[0xff, 0xfe]);
    fails("b.html", &[0xff, 0xfe]);
    assert!(fails("b.docx", b"PK no").contains("docx"));
    assert!(fails("b.pdf", b"%PDF-1.4\nnothing").contains("PDF"));
    let whole = pdf("text");
    fails("c.pdf", &whole[..whole.len() / 3]);
    fails("c.docx", &docx("<w:document><w:p></w:document>"));
}

/// Packed once, packed twice, and by LZW.
#[test]
fn a_pdf_bomb_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let pack = |bytes: &mut dyn Read| {
        let mut packed = ZlibEncoder::new(Vec::new(), Compression::fast());
        std::io::copy(bytes, &mut packed).unwrap();
        packed.finish().unwrap()
    };
    let once = pack(&mut std::io::repeat(0).take(400 << 20));
    let twice = pack(&mut &once[..]);
    let mut lzw = Vec::new();
    let zeros = std::io::BufReader::new(std::io::repeat(0).take(400 << 20));
    let mut encoder = weezl::encode::Encoder::with_tiff_size_switch(weezl::BitOrder::Msb, 8);
    encoder.into_stream(&mut lzw).encode_all(zeros).status.unwrap();
    for (name, filter, packed) in [
        ("once.pdf", "FlateDecode", once),
        ("twice.pdf", "FlateDecode", twice),
        ("lzw.pdf", "LZWDecode", lzw),
    ] {
        let start = format!("%PDF-1.4\n9 0 obj\n<< /Filter /{filter} >>\nstream\n");
        let bytes = [start.as_bytes(), &packed, b"\nendstream\nendobj\n", &pdf("text")].concat();
        let error = format!("{:#}", read(&folder, name, &bytes).unwrap_err());
        assert!(error.contains(name) && error.contains("unpacks to more than"), "{error}");
    }
}

/// pdf-extract panics without a MediaBox, and goes round for ever where a page or a drawing refers to itself. A stack
/// that overflows or a loop would end the test run.
#[test]
fn pdfs_that_panic_or_never_end_are_refused() {
    let folder = TempDir::new().unwrap();
    let page = |from: &str, to: &str| {
        let mut objects = objects("BT /F1 12 Tf (text) Tj ET");
        assert!(objects[2].contains(from));
        objects[2] = objects[2].replace(from, to);
        file_of(&objects)
    };
    let drawing = |keys: &str| {
        let mut objects = objects("/X Do");
        objects.push(stream(&format!("/Type /XObject /Subtype /Form {keys}"), "/X Do"));
        file_of(&objects)
    };
    let without_box = page("/MediaBox [0 0 612 792]", "");
    for (bytes, reason) in [
        (without_box.clone(), "cannot be read: convert it to text first"),
        (page("/Parent 2 0 R /MediaBox [0 0 612 792]", "/Parent 3 0 R"), "pages lie in each other"),
        (drawing(""), "drawings in each other"),
        (drawing("/Resources << /XObject << /X 6 0 R >> >> "), "drawings in each other"),
    ] {
        let error = format!("{:#}", read(&folder, "odd.pdf", &bytes).unwrap_err());
        assert!(error.contains("odd.pdf") && error.contains(reason), "{error}");
    }
    // The command says that and nothing else.
    std::fs::write(folder.path().join("odd.pdf"), without_box).unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/data/bpe");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.args(["data", "chunk", "--documents", "odd.pdf", "--model", model, "--output", "texts.jsonl"]);
    let output = command.current_dir(&folder).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.lines().count() == 1 && error.contains("odd.pdf"), "{error}");
}

/// Every byte is in a chunk, no chunk is too long, and neighbours share about what was asked for.
fn assert_covers(text: &str, options: &ChunkOptions) -> usize {
    let tokenizer = tokenizer("chatml");
    let found = chunks(&tokenizer, text, options).unwrap();
    assert_eq!(found.first().map_or(0, |chunk| chunk.start), 0);
    assert_eq!(found.last().map_or(0, |chunk| chunk.end), text.len());
    for pair in found.windows(2) {
        assert!(pair[1].start <= pair[0].end && pair[0].start < pair[1].start, "{pair:?}");
        let shared = tokenizer.encode(&text[pair[1].start..pair[0].end], false).unwrap().len();
        assert!(shared <= options.overlap + 1, "{shared}");
    }
    for chunk in &found {
        // A cut inside a word may make one more token of it.
        let length = tokenizer.encode(&text[chunk.clone()], false).unwrap().len();
        assert!(length <= options.chunk_size + 1, "{length}");
    }
    found.len()
}

#[test]
fn chunks_cover_the_text_and_end_with_sentences() {
    let text = "A heron stood in the shallow water. It waited for fish.\n\n".repeat(40);
    let options = ChunkOptions { chunk_size: 64, overlap: 8 };
    assert!(assert_covers(&text, &options) > 10);
    for chunk in chunks(&tokenizer("chatml"), &text, &options).unwrap() {
        assert!(text[chunk.clone()].ends_with(['\n', ' ']), "{:?}", &text[chunk]);
    }
    for text in ["", "short", "ü", "😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀😀", "nospaceatall".repeat(60).as_str()]
    {
        assert_covers(text, &ChunkOptions { chunk_size: 16, overlap: 0 });
        assert_covers(text, &ChunkOptions { chunk_size: 16, overlap: 7 });
    }
    assert!(chunks(&tokenizer("chatml"), "x", &ChunkOptions { chunk_size: 16, overlap: 8 }).is_err());
}

#[test]
fn a_whole_book() {
    let Some(data) = test_data("datasets/tinyshakespeare") else { return };
    let folder = std::fs::read_dir(data.join("datasets/tinyshakespeare")).unwrap();
    let file =
        folder.map(|entry| entry.unwrap().path()).find(|path| path.extension().is_some_and(|e| e == "txt"));
    let text = read_document(&file.unwrap()).unwrap();
    let part: String = text.chars().take(100_000).collect();
    assert!(assert_covers(&part, &ChunkOptions { chunk_size: 512, overlap: 64 }) > 50);
}
