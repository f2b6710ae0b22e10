//! What commands and servers are told of a sample, and how they answer.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::Sample;

/// `{"id", "prompt", "completion", "truncated", "columns"}`.
pub fn question(id: u64, sample: &Sample) -> Value {
    json!({
        "id": id,
        "prompt": sample.prompt,
        "completion": sample.completion,
        "truncated": sample.truncated,
        "columns": sample.columns,
    })
}

/// What a judge says of a sample, if it can be read: a number, that the reward does not apply, or what is wrong.
pub enum Said {
    Value(Option<f64>),
    Error(anyhow::Error),
}

/// The same in one; what cannot be read is an error, too.
pub fn answer(id: u64, text: &[u8]) -> Result<Option<f64>> {
    match read(id, text)? {
        Said::Value(value) => Ok(value),
        Said::Error(error) => Err(error),
    }
}

/// A number, null, or an object with `reward` (a number or null) or `error` (text), perhaps with the question's `id`.
///
/// # Errors
/// It is none of these: whatever it was, it may have been no answer to this question.
pub fn read(id: u64, text: &[u8]) -> Result<Said> {
    let text = std::str::from_utf8(text).context("the answer is not UTF-8")?;
    // Words that are no JSON, which Python writes.
    if text.trim().parse::<f64>().is_ok_and(|number| !number.is_finite()) {
        return Ok(Said::Error(anyhow!("the answer is {}, expected a finite number", text.trim())));
    }
    let value: Value =
        serde_json::from_str(text).with_context(|| format!("the answer {} is not JSON", shortened(text)))?;
    let Value::Object(object) = &value else { return number(&value).map(Said::Value) };
    if let Some(other) = object.get("id").filter(|other| **other != json!(id)) {
        bail!("the answer has the id {other}, the question {id}");
    }
    if let Some(error) = object.get("error").filter(|error| !error.is_null()) {
        return Ok(Said::Error(anyhow!("it answers with the error {error}")));
    }
    let reward = number(
        object.get("reward").with_context(|| format!("the answer {} has no reward", shortened(text)))?,
    )?;
    Ok(Said::Value(reward))
}

fn number(value: &Value) -> Result<Option<f64>> {
    match value {
        Value::Null => Ok(None),
        Value::Bool(right) => Ok(Some(f64::from(*right))),
        other => {
            other.as_f64().map(Some).with_context(|| format!("the answer is {other}, expected a number"))
        }
    }
}

/// The beginning of `text`, quoted.
pub fn shortened(text: &str) -> String {
    let mut start: String = text.trim().chars().take(100).collect();
    if start.len() < text.trim().len() {
        start.push_str("..");
    }
    format!("{start:?}")
}
