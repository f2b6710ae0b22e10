use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};
use thiserror::Error;

use super::json::{JsonArray, JsonLines, starts_with_bracket};
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

/// A row that cannot be read. [`Records`] goes on with the next one where the file's format lets it.
#[derive(Clone, Debug, Error)]
#[error("{place}: {reason}")]
pub struct BrokenRow {
    /// Where it stands.
    pub place: Place,
    /// What was expected and what was found.
    pub reason: String,
    /// Whether its bytes are not UTF-8.
    pub broken_utf8: bool,
}

pub(super) type Rows = Box<dyn Iterator<Item = Result<Record>> + Send>;

/// The records of several files in order, read as they are asked for.
pub struct Records {
    files: std::vec::IntoIter<PathBuf>,
    open: Option<Rows>,
}

/// The endings of data files; each may be followed by `.gz` or `.zst`.
pub(super) const ENDINGS: [&str; 4] = ["json", "jsonl", "csv", "parquet"];

impl Records {
    /// Opens `sources`: files, folders (all data files in them, by name) and globs. Files are opened one by one later.
    ///
    /// # Errors
    /// A source that matches nothing, or a file whose ending is not of a known format.
    pub fn open<S: AsRef<str>>(sources: &[S]) -> Result<Records> {
        Ok(Records { files: data_files(sources)?.into_iter(), open: None })
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

/// The data files that all of `sources` (files, folders, globs) name.
///
/// # Errors
/// As [`Records::open`].
pub fn data_files<S: AsRef<str>>(sources: &[S]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for source in sources {
        files.extend(resolve(source.as_ref())?);
    }
    if files.is_empty() {
        bail!("no dataset given");
    }
    Ok(files)
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

/// Whether `path` ends as a data file does, `.jsonl` or `.csv.gz` for example.
pub fn is_data_file(path: &Path) -> bool {
    ending(path).is_some()
}

/// The format's ending and the compression's, if this is a data file.
pub(super) fn ending(path: &Path) -> Option<(&'static str, Option<&'static str>)> {
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
        "jsonl" => Ok(Box::new(JsonLines::new(bytes, file))),
        _ => json_rows(bytes, file),
    }
}

/// A JSON array of objects; an object that holds one such array (`{"data": [..]}`); or, as many files named .json are,
/// objects one after another. Only the middle one is held in memory as a whole.
fn json_rows(mut bytes: Box<dyn BufRead + Send>, file: Arc<Path>) -> Result<Rows> {
    if starts_with_bracket(&mut bytes)? {
        return Ok(Box::new(JsonArray::new(bytes, file)));
    }
    let mut line = Vec::new();
    bytes.read_until(b'\n', &mut line)?;
    let first: Option<Map<String, Value>> = serde_json::from_slice(without_bom(&line)).ok();
    if first.is_some() && !bytes.fill_buf()?.is_empty() {
        return Ok(Box::new(JsonLines::new(Box::new(Cursor::new(line).chain(bytes)), file)));
    }
    bytes.read_to_end(&mut line)?;
    object_of_rows(&line, file)
}

pub(super) fn without_bom(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes)
}

/// The rows of an object that holds one array of objects.
fn object_of_rows(text: &[u8], file: Arc<Path>) -> Result<Rows> {
    let mut object: Row =
        serde_json::from_slice(without_bom(text)).context("expected a JSON array of objects")?;
    let mut arrays = object.iter().filter(|(_, value)| {
        value.as_array().is_some_and(|rows| !rows.is_empty() && rows.iter().all(Value::is_object))
    });
    let name = match (arrays.next(), arrays.next()) {
        (Some((name, _)), None) => name.clone(),
        (None, _) => bail!("expected a JSON array of objects, or an object that holds one"),
        (Some(_), Some(_)) => bail!(
            "the object holds more than one array of objects ({}): leave only the rows",
            object.keys().cloned().collect::<Vec<_>>().join(", ")
        ),
    };
    let Some(Value::Array(rows)) = object.remove(&name) else { bail!("{name} is not an array") };
    Ok(Box::new(rows.into_iter().zip(1..).filter_map(move |(value, number)| match value {
        Value::Object(row) => {
            Some(Ok(Record { row, place: Place { file: file.clone(), unit: "row", number } }))
        }
        _ => None,
    })))
}

/// All values are strings; an empty cell is an empty string.
fn csv_rows(bytes: Box<dyn BufRead + Send>, file: Arc<Path>) -> Result<Rows> {
    let mut reader = csv::ReaderBuilder::new().from_reader(bytes);
    let headers = reader.headers().context("reading the header line")?.clone();
    if headers.iter().any(|name| headers.iter().filter(|other| *other == name).count() > 1) {
        bail!("the header line names a column twice: {:?}", headers.iter().collect::<Vec<_>>());
    }
    Ok(Box::new(reader.into_records().map(move |record| {
        let record = record.map_err(|error| broken_csv(&error, &file))?;
        let number = record.position().map_or(0, csv::Position::line);
        let row =
            headers.iter().zip(&record).map(|(name, cell)| (name.to_owned(), Value::from(cell))).collect();
        Ok(Record { row, place: Place { file: file.clone(), unit: "line", number } })
    })))
}

fn broken_csv(error: &csv::Error, file: &Arc<Path>) -> BrokenRow {
    let number = error.position().map_or(0, csv::Position::line);
    let reason = match error.kind() {
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => {
            format!("{len} cells, but the header has {expected_len}")
        }
        csv::ErrorKind::Utf8 { err, .. } => format!("cell {} is not valid UTF-8", err.field() + 1),
        _ => error.to_string(),
    };
    let broken_utf8 = matches!(error.kind(), csv::ErrorKind::Utf8 { .. });
    BrokenRow { place: Place { file: file.clone(), unit: "line", number }, reason, broken_utf8 }
}
