//! Teaches the embedded model to show its working, by rewards alone: `cargo run --release --example grpo [-- SEED [FOLDER]]`.
//! It knows more than it answers (examples/tiny/README.md). Held-out problems are answered greedily before, between and after.

use std::{path::Path, sync::atomic::AtomicBool};

use anyhow::Result;
use ferrotune::generate::SamplingParams;
use ferrotune::models::FastLanguageModel;
use ferrotune::rewards::{Exact, Format, Rewards};
use ferrotune::train::grpo::{Grpo, GrpoArguments, PromptOptions, Prompts, Rollouts, evaluate};
use ferrotune::train::{Trainer, metrics::RunLog, observer::TrainObserver};

fn rewards() -> Rewards {
    let tags = ["think", "answer"].map(str::to_owned).to_vec();
    Rewards::new(vec![(Box::new(Exact { column: "answer".into() }), 1.0), (Box::new(Format { tags }), 1.0)])
}

/// The held-out problems, and the steps so far.
struct HeldOut(Prompts, u64);

impl HeldOut {
    fn ask(&self, model: &FastLanguageModel) -> Result<()> {
        let greedy = SamplingParams { temperature: 0.0, max_new_tokens: 96, ..model.generation_params()? };
        let scores = evaluate(model, &self.0, &mut rewards(), &greedy, 1 << 30)?.values;
        let mean = |reward: usize| -> f64 {
            scores.iter().filter_map(|values| values[reward]).sum::<f64>() * 100.0 / scores.len() as f64
        };
        println!("step {}: {:.1} % right, {:.1} % with working", self.1, mean(0), mean(1));
        Ok(())
    }
}

impl TrainObserver for HeldOut {
    fn between_steps(&mut self, model: &FastLanguageModel, last: bool) -> Result<()> {
        self.1 += 1;
        if last || self.1.is_multiple_of(20) { self.ask(model) } else { Ok(()) }
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let device = ferrotune::device::init("cpu".parse()?, None)?;
    let config = Path::new("examples/tiny/grpo.yaml");
    let mut arguments = GrpoArguments::from_yaml(&std::fs::read_to_string(config)?, config)?;
    arguments.training.seed = args.next().map_or(Ok(3407), |seed| seed.parse())?;
    arguments.training.output_dir = args.next().unwrap_or_else(|| "runs/grpo".into()).into();
    let arguments = arguments.resolved()?;
    let training = &arguments.training;

    let mut model = FastLanguageModel::from_pretrained(training.model.as_ref(), tch::Kind::Float, device)?;
    model.get_peft_model(training.adapter_config(&training.model), training.seed)?;
    let options = PromptOptions { prompt_column: "prompt", system_prompt: None, longest: 400 };
    let read = |file: &str| Prompts::read(&[file.to_owned()], model.tokenizer()?, options);
    let held_out = HeldOut(read("examples/tiny/heldout.jsonl")?, 0);
    held_out.ask(&model)?;
    let stop = model.generation_params()?.stop_token_ids;
    let rollouts = Rollouts::new(&arguments, read(&training.dataset[0])?, rewards(), stop, 1 << 30)?;
    let log = RunLog::new(&training.output_dir, "GRPO of the embedded model", 1).plotting(&["reward"]);
    let mut observer: Vec<Box<dyn TrainObserver>> = vec![Box::new(held_out), Box::new(log)];
    Trainer {
        model: &mut model,
        objective: &Grpo::new(&arguments),
        arguments: training,
        train: Box::new(rollouts),
        eval: None,
        observer: &mut observer,
        plan: None,
        stop: &AtomicBool::new(false),
    }
    .run(None)?;
    model.save_trained(&training.output_dir)
}
