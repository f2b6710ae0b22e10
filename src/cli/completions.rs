//! What a model in training writes, as a table on screen.

use std::fmt::Write;

use anyhow::Result;

use super::progress::line;
use crate::train::observer::{CompletionRow, Completions, TrainObserver};

/// Characters of a text in the table; the file has all of it.
const MOST_CHARACTERS: usize = 300;

/// Shows some completions of every `steps`th step.
#[derive(Debug)]
pub struct CompletionTable {
    /// 0 for never.
    pub steps: u64,
    pub rows: usize,
}

impl TrainObserver for CompletionTable {
    fn on_completions(&mut self, step: u64, completions: &Completions) -> Result<()> {
        if completions.are_due(step, self.steps) && self.rows > 0 {
            line(&table(step, completions, self.rows));
        }
        Ok(())
    }
}

/// The first `most` of them.
pub fn table(step: u64, completions: &Completions, most: usize) -> String {
    let mut text = format!("completions of step {step}");
    for row in completions.rows.iter().take(most) {
        let _ = write!(
            text,
            "\n  prompt      {}\n  completion  {}\n  reward      {}",
            short(&row.prompt),
            short(&row.completion),
            reward(completions.rewards, row)
        );
        for error in &row.errors {
            let _ = write!(text, "\n  failed      {}", short(error));
        }
    }
    text
}

fn reward(names: &[String], row: &CompletionRow) -> String {
    let number = |value: Option<f64>| value.map_or("none".to_owned(), |value| format!("{value:.3}"));
    let each = names.iter().zip(&row.rewards).map(|(name, value)| format!("{name} {}", number(*value)));
    let each = each.collect::<Vec<_>>().join(", ");
    format!("{} ({each}), advantage {:+.3}", number(row.reward), row.advantage)
}

/// On one line, cut in the middle.
fn short(text: &str) -> String {
    let characters: Vec<char> = text.trim().chars().collect();
    let shown: String = if characters.len() <= MOST_CHARACTERS {
        characters.iter().collect()
    } else {
        let half = MOST_CHARACTERS / 2;
        characters[..half].iter().chain(&['.'; 3]).chain(&characters[characters.len() - half..]).collect()
    };
    shown.replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_texts_and_rewards() {
        let row = CompletionRow {
            prompt: "1 + 1?\n".into(),
            completion: "2".repeat(400),
            rewards: vec![Some(1.0), None],
            reward: Some(1.0),
            advantage: -0.5,
            ..CompletionRow::default()
        };
        let names = ["exact".to_owned(), "json".to_owned()];
        let shown = table(7, &Completions { steps: 1, rewards: &names, rows: &[row.clone(), row] }, 1);
        assert_eq!(shown.lines().count(), 4, "{shown}");
        assert!(shown.contains("1.000 (exact 1.000, json none), advantage -0.500"), "{shown}");
        assert!(shown.contains("2...2"), "{shown}");
    }
}
