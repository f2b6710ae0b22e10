//! `ferrotune grpo`: reinforcement learning from rewards.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::banner::table;
use super::completions::CompletionTable;
use super::engine_args::kv_bytes;
use super::format::count;
use super::model_args::{init_device, kind_of, overflows_f16};
use super::progress::Progress;
use super::resume::{checkpoint_to_resume, warn_of_changes};
use super::train::{dense_modules, finish, last_part, load_model, load_tokenizer, run_planned};
use super::train_banner::{machine_lines, model_lines};
use super::train_plan::{Sizes, TrainPlan, train_plan};
use super::{signals, sources};
use crate::data::Tokenizer;
use crate::models::{Config, FastLanguageModel};
use crate::nn::LoadOptions;
use crate::rewards::{self, RewardOptions, Stop};
use crate::train::Trainer;
use crate::train::grpo::{Grpo, GrpoArguments, Prompt, PromptOptions, Prompts, Rollouts};
use crate::train::metrics::RunLog;
use crate::train::observer::TrainObserver;
use crate::train::plan::Rollout;

/// Metrics of a step on screen, beside the rewards.
const SHOWN: &[(&str, &str)] = &[
    ("completions/mean_length", "length"),
    ("kl", "KL"),
    ("clip_ratio/region_mean", "clipped"),
    ("cispo_clip_ratio", "clipped"),
];

/// Runs what the flags ask for, start to end.
pub fn run(arguments: GrpoArguments) -> Result<()> {
    let mut args = arguments.resolved()?;
    for warning in args.training.warnings() {
        tracing::warn!("{warning}");
    }
    let resume = if args.training.dry_run { None } else { checkpoint_to_resume(&mut args.training)? };
    if let Some(checkpoint) = &resume {
        // The words of every training run were compared before.
        warn_of_changes(checkpoint, |text, file| {
            let other = || {
                format!(
                    "--resume-from-checkpoint: {} is not a checkpoint of ferrotune grpo",
                    checkpoint.folder.display()
                )
            };
            let mut before = GrpoArguments::from_yaml(text, file).with_context(other)?;
            ensure!(!before.rewards().is_empty(), other());
            before.training = args.training.clone();
            Ok(before.differences(&args))
        })?;
    }
    let threads = args.training.threads.or(resume.as_ref().map(|checkpoint| checkpoint.state.threads));
    let device = init_device(&args.training.device)?;
    if let Some(threads) = threads {
        tch::set_num_threads(threads as i32);
    }
    args.training.threads = Some(tch::get_num_threads() as usize);

    let dir =
        sources::model_dir(&args.training.model, args.training.revision.as_deref()).context("--model")?;
    let mut tokenizer = load_tokenizer(&args.training, &dir)?;
    if let Some(now) = resume.as_ref().and_then(|checkpoint| checkpoint.state.template_now) {
        tokenizer.set_template_now(now);
    }
    let read = |names: &[String]| load_prompts(&args, names, &tokenizer, &dir);
    let prompts = read(&args.training.dataset).context("--dataset")?;
    let held_out = match &args.training.eval_dataset[..] {
        [] => None,
        names => Some(read(names).context("--eval-dataset")?),
    };
    let kind = kind_of(args.training.dtype, device, overflows_f16(&dir).context("--model")?);
    let options = LoadOptions {
        load_in_4bit: args.training.load_in_4bit,
        offload_embedding: args.training.offload_embedding,
        nf4_head: args.training.nf4_head,
        ..LoadOptions::new(kind, device)
    };
    check_columns(&args, &prompts)?;
    // No signal raises it before the model is loaded: until then one ends the program at once.
    let stop = Stop::default();
    let reward_options = RewardOptions {
        stop: &stop,
        timeout: Duration::from_secs_f64(args.reward_timeout),
        device,
        kind,
        tokenizer: &tokenizer,
    };
    let judges =
        rewards::build(&args.rewards(), &args.reward_weights, reward_options).context("--reward-funcs")?;
    if args.training.dry_run {
        show_prompts(&prompts, judges.names());
        return Ok(());
    }
    let dense = dense_modules(&args.training, &dir, options)?;
    let longest_prompt = prompts.longest().max(held_out.as_ref().map_or(0, Prompts::longest));
    let longest = longest_prompt + args.max_completion_length;
    let sizes = Sizes {
        longest,
        tokens: (longest * args.training.per_device_train_batch_size) as u64,
        log_probs: true,
        rollout: Some(Rollout::new(
            args.generation_batch_size() as u64,
            args.num_generations as u64,
            longest_prompt as u64,
            args.kv_cache_memory.map(|size| size.0),
        )),
    };
    let plan = train_plan(&args.training, &dir, options, &dense, sizes, None)?;
    let mut model = load_model(&args.training, &dir, options, &dense)?;
    model.set_tokenizer(tokenizer);
    args.training.optim = Some(args.training.optim_for(model.decoder.is_quantized()));
    print!("{}", banner(&args, &model, (&prompts, held_out.as_ref()), judges.names(), plan.as_ref()));

    let stop_token_ids = model.generation_params()?.stop_token_ids;
    let planned = plan.as_ref().and_then(|plan| plan.plan.memory.rollout);
    let kv =
        planned.map_or_else(|| kv_bytes(args.kv_cache_memory, device), |rollout| Ok(rollout.kv_cache))?;
    let mut source = Rollouts::new(&args, prompts, judges, stop_token_ids, kv)?.until(stop.clone());
    if planned.is_some_and(|rollout| rollout.stays) {
        source = source.keeping_its_engine();
    }
    if let Some(held_out) = held_out {
        source = source.holding_out(held_out);
    }
    let title = format!("{} on {}", last_part(&args.training.model), datasets(&args));
    let mut observer: Vec<Box<dyn TrainObserver>> = vec![
        Box::new(Progress::new(args.training.logging_steps).showing(SHOWN)),
        Box::new(CompletionTable { steps: args.log_completions_steps, rows: args.num_completions_to_print }),
        Box::new(
            RunLog::new(&args.training.output_dir, &title, args.training.logging_steps)
                .plotting(&["reward", "completions/mean_length"])
                .with_completions(args.log_completions_steps),
        ),
    ];
    signals::raise_on_signal(&stop.0)?;
    let trainer = Trainer {
        model: &mut model,
        objective: &Grpo::new(&args),
        arguments: &args.training,
        train: Box::new(source),
        eval: None,
        observer: &mut observer,
        plan: plan.as_ref().map(|plan| plan.run.clone()),
        stop: &stop.0,
    };
    let results = run_planned(trainer, resume.as_ref(), plan.as_ref())?;
    drop(observer);
    finish(&args.training, &model, &results)
}

