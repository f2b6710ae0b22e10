use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Serialize, Serializer};

/// What can be wrong with a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// The row cannot be read: not JSON, cut off, too few cells.
    Unreadable,
    /// Bytes that are not UTF-8, or U+FFFD, which stands where an earlier program met such bytes.
    BrokenUtf8,
    /// Columns of no known shape, or values of the wrong type.
    UnknownShape,
    /// An answer, completion or text without content.
    EmptyAnswer,
    /// A question without content.
    EmptyPrompt,
    /// Roles that do not take turns, an unknown role, or nobody who answers at the end.
    RoleOrder,
    /// A special token, spelled out inside a message.
    TemplateTokens,
    /// A picture that cannot be found or read.
    BrokenImage,
    /// The chat template refuses the row.
    TemplateError,
    /// Two tokens that begin a text.
    DoubleBos,
    /// No token is trained.
    AllMasked,
    /// The token that ends a turn is not trained.
    MissingEot,
    /// More tokens than `max_seq_length`.
    TooLong,
    /// The same as an earlier row.
    Duplicate,
    /// Nearly the same as an earlier row.
    NearDuplicate,
    /// Its prompt stands in the evaluation set.
    EvalOverlap,
}

/// Rule, name, whether it is an error (else a warning), what to do.
const TABLE: [(Rule, &str, bool, &str); 16] = [
    (Rule::Unreadable, "unreadable", true, "mend or drop the line"),
    (Rule::BrokenUtf8, "broken-utf8", true, "write the file again as UTF-8 from its source"),
    (Rule::UnknownShape, "unknown-shape", true, "name the columns with --text-column or --template"),
    (Rule::EmptyAnswer, "empty-answer", true, "drop the row: it teaches to say nothing"),
    (Rule::EmptyPrompt, "empty-prompt", false, "write the question, or drop the row"),
    (Rule::RoleOrder, "role-order", true, "merge or drop messages until user and assistant take turns"),
    (Rule::TemplateTokens, "template-tokens", true, "take the token out: the chat template writes it"),
    (Rule::BrokenImage, "broken-image", true, "mend the path or the picture"),
    (Rule::TemplateError, "template-error", true, "change the row, or use another --chat-template"),
    (Rule::DoubleBos, "double-bos", true, "take the token out of the text: the tokenizer adds it"),
    (Rule::AllMasked, "all-masked", true, "raise --max-seq-length, or see what the loss options mask"),
    (Rule::MissingEot, "missing-eot", true, "use a chat template that ends the assistant's turns"),
    (Rule::TooLong, "too-long", false, "raise --max-seq-length, or shorten the row: its end is cut off"),
    (Rule::Duplicate, "duplicate", false, "drop it: ferrotune data dedup"),
    (Rule::NearDuplicate, "near-duplicate", false, "drop it: ferrotune data dedup --near"),
    (Rule::EvalOverlap, "eval-overlap", true, "drop it: the evaluation would measure memory"),
];

impl Rule {
    /// All rules.
    pub fn all() -> impl Iterator<Item = Rule> {
        TABLE.iter().map(|(rule, ..)| *rule)
    }

    fn entry(self) -> &'static (Rule, &'static str, bool, &'static str) {
        &TABLE[self as usize]
    }

    /// The rule's name on the command line and in reports.
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    /// Whether a finding is an error, for which a check of the dataset fails; else a warning.
    pub fn is_error(self) -> bool {
        self.entry().2
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        self.entry().3
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Rule {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Rule> {
        match Rule::all().find(|rule| rule.name() == text) {
            Some(rule) => Ok(rule),
            None => {
                bail!("unknown rule {text:?}: expected one of {}", TABLE.map(|(_, name, ..)| name).join(", "))
            }
        }
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_rules() {
        for (at, (rule, name, ..)) in TABLE.iter().enumerate() {
            assert_eq!(*rule as usize, at);
            assert_eq!(name.parse::<Rule>().unwrap(), *rule);
        }
    }
}
