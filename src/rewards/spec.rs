//! Rewards by name, as flags and configurations write them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};

use super::{
    Command, Exact, Format, Http, Json, Keyword, Length, Numeric, Regex, Repetition, Reward, RewardModel,
    Rewards, Stop, TorchScriptReward,
};
use crate::data::Tokenizer;

/// One reward, as a flag names it:
///
/// | text | reward |
/// |---|---|
/// | `exact[:COLUMN]` | [`Exact`]; the column `answer` if none is named |
/// | `numeric[:COLUMN]` | [`Numeric`]; the same |
/// | `regex:PATTERN` | [`Regex`] |
/// | `format:TAG[-TAG..]` | [`Format`]: `format:think-answer` |
/// | `length:[MIN-]MAX` | [`Length`], in tokens |
/// | `keyword:WORD[,WORD..]` | [`Keyword`] |
/// | `json` | [`Json`] |
/// | `repetition[:N]` | [`Repetition`] of runs of N words, 3 if not given |
/// | `command:LINE` | [`Command`] |
/// | `http://..`, `https://..` | [`Http`] |
/// | `model:PATH` | [`TorchScriptReward`] of a file, [`RewardModel`] of a folder |
///
/// Those of fixed words may end in `=WEIGHT`; a pattern, a command, a URL, a path or a word could hold the sign themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RewardSpec {
    text: String,
    kind: RewardKind,
    weight: Option<f64>,
}

#[derive(Debug, Clone, PartialEq)]
enum RewardKind {
    Exact { column: String },
    Numeric { column: String },
    Regex(String),
    Format { tags: Vec<String> },
    Length { min: usize, max: usize },
    Keyword { words: Vec<String> },
    Json,
    Repetition { ngram: usize },
    Command(String),
    Http(String),
    Model(PathBuf),
}

const KNOWN: &str = "exact[:COLUMN], numeric[:COLUMN], regex:PATTERN, format:TAG[-TAG..], length:[MIN-]MAX, \
    keyword:WORD[,WORD..], json, repetition[:N], command:LINE, http://.., model:PATH";

impl RewardSpec {
    /// The reward model in `path`, a TorchScript file or a folder.
    pub fn model(path: &Path) -> RewardSpec {
        let text = format!("model:{}", path.display());
        RewardSpec { text, kind: RewardKind::Model(path.to_owned()), weight: None }
    }
}

impl RewardSpec {
    /// The column of the dataset that it compares with.
    pub fn column(&self) -> Option<&str> {
        match &self.kind {
            RewardKind::Exact { column } | RewardKind::Numeric { column } => Some(column),
            _ => None,
        }
    }
}

impl FromStr for RewardSpec {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<RewardSpec> {
        // In one line: flags show the outermost error alone.
        parse(text).map_err(|error| anyhow!("reward {text:?}: {error:#}"))
    }
}

fn parse(text: &str) -> Result<RewardSpec> {
    let (name, _) = text.split_once([':', '=']).unwrap_or((text, ""));
    let has_weight = matches!(name, "exact" | "numeric" | "format" | "length" | "json" | "repetition");
    let (spec, weight) = match text.rsplit_once('=').filter(|_| has_weight) {
        Some((spec, weight)) => {
            let weight: f64 = weight
                .parse()
                .ok()
                .filter(|weight: &f64| weight.is_finite())
                .with_context(|| format!("the weight {weight:?} behind = is no number"))?;
            (spec, Some(weight))
        }
        None => (text, None),
    };
    let argument = spec.split_once(':').map(|(_, argument)| argument).filter(|argument| !argument.is_empty());
    let needed = |what: &str| argument.with_context(|| format!("expected {name}:{what}"));
    let column = || argument.unwrap_or("answer").to_owned();
    let number = |text: &str| {
        text.parse::<usize>()
            .ok()
            .filter(|number| *number > 0)
            .with_context(|| format!("{text:?}: expected a number, 1 or more"))
    };
    let kind = match name {
        "exact" => RewardKind::Exact { column: column() },
        "numeric" => RewardKind::Numeric { column: column() },
        "regex" => {
            let pattern = needed("PATTERN")?;
            Regex::new(pattern)?;
            RewardKind::Regex(pattern.to_owned())
        }
        "format" => {
            let tags: Vec<String> =
                needed("TAG[-TAG..], such as format:think-answer")?.split('-').map(str::to_owned).collect();
            if tags.iter().any(|tag| tag.is_empty() || tag.contains(['<', '>'])) {
                bail!("expected names of tags with - between them, such as format:think-answer");
            }
            RewardKind::Format { tags }
        }
        "length" => {
            let range = needed("[MIN-]MAX")?;
            let (min, max) = match range.split_once('-') {
                Some((min, max)) => (number(min)?, number(max)?),
                None => (0, number(range)?),
            };
            if min > max {
                bail!("the shortest length, {min}, is above the longest, {max}");
            }
            RewardKind::Length { min, max }
        }
        "keyword" => {
            let words: Vec<String> =
                needed("WORD[,WORD..]")?.split(',').map(|word| word.trim().to_owned()).collect();
            if words.iter().any(String::is_empty) {
                bail!("a word is empty");
            }
            RewardKind::Keyword { words }
        }
        "json" => match argument {
            None => RewardKind::Json,
            Some(argument) => bail!("json takes no {argument:?}"),
        },
        "repetition" => RewardKind::Repetition { ngram: argument.map_or(Ok(3), number)? },
        "command" => RewardKind::Command(needed("LINE")?.to_owned()),
        "http" | "https" if argument.is_some_and(|rest| rest.starts_with("//")) => {
            RewardKind::Http(text.to_owned())
        }
        "model" => RewardKind::Model(needed("PATH")?.into()),
        _ => bail!("unknown; known are {KNOWN}"),
    };
    Ok(RewardSpec { text: text.to_owned(), kind, weight })
}

