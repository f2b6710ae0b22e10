//! Rewards that need nothing but the text.

use std::collections::HashSet;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::numbers::stated_number;
use super::{Reward, Sample};
use crate::data::problems::is_correct;

/// A [`Reward`] that judges one sample after the other.
macro_rules! rule {
    ($type:ty, $name:literal) => {
        impl Reward for $type {
            fn name(&self) -> &str {
                $name
            }

            fn score(&mut self, samples: &[Sample]) -> Vec<Result<Option<f64>>> {
                samples.iter().map(|sample| self.judge(sample)).collect()
            }
        }
    };
}

/// The text of a column; None where the row has none.
fn column<'a>(sample: &'a Sample, name: &str) -> Result<Option<std::borrow::Cow<'a, str>>> {
    match sample.columns.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.into())),
        Some(Value::Number(number)) => Ok(Some(number.to_string().into())),
        Some(_) => bail!("column {name}: expected a string or a number"),
    }
}

/// 1 if the reply states the text of a column, else 0; does not apply to rows without it. The reply states what stands in its
/// last `<answer>..</answer>`, or all of itself; upper and lower case, white space around it and a full stop do not count.
pub struct Exact {
    pub column: String,
}

impl Exact {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        let answer = column(sample, &self.column)?;
        Ok(answer.map(|answer| f64::from(is_correct(sample.completion, &answer))))
    }
}
rule!(Exact, "exact");

/// 1 if the number that the reply states ([`stated_number`]) is that of a column, else 0; does not apply to rows without it.
pub struct Numeric {
    pub column: String,
}

impl Numeric {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        let Some(answer) = column(sample, &self.column)? else { return Ok(None) };
        let answer = stated_number(&answer)
            .with_context(|| format!("column {}: no number in {answer:?}", self.column))?;
        Ok(Some(f64::from(stated_number(sample.completion).is_some_and(|stated| stated.equals(answer)))))
    }
}
rule!(Numeric, "numeric");

/// 1 if the pattern is found in the reply, else 0.
pub struct Regex(fancy_regex::Regex);

impl Regex {
    /// # Errors
    /// A pattern that cannot be read.
    pub fn new(pattern: &str) -> Result<Regex> {
        Ok(Regex(fancy_regex::Regex::new(pattern).with_context(|| format!("the pattern {pattern:?}"))?))
    }

    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        Ok(Some(f64::from(self.0.is_match(sample.completion)?)))
    }
}
rule!(Regex, "regex");

/// 1 if the whole reply is `<a>..</a><b>..</b>`: the tags once each, in this order, nothing but white space around them, something
/// between each pair; else 0.
pub struct Format {
    pub tags: Vec<String>,
}

impl Format {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        Ok(Some(f64::from(self.fits(sample.completion))))
    }

    fn fits(&self, reply: &str) -> bool {
        let mut rest = reply.trim();
        for tag in &self.tags {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let once = |mark: &str| reply.matches(mark).count() == 1;
            if !once(&open) || !once(&close) {
                return false;
            }
            match rest.strip_prefix(&open).and_then(|rest| rest.split_once(&close)) {
                Some((inside, after)) if !inside.trim().is_empty() => rest = after.trim_start(),
                _ => return false,
            }
        }
        rest.is_empty()
    }
}
rule!(Format, "format");

/// 1 for a completion of `min` to `max` tokens; outside `n / min` below and, above, falling to 0 at twice `max`: `2 - n / max`.
pub struct Length {
    pub min: usize,
    pub max: usize,
}

impl Length {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        let tokens = sample.completion_ids.len();
        Ok(Some(match tokens {
            few if few < self.min => few as f64 / self.min as f64,
            many if many > self.max => (2.0 - many as f64 / self.max as f64).max(0.0),
            _ => 1.0,
        }))
    }
}
rule!(Length, "length");

/// The share of the words that stand somewhere in the reply; upper and lower case do not count.
pub struct Keyword {
    pub words: Vec<String>,
}

impl Keyword {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        let reply = sample.completion.to_lowercase();
        let found = self.words.iter().filter(|word| reply.contains(&word.to_lowercase())).count();
        Ok(Some(found as f64 / self.words.len() as f64))
    }
}
rule!(Keyword, "keyword");

/// 1 if the reply, or what a Markdown fence around all of it holds, is JSON; else 0.
pub struct Json;

impl Json {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        let reply = sample.completion.trim();
        let fenced = reply.strip_prefix("```").and_then(|rest| rest.strip_suffix("```"));
        let text = fenced.map_or(reply, |inside| inside.strip_prefix("json").unwrap_or(inside));
        Ok(Some(f64::from(serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())))
    }
}
rule!(Json, "json");

/// `u / n - 1` with n runs of `ngram` words in the reply, u of them different: 0 without repetition, towards -1 with much of it
/// (Yeo et al., arXiv:2502.03373). Words are what stands between white space; upper and lower case do not count.
pub struct Repetition {
    pub ngram: usize,
}

impl Repetition {
    fn judge(&self, sample: &Sample) -> Result<Option<f64>> {
        let reply = sample.completion.to_lowercase();
        let words: Vec<&str> = reply.split_whitespace().collect();
        let runs: HashSet<&[&str]> = words.windows(self.ngram).collect();
        let all = (words.len() + 1).saturating_sub(self.ngram);
        Ok(Some(if all == 0 { 0.0 } else { runs.len() as f64 / all as f64 - 1.0 }))
    }
}
rule!(Repetition, "repetition");
