//! `--config run.yaml`: every flag of a command under the same word, with flags going before the file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, parser::ValueSource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

const CONFIG: &str = "config";

/// The flags `T` of a command, to be given on the command line or in the YAML file that `--config` names.
///
/// `T` is declared once, as clap flags whose ids are its serde keys. A yes-or-no flag can be turned off again on the
/// command line (`--packing=false`), because the file may have turned it on.
#[derive(Debug, Clone)]
pub struct Configured<T>(pub T);

impl<T: Args + Serialize + DeserializeOwned> Args for Configured<T> {
    fn augment_args(command: Command) -> Command {
        let config = Arg::new(CONFIG)
            .long(CONFIG)
            .value_name("FILE")
            .value_parser(clap::value_parser!(PathBuf))
            .help("YAML file with any of these flags as keys (learning_rate: 1e-4); flags go before it");
        T::augment_args(command.arg(config)).mut_args(|arg| match arg.get_action() {
            ArgAction::SetTrue => arg
                .action(ArgAction::Set)
                .value_parser(clap::value_parser!(bool))
                .num_args(0..=1)
                .require_equals(true)
                .value_name("true|false")
                .default_missing_value("true")
                .default_value("false")
                .hide_default_value(true)
                .hide_possible_values(true),
            _ => arg,
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl<T: Args + Serialize + DeserializeOwned> FromArgMatches for Configured<T> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let flags = T::from_arg_matches(matches)?;
        let Some(file) = matches.get_one::<PathBuf>(CONFIG) else {
            return Ok(Self(flags));
        };
        let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
        merge(&flags, file, given)
            .map(Self)
            .map_err(|error| clap::Error::raw(ErrorKind::ValueValidation, format!("{error:#}\n")))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// `flags` with the values of the file wherever the flag was not `given`.
fn merge<T: Args + Serialize + DeserializeOwned>(
    flags: &T,
    file: &Path,
    given: impl Fn(&str) -> bool,
) -> Result<T> {
    let shown = file.display();
    let text = fs::read_to_string(file).with_context(|| format!("--config: reading {shown}"))?;
    let options = serde_saphyr::options! { strict_booleans: true };
    let values: Option<Map<String, Value>> = serde_saphyr::from_str_with_options(&text, options)
        .with_context(|| format!("{shown}: not a YAML file of keys and values"))?;
    let Value::Object(mut merged) = serde_json::to_value(flags)? else { bail!("flags are not a map") };

    let words = words::<T>(&merged);
    let mut seen = BTreeMap::new();
    for (word, value) in values.unwrap_or_default() {
        let Some(key) = words.get(&word.replace('-', "_")) else {
            bail!("{shown}: unknown key {word:?}{}", suggestion(&word, words.keys()));
        };
        if let Some(other) = seen.insert(key.clone(), word.clone()) {
            bail!("{shown}: {word:?} and {other:?} mean the same");
        }
        // One key after the other, so that a wrong value is reported with its key.
        let before = merged.insert(key.clone(), value.clone());
        serde_json::from_value::<T>(Value::Object(merged.clone()))
            .with_context(|| format!("{shown}: {word}: {value} does not fit"))?;
        if given(key)
            && let Some(before) = before
        {
            merged.insert(key.clone(), before);
        }
    }
    Ok(serde_json::from_value(Value::Object(merged))?)
}

/// Every word that a key of the file may be, with the serde key that it means: the keys themselves and the aliases
/// of the flags.
fn words<T: Args>(keys: &Map<String, Value>) -> BTreeMap<String, String> {
    let mut words: BTreeMap<String, String> = keys.keys().map(|key| (key.clone(), key.clone())).collect();
    for flag in T::augment_args(Command::new("words")).get_arguments() {
        let key = flag.get_id().as_str();
        if keys.contains_key(key) {
            for alias in flag.get_all_aliases().unwrap_or_default() {
                words.insert(alias.replace('-', "_"), key.to_owned());
            }
        }
    }
    words
}

fn suggestion<'a>(word: &str, known: impl Iterator<Item = &'a String>) -> String {
    let nearest = known.map(|key| (edit_distance(word, key), key)).min();
    match nearest {
        Some((distance, key)) if distance <= word.len().div_ceil(3) => format!(" (did you mean {key:?}?)"),
        _ => String::new(),
    }
}

/// Levenshtein's distance: insertions, deletions and replacements that make `b` of `a`.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
