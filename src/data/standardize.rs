//! Roles and keys of ShareGPT and its cousins as `{role, content}`: Unsloth's `standardize_sharegpt`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::records::{Record, Row};
use super::{Example, RowOptions};

/// Who is who.
#[derive(Clone, Debug)]
pub struct RoleAliases {
    /// Names of `system`.
    pub system: Vec<String>,
    /// Names of `user`.
    pub user: Vec<String>,
    /// Names of `assistant`.
    pub assistant: Vec<String>,
}

impl Default for RoleAliases {
    fn default() -> RoleAliases {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        RoleAliases {
            system: names(&["system"]),
            user: names(&["user", "human", "input"]),
            assistant: names(&["gpt", "assistant", "output"]),
        }
    }
}

impl RoleAliases {
    fn role(&self, name: &str) -> Option<&'static str> {
        [(&self.system, "system"), (&self.user, "user"), (&self.assistant, "assistant")]
            .into_iter()
            .find(|(names, _)| names.iter().any(|known| known == name))
            .map(|(_, role)| role)
    }
}

/// Rows that are looked at to tell the key of the roles from that of the texts.
const LOOK_AT: usize = 10;

/// Renames the keys of `conversations` to `role` and `content` and the roles to `system`, `user` and `assistant`; rows
/// without that column stay as they are.
///
/// Of the two keys of a message, the one whose values in the first ten rows are all known is the role; if that is so of
/// both or of none, the one with fewer different values.
///
/// # Errors
/// Messages that have not exactly two keys, or texts that are not strings; a role of no alias.
pub fn standardize_sharegpt(
    records: impl Iterator<Item = Result<Record>>,
    aliases: &RoleAliases,
) -> Result<impl Iterator<Item = Result<Row>>> {
    let mut records = records.peekable();
    let mut first = Vec::new();
    while first.len() < LOOK_AT
        && let Some(record) = records.next()
    {
        first.push(record?);
    }
    let keys = keys(&first, aliases)?;
    let aliases = aliases.clone();
    Ok(first.into_iter().map(Ok).chain(records).map(move |record| {
        let Record { mut row, place } = record?;
        if let (Some((role, content)), Some(Value::Array(turns))) = (&keys, row.get_mut("conversations")) {
            for (turn, number) in turns.iter_mut().zip(1..) {
                *turn = standard(turn, role, content, &aliases)
                    .with_context(|| format!("{place}: column conversations, message {number}"))?;
            }
        }
        Ok(row)
    }))
}

/// The key of the roles and the key of the texts; `None` where there is no column `conversations`.
fn keys(records: &[Record], aliases: &RoleAliases) -> Result<Option<(String, String)>> {
    let mut values: Vec<(String, BTreeSet<String>)> = Vec::new();
    for Record { row, place } in records {
        let Some(turns) = row.get("conversations") else { continue };
        let turns = turns.as_array().with_context(|| format!("{place}: column conversations is no list"))?;
        for turn in turns {
            let turn =
                turn.as_object().with_context(|| format!("{place}: a message is no object: {turn}"))?;
            for (key, value) in turn {
                let Some(text) = value.as_str() else {
                    bail!("{place}: {key} of a message is no string: only texts can be standardised")
                };
                match values.iter_mut().find(|(known, _)| known == key) {
                    Some((_, seen)) => {
                        seen.insert(text.to_owned());
                    }
                    None => values.push((key.clone(), [text.to_owned()].into())),
                }
            }
        }
    }
    if values.is_empty() && records.iter().all(|record| !record.row.contains_key("conversations")) {
        return Ok(None);
    }
    let [(a, of_a), (b, of_b)] = values.as_slice() else {
        let names: Vec<&str> = values.iter().map(|(key, _)| key.as_str()).collect();
        bail!(
            "the messages of conversations have the keys [{}]: expected exactly two, of the role and of the text \
             (rows with tools or pictures: standardize --to-messages)",
            names.join(", ")
        );
    };
    let known = |values: &BTreeSet<String>| values.iter().all(|value| aliases.role(value).is_some());
    let a_is_role = match (known(of_a), known(of_b)) {
        (true, false) => true,
        (false, true) => false,
        _ => of_a.len() <= of_b.len(),
    };
    let (role, content, roles) = if a_is_role { (a, b, of_a) } else { (b, a, of_b) };
    let unknown: Vec<&str> =
        roles.iter().map(String::as_str).filter(|role| aliases.role(role).is_none()).collect();
    if !unknown.is_empty() {
        bail!(
            "the roles [{}] are unknown: name them as aliases of system, user or assistant",
            unknown.join(", ")
        );
    }
    Ok(Some((role.clone(), content.clone())))
}

fn standard(turn: &Value, role: &str, content: &str, aliases: &RoleAliases) -> Result<Value> {
    let text = |key: &str| turn[key].as_str().with_context(|| format!("there is no string {key}"));
    let name = text(role)?;
    let Some(role) = aliases.role(name) else {
        bail!("the role {name:?} is unknown: name it as an alias of system, user or assistant")
    };
    Ok(json!({"role": role, "content": text(content)?}))
}

/// A row of any known conversational shape as TRL's `messages`, with `tools` where it has some; other columns are left
/// out. Alpaca rows become messages; prompts and completions that are texts cannot.
pub fn to_messages(record: &Record, options: &RowOptions) -> Result<Row> {
    let example = options.example(&record.row, true).with_context(|| record.place.to_string())?;
    let Example::Conversation(conversation) = example else {
        bail!("{}: the row is no conversation, but a text or tokens", record.place)
    };
    let mut row = Row::new();
    row.insert("messages".to_owned(), Value::Array(conversation.messages));
    if let Some(tools) = conversation.tools {
        row.insert("tools".to_owned(), tools);
    }
    Ok(row)
}