/// A reward that compares with a column that no row has would say nothing, step after step.
fn check_columns(args: &GrpoArguments, prompts: &Prompts) -> Result<()> {
    for spec in args.rewards() {
        let Some(column) = spec.column() else { continue };
        let has = |prompt: &Prompt| prompt.columns.get(column).is_some_and(|value| !value.is_null());
        ensure!(
            prompts.rows.iter().any(has),
            "--reward-funcs {spec}: no row has a column {column:?}; the first has {}",
            prompts.rows[0].columns.keys().cloned().collect::<Vec<_>>().join(", ")
        );
    }
    Ok(())
}

fn load_prompts(
    args: &GrpoArguments,
    names: &[String],
    tokenizer: &Tokenizer,
    dir: &Path,
) -> Result<Prompts> {
    let context = Config::from_dir(dir)?.max_position_embeddings.max(1) as usize;
    let room = context.min(args.training.max_seq_length);
    let files = sources::dataset_files(names, &args.training.dataset_split)?;
    let fits = args.max_completion_length < room;
    let options = PromptOptions {
        prompt_column: &args.prompt_column,
        system_prompt: args.system_prompt.as_deref(),
        longest: if fits { room - args.max_completion_length } else { usize::MAX },
    };
    // What is wrong with the rows is said first.
    let prompts = Prompts::read(&files, tokenizer, options)?;
    ensure!(
        fits,
        "--max-completion-length {}: the model's context and --max-seq-length leave room for {room} tokens, prompt included",
        args.max_completion_length
    );
    if prompts.left_out > 0 {
        tracing::warn!(
            "{} prompts of more than {} tokens are left out: with {} of the completion they are longer than --max-seq-length or the \
             model's context",
            count(prompts.left_out as u64),
            options.longest,
            args.max_completion_length
        );
    }
    Ok(prompts)
}

fn datasets(args: &GrpoArguments) -> String {
    args.training.dataset.iter().map(|name| last_part(name)).collect::<Vec<_>>().join(", ")
}

fn banner(
    args: &GrpoArguments,
    model: &FastLanguageModel,
    (prompts, held_out): (&Prompts, Option<&Prompts>),
    rewards: &[String],
    plan: Option<&TrainPlan>,
) -> String {
    let mut lines = model_lines(&args.training, model);
    let groups = args.generation_batch_size() / args.num_generations;
    lines.extend([
        (
            "prompts",
            format!(
                "{} of up to {} tokens from {}",
                count(prompts.rows.len() as u64),
                count(prompts.longest() as u64),
                datasets(args)
            ),
        ),
        ("rewards", rewards.join(", ")),
        (
            "rollout",
            format!(
                "{groups} prompts x {} completions of up to {} tokens",
                args.num_generations, args.max_completion_length
            ),
        ),
        (
            "step",
            format!(
                "{} x {} completions",
                args.training.per_device_train_batch_size, args.training.gradient_accumulation_steps
            ),
        ),
    ]);
    if let Some(held_out) = held_out {
        lines.push(("evaluation", format!("{} prompts", count(held_out.rows.len() as u64))));
    }
    lines.extend(machine_lines(&args.training, model, plan));
    table(&format!("ferrotune {}", env!("CARGO_PKG_VERSION")), &lines)
}

/// `--dry-run`: the first prompt as the model will see it.
fn show_prompts(prompts: &Prompts, rewards: &[String]) {
    println!(
        "{} prompts, the longest of {} tokens; rewards: {}",
        count(prompts.rows.len() as u64),
        count(prompts.longest() as u64),
        rewards.join(", ")
    );
    let first = &prompts.rows[0];
    println!("\nThe first prompt, of {} tokens:\n\n{}", first.ids.len(), first.text);
    println!("\nWhat rewards see beside it: {}", serde_json::Value::Object(first.columns.clone()));
}
