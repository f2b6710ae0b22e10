//! What a dataset holds: rows, columns, roles, lengths, what is trained of it.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::Value;

use super::column_types::ColumnTypes;
use super::encode::{Encoded, Encoder};
use super::images::{ImageInfo, ImageSource, images};
use super::lint::texts;
use super::parallel::{CHUNK, pipeline};
use super::records::{BrokenRow, Record, Records};
use super::{DatasetFormat, DatasetOptions, Example, Histogram, TokenDataset, Tokenizer};

/// What was found in a dataset.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// Rows, those that cannot be read included.
    pub rows: u64,
    /// Columns and what they hold, such as `lists of {role, content}`.
    pub columns: Vec<(String, String)>,
    /// Rows by shape; rows of no known shape are under `unknown`.
    pub formats: BTreeMap<String, u64>,
    /// Messages by role.
    pub roles: BTreeMap<String, u64>,
    /// Messages of a conversation.
    pub turns: Histogram,
    /// Characters of a row's texts.
    pub characters: Histogram,
    /// What the tokenizer makes of the rows, if one was given.
    pub tokens: Option<TokenCounts>,
    /// Pictures, by format and size such as `jpeg 256x256`; those that are not downloaded are `url`.
    pub images: BTreeMap<String, u64>,
    /// Rows that cannot be read, understood or rendered: how many, and the first reason.
    pub broken: Option<(u64, String)>,
}

/// Tokens of a dataset.
#[derive(Clone, Debug, Default)]
pub struct TokenCounts {
    /// Tokens of a row, before it is cut.
    pub lengths: Histogram,
    /// Rows longer than `max_seq_length`.
    pub truncated: u64,
    /// Tokens that are trained, after rows are cut.
    pub trained: u64,
    /// Tokens after rows are cut.
    pub kept: u64,
    /// The first samples.
    pub examples: TokenDataset,
}

#[derive(Default)]
struct Seen {
    format: &'static str,
    roles: Vec<String>,
    turns: Option<usize>,
    characters: usize,
    images: Vec<String>,
    encoded: Option<Encoded>,
}

/// Reads all of `records`, and keeps the first `examples` samples; `on_rows` hears the number of rows so far.
///
/// # Errors
/// A file that cannot be opened. Broken rows are counted.
pub fn inspect(
    mut records: Records,
    tokenizer: Option<&Tokenizer>,
    options: &DatasetOptions,
    examples: usize,
    on_rows: &mut (dyn FnMut(u64) + Send),
) -> Result<Inspection> {
    let encoder = tokenizer.map(|tokenizer| Encoder::new(tokenizer, options));
    let mut found =
        Inspection { tokens: encoder.as_ref().map(|_| TokenCounts::default()), ..Default::default() };
    let mut columns = ColumnTypes::default();
    pipeline(
        || read_chunk(&mut records),
        |record| Some(look_at(record.as_ref().ok()?, encoder.as_ref(), options)),
        |records, seen| {
            found.rows += records.len() as u64;
            for (record, seen) in records.into_iter().zip(seen) {
                match (record, seen) {
                    (Ok(record), Some(Ok(seen))) => {
                        columns.see(&record.row);
                        found.add(seen, options, examples);
                    }
                    (Ok(record), Some(Err(error))) => {
                        columns.see(&record.row);
                        found.break_row(format!("{}: {error:#}", record.place));
                    }
                    (Ok(_), None) => {}
                    (Err(broken), _) => found.break_row(broken.to_string()),
                }
            }
            on_rows(found.rows);
            Ok(())
        },
    )?;
    found.columns = columns.describe();
    Ok(found)
}

/// Some records or broken rows.
pub(super) fn read_chunk(records: &mut Records) -> Result<Vec<std::result::Result<Record, BrokenRow>>> {
    records.by_ref().take(CHUNK).map(readable).collect()
}

/// A file that cannot be opened is an error, a row that cannot be read is a broken row.
fn readable(record: Result<Record>) -> Result<std::result::Result<Record, BrokenRow>> {
    match record {
        Ok(record) => Ok(Ok(record)),
        Err(error) => Ok(Err(error.downcast::<BrokenRow>()?)),
    }
}

impl Inspection {
    fn break_row(&mut self, reason: String) {
        self.broken.get_or_insert((0, reason)).0 += 1;
    }

    fn add(&mut self, seen: Seen, options: &DatasetOptions, examples: usize) {
        *self.formats.entry(seen.format.to_owned()).or_default() += 1;
        for role in seen.roles {
            *self.roles.entry(role).or_default() += 1;
        }
        for image in seen.images {
            *self.images.entry(image).or_default() += 1;
        }
        if let Some(turns) = seen.turns {
            self.turns.add(turns);
        }
        self.characters.add(seen.characters);
        if let (Some(counts), Some(encoded)) = (&mut self.tokens, seen.encoded) {
            let kept = encoded.ids.len().min(options.max_seq_length);
            counts.lengths.add(encoded.ids.len());
            counts.truncated += u64::from(kept < encoded.ids.len());
            counts.kept += kept as u64;
            counts.trained +=
                encoded.trained[..kept].iter().skip(1).filter(|trained| **trained).count() as u64;
            if counts.examples.len() < examples {
                counts.examples.push(&encoded.ids[..kept], &encoded.trained[..kept]);
            }
        }
    }
}

fn look_at(record: &Record, encoder: Option<&Encoder>, options: &DatasetOptions) -> Result<Seen> {
    let rows = &options.rows;
    let given = if rows.template.is_some() || rows.text_column.is_some() {
        Some(DatasetFormat::Text)
    } else {
        rows.dataset_format.or_else(|| DatasetFormat::recognise(&record.row))
    };
    let Some(format) = given else {
        // A table that is still to become a dataset, with ferrotune data to-sharegpt or --template.
        let characters = record.row.values().filter_map(Value::as_str).map(|text| text.chars().count()).sum();
        return Ok(Seen { format: "unknown", characters, ..Seen::default() });
    };
    let chat = encoder.is_none_or(|encoder| encoder.tokenizer.chat_template().is_some());
    let example = rows.example(&record.row, chat)?;
    let characters = |text: &str| text.chars().count();
    let mut seen = Seen { format: format.name(), ..Seen::default() };
    match &example {
        Example::Text(text) => seen.characters = characters(text),
        Example::PromptCompletion { prompt, completion } => {
            seen.characters = characters(prompt) + characters(completion);
        }
        Example::Tokens { .. } => {}
        Example::Conversation(conversation) => {
            let messages = &conversation.messages;
            seen.turns = Some(messages.len());
            seen.roles =
                messages.iter().filter_map(|message| message["role"].as_str().map(str::to_owned)).collect();
            seen.characters = messages.iter().flat_map(texts).map(characters).sum();
        }
    }
    for image in images(&record.row, &example, record.place.file.parent())? {
        seen.images.push(describe(&image)?);
    }
    seen.encoded = encoder.map(|encoder| encoder.encode(&example)).transpose()?;
    Ok(seen)
}

fn describe(image: &ImageSource) -> Result<String> {
    Ok(match image.info()? {
        Some(ImageInfo { format, width, height }) => format!("{format} {width}x{height}"),
        None => "url".to_owned(),
    })
}
