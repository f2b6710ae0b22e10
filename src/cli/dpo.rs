//! `ferrotune dpo`: preference training.

use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::model_args::{init_device, kind_of, overflows_f16};
use super::progress::{Progress, RowProgress};
use super::resume::{checkpoint_to_resume, warn_of_changes};
use super::train::{
    banner, dense_modules, finish, last_part, load_model, load_tokenizer, run_planned, show_sample,
};
use super::train_plan::{Sizes, train_plan};
use super::train_serve::ServeBetweenSteps;
use super::{signals, sources};
use crate::data::{BatchOptions, BatchStream, DatasetReport, TokenDataset, Tokenizer, prepare_preferences};
use crate::error::Error;
use crate::models::Decoder;
use crate::nn::LoadOptions;
use crate::train::checkpoint::Checkpoint;
use crate::train::metrics::RunLog;
use crate::train::observer::TrainObserver;
use crate::train::preference::{
    LossType, PreferenceArguments, PreferenceLoss, ReferenceCache, reference_log_probs,
};
use crate::train::{Trainer, TrainingArguments};

/// What of the objective's metrics a line shows, and what gets a picture.
const SHOWN: &[(&str, &str)] = &[("rewards/margins", "margin"), ("rewards/accuracies", "accuracy")];
const PLOTS: &[&str] = &["rewards/margins", "rewards/accuracies"];
const PLOTS_OF_KTO: &[&str] = &["rewards/margins", "kl"];

/// Runs what the flags ask for, start to end.
pub fn run(arguments: PreferenceArguments) -> Result<()> {
    let mut preference = arguments.resolved()?;
    for warning in preference.train.warnings() {
        tracing::warn!("{warning}");
    }
    let resume = if preference.train.dry_run { None } else { checkpoint_to_resume(&mut preference.train)? };
    if let Some(checkpoint) = &resume {
        // The words of every training run were compared before.
        warn_of_changes(checkpoint, |text, file| {
            let other = || {
                format!(
                    "--resume-from-checkpoint: {} is not a checkpoint of ferrotune dpo",
                    checkpoint.folder.display()
                )
            };
            Ok(PreferenceArguments::from_yaml(text, file).with_context(other)?.own_differences(&preference))
        })?;
    }
    let args = &mut preference.train;
    let threads = args.threads.or(resume.as_ref().map(|checkpoint| checkpoint.state.threads));
    let device = init_device(&args.device)?;
    if let Some(threads) = threads {
        tch::set_num_threads(threads as i32);
    }
    args.threads = Some(tch::get_num_threads() as usize);

    let dir = sources::model_dir(&args.model, args.revision.as_deref()).context("--model")?;
    let mut tokenizer = load_tokenizer(args, &dir)?;
    if let Some(now) = resume.as_ref().and_then(|checkpoint| checkpoint.state.template_now) {
        tokenizer.set_template_now(now);
    }
    let (data, reports) = load_data(&preference, &tokenizer)?;
    if preference.train.dry_run {
        return show_sample(&tokenizer, &data.train, &reports[0]);
    }
    let args = &mut preference.train;
    let kind = kind_of(args.dtype, device, overflows_f16(&dir).context("--model")?);
    let options = LoadOptions {
        load_in_4bit: args.load_in_4bit,
        offload_embedding: args.offload_embedding,
        nf4_head: args.nf4_head,
        ..LoadOptions::new(kind, device)
    };
    let dense = dense_modules(args, &dir, options)?;
    let plan = {
        let (train, eval) = streams(args, data.clone())?;
        let sizes = Sizes {
            longest: train.data().max_len(),
            tokens: train.most_tokens() as u64,
            log_probs: true,
            rollout: None,
        };
        let eval_tokens = eval.as_ref().map(|eval| eval.most_tokens() as u64);
        train_plan(args, &dir, options, &dense, sizes, eval_tokens)?
    };
    let mut model = load_model(args, &dir, options, &dense)?;
    model.set_tokenizer(tokenizer);
    args.optim = Some(args.optim_for(model.decoder.is_quantized()));
    let data = with_references(&preference, &model.decoder, data, resume.as_ref())?;
    let args = &preference.train;
    let (train, eval) = streams(args, data)?;
    print!("{}", banner(args, &model, &train, &reports, plan.as_ref()));

    let losses: Vec<String> = preference.loss_type.iter().map(LossType::to_string).collect();
    let title = format!(
        "{} on {}, {}",
        last_part(&args.model),
        args.dataset.iter().map(|name| last_part(name)).collect::<Vec<_>>().join(", "),
        losses.join(" + ")
    );
    let plots = if preference.has(LossType::Kto) { PLOTS_OF_KTO } else { PLOTS };
    let mut observer: Vec<Box<dyn TrainObserver>> = vec![
        Box::new(Progress::new(args.logging_steps).showing(SHOWN)),
        Box::new(RunLog::new(&args.output_dir, &title, args.logging_steps).plotting(plots)),
    ];
    if let Some(address) = args.serve {
        observer.push(Box::new(ServeBetweenSteps::start(address, &args.model, &model)?));
    }
    let stop = signals::stop_flag()?;
    let objective = PreferenceLoss::new(&preference, &model.decoder)?;
    let trainer = Trainer {
        model: &mut model,
        objective: &objective,
        arguments: args,
        train: Box::new(train),
        eval,
        observer: &mut observer,
        plan: plan.as_ref().map(|plan| plan.run.clone()),
        stop: &stop,
    };
    let results = run_planned(trainer, resume.as_ref(), plan.as_ref())?;
    drop(observer);
    finish(args, &model, &results)
}

