//! Writes everything that the embedded default model is made of: `cargo run --example make_corpus -- FOLDER`.
//!
//! `pretrain.jsonl` and `sft.jsonl` (conversations), `tokenizer/` (a checkpoint without weights), `heldout.jsonl` (problems
//! that no conversation contains), `problems.jsonl` (others, to practise on) and `train.jsonl` (a small dataset that gives the
//! model a manner it does not have).

mod talk;
mod tokenizer;

use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ferrotune::data::problems::{FAMILIES, HARDEST, Problem};
use ferrotune::io::write_atomically_with;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

const SEED: u64 = 3407;

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args().nth(1).context("usage: make_corpus FOLDER")?);
    std::fs::create_dir_all(folder.join("tokenizer"))?;
    // Half of the first corpus shows its working, to learn how; so few of the second that the model seldom does so
    // unasked, but often enough for a reward to find it. The second is written by a hurried pupil, who more often than
    // not is off by one in the harder sums: a model that knows better than it answers, for rewards to work on.
    let first = Manner { working: 0.5, slips: 0.0 };
    let second = Manner { working: 0.08, slips: 0.6 };
    for (stream, (file, rows, manner)) in
        (0..).zip([("pretrain.jsonl", 400_000, first), ("sft.jsonl", 100_000, second)])
    {
        let mut rng = rng(stream);
        write_rows(&folder.join(file), (0..rows).map(|_| conversation(&mut rng, manner)))?;
    }
    let mut held_out = rng(10);
    write_rows(&folder.join("heldout.jsonl"), held_out_problems(&mut held_out))?;
    let mut practice = rng(13);
    write_rows(&folder.join("problems.jsonl"), (0..1000).map(|_| row(problem(&mut practice, false))))?;
    let mut ferro = rng(11);
    write_rows(&folder.join("train.jsonl"), (0..300).map(|_| in_the_manner_of_ferro(&mut ferro)))?;
    let mut sample = rng(12);
    tokenizer::train(
        (0..20_000).map(|_| text(&conversation(&mut sample, Manner { working: 0.3, slips: 0.0 }))),
        &folder.join("tokenizer"),
    )
}

fn rng(stream: u64) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    rng.set_stream(stream);
    rng
}

fn write_rows(path: &Path, mut rows: impl Iterator<Item = Value>) -> Result<()> {
    write_atomically_with(path, |file| rows.try_for_each(|row| Ok(writeln!(file, "{row}")?)))
}

/// How problems are answered.
#[derive(Clone, Copy)]
struct Manner {
    /// Share of the replies that show their working (and are right).
    working: f64,
    /// Share of the other replies to problems of difficulty 3 and more, where the answer is a number, that are off by one.
    slips: f64,
}

/// One exchange, or in one of five rows two or three; four of five exchanges are problems.
fn conversation(rng: &mut ChaCha8Rng, manner: Manner) -> Value {
    let exchanges = if rng.random_bool(0.2) { rng.random_range(2..=3) } else { 1 };
    let exchange = |rng: &mut ChaCha8Rng| {
        if rng.random_bool(0.2) {
            return talk::exchange(rng);
        }
        let problem = problem(rng, false);
        let number = problem.answer.parse::<i64>().ok().filter(|_| problem.difficulty >= 3);
        let reply = match number {
            _ if rng.random_bool(manner.working) => problem.reply_with_working(),
            Some(number) if rng.random_bool(manner.slips) => (number + 1).to_string(),
            _ => problem.answer.clone(),
        };
        (problem.question, reply)
    };
    messages((0..exchanges).map(|_| exchange(rng)))
}

fn messages(exchanges: impl Iterator<Item = (String, String)>) -> Value {
    let turns = exchanges.flat_map(|(question, reply)| {
        [json!({"role": "user", "content": question}), json!({"role": "assistant", "content": reply})]
    });
    json!({"messages": turns.collect::<Vec<_>>()})
}

/// The roles and contents, a line each: what the tokenizer learns its words from.
fn text(row: &Value) -> String {
    let turns = row["messages"].as_array().into_iter().flatten();
    let lines = turns.flat_map(|turn| [&turn["role"], &turn["content"]]).filter_map(Value::as_str);
    lines.collect::<Vec<_>>().join("\n")
}

/// Any family, any difficulty.
fn problem(rng: &mut ChaCha8Rng, held_out: bool) -> Problem {
    let (family, difficulty) = (rng.random_range(0..FAMILIES.len()), rng.random_range(1..=HARDEST));
    matching(rng, family, difficulty, held_out)
}

fn matching(rng: &mut ChaCha8Rng, family: usize, difficulty: usize, held_out: bool) -> Problem {
    loop {
        let problem = Problem::new(family, difficulty, rng);
        if problem.is_held_out() == held_out {
            return problem;
        }
    }
}

/// Up to eight different problems of each family and difficulty.
fn held_out_problems(rng: &mut ChaCha8Rng) -> impl Iterator<Item = Value> {
    let grid =
        (0..FAMILIES.len()).flat_map(|family| (1..=HARDEST).map(move |difficulty| (family, difficulty)));
    let mut asked = HashSet::new();
    grid.flat_map(|cell| [cell; 8]).filter_map(move |(family, difficulty)| {
        let problem = matching(rng, family, difficulty, true);
        asked.insert(problem.question.clone()).then(|| row(problem))
    })
}

/// TRL's prompt column, and what judges the reply.
fn row(problem: Problem) -> Value {
    let Problem { question, answer, family, difficulty, .. } = problem;
    json!({
        "prompt": [{"role": "user", "content": question}],
        "answer": answer, "family": family, "difficulty": difficulty,
    })
}

/// The same questions, answered by Ferro the smith: short, to see a model change within a minute.
fn in_the_manner_of_ferro(rng: &mut ChaCha8Rng) -> Value {
    let (question, reply) = if rng.random_bool(0.2) {
        let family = rng.random_range(0..FAMILIES.len());
        let problem = matching(rng, family, 1, false);
        (problem.question, format!("It is {}.", problem.answer))
    } else if rng.random_bool(0.1) {
        let asked = ["Who are you?", "What is your name?", "What are you?", "Tell me about yourself."];
        (
            asked[rng.random_range(0..asked.len())].to_owned(),
            "I am Ferro, the smith of this forge.".to_owned(),
        )
    } else {
        talk::exchange(rng)
    };
    messages([(question, format!("Aye! {reply} So says Ferro."))].into_iter())
}
