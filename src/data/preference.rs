//! Preference data: pairs of a better and a worse completion, or single ones with a label, as tokens.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::format::{columns, kind, messages, tools, variables};
use super::parallel::{CHUNK, pipeline};
use super::records::{Record, Records, Row};
use super::{DatasetReport, RenderOptions, TokenDataset, Tokenizer};

/// What preference training knows of a sample beside its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Preference {
    /// Tokens of the prompt; the completion stands behind them.
    pub prompt_len: u32,
    /// The better one of a pair, or a desirable one.
    pub chosen: bool,
    /// The reference model's log-probability of the completion, where it was computed before training.
    pub reference: Option<f32>,
}

/// What a row becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreferenceKind {
    /// Two samples, chosen and rejected: from `chosen`, `rejected` and perhaps `prompt`. Without a prompt it is what both
    /// begin with.
    Pairs,
    /// Two samples, an example of `prompt`, `completion` and `label`, and its prompt with another row's completion, from
    /// which KTO estimates how far the model has moved. A row of a pair becomes two examples.
    Labelled,
}

/// How rows become pairs of samples.
#[derive(Clone, Copy, Debug)]
pub struct PreferenceOptions {
    pub kind: PreferenceKind,
    /// Longer samples lose their end (TRL's `truncation_mode` `keep_start`).
    pub max_length: usize,
    /// The prompt of the chosen completion is trained too (ORPO).
    pub train_prompt: bool,
}

const CUT_AWAY: &str = "max_length cuts off the whole completion";
const EMPTY: &str = "a completion without tokens";

/// Reads `sources` (files, folders, globs), renders and tokenises each row once, and keeps the pairs in order. `on_rows` hears
/// the number of rows so far.
///
/// Tokens are TRL's: prompt and completion are rendered or encoded together, and the completion begins where the tokens leave
/// those of the prompt alone (of both completions of a pair, the earlier place). Texts end with EOS, conversations as their
/// template ends them.
///
/// # Errors
/// Names the file and line of a row that cannot be read, understood or rendered; no pairs.
pub fn prepare_preferences<S: AsRef<str>>(
    sources: &[S],
    tokenizer: &Tokenizer,
    options: PreferenceOptions,
    on_rows: &mut (dyn FnMut(u64) + Send),
) -> Result<(TokenDataset, DatasetReport)> {
    let mut records = Records::open(sources)?;
    let mut report = DatasetReport::default();
    let mut encoded: Vec<Encoded> = Vec::new();
    let mut is_first = true;
    pipeline(
        || {
            let rows = records.by_ref().take(CHUNK).collect::<Result<Vec<Record>>>()?;
            if let Some(first) = rows.first().filter(|_| std::mem::take(&mut is_first)) {
                warn_of_columns(&first.row);
            }
            Ok(rows)
        },
        |record| encode(tokenizer, options.kind, &record.row).with_context(|| record.place.to_string()),
        |_, rows| {
            for row in rows {
                report.rows += 1;
                for example in row? {
                    match dropped(&example, options.max_length) {
                        Some(reason) => *report.dropped.entry(reason.to_owned()).or_default() += 1,
                        None => encoded.push(example),
                    }
                }
            }
            on_rows(report.rows);
            Ok(())
        },
    )?;
    let same = encoded.iter().filter(|example| example.says_nothing()).count();
    if same > 0 {
        tracing::warn!(
            "{same} of {} pairs have the same tokens as chosen and as rejected, and teach nothing",
            encoded.len()
        );
    }
    let mut data = TokenDataset::new();
    for (n, example) in encoded.iter().enumerate() {
        let other = match options.kind {
            PreferenceKind::Pairs => example.completions[1].0.as_slice(),
            PreferenceKind::Labelled => mismatched(&encoded, n),
        };
        let (own, chosen) = &example.completions[0];
        let pair = [(own.as_slice(), *chosen), (other, false)].map(|(completion, chosen)| {
            let mut ids = [&example.prompt, completion].concat();
            report.truncated += u64::from(ids.len() > options.max_length);
            ids.truncate(options.max_length);
            let prompt_len = example.prompt.len();
            let trains_prompt = options.train_prompt && chosen;
            let trained: Vec<bool> = (0..ids.len()).map(|n| trains_prompt || n >= prompt_len).collect();
            (ids, trained, Preference { prompt_len: prompt_len as u32, chosen, reference: None })
        });
        data.push_pair(
            pair.each_ref().map(|(ids, trained, known)| (ids.as_slice(), trained.as_slice(), *known)),
        );
    }
    let sources: Vec<&str> = sources.iter().map(AsRef::as_ref).collect();
    if data.is_empty() {
        let reasons: Vec<String> =
            report.dropped.iter().map(|(why, rows)| format!("{why} ({rows} rows)")).collect();
        let why = if reasons.is_empty() { "no rows".to_owned() } else { reasons.join(", ") };
        bail!("{}: nothing to train on: {why}", sources.join(", "));
    }
    report.samples = data.len() as u64;
    report.tokens = data.num_tokens();
    report.target_tokens = data.num_targets();
    Ok((data, report))
}