/// Pairs to train on, and to evaluate on.
#[derive(Clone)]
struct Data {
    train: Arc<TokenDataset>,
    eval: Option<Arc<TokenDataset>>,
}

/// The pairs, and what became of the rows of both files.
fn load_data(preference: &PreferenceArguments, tokenizer: &Tokenizer) -> Result<(Data, Vec<DatasetReport>)> {
    let args = &preference.train;
    let read = |names: &[String]| -> Result<(TokenDataset, DatasetReport)> {
        let files = sources::dataset_files(names, &args.dataset_split)?;
        let progress = RowProgress::new("tokenising")?;
        prepare_preferences(&files, tokenizer, preference.data(), &mut |rows| progress.set(rows))
    };
    let (mut train, report) = read(&args.dataset).context("--dataset")?;
    let (mut eval, mut reports) = (None, vec![report]);
    if !args.eval_dataset.is_empty() {
        let (data, report) = read(&args.eval_dataset).context("--eval-dataset")?;
        reports.push(report);
        eval = Some(data);
    } else if args.test_size > 0.0 {
        if train.len() < 4 {
            bail!(Error::Usage("--test-size: one row cannot be split".to_owned()));
        }
        let (rest, held_out) = train.split(args.test_size, args.seed);
        (train, eval) = (rest, Some(held_out));
    }
    Ok((Data { train: Arc::new(train), eval: eval.map(Arc::new) }, reports))
}

fn streams(args: &TrainingArguments, data: Data) -> Result<(BatchStream, Option<BatchStream>)> {
    let options = BatchOptions {
        batch_size: args.per_device_train_batch_size,
        max_seq_length: args.max_seq_length,
        packing: false,
        shuffle: true,
        seed: args.seed,
    };
    let of_eval = BatchOptions { batch_size: args.per_device_eval_batch_size, shuffle: false, ..options };
    Ok((
        BatchStream::new(data.train, options)?,
        data.eval.map(|eval| BatchStream::new(eval, of_eval)).transpose()?,
    ))
}

/// The data with the reference's log-probabilities, where they are computed before training.
fn with_references(
    preference: &PreferenceArguments,
    decoder: &Decoder,
    data: Data,
    resume: Option<&Checkpoint>,
) -> Result<Data> {
    if !preference.precomputes() {
        return Ok(data);
    }
    let args = &preference.train;
    let before = resume.and_then(|checkpoint| checkpoint.folder.parent());
    let mut cache = ReferenceCache::open(&args.output_dir, before)?;
    let mut noted = |data: Arc<TokenDataset>| -> Result<Arc<TokenDataset>> {
        let progress = RowProgress::new("reference log-probabilities")?;
        let batch_size = args.per_device_eval_batch_size;
        let log_probs = cache
            .get(&data, || reference_log_probs(decoder, &data, batch_size, &mut |rows| progress.set(rows)))?;
        let mut data = Arc::unwrap_or_clone(data);
        data.set_references(&log_probs);
        Ok(Arc::new(data))
    };
    Ok(Data { train: noted(data.train)?, eval: data.eval.map(noted).transpose()? })
}
