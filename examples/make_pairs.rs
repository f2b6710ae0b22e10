//! Pairs for `ferrotune dpo` that a model makes itself: `cargo run --release --example make_pairs -- OUTPUT [PROBLEMS [MODEL [SEED]]]`.
//!
//! Asks the model each problem 8 times at temperature 1. Where some answers are right and some wrong, the first right one is chosen
//! and the first wrong one rejected. No problem is one of those that are held out.

use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use ferrotune::data::problems::{FAMILIES, HARDEST, Problem, is_correct};
use ferrotune::device;
use ferrotune::generate::SamplingParams;
use ferrotune::models::FastLanguageModel;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tch::Kind;

const SAMPLES: usize = 8;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let output = args.next().context("which file is written?")?;
    let problems: u64 = args.next().map_or(Ok(2000), |text| text.parse())?;
    let model = args.next().unwrap_or_else(|| "examples/tiny/model".to_owned());
    let seed: u64 = args.next().map_or(Ok(1), |text| text.parse())?;
    let device = device::init("auto".parse()?, None)?;
    let model = FastLanguageModel::from_pretrained(Path::new(&model), Kind::Float, device)?;
    let params = SamplingParams { max_new_tokens: 96, temperature: 1.0, ..model.generation_params()? };
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut file = BufWriter::new(std::fs::File::create(&output).with_context(|| output.clone())?);
    let mut written = 0;
    for number in 0..problems {
        let problem = loop {
            let (family, difficulty) = (rng.random_range(0..FAMILIES.len()), rng.random_range(1..=HARDEST));
            let problem = Problem::new(family, difficulty, &mut rng);
            if !problem.is_held_out() {
                break problem;
            }
        };
        let prompt = json!([{"role": "user", "content": problem.question}]);
        let ids = model.chat_ids(prompt.as_array().context("a list")?)?;
        let params = SamplingParams { seed: seed << 32 | number, ..params.clone() };
        let answers = model.generate_several(&ids, &params, SAMPLES, |_, _| ())?;
        let (right, wrong): (Vec<_>, Vec<_>) =
            answers.iter().partition(|answer| is_correct(&answer.text, &problem.answer));
        if let (Some(right), Some(wrong)) = (right.first(), wrong.first()) {
            let says = |text: &str| json!([{"role": "assistant", "content": text}]);
            let pair = json!({"prompt": prompt, "chosen": says(&right.text), "rejected": says(&wrong.text)});
            writeln!(file, "{pair}")?;
            written += 1;
        }
    }
    file.flush()?;
    println!("{written} pairs of {problems} problems in {output}");
    Ok(())
}
