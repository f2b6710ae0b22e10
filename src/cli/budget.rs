//! The memory that a run may take, and the plan for it.

use anyhow::{Result, anyhow, bail};
use tch::Device;

use super::cards;
use super::format::{bytes, count};
use crate::device;
use crate::train::plan::{Budget, Card, Memory, Plan, Work};
use crate::train::{GradientCheckpointing, RunPlan, Size};

/// Of what is free on the GPU, and of the host's available memory.
const SHARE_OF_DEVICE: f64 = 0.92;
const SHARE_OF_HOST: f64 = 0.5;

/// `--max-memory` and `--max-host-memory`, or their defaults on `device`.
pub fn budget(max_memory: Option<Size>, max_host_memory: Option<Size>, device: Device) -> Result<Budget> {
    let ours = || -> Result<u64> {
        let memory = device::memory(device)?;
        // What CUDA took at the start is part of what the process may have.
        let taken = device::process_memory(device).unwrap_or(0).saturating_sub(memory.reserved);
        Ok((memory.free as f64 * SHARE_OF_DEVICE) as u64 + taken)
    };
    let host = || -> Result<u64> { Ok((device::memory(Device::Cpu)?.free as f64 * SHARE_OF_HOST) as u64) };
    Ok(Budget {
        device: max_memory.map_or_else(ours, |size| Ok(size.0))?,
        host: max_host_memory.map_or_else(host, |size| Ok(size.0))?,
    })
}

/// What the run will keep of each layer on the GPU `device`, which is held to the budget from here on.
///
/// # Errors
/// The run does not fit: what it needs, and the smallest change that would fit.
pub fn plan_for(
    work: &Work,
    checkpointing: GradientCheckpointing,
    budget: Budget,
    device: Device,
) -> Result<(Plan, RunPlan, Card)> {
    let card = cards::of_gpu(device)?;
    let plan = chosen(work, checkpointing, budget, &card)
        .ok_or_else(|| refusal(work, checkpointing, budget, &card))?;
    device::limit_memory(device, Memory::allocator_limit(budget.device), budget.host, work.tokens)?;
    let run = plan.run(budget);
    Ok((plan, run, card))
}

/// The plan that a word of the flag means; none if it does not fit.
pub fn chosen(
    work: &Work,
    checkpointing: GradientCheckpointing,
    budget: Budget,
    card: &Card,
) -> Option<Plan> {
    match checkpointing {
        GradientCheckpointing::Auto => work.fastest(card, budget),
        other => work.uniform_within(other.policy(), card, budget),
    }
}

fn refusal(work: &Work, checkpointing: GradientCheckpointing, budget: Budget, card: &Card) -> anyhow::Error {
    let needed = match checkpointing {
        GradientCheckpointing::Auto => work.smallest(card, budget.host),
        other => work.least_uniform_plan(other.policy(), card),
    };
    anyhow!(
        "this run does not fit: it needs {} of the GPU and {} of the host, and may take {} and {} (--max-memory, \
         --max-host-memory). The smallest change that fits: {}",
        bytes(needed.memory.device()),
        bytes(needed.memory.host),
        bytes(budget.device),
        bytes(budget.host),
        smallest_change(work, checkpointing, budget, card)
    )
}

