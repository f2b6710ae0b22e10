//! What would make a run fit that does not.

use crate::train::plan::{Budget, Card, Work};
use crate::train::{GradientCheckpointing, Optim, TrainingArguments};

/// The smallest change that makes a run fit, in words of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// With the policy that was asked for, if anything does but more memory.
    pub smallest: String,
    /// Where another was asked for, with the one that is chosen layer by layer.
    pub with_auto: Option<String>,
}

/// For `work`, which does not fit `budget`.
pub fn changes(work: &Work, checkpointing: GradientCheckpointing, budget: Budget, card: &Card) -> Changes {
    const AUTO: &str = "--use-gradient-checkpointing auto";
    let auto = GradientCheckpointing::Auto;
    let mut with_auto = None;
    if checkpointing != auto {
        with_auto = match work.chosen(auto, card, budget) {
            Some(_) => Some(AUTO.into()),
            None => within(work, &Fit { checkpointing: auto, budget, card })
                .map(|words| joined([Some(AUTO), Some(&words)])),
        };
    }
    let fit = Fit { checkpointing, budget, card };
    let smallest = within(work, &fit).or_else(|| with_auto.take());
    Changes { smallest: smallest.unwrap_or_else(|| more_memory(work, &fit)), with_auto }
}

/// What a changed run must keep to.
#[derive(Clone, Copy)]
struct Fit<'a> {
    checkpointing: GradientCheckpointing,
    budget: Budget,
    card: &'a Card,
}

impl Fit<'_> {
    fn takes(&self, work: &Work) -> bool {
        work.chosen(self.checkpointing, self.card, self.budget).is_some()
    }

    /// The words for samples that are short enough.
    fn shorter(&self, work: &Work) -> Option<String> {
        match work.longest(self.checkpointing, self.budget, self.card) {
            0 => None,
            length => Some(length_words(work, length)),
        }
    }
}

/// From what changes nothing but time to what changes the model: the first that fits.
fn within(work: &Work, fit: &Fit) -> Option<String> {
    let Fit { checkpointing, budget, card } = *fit;
    let needed = work.least(checkpointing, card, u64::MAX).memory;
    if needed.device() <= budget.device && needed.host > budget.host {
        return Some(format!("--max-host-memory {}", mebibytes(needed.host)));
    }
    if let Some((words, _)) = with_flags(work, true, false).filter(|(_, changed)| fit.takes(changed)) {
        return Some(words);
    }
    if let Some(words) = fewer_rows(work, fit) {
        return Some(words);
    }
    if work.optim == Optim::AdamwTorch {
        const IN_8BIT: &str = "--optim adamw_8bit";
        let changed = Work { optim: Optim::Adamw8bit, ..work.clone() };
        if fit.takes(&changed) {
            return Some(IN_8BIT.into());
        }
        if let Some(words) = fewer_rows(&changed, fit) {
            return Some(joined([Some(IN_8BIT), Some(&words)]));
        }
    }
    let rows = work.tokens / work.sample.max(1);
    let one = of_rows(work, 1);
    let one_row = if rows > 1 { rows_words(work, 1) } else { None };
    let one_row = one_row.as_deref().map(bare);
    if let Some(words) = fit.shorter(&one) {
        return Some(joined([one_row, Some(&words)]));
    }
    for offload in [false, true] {
        if let Some((words, _)) = with_flags(&one, offload, true).filter(|(_, changed)| fit.takes(changed)) {
            return Some(joined([Some(words.as_str()), one_row]));
        }
    }
    if let Some(changed) = work.with_lora_instead(u64::from(TrainingArguments::default().r)) {
        const LORA: &str = "LoRA, without --full-finetuning";
        return match fit.takes(&changed) {
            true => Some(LORA.into()),
            false => within(&changed, fit).map(|words| format!("{LORA}, {words}")),
        };
    }
    if one.in_4bit().is_some_and(|changed| fit.takes(&changed)) {
        let words = if work.fp8 { "--base-dtype auto --load-in-4bit" } else { "--load-in-4bit" };
        return Some(joined([Some(words), one_row]));
    }
    for (offload, nf4) in [(true, false), (false, true), (true, true)] {
        if let Some((words, changed)) = with_flags(&one, offload, nf4)
            && let Some(length) = fit.shorter(&changed)
        {
            return Some(joined([Some(words.as_str()), one_row, Some(&length)]));
        }
    }
    None
}

fn more_memory(work: &Work, fit: &Fit) -> String {
    let shortest = work.rollout.map_or(256, |rollout| rollout.prompt + 1);
    let least = of_rows(work, 1).with_length(shortest).least(fit.checkpointing, fit.card, fit.budget.host);
    format!("--max-memory {}, or a smaller model", mebibytes(least.memory.device()))
}

fn joined<'a>(words: impl IntoIterator<Item = Option<&'a str>>) -> String {
    words.into_iter().flatten().collect::<Vec<_>>().join(" ")
}

fn of_rows(work: &Work, rows: u64) -> Work {
    Work { tokens: rows * work.sample, ..work.clone() }
}

/// As many samples a pass as fit, if fewer do.
fn fewer_rows(work: &Work, fit: &Fit) -> Option<String> {
    let rows = work.tokens / work.sample.max(1);
    let mut fewer = (1..rows).rev().filter_map(|rows| Some((rows, rows_words(work, rows)?)));
    fewer.find(|(rows, _)| fit.takes(&of_rows(work, *rows))).map(|(_, words)| words)
}

/// Fewer samples a pass, as many a step. None where completions would not come out even.
fn rows_words(work: &Work, rows: u64) -> Option<String> {
    let Some(rollout) = work.rollout else {
        return Some(format!(
            "--per-device-train-batch-size {rows} (with more --gradient-accumulation-steps)"
        ));
    };
    let before = work.tokens / work.sample.max(1);
    let of_step = before * work.gradient_accumulation_steps;
    let even = of_step.is_multiple_of(rows) && rollout.sequences.is_multiple_of(rows);
    let generated = if rollout.sequences == of_step {
        String::new()
    } else {
        format!(" --steps-per-generation {}", rollout.sequences / rows)
    };
    even.then(|| {
        let passes = of_step / rows;
        format!("--per-device-train-batch-size {rows} --gradient-accumulation-steps {passes}{generated}")
    })
}

/// Words without what stands in brackets behind them.
fn bare(words: &str) -> &str {
    words.split(" (").next().unwrap_or(words)
}

/// Samples of `length` tokens.
fn length_words(work: &Work, length: u64) -> String {
    match work.rollout {
        Some(rollout) => format!("--max-completion-length {}", length - rollout.prompt),
        None => format!("--max-seq-length {length}"),
    }
}

/// `work` with the flags of these that it has not yet, and their words; none where it has them or loading would refuse it.
fn with_flags(work: &Work, offload: bool, nf4: bool) -> Option<(String, Work)> {
    let (offload, nf4) = (offload && work.embedding > 0, nf4 && !work.nf4_head);
    if (offload && work.trained.embedding) || (nf4 && work.trained.head) {
        return None;
    }
    let words = [(offload, "--offload-embedding"), (nf4, "--nf4-head")];
    let words: Vec<&str> = words.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect();
    let changed = work.clone().with_embeddings(offload, nf4).ok()?;
    (!words.is_empty()).then(|| (words.join(" "), changed))
}

fn mebibytes(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}
