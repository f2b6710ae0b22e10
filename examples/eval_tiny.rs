//! Scores a checkpoint on held-out problems: `cargo run --release --example eval_tiny -- [MODEL [PROBLEMS [ADAPTER]]]`.
//!
//! For each family: the share that the greedy answer solves, the share that at least one of 8 answers at temperature 1
//! solves (pass@8), and the share of those answers that show their working.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use ferrotune::data::problems::is_correct;
use ferrotune::device;
use ferrotune::generate::SamplingParams;
use ferrotune::models::FastLanguageModel;
use serde_json::Value;
use tch::Kind;

const SAMPLES: usize = 8;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args.next().unwrap_or_else(|| "examples/tiny/model".to_owned());
    let problems = args.next().unwrap_or_else(|| "examples/tiny/heldout.jsonl".to_owned());
    let device = device::init("auto".parse()?, None)?;
    let mut model = FastLanguageModel::from_pretrained(Path::new(&model), Kind::Float, device)?;
    if let Some(adapter) = args.next() {
        model.load_adapter(Path::new(&adapter))?;
    }
    let greedy = SamplingParams { max_new_tokens: 96, ..model.generation_params()? };

    // By family and by difficulty: problems, solved greedily, solved by one of the samples, samples with working.
    let mut scores: BTreeMap<String, [usize; 4]> = BTreeMap::new();
    for (seed, line) in (0..).zip(std::fs::read_to_string(&problems).context(problems)?.lines()) {
        let problem: Value = serde_json::from_str(line)?;
        let answer = problem["answer"].as_str().context("no answer")?;
        let prompt = model.chat_ids(problem["prompt"].as_array().context("no prompt")?)?;
        let best = model.generate(&prompt, &greedy, |_| ())?;
        // A seed for each problem: with one for all, the same chances would be drawn again and again.
        let sampled = SamplingParams { temperature: 1.0, seed, ..greedy.clone() };
        let samples = model.generate_several(&prompt, &sampled, SAMPLES, |_, _| ())?;
        let solved = usize::from(is_correct(&best.text, answer));
        let passed = usize::from(samples.iter().any(|sample| is_correct(&sample.text, answer)));
        let working = samples.iter().filter(|sample| sample.text.starts_with("<think>")).count();
        let family = problem["family"].as_str().context("no family")?;
        for key in [family.to_owned(), format!("difficulty {}", problem["difficulty"]), "all".to_owned()] {
            let row = scores.entry(key).or_default();
            for (sum, count) in row.iter_mut().zip([1, solved, passed, working]) {
                *sum += count;
            }
        }
    }
    println!("| problems | | greedy | pass@{SAMPLES} | with working |\n|---|---|---|---|---|");
    for (key, [problems, solved, passed, working]) in scores {
        let percent = |count: usize, of: usize| format!("{:.1} %", 100.0 * count as f64 / of as f64);
        let (greedy, pass) = (percent(solved, problems), percent(passed, problems));
        println!("| {key} | {problems} | {greedy} | {pass} | {} |", percent(working, problems * SAMPLES));
    }
    Ok(())
}
