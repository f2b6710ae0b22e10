use std::collections::{BTreeMap, HashSet};
use std::fmt;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::encode::{Encoded, Encoder};
use super::fingerprint::{Fingerprint, fingerprint};
use super::format::{Example, RowOptions};
use super::lint::{Finding, LintCounts, RowChecks, Rule};
use super::parallel::{CHUNK, pipeline};
use super::records::{Place, Record, Records};
use super::{TokenDataset, Tokenizer};

/// How a dataset becomes samples.
#[derive(Clone, Debug)]
pub struct DatasetOptions {
    /// How rows are understood.
    pub rows: RowOptions,
    /// Longer samples lose their end (TRL's `keep_start`).
    pub max_seq_length: usize,
    /// Trains on the assistant's turns only, of conversations.
    pub assistant_only_loss: bool,
    /// Trains on the completion only, of prompt-completion rows.
    pub completion_only_loss: bool,
    /// Goes on when the chat template's end-of-turn token is never a label.
    pub allow_missing_eot: bool,
}

impl Default for DatasetOptions {
    fn default() -> DatasetOptions {
        DatasetOptions {
            rows: RowOptions::default(),
            max_seq_length: 2048,
            assistant_only_loss: false,
            completion_only_loss: true,
            allow_missing_eot: false,
        }
    }
}

/// What became of a dataset's rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatasetReport {
    /// Rows read.
    pub rows: u64,
    /// Samples kept.
    pub samples: u64,
    /// Tokens of all samples.
    pub tokens: u64,
    /// Tokens that are predicted.
    pub target_tokens: u64,
    /// Samples that lost their end to `max_seq_length`.
    pub truncated: u64,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// The chat template's end-of-turn token, where a template was used.
    pub end_of_turn: Option<String>,
    /// What [`Lint`](super::Lint) would say of the rows by the rules that cost nothing here.
    pub findings: LintCounts,
}

impl DatasetReport {
    /// As JSON, for a file.
    pub(super) fn to_json(&self) -> Value {
        json!({
            "rows": self.rows,
            "samples": self.samples,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "end_of_turn": self.end_of_turn,
            "findings": self.findings.to_json(),
        })
    }

    /// What [`to_json`](Self::to_json) wrote.
    pub(super) fn from_json(value: &Value) -> Result<DatasetReport> {
        let number = |key: &str| value[key].as_u64().with_context(|| format!("{key} is no number"));
        Ok(DatasetReport {
            rows: number("rows")?,
            samples: number("samples")?,
            tokens: number("tokens")?,
            target_tokens: number("target_tokens")?,
            truncated: number("truncated")?,
            dropped: serde_json::from_value(value["dropped"].clone())?,
            end_of_turn: serde_json::from_value(value["end_of_turn"].clone())?,
            findings: LintCounts::from_json(&value["findings"])?,
        })
    }
}

impl fmt::Display for DatasetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows, {} samples, ", self.rows, self.samples)?;
        write!(f, "{} tokens, {} of them trained", self.tokens, self.target_tokens)?;
        if self.truncated > 0 {
            write!(f, "; {} truncated to max_seq_length", self.truncated)?;
        }
        for (reason, count) in &self.dropped {
            write!(f, "; {count} dropped: {reason}")?;
        }
        Ok(())
    }
}

const EMPTY: &str = "no tokens";
const NOTHING_TRAINED: &str = "no token is trained";
const CUT_AWAY: &str = "max_seq_length cuts off all that is trained";

/// Reads `sources` (files, folders, globs), renders and tokenises each row once, and keeps the samples in order.
///
/// # Errors
/// Names the file and line of a row that cannot be read, understood or rendered; and refuses a dataset in which nothing
/// is trained or, where a chat template is in use, the token that ends a turn never is.
pub fn prepare<S: AsRef<str>>(
    sources: &[S],
    tokenizer: &Tokenizer,
    options: &DatasetOptions,
) -> Result<(TokenDataset, DatasetReport)> {
    prepare_with(sources, tokenizer, options, &mut |_| {})
}

