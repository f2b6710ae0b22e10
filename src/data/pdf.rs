//! The text of PDF files.
//!
//! pdf-extract follows whatever a file refers to, in circles as well: what may not end is refused before it begins.

use std::collections::HashMap;
use std::io::Read;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use flate2::read::ZlibDecoder;
use pdf_extract::content::Content;
use pdf_extract::{Dictionary, Document, Object, ObjectId, PlainTextOutput, output_doc};
use weezl::decode::Decoder;
use weezl::{BitOrder, LzwStatus};

use super::panics::without_panic;

/// Folders of pages in each other, and drawings in each other.
const DEEPEST: usize = 64;
/// Drawings on all pages.
const MOST_DRAWINGS: u64 = 1 << 20;
/// What the streams of a file may come to unpacked, and that many times the file: more is a bomb, not a document.
const MOST_UNPACKED: u64 = 256 << 20;
const MOST_TIMES: u64 = 32;
/// Before a stream: what says how it is packed.
const DICTIONARY: usize = 1024;
/// Objects in each other take stack; only what is used of it becomes memory.
const STACK: usize = 256 << 20;

/// The text of a PDF file in the order of the file.
///
/// # Errors
/// A file that is broken, encrypted, unpacks to far more than it is, or goes in circles.
pub(super) fn text(bytes: &[u8]) -> Result<String> {
    check_unpacked(bytes)?;
    let text = thread::scope(|scope| {
        let thread = thread::Builder::new().stack_size(STACK);
        let thread = thread.spawn_scoped(scope, || without_panic(|| extract(bytes)));
        anyhow::Ok(thread.context("starting a thread")?.join().ok().flatten())
    })?;
    text.context("a PDF that cannot be read: convert it to text first")?
}

/// Unpacks every zlib stream of the file, what is packed twice, and what is said to be LZW, without keeping it: the library
/// keeps all of it.
fn check_unpacked(bytes: &[u8]) -> Result<()> {
    const MARK: &[u8] = b"stream";
    let most = MOST_UNPACKED.saturating_add(MOST_TIMES.saturating_mul(bytes.len() as u64));
    let mut left = most;
    let mut take = |bytes: usize| -> Result<()> {
        ensure!(bytes as u64 <= left, "a PDF that unpacks to more than {most} bytes");
        left -= bytes as u64;
        Ok(())
    };
    let mut buffer = vec![0; 1 << 16];
    // Gives the first two bytes. What is not zlib after all, or broken, unpacks to no more.
    let mut count = |packed: &mut dyn Read, take: &mut dyn FnMut(usize) -> Result<()>| -> Result<[u8; 2]> {
        let mut start = None;
        while let Ok(read @ 1..) = packed.read(&mut buffer) {
            start.get_or_insert([buffer[0], buffer[1]]);
            take(read)?;
        }
        Ok(start.unwrap_or_default())
    };
    let zlib =
        |start: &[u8]| matches!(start, [a, b, ..] if a & 15 == 8 && u16::from_be_bytes([*a, *b]) % 31 == 0);
    let mut rest = bytes;
    while let Some(found) = rest.windows(MARK.len()).position(|window| window == MARK) {
        let before = bytes.len() - rest.len() + found;
        let dictionary = &bytes[before.saturating_sub(DICTIONARY)..before];
        rest = &rest[found + MARK.len()..];
        let packed = rest.strip_prefix(b"\r\n").or_else(|| rest.strip_prefix(b"\n")).unwrap_or(rest);
        if zlib(packed) && zlib(&count(&mut ZlibDecoder::new(packed), &mut take)?) {
            count(&mut ZlibDecoder::new(ZlibDecoder::new(packed)), &mut take)?;
        }
        if dictionary.windows(3).any(|word| word == b"LZW") {
            for decoder in [Decoder::with_tiff_size_switch(BitOrder::Msb, 8), Decoder::new(BitOrder::Msb, 8)]
            {
                count_lzw(decoder, packed, &mut take)?;
            }
        }
    }
    Ok(())
}

