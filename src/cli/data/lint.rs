use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::args::{RowProgress, SampleArgs, SourceArgs};
use crate::cli::format::count;
use crate::cli::sources;
use crate::data::{Finding, Lint, LintCounts, LintOptions, LintedRow, Rule, output_format, write_rows};

/// Checks every row of a dataset.
///
/// Exit code 1 if a row breaks an error rule (with --strict, any rule), 0 otherwise. Rules about tokens need --model.
/// docs/data.md explains each rule.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  ferrotune data lint --dataset chats.jsonl --model DIR --assistant-only-loss\n  \
    ferrotune data lint --dataset chats.jsonl --model DIR --eval-dataset test.jsonl --near-duplicates --fix clean.jsonl"
)]
pub struct LintArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    #[command(flatten)]
    pub sample: SampleArgs,
    /// Evaluation set, of which no prompt may be in the dataset
    #[arg(long, value_name = "FILE|ID", value_delimiter = ',')]
    pub eval_dataset: Vec<String>,
    /// Also look for rows that are nearly the same, from this similarity (Jaccard, of three words in a row) on
    #[arg(long, value_name = "SHARE", num_args = 0..=1, default_missing_value = "0.8")]
    pub near_duplicates: Option<f64>,
    /// Rules that may be broken
    #[arg(long, value_name = "RULE", value_delimiter = ',')]
    pub allow: Vec<Rule>,
    /// Fail on warnings, too
    #[arg(long)]
    pub strict: bool,
    /// Write the rows that break no rule to this file, and those that do, with the reason, to FILE.dropped.jsonl
    #[arg(long, value_name = "FILE")]
    pub fix: Option<PathBuf>,
    /// Findings to print of each rule
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub max_findings: u64,
    /// Write all findings to this file, one JSON object a line
    #[arg(long, value_name = "FILE.jsonl")]
    pub report: Option<PathBuf>,
}

/// Runs what the flags ask for.
pub fn run(args: LintArgs) -> Result<()> {
    if let Some(path) = &args.fix {
        output_format(path).context("--fix")?;
    }
    if let Some(share) = args.near_duplicates
        && !(share > 0.0 && share <= 1.0)
    {
        bail!(crate::error::Error::Usage(format!("--near-duplicates: {share} is not between 0 and 1")));
    }
    let tokenizer = args.sample.tokenizer()?;
    let options = LintOptions {
        dataset: args.sample.options()?,
        eval: match args.eval_dataset.is_empty() {
            true => Vec::new(),
            false => sources::dataset_files(&args.eval_dataset, "test").context("--eval-dataset")?,
        },
        near_duplicates: args.near_duplicates,
        allow: args.allow.iter().copied().collect(),
    };
    let rows = Lint::new(args.source.records()?, tokenizer.as_ref(), &options)?;
    let mut tally = Tally::new(&args)?;
    match &args.fix {
        Some(path) => {
            let clean = rows.filter_map(|row| match row.and_then(|row| tally.take(row)) {
                Ok(row) => row.map(Ok),
                Err(error) => Some(Err(error)),
            });
            write_rows(path, clean)?;
        }
        None => {
            for row in rows {
                tally.take(row?)?;
            }
        }
    }
    tally.finish(&args)
}

/// What was found so far.
struct Tally {
    progress: RowProgress,
    rows: u64,
    clean: u64,
    counts: LintCounts,
    shown: BTreeMap<Rule, Vec<Finding>>,
    most_shown: u64,
    report: Option<JsonLines>,
    dropped: Option<JsonLines>,
}

impl Tally {
    fn new(args: &LintArgs) -> Result<Tally> {
        let dropped = args.fix.as_ref().map(|path| dropped_path(path));
        Ok(Tally {
            progress: RowProgress::new("checking")?,
            rows: 0,
            clean: 0,
            counts: LintCounts::default(),
            shown: BTreeMap::new(),
            most_shown: args.max_findings,
            report: args.report.as_deref().map(JsonLines::create).transpose()?,
            dropped: dropped.as_deref().map(JsonLines::create).transpose()?,
        })
    }