impl fmt::Display for RewardSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for RewardSpec {
    type Error = String;

    fn try_from(text: String) -> Result<RewardSpec, String> {
        text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
    }
}

impl From<RewardSpec> for String {
    fn from(spec: RewardSpec) -> String {
        spec.text
    }
}

/// What rewards need beside their texts.
#[derive(Clone, Copy)]
pub struct RewardOptions<'a> {
    /// Ends the waits for commands and servers.
    pub stop: &'a Stop,
    /// How long a command or a server may take for one sample.
    pub timeout: Duration,
    /// Where reward models run.
    pub device: Device,
    /// The dtype of a checkpoint's weights and activations.
    pub kind: Kind,
    /// Of the model in training: for TorchScript modules without one of their own.
    pub tokenizer: &'a Tokenizer,
}

/// The rewards of `specs`. `weights` are theirs in order; if none are given, each weighs what its text says, or 1.
///
/// # Errors
/// No specs; another number of weights; weights in both places; a model that does not load.
pub fn build(specs: &[RewardSpec], weights: &[f64], options: RewardOptions) -> Result<Rewards> {
    if specs.is_empty() {
        bail!("no reward is given: name one, such as {KNOWN}");
    }
    if !weights.is_empty() && weights.len() != specs.len() {
        bail!("{} reward weights for {} rewards", weights.len(), specs.len());
    }
    if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
        bail!("the reward weight {weight} is not finite");
    }
    if let Some(spec) = specs.iter().find(|spec| spec.weight.is_some() && !weights.is_empty()) {
        bail!("reward {:?} has a weight of its own: give the weights in one place", spec.text);
    }
    let mut rewards = Vec::with_capacity(specs.len());
    for (n, spec) in specs.iter().enumerate() {
        let weight = weights.get(n).copied().or(spec.weight).unwrap_or(1.0);
        rewards.push((one(&spec.kind, options).with_context(|| format!("reward {:?}", spec.text))?, weight));
    }
    Ok(Rewards::new(rewards))
}

fn one(kind: &RewardKind, options: RewardOptions) -> Result<Box<dyn Reward>> {
    Ok(match kind.clone() {
        RewardKind::Exact { column } => Box::new(Exact { column }),
        RewardKind::Numeric { column } => Box::new(Numeric { column }),
        RewardKind::Regex(pattern) => Box::new(Regex::new(&pattern)?),
        RewardKind::Format { tags } => Box::new(Format { tags }),
        RewardKind::Length { min, max } => Box::new(Length { min, max }),
        RewardKind::Keyword { words } => Box::new(Keyword { words }),
        RewardKind::Json => Box::new(Json),
        RewardKind::Repetition { ngram } => Box::new(Repetition { ngram }),
        RewardKind::Command(line) => {
            Box::new(Command::new(&line, options.timeout).until(options.stop.clone()))
        }
        RewardKind::Http(url) => Box::new(Http::new(&url, options.timeout).until(options.stop.clone())),
        RewardKind::Model(path) if path.is_dir() => {
            Box::new(RewardModel::from_pretrained(&path, options.kind, options.device)?)
        }
        RewardKind::Model(path) if path.is_file() => {
            Box::new(TorchScriptReward::load(&path, options.device, options.tokenizer)?)
        }
        RewardKind::Model(path) => bail!("{}: no such file or folder", path.display()),
    })
}