fn count_lzw(
    mut decoder: Decoder,
    mut packed: &[u8],
    take: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let step = decoder.decode_bytes(packed, &mut buffer);
        take(step.consumed_out)?;
        packed = &packed[step.consumed_in..];
        if !matches!(step.status, Ok(LzwStatus::Ok)) {
            return Ok(());
        }
    }
}

fn extract(bytes: &[u8]) -> Result<String> {
    let broken = |error: &dyn std::fmt::Display| anyhow!("not a PDF that can be read: {error}");
    let mut document = Document::load_mem(bytes).map_err(|error| broken(&error))?;
    if document.is_encrypted() {
        document.decrypt("").map_err(|error| broken(&error))?;
    }
    let mut known = HashMap::new();
    let mut all = 0;
    for page in document.get_pages().into_values() {
        let resources = resources_of_page(&document, page)?;
        if let (Some(resources), Ok(content)) = (resources, document.get_page_content(page)) {
            all += drawings(&document, &content, resources, 0, &mut known)?;
            ensure!(all <= MOST_DRAWINGS, "a PDF with more than {MOST_DRAWINGS} drawings in drawings");
        }
    }
    let mut text = String::new();
    output_doc(&document, &mut PlainTextOutput::new(&mut text)).map_err(|error| broken(&error))?;
    Ok(text)
}

/// The page's resources, or those of the folders that it lies in.
fn resources_of_page(document: &Document, page: ObjectId) -> Result<Option<&Dictionary>> {
    let (mut place, mut found) = (document.get_dictionary(page).ok(), None);
    for _ in 0..DEEPEST {
        let Some(folder) = place else { return Ok(found) };
        found = found.or_else(|| dictionary(document, folder, b"Resources"));
        let parent = folder.get(b"Parent").and_then(Object::as_reference);
        place = parent.and_then(|parent| document.get_dictionary(parent)).ok();
    }
    Err(anyhow!("a PDF whose pages lie in each other"))
}

fn dictionary<'a>(document: &'a Document, of: &'a Dictionary, key: &[u8]) -> Option<&'a Dictionary> {
    document.dereference(of.get(key).ok()?).ok()?.1.as_dict().ok()
}

/// How many drawings (XObjects) `content` shows, those in drawings included. `known` has those counted before, by the
/// drawing and the resources that its names stand for.
fn drawings(
    document: &Document,
    content: &[u8],
    resources: &Dictionary,
    depth: usize,
    known: &mut HashMap<(ObjectId, *const Dictionary), u64>,
) -> Result<u64> {
    ensure!(depth < DEEPEST, "a PDF with more than {DEEPEST} drawings in each other");
    let (Some(named), Ok(content)) = (dictionary(document, resources, b"XObject"), Content::decode(content))
    else {
        return Ok(1);
    };
    let mut count = 1;
    for operation in content.operations.iter().filter(|operation| operation.operator == "Do") {
        let name = operation.operands.first().and_then(|name| name.as_name().ok());
        let id = name.and_then(|name| named.get(name).and_then(Object::as_reference).ok());
        let Some((id, Ok(stream))) = id.map(|id| (id, document.get_object(id).and_then(Object::as_stream)))
        else {
            continue;
        };
        let own = dictionary(document, &stream.dict, b"Resources").unwrap_or(resources);
        let key = (id, std::ptr::from_ref(own));
        count += match known.get(&key) {
            Some(count) => *count,
            None => {
                let content = stream.get_plain_content().unwrap_or_else(|_| stream.content.clone());
                let count = drawings(document, &content, own, depth + 1, known)?;
                known.insert(key, count);
                count
            }
        };
        ensure!(count <= MOST_DRAWINGS, "a PDF with more than {MOST_DRAWINGS} drawings in drawings");
    }
    Ok(count)
}
