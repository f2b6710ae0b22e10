//! JSON files row by row: one object a line, or one array of objects. Only the row at hand is in memory.

use std::io::{self, BufRead};
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;

use super::records::{BrokenRow, Place, Record, Row, without_bom};

/// One JSON object a line; empty lines do not count. Goes on behind a line that cannot be read.
pub(super) struct JsonLines {
    bytes: Box<dyn BufRead + Send>,
    file: Arc<Path>,
    line: u64,
    text: Vec<u8>,
}

impl JsonLines {
    pub(super) fn new(bytes: Box<dyn BufRead + Send>, file: Arc<Path>) -> JsonLines {
        JsonLines { bytes, file, line: 0, text: Vec::new() }
    }
}

impl Iterator for JsonLines {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        loop {
            self.text.clear();
            self.line += 1;
            match self.bytes.read_until(b'\n', &mut self.text) {
                Ok(0) => return None,
                Ok(_) => {}
                // Nothing can be read behind it: of a cut archive, the same error for ever.
                Err(error) => {
                    let error = anyhow::anyhow!("{}, line {}: {error}", self.file.display(), self.line);
                    self.bytes = Box::new(io::empty());
                    return Some(Err(error));
                }
            }
            let text = without_bom(&self.text).trim_ascii();
            if text.is_empty() {
                continue;
            }
            let place = Place { file: self.file.clone(), unit: "line", number: self.line };
            return Some(parse_line(text, place));
        }
    }
}

/// The object that a line holds.
pub(super) fn parse_line(line: &[u8], place: Place) -> Result<Record> {
    let text = str::from_utf8(without_bom(line));
    let (reason, broken_utf8) = match text.map(|text| serde_json::from_str::<Row>(text.trim())) {
        Ok(Ok(row)) => return Ok(Record { row, place }),
        Ok(Err(error)) => (format!("expected one JSON object a line: {error}"), false),
        Err(error) => (format!("byte {} is not valid UTF-8", error.valid_up_to() + 1), true),
    };
    Err(BrokenRow { place, reason, broken_utf8 }.into())
}

/// Whether the first byte that is no space is `[`, which is then taken from `bytes`, as all before it.
pub(super) fn starts_with_bracket(bytes: &mut Box<dyn BufRead + Send>) -> io::Result<bool> {
    loop {
        let buffer = bytes.fill_buf()?;
        let text = without_bom(buffer);
        let space = buffer.len() - text.trim_ascii_start().len();
        match buffer.get(space) {
            Some(b'[') => {
                bytes.consume(space + 1);
                return Ok(true);
            }
            Some(_) => return Ok(false),
            None if buffer.is_empty() => return Ok(false),
            None => {
                let all = buffer.len();
                bytes.consume(all);
            }
        }
    }
}

/// The objects of an array whose `[` was read. Ends at the first error: what follows could be anything.
pub(super) struct JsonArray {
    bytes: Box<dyn BufRead + Send>,
    file: Arc<Path>,
    line: u64,
    row: u64,
    done: bool,
}

impl JsonArray {
    pub(super) fn new(bytes: Box<dyn BufRead + Send>, file: Arc<Path>) -> JsonArray {
        JsonArray { bytes, file, line: 1, row: 0, done: false }
    }

    /// The next byte that is no space, which stays; `None` at the end of the file.
    fn skip_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.bytes.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let space = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let found = buffer.get(space).copied();
            self.line += newlines(&buffer[..space]);
            self.bytes.consume(space);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    fn broken(&self, line: u64, reason: &str) -> BrokenRow {
        let place = Place { file: self.file.clone(), unit: "line", number: line };
        BrokenRow { place, reason: reason.to_owned(), broken_utf8: false }
    }

    fn element(&mut self) -> Result<Option<Row>> {
        match (self.skip_space()?, self.row) {
            (Some(b']'), _) => {
                self.bytes.consume(1);
                return match self.skip_space()? {
                    None => Ok(None),
                    Some(_) => Err(self.broken(self.line, "text after the end of the array").into()),
                };
            }
            (Some(b','), row) if row > 0 => self.bytes.consume(1),
            (Some(_), 0) => {}
            (None, _) => return Err(self.cut().into()),
            (Some(_), _) => return Err(self.broken(self.line, "expected , or ] after an element").into()),
        }
        let first = self.skip_space()?;
        self.row += 1;
        let line = self.line;
        let object = match first {
            None => return Err(self.cut().into()),
            Some(b'{') => self.object()?,
            Some(_) => {
                return Err(self
                    .broken(line, "expected an array of JSON objects, found another value")
                    .into());
            }
        };
        if let Err(error) = str::from_utf8(&object) {
            let line = line + newlines(&object[..error.valid_up_to()]);
            return Err(BrokenRow { broken_utf8: true, ..self.broken(line, "not valid UTF-8") }.into());
        }
        serde_json::from_slice(&object).map(Some).map_err(|error| {
            let line = line + error.line().saturating_sub(1) as u64;
            self.broken(line, &format!("expected an array of JSON objects: {error}")).into()
        })
    }

    fn cut(&self) -> BrokenRow {
        self.broken(self.line, "the array does not end: is the file whole?")
    }

    /// The bytes from `{` to the `}` that closes it.
    fn object(&mut self) -> Result<Vec<u8>> {
        let mut object = Vec::new();
        let (mut depth, mut in_string, mut escaped) = (0u64, false, false);
        loop {
            let buffer = self.bytes.fill_buf()?;
            if buffer.is_empty() {
                return Err(self.cut().into());
            }
            let mut end = None;
            for (at, byte) in buffer.iter().enumerate() {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    b'{' if !in_string => depth += 1,
                    b'}' if !in_string => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    end = Some(at + 1);
                    break;
                }
            }
            let taken = end.unwrap_or(buffer.len());
            object.extend_from_slice(&buffer[..taken]);
            self.line += newlines(&buffer[..taken]);
            self.bytes.consume(taken);
            if end.is_some() {
                return Ok(object);
            }
        }
    }
}

fn newlines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

impl Iterator for JsonArray {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        if self.done {
            return None;
        }
        let element = self.element();
        self.done = !matches!(element, Ok(Some(_)));
        let place = Place { file: self.file.clone(), unit: "row", number: self.row };
        match element {
            Ok(row) => row.map(|row| Ok(Record { row, place })),
            Err(error) if error.is::<BrokenRow>() => Some(Err(error)),
            Err(error) => Some(Err(error.context(self.file.display().to_string()))),
        }
    }
}
