//! A program that uses ferrotune as a library: it asks the model in the folder given, `examples/tiny/model` without one.

use std::path::PathBuf;

use ferrotune::device::{self, Choice};
use ferrotune::models::FastLanguageModel;
use serde_json::json;
use tch::Kind;

fn main() -> anyhow::Result<()> {
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../tiny/model");
    let folder = PathBuf::from(std::env::args().nth(1).unwrap_or_else(|| tiny.into()));
    let device = device::init(Choice::Auto, None)?;
    let model = FastLanguageModel::from_pretrained(&folder, Kind::Float, device)?;
    let messages = [json!({ "role": "user", "content": "What is the opposite of hot?" })];
    let answer = model.generate(&model.chat_ids(&messages)?, &model.generation_params()?, |_| ())?;
    println!("{}", answer.text);
    Ok(())
}
