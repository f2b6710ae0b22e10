//! `ferrotune train`: supervised fine-tuning, LoRA or full.

use std::collections::BTreeSet;
use std::fs;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::banner::{summary, table};
use super::format::{bytes, count, percent};
use super::model_args::{init_device, kind_of, overflows_f16};
use super::progress::{Progress, RowProgress};
use super::quant_args::{self, QuantArgs};
use super::resume::checkpoint_to_resume;
use super::train_banner::{machine_lines, model_lines};
use super::train_plan::{Sizes, TrainPlan, train_plan};
use super::train_serve::ServeBetweenSteps;
use super::{signals, sources};
use crate::data::{
    BatchOptions, BatchStream, ChatTemplate, DatasetOptions, DatasetReport, RowOptions, TokenCache,
    TokenDataset, Tokenizer, prepare_with, preview,
};
use crate::error::Error;
use crate::export::{DYNAMIC_PLAN, DynamicPlan};
use crate::models::FastLanguageModel;
use crate::nn::LoadOptions;
use crate::train::checkpoint::Checkpoint;
use crate::train::metrics::RunLog;
use crate::train::observer::{StopReason, TrainObserver, TrainResults};
use crate::train::{BaseDtype, Quant, Sft, Trainer, TrainingArguments};

/// Runs what the flags ask for, start to end.
pub fn run(arguments: TrainingArguments) -> Result<()> {
    let mut args = arguments.resolved()?;
    for warning in args.warnings() {
        tracing::warn!("{warning}");
    }
    let resume = if args.dry_run { None } else { checkpoint_to_resume(&mut args)? };
    // A checkpoint continues to the bit only with its own number of threads.
    let threads = args.threads.or(resume.as_ref().map(|checkpoint| checkpoint.state.threads));
    let device = init_device(&args.device)?;
    if let Some(threads) = threads {
        tch::set_num_threads(threads as i32);
    }
    args.threads = Some(tch::get_num_threads() as usize);

    let dir = sources::model_dir(&args.model, args.revision.as_deref()).context("--model")?;
    let mut tokenizer = load_tokenizer(&args, &dir)?;
    if let Some(now) = resume.as_ref().and_then(|checkpoint| checkpoint.state.template_now) {
        tokenizer.set_template_now(now);
    }
    let (train, eval, reports) = load_data(&args, &tokenizer)?;
    let kind = kind_of(args.dtype, device, overflows_f16(&dir).context("--model")?);
    let options = LoadOptions {
        load_in_4bit: args.load_in_4bit,
        base_fp8: args.base_dtype == BaseDtype::Fp8,
        offload_embedding: args.offload_embedding,
        nf4_head: args.nf4_head,
        ..LoadOptions::new(kind, device)
    };
    let dense = dense_modules(&args, &dir, options)?;
    let sizes = Sizes {
        longest: train.data().max_len(),
        tokens: train.most_tokens() as u64,
        log_probs: false,
        rollout: None,
    };
    let eval_tokens = eval.as_ref().map(|eval| eval.most_tokens() as u64);
    let plan = train_plan(&args, &dir, options, &dense, sizes, eval_tokens)?;
    let mut model = load_model(&args, &dir, options, &dense)?;
    model.set_tokenizer(tokenizer);
    args.optim = Some(args.optim_for(model.decoder.is_quantized()));
    if args.dry_run {
        return show_sample(model.tokenizer()?, train.data(), &reports[0]);
    }
    print!("{}", banner(&args, &model, &train, &reports, plan.as_ref()));

    let title = format!(
        "{} on {}",
        last_part(&args.model),
        args.dataset.iter().map(|name| last_part(name)).collect::<Vec<_>>().join(", ")
    );
    let mut observer: Vec<Box<dyn TrainObserver>> = vec![
        Box::new(Progress::new(args.logging_steps)),
        Box::new(RunLog::new(&args.output_dir, &title, args.logging_steps)),
    ];
    if let Some(address) = args.serve {
        observer.push(Box::new(ServeBetweenSteps::start(address, &args.model, &model)?));
    }
    let stop = signals::stop_flag()?;
    let trainer = Trainer {
        model: &mut model,
        objective: &Sft,
        arguments: &args,
        train: Box::new(train),
        eval,
        observer: &mut observer,
        plan: plan.as_ref().map(|plan| plan.run.clone()),
        stop: &stop,
    };
    let results = run_planned(trainer, resume.as_ref(), plan.as_ref())?;
    drop(observer);
    finish(&args, &model, &results)
}