/// As [`prepare`]; `on_rows` hears the number of rows so far.
pub fn prepare_with<S: AsRef<str>>(
    sources: &[S],
    tokenizer: &Tokenizer,
    options: &DatasetOptions,
    on_rows: &mut (dyn FnMut(u64) + Send),
) -> Result<(TokenDataset, DatasetReport)> {
    let mut data = TokenDataset::new();
    let mut push = |ids: &[u32], trained: &[bool]| {
        data.push(ids, trained);
        Ok(())
    };
    let report = prepare_into(sources, tokenizer, options, &mut push, on_rows)?;
    Ok((data, report))
}

/// Takes a sample's token ids and which of them are trained.
pub(super) type Push<'a> = dyn FnMut(&[u32], &[bool]) -> Result<()> + Send + 'a;

/// As [`prepare_with`], with each sample given to `push`.
pub(super) fn prepare_into<S: AsRef<str>>(
    sources: &[S],
    tokenizer: &Tokenizer,
    options: &DatasetOptions,
    push: &mut Push,
    on_rows: &mut (dyn FnMut(u64) + Send),
) -> Result<DatasetReport> {
    let encoder = Encoder::new(tokenizer, options);
    let checks = RowChecks::new(Some(tokenizer), encoder.end_of_turn.clone(), options)?;
    let mut sink = Sink {
        push,
        options,
        end_of_turn: encoder.end_of_turn.as_ref().map(|token| token.id),
        seen: HashSet::new(),
        report: DatasetReport::default(),
        conversations: 0,
        with_end_of_turn: 0,
    };
    let mut records = Records::open(sources)?;
    pipeline(
        || records.by_ref().take(CHUNK).collect::<Result<Vec<Record>>>(),
        |record| prepare_record(&encoder, &checks, record).with_context(|| record.place.to_string()),
        |records, prepared| {
            for (record, prepared) in records.into_iter().zip(prepared) {
                sink.add(record.place, prepared?)?;
            }
            on_rows(sink.report.rows);
            Ok(())
        },
    )?;
    let Sink { mut report, conversations, with_end_of_turn, .. } = sink;
    let sources: Vec<&str> = sources.iter().map(AsRef::as_ref).collect();
    let sources = sources.join(", ");
    if report.samples == 0 {
        bail!("{sources}: {}", nothing_to_train(&report, options));
    }
    if conversations > 0 {
        report.end_of_turn = encoder.end_of_turn.as_ref().map(|token| token.content.clone());
        if with_end_of_turn == 0 {
            let message = missing_end_of_turn(&encoder, &report);
            if !options.allow_missing_eot {
                bail!("{sources}: {message}; or go on with --allow-missing-eot");
            }
            tracing::warn!("{sources}: {message}");
        }
    }
    Ok(report)
}

/// Takes prepared rows in their order.
struct Sink<'a> {
    push: &'a mut Push<'a>,
    options: &'a DatasetOptions,
    end_of_turn: Option<u32>,
    /// Half of each fingerprint: of 10^8 rows two that differ share it with a chance of 0.03 %.
    seen: HashSet<u64>,
    report: DatasetReport,
    conversations: u64,
    with_end_of_turn: u64,
}

