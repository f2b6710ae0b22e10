use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Map, Value};

use super::parquet;

/// One row of a dataset: column names and values.
pub type Row = Map<String, Value>;

/// Where a record came from, for messages: `data.jsonl, line 12` or `data.parquet, row 3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The data file.
    pub file: Arc<Path>,
    /// `line` for line-based files, else `row`; both count from 1.
    pub unit: &'static str,
    /// The number of the line or row.
    pub number: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} {}", self.file.display(), self.unit, self.number)
    }
}

/// A row and where it stands.
#[derive(Clone, Debug)]
pub struct Record {
    /// The values by column.
    pub row: Row,
    /// Its file and line.
    pub place: Place,
}

type Rows = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// The records of several files in order, read as they are asked for.
pub struct Records {
    files: std::vec::IntoIter<PathBuf>,
    open: Option<Rows>,
}

/// The endings of data files; each may be followed by `.gz` or `.zst`.
const ENDINGS: [&str; 4] = ["json", "jsonl", "csv", "parquet"];

impl Records {
    /// Opens `sources`: files, folders (all data files in them, by name) and globs. Files are opened one by one later.
    ///
    /// # Errors
    /// A source that matches nothing, or a file whose ending is not of a known format.
    pub fn open<S: AsRef<str>>(sources: &[S]) -> Result<Records> {
        let mut files = Vec::new();
        for source in sources {
            files.extend(resolve(source.as_ref())?);
        }
        if files.is_empty() {
            bail!("no dataset given");
        }
        Ok(Records { files: files.into_iter(), open: None })
    }
}

impl Iterator for Records {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        loop {
            if let Some(rows) = &mut self.open {
                if let Some(record) = rows.next() {
                    return Some(record);
                }
                self.open = None;
            }
            let file = self.files.next()?;
            match read(&file) {
                Ok(rows) => self.open = Some(rows),
                Err(error) => return Some(Err(error.context(format!("reading {}", file.display())))),
            }
        }
    }
}

/// The data files that `source` names, in order of their names.
fn resolve(source: &str) -> Result<Vec<PathBuf>> {
    let path = Path::new(source);
    let known =
        || format!("{} (each also with .gz or .zst)", ENDINGS.map(|ending| format!(".{ending}")).join(", "));
    if path.is_file() {
        if ending(path).is_none() {
            bail!("{source}: unknown kind of data file: expected {}", known());
        }
        return Ok(vec![path.to_owned()]);
    }
    let mut files: Vec<PathBuf> = if path.is_dir() {
        fs::read_dir(path)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect())
            .with_context(|| format!("reading the folder {source}"))?
    } else if source.contains(['*', '?', '[']) {
        glob::glob(source)
            .with_context(|| format!("{source}: not a valid glob"))?
            .collect::<Result<_, _>>()
            .with_context(|| format!("reading what {source} matches"))?
    } else {
        bail!("{source}: no such file or folder");
    };
    files.retain(|file| file.is_file() && ending(file).is_some());
    files.sort();
    if files.is_empty() {
        bail!("{source}: no data file found: expected {}", known());
    }
    Ok(files)
}

/// The format's ending and the compression's, if this is a data file.
fn ending(path: &Path) -> Option<(&'static str, Option<&'static str>)> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let (stem, compression) = match (name.strip_suffix(".gz"), name.strip_suffix(".zst")) {
        (Some(stem), _) => (stem, Some("gz")),
        (_, Some(stem)) => (stem, Some("zst")),
        _ => (name.as_str(), None),
    };
    let (_, found) = stem.rsplit_once('.')?;
    ENDINGS.into_iter().find(|known| *known == found).map(|format| (format, compression))
}

fn read(path: &Path) -> Result<Rows> {
    let (format, compression) = ending(path).context("not a data file")?;
    let file: Arc<Path> = path.into();
    let raw = File::open(path)?;
    if (format, compression) == ("parquet", None) {
        return parquet::rows(raw, file);
    }
    let mut bytes: Box<dyn BufRead + Send> = match compression {
        Some("gz") => Box::new(BufReader::new(flate2::read::MultiGzDecoder::new(BufReader::new(raw)))),
        Some(_) => Box::new(BufReader::new(zstd::stream::read::Decoder::new(raw)?)),
        None => Box::new(BufReader::new(raw)),
    };
    match format {
        "parquet" => {
            let mut whole = Vec::new();
            bytes.read_to_end(&mut whole)?;
            parquet::rows(::bytes::Bytes::from(whole), file)
        }
        "csv" => csv_rows(bytes, file),
        "jsonl" => Ok(Box::new(JsonLines { bytes, file, line: 0, text: String::new() })),
        _ => json_rows(bytes, file),
    }
}

struct JsonLines {
    bytes: Box<dyn BufRead + Send>,
    file: Arc<Path>,
    line: u64,
    text: String,
}

impl Iterator for JsonLines {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        loop {
            self.text.clear();
            self.line += 1;
            let place = Place { file: self.file.clone(), unit: "line", number: self.line };
            match self.bytes.read_line(&mut self.text) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => return Some(Err(anyhow!("{place}: {error}"))),
            }
            let text = self.text.trim_start_matches('\u{feff}').trim();
            if !text.is_empty() {
                let row = serde_json::from_str::<Row>(text);
                return Some(match row {
                    Ok(row) => Ok(Record { row, place }),
                    Err(error) => Err(anyhow!("{place}: expected one JSON object a line: {error}")),
                });
            }
        }
    }
}