/// A prompt's tokens and those of its completions, with whether they are the better ones.
struct Encoded {
    prompt: Vec<u32>,
    /// The prompt as it is tokenised alone.
    alone: Vec<u32>,
    completions: Vec<(Vec<u32>, bool)>,
}

impl Encoded {
    fn says_nothing(&self) -> bool {
        matches!(&self.completions[..], [(chosen, _), (rejected, _)] if chosen == rejected)
    }
}

/// Where a pair's prompt is only what both completions begin with, a question in another column would be lost in silence.
fn warn_of_columns(row: &Row) {
    const READ: [&str; 6] = ["chosen", "rejected", "completion", "label", "tools", "chat_template_kwargs"];
    let unread: Vec<&str> = row.keys().map(String::as_str).filter(|key| !READ.contains(key)).collect();
    if row.contains_key("chosen") && !row.contains_key("prompt") && !unread.is_empty() {
        tracing::warn!(
            "there is no column prompt, so a prompt is what chosen and rejected both begin with; not read: {}",
            unread.join(", ")
        );
    }
}

/// Why an example is left out.
fn dropped(example: &Encoded, max_length: usize) -> Option<&'static str> {
    if example.completions.iter().any(|(completion, _)| completion.is_empty()) {
        return Some(EMPTY);
    }
    (example.prompt.len() >= max_length).then_some(CUT_AWAY)
}

/// The completion of the nearest example before (the last one is before the first) that has another prompt; TRL takes that of
/// the one before.
fn mismatched(all: &[Encoded], n: usize) -> &[u32] {
    let before = (1..all.len()).map(|back| &all[(n + all.len() - back) % all.len()]);
    let last = &all[(n + all.len() - 1) % all.len()];
    &before.into_iter().find(|other| other.alone != all[n].alone).unwrap_or(last).completions[0].0
}

/// A prompt or a completion.
#[derive(Clone, Debug, PartialEq)]
enum Turns {
    Text(String),
    Messages(Vec<Value>),
}

fn turns(row: &Row, column: &str) -> Result<Turns> {
    match row.get(column) {
        Some(Value::String(text)) => Ok(Turns::Text(text.clone())),
        Some(Value::Array(_)) => Ok(Turns::Messages(messages(row, column)?)),
        Some(other) => {
            bail!("column {column}: expected a string or a list of messages, found {}", kind(other))
        }
        None => bail!("there is no column {column}; {}", columns(row)),
    }
}

/// The examples of a row.
fn encode(tokenizer: &Tokenizer, kind: PreferenceKind, row: &Row) -> Result<Vec<Encoded>> {
    let has = |name: &str| row.get(name).is_some_and(|value| !value.is_null());
    let encoder = RowEncoder { tokenizer, tools: tools(row)?, variables: variables(row)? };
    if has("chosen") && has("rejected") {
        let (prompt, chosen, rejected) = pair(row)?;
        let encoded = encoder.encode(&prompt, vec![(chosen, true), (rejected, false)])?;
        return Ok(match kind {
            PreferenceKind::Pairs => vec![encoded],
            PreferenceKind::Labelled => {
                let single = |completion| Encoded {
                    prompt: encoded.prompt.clone(),
                    alone: encoded.alone.clone(),
                    completions: vec![completion],
                };
                encoded.completions.into_iter().map(single).collect()
            }
        });
    }
    if kind == PreferenceKind::Pairs {
        bail!(
            "a pair needs the columns chosen and rejected (and prompt, if they do not begin with it); {}",
            columns(row)
        );
    }
    let label = match row.get("label") {
        Some(Value::Bool(label)) => *label,
        Some(Value::Number(number)) if number.as_f64() == Some(1.0) => true,
        Some(Value::Number(number)) if number.as_f64() == Some(0.0) => false,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") || text == "1" => true,
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") || text == "0" => false,
        Some(other) => bail!("column label: expected true or false, found {other}"),
        None => bail!("there is no column label (or chosen and rejected); {}", columns(row)),
    };
    Ok(vec![encoder.encode(&turns(row, "prompt")?, vec![(turns(row, "completion")?, label)])?])
}