/// From what changes nothing but time to what changes the model: the first that fits.
pub fn smallest_change(
    work: &Work,
    checkpointing: GradientCheckpointing,
    budget: Budget,
    card: &Card,
) -> String {
    let fits = |work: &Work, budget: Budget| work.fastest(card, budget).is_some();
    if checkpointing != GradientCheckpointing::Auto && fits(work, budget) {
        return "--use-gradient-checkpointing auto".into();
    }
    let host = work.smallest(card, u64::MAX).memory;
    if host.device() <= budget.device && host.host > budget.host {
        return format!("--max-host-memory {}", mebibytes(host.host));
    }
    let fitting = |work: &Work, offload: bool, nf4: bool| {
        with_flags(work, offload, nf4).filter(|(_, changed)| fits(changed, budget)).map(|(words, _)| words)
    };
    if let Some(words) = fitting(work, true, false) {
        return words;
    }
    let rows = work.tokens / work.sample.max(1);
    let of_rows = |rows: u64| Work { tokens: rows * work.sample, ..work.clone() };
    let fewer = (1..rows).rev().filter_map(|rows| Some((rows, rows_words(work, rows)?)));
    if let Some((_, words)) = fewer.into_iter().find(|(rows, _)| fits(&of_rows(*rows), budget)) {
        return words;
    }
    let one = of_rows(1);
    let one_row = if rows > 1 { rows_words(work, 1) } else { None };
    let shorter = |work: &Work| match work.longest(budget, card) {
        0 => None,
        length => Some(length_words(work, length)),
    };
    if let Some(words) = shorter(&one) {
        let one_row = one_row.as_deref().map(bare);
        return one_row.into_iter().chain([words.as_str()]).collect::<Vec<_>>().join(" ");
    }
    if let Some(words) = fitting(&one, false, true).or_else(|| fitting(&one, true, true)) {
        return words;
    }
    if let Some(quantised) = one.in_4bit()
        && fits(&quantised, budget)
    {
        return "--load-in-4bit".into();
    }
    for (offload, nf4) in [(true, false), (false, true), (true, true)] {
        if let Some((words, changed)) = with_flags(&one, offload, nf4)
            && let Some(length) = shorter(&changed)
        {
            let one_row = one_row.as_deref().map(bare);
            return [words.as_str()]
                .into_iter()
                .chain(one_row)
                .chain([length.as_str()])
                .collect::<Vec<_>>()
                .join(" ");
        }
    }
    let shortest = one.rollout.map_or(256, |rollout| rollout.prompt + 1);
    let least = one.with_length(shortest).smallest(card, budget.host).memory.device();
    format!("--max-memory {}, or a smaller model", mebibytes(least))
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
    let words = [(offload, "--offload-embedding"), (nf4, "--nf4-head")];
    let words: Vec<&str> = words.into_iter().filter(|(on, _)| *on).map(|(_, word)| word).collect();
    let changed = work.clone().with_embeddings(offload, nf4).ok()?;
    (!words.is_empty()).then(|| (words.join(" "), changed))
}

fn mebibytes(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// What a plan says, as lines of a table.
pub fn lines(plan: &Plan, budget: Budget, card: &Card) -> Vec<(&'static str, String)> {
    let memory = &plan.memory;
    let kept: Vec<String> =
        plan.lines().into_iter().map(|(name, places)| format!("{name} {places}")).collect();
    let mut lines = vec![(
        "plan",
        format!(
            "{} of {} on the GPU, {} of {} at the host, about {} ms a step by the rates of {}",
            bytes(memory.device()),
            bytes(budget.device),
            bytes(memory.host),
            bytes(budget.host),
            count(plan.milliseconds.round() as u64),
            card.name
        ),
    )];
    lines.extend(kept.into_iter().map(|line| ("", line)));
    lines.extend(rollout_line(memory).map(|line| ("", line)));
    lines
}

/// What a plan says of rollouts, if there are any.
pub fn rollout_line(memory: &Memory) -> Option<String> {
    let rollout = memory.rollout?;
    let stays =
        if rollout.stays { "which stay while the model trains" } else { "given back before it trains" };
    Some(format!(
        "{} of keys and values, {stays}; tensors hold {} while completions are written, {} while the model trains",
        bytes(rollout.kv_cache),
        bytes(memory.rollout()),
        bytes(memory.training())
    ))
}

/// Refuses evaluation batches that do not fit.
pub fn check_evaluation(work: &Work, tokens: u64, budget: Budget) -> Result<()> {
    let needed = work.evaluation(tokens);
    if needed > budget.device {
        bail!(
            "the evaluation does not fit: its batches of up to {} tokens need {} of the GPU, and may take {}: lower \
             --per-device-eval-batch-size",
            count(tokens),
            bytes(needed),
            bytes(budget.device)
        );
    }
    Ok(())
}