    /// Counts a row and gives it back if nothing is wrong with it.
    fn take(&mut self, row: LintedRow) -> Result<Option<crate::data::Row>> {
        self.rows += 1;
        self.progress.add_one();
        for finding in &row.findings {
            self.counts.add(finding);
            let shown = self.shown.entry(finding.rule).or_default();
            if (shown.len() as u64) < self.most_shown {
                shown.push(finding.clone());
            }
            if let Some(report) = &mut self.report {
                report.write(&as_json(finding))?;
            }
        }
        let kept = row.findings.is_empty();
        self.clean += u64::from(kept);
        let record = row.record.map(|record| record.row);
        if let (false, Some(dropped)) = (kept, &mut self.dropped) {
            let findings: Vec<_> = row.findings.iter().map(as_json).collect();
            dropped.write(&json!({"findings": findings, "row": record}))?;
        }
        Ok(record.filter(|_| kept))
    }

    fn finish(self, args: &LintArgs) -> Result<()> {
        drop(self.progress);
        for file in [self.report, self.dropped].into_iter().flatten() {
            file.finish()?;
        }
        let mut out = stdout().lock();
        for (rule, number, _) in self.counts.iter() {
            let kind = if rule.is_error() { "error" } else { "warning" };
            writeln!(out, "{kind}: {rule}, {} rows: {}", count(number), rule.remedy())?;
            let shown = &self.shown[&rule];
            for finding in shown {
                writeln!(out, "  {}: {}", finding.place, finding.message)?;
            }
            if number > shown.len() as u64 {
                writeln!(out, "  and {} more", count(number - shown.len() as u64))?;
            }
        }
        let (errors, warnings) = self.counts.errors_and_warnings();
        let clean = count(self.clean);
        writeln!(
            out,
            "{} rows, {clean} without findings; {errors} errors, {warnings} warnings",
            count(self.rows)
        )?;
        if let Some(path) = &args.fix {
            let dropped = dropped_path(path);
            writeln!(out, "{clean} rows -> {}; the others and why -> {}", path.display(), dropped.display())?;
        }
        out.flush().context("writing to stdout")?;
        // A cleaned file is what was asked for: it is no failure that there was something to clean.
        if args.fix.is_none() && (errors > 0 || args.strict && warnings > 0) {
            bail!("the dataset breaks rules: mend it, write a cleaned one with --fix FILE, or --allow RULE");
        }
        Ok(())
    }
}

fn as_json(finding: &Finding) -> serde_json::Value {
    json!({
        "rule": finding.rule,
        "error": finding.rule.is_error(),
        "file": finding.place.file.display().to_string(),
        "unit": finding.place.unit,
        "number": finding.place.number,
        "message": finding.message,
        "remedy": finding.rule.remedy(),
    })
}

fn dropped_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".dropped.jsonl");
    name.into()
}

/// A file of JSON objects that stands under its name only once it is whole.
struct JsonLines {
    path: PathBuf,
    beside: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Drop for JsonLines {
    /// Of a check that failed nothing stays.
    fn drop(&mut self) {
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.beside);
        }
    }
}

impl JsonLines {
    fn create(path: &Path) -> Result<JsonLines> {
        let name = path.file_name().with_context(|| format!("{}: not a file name", path.display()))?;
        let beside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        let file = File::create(&beside).with_context(|| format!("writing {}", path.display()))?;
        Ok(JsonLines { path: path.to_owned(), beside, file: Some(BufWriter::new(file)) })
    }

    fn write(&mut self, value: &serde_json::Value) -> Result<()> {
        let file = self.file.as_mut().context("the file is finished")?;
        writeln!(file, "{value}").with_context(|| format!("writing {}", self.path.display()))
    }

    fn finish(mut self) -> Result<()> {
        let file = self.file.take().context("the file is finished")?;
        let write = || -> Result<()> {
            file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
            Ok(std::fs::rename(&self.beside, &self.path)?)
        };
        write().with_context(|| format!("writing {}", self.path.display()))
    }
}