/// A JSON array of objects; an object that holds one such array (`{"data": [..]}`); or, as many files named .json are,
/// objects one after another.
fn json_rows(mut bytes: Box<dyn BufRead + Send>, file: Arc<Path>) -> Result<Rows> {
    let mut text = String::new();
    bytes.read_to_string(&mut text)?;
    if text.trim_start_matches('\u{feff}').trim_start().starts_with('[') {
        return Ok(Box::new(JsonArray::new(text, file)));
    }
    let mut objects =
        serde_json::Deserializer::from_str(text.trim_start_matches('\u{feff}')).into_iter::<Row>();
    let first = objects.next().transpose().with_context(|| "expected a JSON array of objects")?;
    let alone = objects.next().is_none();
    let Some(mut first) = first.filter(|_| alone) else {
        let lines = std::io::Cursor::new(text.into_bytes());
        return Ok(Box::new(JsonLines { bytes: Box::new(lines), file, line: 0, text: String::new() }));
    };
    let mut arrays = first.iter().filter(|(_, value)| {
        value.as_array().is_some_and(|rows| !rows.is_empty() && rows.iter().all(Value::is_object))
    });
    let name = match (arrays.next(), arrays.next()) {
        (Some((name, _)), None) => name.clone(),
        (None, _) => bail!("expected a JSON array of objects, or an object that holds one"),
        (Some(_), Some(_)) => bail!(
            "the object holds more than one array of objects ({}): leave only the rows",
            first.keys().cloned().collect::<Vec<_>>().join(", ")
        ),
    };
    let Some(Value::Array(rows)) = first.remove(&name) else { bail!("{name} is not an array") };
    Ok(Box::new(rows.into_iter().zip(1..).filter_map(move |(value, number)| match value {
        Value::Object(row) => {
            Some(Ok(Record { row, place: Place { file: file.clone(), unit: "row", number } }))
        }
        _ => None,
    })))
}

/// Reads an array element by element: only the text is held, not all values at once.
struct JsonArray {
    text: String,
    file: Arc<Path>,
    at: usize,
    row: u64,
    done: bool,
}

impl JsonArray {
    fn new(text: String, file: Arc<Path>) -> JsonArray {
        let at = text.find('[').map_or(0, |at| at + 1);
        JsonArray { text, file, at, row: 0, done: false }
    }

    fn skip_space(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        let space = rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.at += space;
        rest.get(space).copied()
    }

    fn element(&mut self) -> Result<Option<Row>> {
        match (self.skip_space(), self.row) {
            (Some(b']'), _) => {
                self.at += 1;
                match self.skip_space() {
                    None => return Ok(None),
                    Some(_) => bail!("line {}: text after the end of the array", self.line(self.at)),
                }
            }
            (Some(b','), row) if row > 0 => self.at += 1,
            (Some(_), 0) => {}
            (None, _) => bail!("line {}: the array does not end: is the file whole?", self.line(self.at)),
            (Some(_), _) => bail!("line {}: expected , or ] after an element", self.line(self.at)),
        }
        self.row += 1;
        let rest = &self.text[self.at..];
        let mut elements = serde_json::Deserializer::from_str(rest).into_iter::<Row>();
        let element = elements.next();
        let end = self.at + elements.byte_offset();
        match element {
            Some(Ok(row)) => {
                self.at = end;
                Ok(Some(row))
            }
            Some(Err(error)) => {
                let line = self.line(self.at) + error.line().saturating_sub(1);
                bail!("line {line}: expected an array of JSON objects: {error}")
            }
            None => bail!("line {}: the array does not end: is the file whole?", self.line(self.at)),
        }
    }

    fn line(&self, at: usize) -> usize {
        1 + self.text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count()
    }
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
            Err(error) => Some(Err(anyhow!("{}, {error}", self.file.display()))),
        }
    }
}

/// All values are strings; an empty cell is an empty string.
fn csv_rows(bytes: Box<dyn BufRead + Send>, file: Arc<Path>) -> Result<Rows> {
    let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
    let headers = reader.headers().context("reading the header line")?.clone();
    if headers.iter().any(|name| headers.iter().filter(|other| *other == name).count() > 1) {
        bail!("the header line names a column twice: {:?}", headers.iter().collect::<Vec<_>>());
    }
    Ok(Box::new(reader.into_records().map(move |record| {
        let record = record.map_err(|error| match error.kind() {
            csv::ErrorKind::UnequalLengths { pos, expected_len, len } => anyhow!(
                "{}, line {}: {len} cells, but the header has {expected_len}",
                file.display(),
                pos.as_ref().map_or(0, csv::Position::line)
            ),
            _ => anyhow!("{}: {error}", file.display()),
        })?;
        let number = record.position().map_or(0, csv::Position::line);
        let row =
            headers.iter().zip(&record).map(|(name, cell)| (name.to_owned(), Value::from(cell))).collect();
        Ok(Record { row, place: Place { file: file.clone(), unit: "line", number } })
    })))
}