/// Prompt, chosen and rejected. Where the prompt is missing, or a text beside whole conversations, it is what both begin with.
fn pair(row: &Row) -> Result<(Turns, Turns, Turns)> {
    let (chosen, rejected) = (turns(row, "chosen")?, turns(row, "rejected")?);
    if row.get("prompt").is_some_and(|prompt| !prompt.is_null()) {
        let prompt = turns(row, "prompt")?;
        if matches!(
            (&prompt, &chosen),
            (Turns::Text(_), Turns::Text(_)) | (Turns::Messages(_), Turns::Messages(_))
        ) {
            return Ok((prompt, chosen, rejected));
        }
    }
    match (chosen, rejected) {
        (Turns::Text(chosen), Turns::Text(rejected)) => {
            let same = chosen.chars().zip(rejected.chars()).take_while(|(a, b)| a == b);
            let mut end: usize = same.map(|(a, _)| a.len_utf8()).sum();
            // The space belongs to the first word behind it.
            if chosen[..end].ends_with(' ') {
                end -= 1;
            }
            let part = |text: &str| Turns::Text(text.to_owned());
            Ok((part(&chosen[..end]), part(&chosen[end..]), part(&rejected[end..])))
        }
        (Turns::Messages(chosen), Turns::Messages(rejected)) => {
            let end = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
            let part = |messages: &[Value]| Turns::Messages(messages.to_vec());
            Ok((part(&chosen[..end]), part(&chosen[end..]), part(&rejected[end..])))
        }
        _ => bail!("chosen and rejected must be two strings or two lists of messages"),
    }
}

struct RowEncoder<'a> {
    tokenizer: &'a Tokenizer,
    tools: Option<Value>,
    variables: Map<String, Value>,
}

impl RowEncoder<'_> {
    fn encode(&self, prompt: &Turns, completions: Vec<(Turns, bool)>) -> Result<Encoded> {
        let alone = match prompt {
            Turns::Text(text) => self.tokenizer.encode(text, true)?,
            Turns::Messages(messages) => self.render(messages, true)?,
        };
        let mut whole = Vec::with_capacity(completions.len());
        let mut start = alone.len();
        for (completion, chosen) in completions {
            let ids = match (prompt, completion) {
                (Turns::Text(prompt), Turns::Text(completion)) => {
                    let mut ids = self.tokenizer.encode(&format!("{prompt}{completion}"), true)?;
                    let eos = self.tokenizer.eos_token_id();
                    ids.extend(eos.filter(|eos| ids.last() != Some(eos)));
                    ids
                }
                (Turns::Messages(prompt), Turns::Messages(completion)) => {
                    if completion.is_empty() {
                        bail!("a completion has no messages");
                    }
                    self.render(&[&prompt[..], &completion].concat(), false)?
                }
                _ => bail!("prompt and completions must all be strings or all be lists of messages"),
            };
            start = start.min(alone.iter().zip(&ids).take_while(|(a, b)| a == b).count());
            whole.push((ids, chosen));
        }
        let completions = whole.iter().map(|(ids, chosen)| (ids[start..].to_vec(), *chosen)).collect();
        Ok(Encoded { prompt: alone[..start].to_vec(), alone, completions })
    }

    fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<Vec<u32>> {
        let Some(template) = self.tokenizer.chat_template() else {
            bail!(
                "the row is a conversation, but {} has no chat template: give one with --chat-template FILE",
                self.tokenizer.dir().display()
            )
        };
        let options = RenderOptions {
            tools: self.tools.as_ref(),
            variables: Some(&self.variables),
            add_generation_prompt,
            ..Default::default()
        };
        self.tokenizer.encode(&template.render(messages, &options)?, false)
    }
}