/// Runs to the end. Where memory was short although there is a plan, the error says so.
pub(super) fn run_planned(
    trainer: Trainer,
    resume: Option<&Checkpoint>,
    plan: Option<&TrainPlan>,
) -> Result<TrainResults> {
    trainer.run(resume).map_err(|error| match plan {
        // In a backward pass it comes from libtorch's own engine, as text.
        Some(plan) if format!("{error:#}").contains("out of memory") => error.context(missed(plan)),
        _ => error,
    })
}

/// Writes the model of a run that is over, and says how it went.
pub(super) fn finish(
    args: &TrainingArguments,
    model: &FastLanguageModel,
    results: &TrainResults,
) -> Result<()> {
    if results.stop_reason == StopReason::Interrupted {
        print!("\n{}", summary(results, &args.output_dir));
        bail!(Error::Interrupted(format!(
            "step {} is saved in {}",
            results.global_step,
            args.output_dir.display()
        )));
    }
    match &model.adapter {
        // Adapters stay f32; a whole model is saved in the type it was run in.
        Some(_) => model.save_trained(&args.output_dir)?,
        None => model.save_pretrained(&args.output_dir, model.decoder.kind)?,
    }
    model.tokenizer()?.save(&args.output_dir)?;
    print!("\n{}", summary(results, &args.output_dir));
    Ok(())
}

/// The model's tokenizer with the chat template that was asked for.
pub(super) fn load_tokenizer(args: &TrainingArguments, dir: &Path) -> Result<Tokenizer> {
    let mut tokenizer = FastLanguageModel::tokenizer_of(dir)?;
    if let Some(template) = &args.chat_template {
        let path = Path::new(template);
        tokenizer.set_chat_template(match path.is_file() {
            true => ChatTemplate::from_file(path)?,
            false => ChatTemplate::new(template, "--chat-template")?,
        });
    }
    Ok(tokenizer)
}

pub(super) fn load_model(
    args: &TrainingArguments,
    dir: &Path,
    options: LoadOptions,
    dense: &BTreeSet<String>,
) -> Result<FastLanguageModel> {
    let mut model = if args.from_scratch {
        FastLanguageModel::from_scratch(dir, options.kind, options.device, args.seed)?
    } else {
        FastLanguageModel::from_pretrained_keeping(dir, options, dense)?
    };
    match args.trains_all_weights() {
        true => model.train_all()?,
        false => model.get_peft_model(args.adapter_config(&args.model), args.seed)?,
    }
    Ok(model)
}

/// Modules that `--load-in-4bit` leaves as they are.
pub(super) fn dense_modules(
    args: &TrainingArguments,
    dir: &Path,
    options: LoadOptions,
) -> Result<BTreeSet<String>> {
    if args.from_scratch {
        return Ok(BTreeSet::new());
    }
    Ok(load_plan(args, dir, options)?.map(|plan| plan.kept()).unwrap_or_default())
}

pub(super) fn missed(plan: &TrainPlan) -> String {
    let memory = &plan.plan.memory;
    format!(
        "the plan of this run was wrong: it predicted {} of the GPU, and the {} of --max-memory were not enough. A larger \
         --max-memory or a smaller batch helps; please report it with the output of `ferrotune plan`",
        bytes(memory.device()),
        bytes(plan.budget.device)
    )
}

/// What `--quant dynamic-nf4` keeps: judged once a run. It stands in the output folder, where a resumed run finds it: on a GPU
/// another judgement could differ in its last bits.
fn load_plan(args: &TrainingArguments, dir: &Path, options: LoadOptions) -> Result<Option<DynamicPlan>> {
    if args.resume_from_checkpoint.is_some() && args.output_dir.join(DYNAMIC_PLAN).is_file() {
        return (args.quant == Quant::DynamicNf4).then(|| DynamicPlan::load(&args.output_dir)).transpose();
    }
    let quant = QuantArgs {
        quant: args.quant,
        quant_budget: args.quant_budget,
        calibration_dataset: args.calibration_dataset.clone(),
    };
    let plan = quant.plan_to_load(dir, options)?;
    if let Some(plan) = &plan {
        print!("{}", quant_args::table(plan));
        if !args.dry_run {
            fs::create_dir_all(&args.output_dir)
                .with_context(|| format!("creating {}", args.output_dir.display()))?;
            plan.save(&args.output_dir)?;
        }
    }
    Ok(plan)
}

