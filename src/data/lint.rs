//! What is wrong with a dataset, row by row, before GPU time is spent on it.
//!
//! [`Lint`] goes through records and gives each with its [`Finding`]s. Checks of single rows run in parallel; the rows'
//! fingerprints are then compared in order.

mod checks;
mod rule;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::path::PathBuf;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde_json::{Value, json};

use checks::Broken;
pub(super) use checks::{RowChecks, texts};
pub use rule::Rule;

use super::encode::Encoder;
use super::fingerprint::{Fingerprint, fingerprint, prompt_fingerprint, whole_text};
use super::images::check_images;
use super::inspect::read_chunk;
use super::minhash::{NearDuplicates, Signature};
use super::records::{BrokenRow, Place, Record, Records};
use super::{DatasetOptions, Example, Tokenizer};

/// What to look for.
#[derive(Clone, Debug, Default)]
pub struct LintOptions {
    /// How rows become samples in the training to come.
    pub dataset: DatasetOptions,
    /// Files, folders or globs of the evaluation set, whose prompts must not be trained on.
    pub eval: Vec<String>,
    /// The similarity (0 to 1) from which on two rows are near-duplicates; not looked for if not given.
    pub near_duplicates: Option<f64>,
    /// Rules that do not count.
    pub allow: BTreeSet<Rule>,
}

/// One thing that is wrong with one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which rule it breaks.
    pub rule: Rule,
    /// Where the row stands.
    pub place: Place,
    /// What was found.
    pub message: String,
}

/// A row and what is wrong with it.
#[derive(Clone, Debug)]
pub struct LintedRow {
    /// The row, if it could be read.
    pub record: Option<Record>,
    /// What was found, by rule.
    pub findings: Vec<Finding>,
}

/// Checks records as they are asked for. Per row it remembers about 100 bytes, and with near-duplicates 0.6 KB more.
pub struct Lint<'a> {
    records: Records,
    checker: Checker<'a>,
    seen: HashMap<Fingerprint, Place>,
    near: Option<NearDuplicates>,
    near_places: Vec<Place>,
    /// Rows that were read, not yet checked.
    ahead: Option<Result<Vec<std::result::Result<Record, BrokenRow>>>>,
    ready: VecDeque<LintedRow>,
}

/// What rows are checked by, on many threads.
struct Checker<'a> {
    options: &'a LintOptions,
    encoder: Option<Encoder<'a>>,
    checks: RowChecks,
    /// The prompts of the evaluation set.
    eval: HashSet<Fingerprint>,
}

/// What the parallel part found out about a row.
#[derive(Default)]
struct Checked {
    broken: Vec<(Rule, String)>,
    fingerprint: Option<Fingerprint>,
    prompt: Option<Fingerprint>,
    signature: Option<Signature>,
}

impl<'a> Lint<'a> {
    /// Checks `records`; the rules about tokens need a `tokenizer`.
    ///
    /// # Errors
    /// The evaluation set cannot be read.
    pub fn new(
        records: Records,
        tokenizer: Option<&'a Tokenizer>,
        options: &'a LintOptions,
    ) -> Result<Lint<'a>> {
        let encoder = tokenizer.map(|tokenizer| Encoder::new(tokenizer, &options.dataset));
        let end_of_turn = encoder.as_ref().and_then(|encoder| encoder.end_of_turn.clone());
        let checks = RowChecks::new(tokenizer, end_of_turn, &options.dataset)?;
        let mut checker = Checker { options, encoder, checks, eval: HashSet::new() };
        if !options.eval.is_empty() {
            for record in Records::open(&options.eval)? {
                let record = record?;
                let example = options.dataset.rows.example(&record.row, checker.chat());
                checker.eval.insert(prompt_fingerprint(&example.with_context(|| record.place.to_string())?));
            }
        }
        Ok(Lint {
            records,
            checker,
            seen: HashMap::new(),
            near: options.near_duplicates.map(NearDuplicates::new),
            near_places: Vec::new(),
            ahead: None,
            ready: VecDeque::new(),
        })
    }

    /// Compares a row with those before it and with the evaluation set.
    fn compare(&mut self, place: &Place, checked: &mut Checked) {
        if let Some(fingerprint) = checked.fingerprint {
            match self.seen.get(&fingerprint) {
                Some(first) => {
                    checked.broken.push((Rule::Duplicate, format!("the same as {first}")));
                    // Of course it is near, too.
                    checked.signature = None;
                }
                None => {
                    self.seen.insert(fingerprint, place.clone());
                }
            }
        }
        if checked.prompt.is_some_and(|prompt| self.checker.eval.contains(&prompt)) {
            checked.broken.push((Rule::EvalOverlap, "the evaluation set asks the same".to_owned()));
        }
        if let (Some(near), Some(signature)) = (&mut self.near, &checked.signature) {
            match near.insert(signature) {
                Ok(_) => self.near_places.push(place.clone()),
                Err((number, similarity)) => {
                    let first = &self.near_places[number as usize];
                    let how = format!("{:.0} % the same as {first}", 100.0 * similarity);
                    checked.broken.push((Rule::NearDuplicate, how));
                }
            }
        }
    }

    /// Checks the rows that were read, while the next ones are.
    fn next_chunk(&mut self) -> Result<()> {
        let chunk = match self.ahead.take() {
            Some(chunk) => chunk?,
            None => read_chunk(&mut self.records)?,
        };
        let (checker, records) = (&self.checker, &mut self.records);
        let (ahead, checked) = rayon::join(
            || if chunk.is_empty() { Ok(Vec::new()) } else { read_chunk(records) },
            || {
                let check = |record: &std::result::Result<Record, BrokenRow>| {
                    record.as_ref().ok().map(|record| checker.check(record))
                };
                chunk.par_iter().map(check).collect::<Vec<_>>()
            },
        );
        self.ahead = Some(ahead);
        for (record, checked) in chunk.into_iter().zip(checked) {
            let mut checked = checked.unwrap_or_default();
            let (record, place) = match record {
                Ok(record) => {
                    self.compare(&record.place, &mut checked);
                    let place = record.place.clone();
                    (Some(record), place)
                }
                Err(row) => {
                    let rule = if row.broken_utf8 { Rule::BrokenUtf8 } else { Rule::Unreadable };
                    checked.broken.push((rule, row.reason));
                    (None, row.place)
                }
            };
            let findings = checked
                .broken
                .into_iter()
                .filter(|(rule, _)| !self.checker.options.allow.contains(rule))
                .map(|(rule, message)| Finding { rule, place: place.clone(), message })
                .collect();
            self.ready.push_back(LintedRow { record, findings });
        }
        Ok(())
    }
}

