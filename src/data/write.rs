//! Rows into files: JSONL, JSON, CSV, Parquet, each whole or absent.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::column_types::ColumnTypes;
use super::parquet_write::write_parquet;
use super::records::{ENDINGS, Row, ending};
use crate::error::Error;
use crate::io::write_atomically_with;

/// Writes `rows` to `path` in the format of its ending (`.jsonl`, `.json`, `.csv`, `.parquet`; the first three also with
/// `.gz` or `.zst`) and returns how many there were. Memory does not grow with their number: formats that must know all
/// columns first read the rows again from a file beside `path`, which is then removed.
///
/// A CSV cell is a string as it is, null as nothing, any other value as JSON.
///
/// # Errors
/// An unknown ending; an error among `rows`; a column whose values Parquet cannot hold in one type.
pub fn write_rows(path: &Path, rows: impl IntoIterator<Item = Result<Row>>) -> Result<u64> {
    let (format, compression) = output_format(path)?;
    let mut count = 0;
    let rows = rows.into_iter().inspect(|row| count += u64::from(row.is_ok()));
    match format {
        "jsonl" => write_atomically_with(path, |file| {
            compressed(file, compression, |out| {
                for row in rows {
                    serde_json::to_writer(&mut *out, &row?)?;
                    out.write_all(b"\n")?;
                }
                Ok(())
            })
        })?,
        "json" => write_atomically_with(path, |file| {
            compressed(file, compression, |out| {
                let mut before = "[\n";
                for row in rows {
                    out.write_all(before.as_bytes())?;
                    serde_json::to_writer(&mut *out, &row?)?;
                    before = ",\n";
                }
                out.write_all(if before == "[\n" { b"[]\n" } else { b"\n]\n" })?;
                Ok(())
            })
        })?,
        "csv" => {
            let spool = Spool::new(path, rows)?;
            write_atomically_with(path, |file| compressed(file, compression, |out| write_csv(out, &spool)))?;
        }
        _ => {
            let spool = Spool::new(path, rows)?;
            let schema = spool.columns.schema()?;
            write_atomically_with(path, |file| write_parquet(file, schema, spool.rows()?))?;
        }
    }
    Ok(count)
}

/// The format and compression that the ending of `path` asks for.
///
/// # Errors
/// No ending, or one of no format that can be written.
pub fn output_format(path: &Path) -> Result<(&'static str, Option<&'static str>)> {
    match ending(path) {
        Some(("parquet", Some(_))) => bail!(Error::Usage(format!(
            "{}: a Parquet file is compressed inside: name it .parquet",
            path.display()
        ))),
        Some(found) => Ok(found),
        None => bail!(Error::Usage(format!(
            "{}: the ending names no format: expected {} (each but .parquet also with .gz or .zst)",
            path.display(),
            ENDINGS.map(|ending| format!(".{ending}")).join(", ")
        ))),
    }
}

fn compressed(
    file: &mut BufWriter<File>,
    compression: Option<&str>,
    write: impl FnOnce(&mut dyn Write) -> Result<()>,
) -> Result<()> {
    match compression {
        Some("gz") => {
            let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::default());
            write(&mut encoder)?;
            encoder.finish()?;
        }
        Some(_) => {
            let mut encoder = zstd::stream::write::Encoder::new(file, zstd::DEFAULT_COMPRESSION_LEVEL)?;
            write(&mut encoder)?;
            encoder.finish()?;
        }
        None => write(file)?,
    }
    Ok(())
}

fn write_csv(out: &mut dyn Write, spool: &Spool) -> Result<()> {
    let mut csv = csv::Writer::from_writer(out);
    let columns: Vec<&str> = spool.columns.names().collect();
    if !columns.is_empty() {
        csv.write_record(&columns)?;
    }
    for row in spool.rows()? {
        let row = row?;
        let cells = columns.iter().map(|column| match row.get(*column) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        });
        csv.write_record(cells)?;
    }
    Ok(csv.flush()?)
}

/// Rows in a file of their own, to be read again once their columns are known.
struct Spool {
    path: PathBuf,
    columns: ColumnTypes,
}

impl Spool {
    fn new(beside: &Path, rows: impl Iterator<Item = Result<Row>>) -> Result<Spool> {
        let name = beside.file_name().unwrap_or_default().to_string_lossy();
        let path = beside.with_file_name(format!(".{name}.rows.{}.tmp", std::process::id()));
        let mut spool = Spool { path, columns: ColumnTypes::default() };
        let file = File::create(&spool.path).with_context(|| format!("writing {}", spool.path.display()))?;
        let mut file = BufWriter::new(file);
        for row in rows {
            let row = row?;
            spool.columns.see(&row);
            serde_json::to_writer(&mut file, &row)?;
            file.write_all(b"\n")?;
        }
        file.flush().with_context(|| format!("writing {}", spool.path.display()))?;
        Ok(spool)
    }

    fn rows(&self) -> Result<impl Iterator<Item = Result<Row>>> {
        let lines = BufReader::new(File::open(&self.path)?).lines();
        Ok(lines.map(|line| Ok(serde_json::from_str(&line?)?)))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
