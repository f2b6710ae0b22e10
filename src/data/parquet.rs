//! Parquet rows as JSON values, one row group after another.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use chrono::DateTime;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row as ParquetRow};
use serde_json::{Map, Value};

use super::panics::without_panic;
use super::records::{BrokenRow, Place, Record, Rows};

const GAVE_UP: &str = "a broken page, on which the Parquet library gives up";

/// The Parquet library panics on some broken files.
fn checked<T>(work: impl FnOnce() -> parquet::errors::Result<T>) -> parquet::errors::Result<T> {
    without_panic(work).unwrap_or_else(|| Err(ParquetError::General(GAVE_UP.to_owned())))
}

pub(super) fn rows<R>(source: R, file: Arc<Path>) -> Result<Rows>
where
    R: ChunkReader + 'static,
{
    let reader = checked(|| SerializedFileReader::new(source)).context("not a whole Parquet file")?;
    let mut rows = RowIter::from_file_into(Box::new(reader));
    let mut number = 0;
    let mut broken = false;
    Ok(Box::new(std::iter::from_fn(move || {
        if broken {
            return None;
        }
        let row = checked(|| rows.next().transpose()).transpose()?;
        number += 1;
        let place = Place { file: file.clone(), unit: "row", number };
        Some(match row {
            Ok(row) => Ok(Record { row: object(&row, true), place }),
            Err(error) => {
                // The pages behind a torn one cannot be told apart.
                broken = true;
                Err(BrokenRow { place, reason: error.to_string(), broken_utf8: false }.into())
            }
        })
    })))
}

/// The rows of each row group of `file`.
pub(super) fn group_rows(file: &Path) -> Result<Vec<u64>> {
    let source = File::open(file)?;
    let reader = checked(|| SerializedFileReader::new(source)).context("not a whole Parquet file")?;
    let rows = reader.metadata().row_groups().iter().map(|group| u64::try_from(group.num_rows()));
    rows.collect::<Result<_, _>>().context("a row group with a negative number of rows")
}

/// The records of one row group, which `before` rows precede.
pub(super) fn group(file: &Arc<Path>, group: usize, before: u64) -> Result<Vec<Record>> {
    let place = |number| Place { file: file.clone(), unit: "row", number };
    let shown = || file.display().to_string();
    let source = File::open(file).with_context(shown)?;
    let reader = checked(|| SerializedFileReader::new(source)).with_context(shown)?;
    let group = checked(|| reader.get_row_group(group)).with_context(shown)?;
    let mut rows = checked(|| RowIter::from_row_group(None, group.as_ref())).with_context(shown)?;
    std::iter::from_fn(|| checked(|| rows.next().transpose()).transpose())
        .zip(before + 1..)
        .map(|(row, number)| {
            let row = row.with_context(|| place(number).to_string())?;
            Ok(Record { row: object(&row, true), place: place(number) })
        })
        .collect()
}

/// A struct's null fields are left out: columns hold a key for every row that any row has, such as `tool_calls`.
fn object(row: &ParquetRow, keep_null: bool) -> Map<String, Value> {
    row.get_column_iter()
        .filter(|(_, field)| keep_null || !matches!(field, Field::Null))
        .map(|(name, field)| (name.clone(), value(field)))
        .collect()
}

fn value(field: &Field) -> Value {
    let time =
        |time: Option<DateTime<chrono::Utc>>| time.map_or(Value::Null, |t| Value::from(t.to_rfc3339()));
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => Value::from(*x),
        Field::Byte(x) => Value::from(*x),
        Field::Short(x) => Value::from(*x),
        Field::Int(x) | Field::TimeMillis(x) => Value::from(*x),
        Field::Long(x) | Field::TimeMicros(x) => Value::from(*x),
        Field::UByte(x) => Value::from(*x),
        Field::UShort(x) => Value::from(*x),
        Field::UInt(x) => Value::from(*x),
        Field::ULong(x) => Value::from(*x),
        Field::Float16(x) => Value::from(f32::from(*x)),
        Field::Float(x) => Value::from(*x),
        Field::Double(x) => Value::from(*x),
        Field::Str(x) => Value::from(x.as_str()),
        // Text, as many writers leave it unmarked, or else binary: pictures, as a rule.
        Field::Bytes(x) => match str::from_utf8(x.data()) {
            Ok(text) => Value::from(text),
            Err(_) => Value::from(BASE64_STANDARD.encode(x.data())),
        },
        Field::Date(days) => time(DateTime::from_timestamp(i64::from(*days) * 86_400, 0)),
        Field::TimestampMillis(x) => time(DateTime::from_timestamp_millis(*x)),
        Field::TimestampMicros(x) => time(DateTime::from_timestamp_micros(*x)),
        Field::Group(row) => Value::Object(object(row, false)),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        Field::MapInternal(map) => Value::Object(
            map.entries()
                .iter()
                .map(|(key, item)| {
                    let key = match value(key) {
                        Value::String(text) => text,
                        other => other.to_string(),
                    };
                    (key, value(item))
                })
                .collect(),
        ),
        // Decimals print as their digits.
        other => Value::from(other.to_string()),
    }
}