impl Checker<'_> {
    /// Whether Alpaca rows become messages.
    fn chat(&self) -> bool {
        self.encoder.as_ref().is_none_or(|encoder| encoder.tokenizer.chat_template().is_some())
    }

    fn check(&self, record: &Record) -> Checked {
        let mut checked = Checked { broken: Vec::new(), fingerprint: None, prompt: None, signature: None };
        let example = match self.options.dataset.rows.example(&record.row, self.chat()) {
            Ok(example) => example,
            Err(error) => {
                checked.broken.push((Rule::UnknownShape, format!("{error:#}")));
                return checked;
            }
        };
        checked.broken = self.checks.example(&example);
        let folder = record.place.file.parent();
        let images = check_images(&record.row, &example, folder);
        checked.broken.extend(images.into_iter().map(|how| (Rule::BrokenImage, how)));
        checked.fingerprint = Some(fingerprint(&example));
        if !self.eval.is_empty() {
            checked.prompt = Some(prompt_fingerprint(&example));
        }
        if self.options.near_duplicates.is_some() {
            checked.signature = Signature::new(&whole_text(&example));
        }
        if let Some(encoder) = &self.encoder {
            let broken = self.check_tokens(encoder, &example);
            checked
                .broken
                .extend(broken.unwrap_or_else(|error| vec![(Rule::TemplateError, format!("{error:#}"))]));
        }
        checked
    }

    /// The rules about tokens; most short conversations need not be tokenised for them.
    fn check_tokens(&self, encoder: &Encoder, example: &Example) -> Result<Vec<Broken>> {
        let encoded = match example {
            Example::Conversation(conversation) => {
                let shown = encoder.show(conversation)?;
                let whole =
                    conversation.prompt_messages.is_none() || !self.options.dataset.completion_only_loss;
                if whole && self.checks.are_surely_fine(encoder.tokenizer, &shown) {
                    return Ok(Vec::new());
                }
                encoder.tokenise(conversation, &shown)?
            }
            other => encoder.encode(other)?,
        };
        Ok(self.checks.encoded(example, &encoded))
    }
}

impl Iterator for Lint<'_> {
    type Item = Result<LintedRow>;

    fn next(&mut self) -> Option<Result<LintedRow>> {
        if self.ready.is_empty()
            && let Err(error) = self.next_chunk()
        {
            return Some(Err(error));
        }
        self.ready.pop_front().map(Ok)
    }
}

/// How many rows break each rule, and the first of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LintCounts(BTreeMap<Rule, (u64, Finding)>);

impl LintCounts {
    /// Counts a finding.
    pub fn add(&mut self, finding: &Finding) {
        self.0.entry(finding.rule).or_insert_with(|| (0, finding.clone())).0 += 1;
    }

    /// Each broken rule with its number of findings and the first one.
    pub fn iter(&self) -> impl Iterator<Item = (Rule, u64, &Finding)> {
        self.0.iter().map(|(rule, (count, first))| (*rule, *count, first))
    }

    /// As JSON, for a file.
    pub(super) fn to_json(&self) -> Value {
        let finding = |(rule, count, first): (Rule, u64, &Finding)| {
            let Place { file, unit, number } = &first.place;
            json!([rule, count, first.message, file.display().to_string(), unit, number])
        };
        self.iter().map(finding).collect()
    }

    /// What [`to_json`](Self::to_json) wrote.
    pub(super) fn from_json(value: &Value) -> Result<LintCounts> {
        type Row = (String, u64, String, PathBuf, String, u64);
        let rows: Vec<Row> = serde_json::from_value(value.clone())?;
        let counts = rows.into_iter().map(|(rule, count, message, file, unit, number)| {
            let unit = if unit == "line" { "line" } else { "row" };
            let rule: Rule = rule.parse()?;
            let place = Place { file: file.into(), unit, number };
            Ok((rule, (count, Finding { rule, place, message })))
        });
        Ok(LintCounts(counts.collect::<Result<_>>()?))
    }

    /// The findings of error rules, and those of warnings.
    pub fn errors_and_warnings(&self) -> (u64, u64) {
        let of = |errors| {
            self.iter().filter(|(rule, ..)| rule.is_error() == errors).map(|(_, count, _)| count).sum()
        };
        (of(true), of(false))
    }
}
