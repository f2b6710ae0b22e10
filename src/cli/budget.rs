//! The memory that a run may take, and the plan for it.

use anyhow::{Result, anyhow, bail};
use tch::Device;

use super::changes::changes;
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

/// Says of bounds that were given for a run on the CPU that they bound nothing.
pub fn warn_without_gpu(device: Device, max_memory: Option<Size>, max_host_memory: Option<Size>) {
    for (flag, size) in [("--max-memory", max_memory), ("--max-host-memory", max_host_memory)] {
        if size.is_some() && !device.is_cuda() {
            tracing::warn!("{flag} bounds runs on a GPU: on the CPU nothing is bounded");
        }
    }
}

/// What the run will keep of each layer on the GPU `device`, which is held to the budget from here on.
///
/// # Errors
/// The run does not fit: what it needs, and the smallest change that would fit.
pub fn plan_for(
    work: &Work,
    checkpointing: GradientCheckpointing,
    budget: Budget,
    (device, card): (Device, &Card),
) -> Result<(Plan, RunPlan)> {
    let plan =
        work.chosen(checkpointing, card, budget).ok_or_else(|| refusal(work, checkpointing, budget, card))?;
    device::limit_memory(device, Memory::allocator_limit(budget.device), budget.host, work.tokens)?;
    let run = plan.run(budget);
    Ok((plan, run))
}

fn refusal(work: &Work, checkpointing: GradientCheckpointing, budget: Budget, card: &Card) -> anyhow::Error {
    let needed = work.least(checkpointing, card, budget.host);
    let changes = changes(work, checkpointing, budget, card);
    let or = changes.with_auto.map_or(String::new(), |words| format!("; or: {words}"));
    anyhow!(
        "this run does not fit: it needs {} of the GPU and {} of the host, and may take {} and {} (--max-memory, \
         --max-host-memory). The smallest change that fits: {}{or}",
        bytes(needed.memory.device()),
        bytes(needed.memory.host),
        bytes(budget.device),
        bytes(budget.host),
        changes.smallest
    )
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