impl Sink<'_> {
    fn add(&mut self, place: Place, row: Prepared) -> Result<()> {
        let Prepared { is_conversation, encoded: Encoded { mut ids, mut trained }, mut broken, fingerprint } =
            row;
        let report = &mut self.report;
        report.rows += 1;
        if !self.seen.insert(fingerprint as u64) {
            broken.push((Rule::Duplicate, "the same as an earlier row".to_owned()));
        }
        // The other two are counted below.
        broken.retain(|(rule, _)| !matches!(rule, Rule::TooLong | Rule::AllMasked));
        for (rule, message) in broken {
            report.findings.add(&Finding { rule, place: place.clone(), message });
        }
        self.conversations += u64::from(is_conversation);
        let targets = |trained: &[bool]| trained.iter().skip(1).filter(|trained| **trained).count() as u64;
        let had_targets = targets(&trained) > 0;
        let whole = ids.len();
        ids.truncate(self.options.max_seq_length);
        trained.truncate(self.options.max_seq_length);
        let left = targets(&trained);
        let reason = match () {
            () if whole == 0 => Some(EMPTY),
            () if !had_targets => Some(NOTHING_TRAINED),
            () if left == 0 => Some(CUT_AWAY),
            () => None,
        };
        if let Some(reason) = reason {
            *report.dropped.entry(reason.to_owned()).or_default() += 1;
            return Ok(());
        }
        report.samples += 1;
        report.tokens += ids.len() as u64;
        report.target_tokens += left;
        report.truncated += u64::from(ids.len() < whole);
        if let Some(end) = self.end_of_turn {
            let ends = ids.iter().zip(&trained).skip(1).any(|(id, trained)| *trained && *id == end);
            self.with_end_of_turn += u64::from(ends && is_conversation);
        }
        (self.push)(&ids, &trained)
    }
}

struct Prepared {
    is_conversation: bool,
    encoded: Encoded,
    broken: Vec<(Rule, String)>,
    fingerprint: Fingerprint,
}

fn prepare_record(encoder: &Encoder, checks: &RowChecks, record: &Record) -> Result<Prepared> {
    let example = encoder.options.rows.example(&record.row, encoder.tokenizer.chat_template().is_some())?;
    let encoded = encoder.encode(&example)?;
    let mut broken = checks.example(&example);
    broken.extend(checks.encoded(&example, &encoded));
    Ok(Prepared {
        is_conversation: matches!(example, Example::Conversation(_)),
        fingerprint: fingerprint(&example),
        encoded,
        broken,
    })
}

fn nothing_to_train(report: &DatasetReport, options: &DatasetOptions) -> String {
    if report.rows == 0 {
        return "no rows".to_owned();
    }
    let reasons: Vec<String> =
        report.dropped.iter().map(|(reason, count)| format!("{reason} ({count} rows)")).collect();
    let advice = if report.dropped.contains_key(CUT_AWAY) {
        format!("raise --max-seq-length (now {})", options.max_seq_length)
    } else if options.assistant_only_loss {
        "check that the conversations have assistant turns that are not empty, or train on all tokens without \
         --assistant-only-loss"
            .to_owned()
    } else {
        "check that texts and completions are not empty".to_owned()
    };
    format!("every label is masked, so there is nothing to learn: {}. {advice}", reasons.join(", "))
}

fn missing_end_of_turn(encoder: &Encoder, report: &DatasetReport) -> String {
    let origin = encoder.tokenizer.chat_template().map_or("", |template| template.origin());
    let Some(token) = &encoder.end_of_turn else {
        return format!(
            "chat template {origin} ends the assistant's turn with no special token, and the tokenizer has no \
             eos_token: a model tuned so would not learn to stop. Use a template that ends turns (--chat-template FILE)"
        );
    };
    let mut message = format!(
        "the token {:?} ({}), with which chat template {origin} ends the assistant's turn, is never a label in {} \
         samples: a model tuned so would not learn to stop. ",
        token.content, token.id, report.samples
    );
    let truncated = report.truncated == report.samples;
    message.push_str(match encoder.tokenizer.chat_template() {
        _ if truncated => "Every sample is cut before its end: raise --max-seq-length",
        Some(template) if template.marks_generation() => {
            "Put the token inside the template's {% generation %} block (--chat-template FILE)"
        }
        _ => "Use a template that writes it behind assistant messages (--chat-template FILE)",
    });
    message
}
