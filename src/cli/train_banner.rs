//! What a run is, before it starts.

use super::banner::trainable;
use super::format::bytes;
use super::model_args::name_of;
use super::train_plan::TrainPlan;
use crate::device;
use crate::models::FastLanguageModel;
use crate::train::{Optim, TrainingArguments, memory};

/// Rows of a [`table`](super::banner::table).
pub type Lines = Vec<(&'static str, String)>;

/// The model, and how it trains.
pub fn model_lines(args: &TrainingArguments, model: &FastLanguageModel) -> Lines {
    let decoder = &model.decoder;
    let config = &decoder.config;
    let trained: usize = decoder.trainable().iter().map(|parameter| parameter.tensor.numel()).sum();
    let dtype = name_of(decoder.kind);
    let method = match &model.adapter {
        Some(adapter) => {
            let base = match (decoder.is_fp8(), decoder.is_quantized()) {
                (true, _) => " on fp8 weights",
                (false, true) => " on 4-bit weights",
                (false, false) => "",
            };
            format!("LoRA r {}, lora_alpha {}{base}", adapter.r, adapter.lora_alpha)
        }
        None if args.from_scratch => "all weights, from random ones".to_owned(),
        None => "all weights".to_owned(),
    };
    let mut lines = vec![
        (
            "model",
            format!(
                "{}: {}, {} layers, hidden size {}, {dtype}",
                args.model,
                config.model_type,
                config.layers.len(),
                config.hidden_size
            ),
        ),
        ("trains", format!("{}, {method}", trainable(trained as u64, decoder.num_parameters() as u64))),
    ];
    let optimizer = match args.optim_for(decoder.is_quantized()) {
        optim @ Optim::AdamwTorch => optim.to_string(),
        optim @ Optim::Adamw8bit => format!("{optim}, moments in 8 bits"),
    };
    lines.push(("optimizer", optimizer));
    lines
}

/// The machine, the output, and what the plan says.
pub fn machine_lines(args: &TrainingArguments, model: &FastLanguageModel, plan: Option<&TrainPlan>) -> Lines {
    let device = model.decoder.device;
    let machine = device::describe(device);
    let mut lines = vec![
        (
            "device",
            format!(
                "{machine}; {} in use of {}",
                bytes(memory::in_use(device)),
                bytes(memory::total(device))
            ),
        ),
        ("output", args.output_dir.display().to_string()),
    ];
    if let Some(TrainPlan { plan, budget, card, .. }) = plan {
        lines.extend(super::budget::lines(plan, *budget, card));
    }
    lines
}
