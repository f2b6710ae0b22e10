//! The text of documents: txt, md, html, pdf, docx.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use quick_xml::Reader;
use quick_xml::events::Event;

use super::pdf;

/// The endings of files that are read as documents.
pub const DOCUMENT_ENDINGS: [&str; 6] = ["txt", "md", "html", "htm", "pdf", "docx"];

/// A docx file's text may be this much larger than the file: more is a bomb, not a document.
const LARGEST_XML: u64 = 1 << 30;

/// The text of the document at `path`. Markdown stays as it is; HTML becomes text with line breaks where the page has
/// them; of PDF and docx the text is taken in the order of the file.
///
/// # Errors
/// An unknown ending; a file that is broken, encrypted or not UTF-8 (txt, md, html).
pub fn read_document(path: &Path) -> Result<String> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_lowercase();
    let text = match ending.as_str() {
        "txt" | "md" => fs::read_to_string(path).map_err(anyhow::Error::from),
        "html" | "htm" => html(path),
        "pdf" => fs::read(path).map_err(anyhow::Error::from).and_then(|bytes| pdf::text(&bytes)),
        "docx" => docx(path),
        _ => bail!(
            "{}: unknown kind of document: expected {}",
            path.display(),
            DOCUMENT_ENDINGS.map(|ending| format!(".{ending}")).join(", ")
        ),
    };
    text.with_context(|| format!("reading {}", path.display()))
}

/// Cells of a table come one after another, and lines are hardly ever broken: a line is what the page calls one.
fn html(path: &Path) -> Result<String> {
    const WIDE: usize = 1 << 16;
    const RULE: char = '─';
    let bytes = fs::read(path)?;
    let text = str::from_utf8(&bytes)?;
    let text = html2text::config::plain_no_decorate()
        .raw_mode(true)
        .string_from_read(text.as_bytes(), WIDE)
        .map_err(|error| anyhow!("not HTML that can be read: {error}"))?;
    // A ruler is drawn as wide as the page.
    let is_rule = |line: &str| line.starts_with(RULE) && line.chars().all(|c| c == RULE);
    Ok(text.lines().filter(|line| !is_rule(line)).flat_map(|line| [line, "\n"]).collect())
}

/// The text of `word/document.xml`: runs `w:t`, paragraphs `w:p`, breaks `w:br`, tabs `w:tab`.
fn docx(path: &Path) -> Result<String> {
    let mut archive = zip::ZipArchive::new(File::open(path)?).context("not a docx file")?;
    let document = archive.by_name("word/document.xml").context("not a docx file: no word/document.xml")?;
    let mut xml = String::new();
    document.take(LARGEST_XML).read_to_string(&mut xml)?;
    let mut reader = Reader::from_str(&xml);
    let mut text = String::new();
    let mut in_text = false;
    loop {
        match reader.read_event()? {
            Event::Start(tag) if tag.name().as_ref() == "w:t" => in_text = true,
            Event::End(tag) if tag.name().as_ref() == "w:t" => in_text = false,
            Event::End(tag) if tag.name().as_ref() == "w:p" => text.push('\n'),
            Event::Empty(tag) => match tag.name().as_ref() {
                "w:br" | "w:cr" => text.push('\n'),
                "w:tab" => text.push('\t'),
                _ => {}
            },
            Event::Text(piece) if in_text => text.push_str(&piece),
            Event::GeneralRef(entity) if in_text => {
                if let Some(character) = entity.resolve_char_ref()? {
                    text.push(character);
                } else {
                    text.push_str(quick_xml::escape::resolve_predefined_entity(&entity).unwrap_or_default());
                }
            }
            Event::Eof => return Ok(text),
            _ => {}
        }
    }
}