/// Training batches, evaluation batches, and what became of the rows of both.
fn load_data(
    args: &TrainingArguments,
    tokenizer: &Tokenizer,
) -> Result<(BatchStream, Option<BatchStream>, Vec<DatasetReport>)> {
    let options = DatasetOptions {
        rows: RowOptions {
            dataset_format: args
                .dataset_format
                .as_deref()
                .map(str::parse)
                .transpose()
                .context("--dataset-format")?,
            text_column: args.text_column.clone(),
            template: args.template.clone(),
        },
        max_seq_length: args.max_seq_length,
        assistant_only_loss: args.assistant_only_loss,
        completion_only_loss: args.completion_only_loss.unwrap_or(true),
        allow_missing_eot: args.allow_missing_eot,
    };
    let read = |names: &[String]| -> Result<(TokenDataset, DatasetReport)> {
        let files = sources::dataset_files(names, &args.dataset_split)?;
        let progress = RowProgress::new("tokenising")?;
        let mut on_rows = |rows| progress.set(rows);
        let (data, report) = match &args.dataset_cache {
            Some(dir) => TokenCache::new(dir).prepare(&files, tokenizer, &options, &mut on_rows)?,
            None => prepare_with(&files, tokenizer, &options, &mut on_rows)?,
        };
        drop(progress);
        for (rule, rows, first) in report.findings.iter() {
            tracing::warn!(
                "{rule}: {} rows; the first: {}: {} (`ferrotune data lint` shows all)",
                count(rows),
                first.place,
                first.message
            );
        }
        Ok((data, report))
    };
    let (mut train, report) = read(&args.dataset).context("--dataset")?;
    let mut reports = vec![report];
    let mut eval = None;
    if !args.eval_dataset.is_empty() {
        let (data, report) = read(&args.eval_dataset).context("--eval-dataset")?;
        reports.push(report);
        eval = Some(data);
    } else if args.test_size > 0.0 {
        if train.len() < 2 {
            bail!(Error::Usage("--test-size: one sample cannot be split".to_owned()));
        }
        let (rest, held_out) = train.split(args.test_size, args.seed);
        (train, eval) = (rest, Some(held_out));
    }
    let batches = BatchOptions {
        batch_size: args.per_device_train_batch_size,
        max_seq_length: args.max_seq_length,
        packing: args.packing,
        shuffle: true,
        seed: args.seed,
    };
    let eval_batches =
        BatchOptions { batch_size: args.per_device_eval_batch_size, shuffle: false, ..batches };
    let eval = eval.map(|data| BatchStream::new(Arc::new(data), eval_batches)).transpose()?;
    Ok((BatchStream::new(Arc::new(train), batches)?, eval, reports))
}

pub(super) fn banner(
    args: &TrainingArguments,
    model: &FastLanguageModel,
    train: &BatchStream,
    reports: &[DatasetReport],
    plan: Option<&TrainPlan>,
) -> String {
    let mut lines = model_lines(args, model);
    let data = train.data();
    let samples = (data.len() as f64 / train.batches_per_epoch() as f64).max(1.0);
    let samples_per_step = samples * args.gradient_accumulation_steps as f64;
    let tokens_per_step = data.num_tokens() as f64 / data.len() as f64 * samples_per_step;
    for (label, report) in ["data", "evaluation"].into_iter().zip(reports) {
        lines.push((label, report.to_string()));
    }
    if args.test_size > 0.0 {
        lines.push(("evaluation", format!("{} of them held out", percent(args.test_size))));
    }
    lines.push((
        "step",
        format!(
            "{} x {} {}, about {} tokens",
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            match data.row_samples() {
                1 if args.packing => "packs",
                1 => "samples",
                _ => "pairs",
            },
            count(tokens_per_step.round() as u64)
        ),
    ));
    lines.extend(machine_lines(args, model, plan));
    table(&format!("ferrotune {}", env!("CARGO_PKG_VERSION")), &lines)
}

/// `--dry-run`: the first sample, or pair, as the model will see it; what is trained stands out.
pub(super) fn show_sample(tokenizer: &Tokenizer, data: &TokenDataset, report: &DatasetReport) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let colour = out.is_terminal();
    let (on, off) = if colour { ("\x1b[1;32m", "\x1b[0m") } else { ("[[", "]]") };
    let what = if data.row_samples() == 1 { "sample" } else { "pair" };
    writeln!(out, "{report}\n\nThe first {what}; {on}what is trained{off} is marked:")?;
    for sample in 0..data.row_samples() {
        writeln!(out)?;
        for span in preview(tokenizer, data, sample)? {
            match span.trained {
                true => write!(out, "{on}{}{off}", span.text)?,
                false => write!(out, "{}", span.text)?,
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

pub(super) fn last_part(name: &str) -> &str {
    name.trim_end_matches('/').rsplit('/').next().unwrap_or(name)
}
