//! Fine-tune and run Hugging Face language models from one native program, on libtorch.
//!
//! Ask a model:
//!
//! ```
//! use ferrotune::{device, models::FastLanguageModel};
//! # fn main() -> anyhow::Result<()> {
//! let device = device::init(device::Choice::Cpu, None)?; // before anything else of libtorch
//! let model = FastLanguageModel::from_pretrained("examples/tiny/model".as_ref(), tch::Kind::Float, device)?;
//! let question = [serde_json::json!({"role": "user", "content": "What is the opposite of hot?"})];
//! let answer = model.generate(&model.chat_ids(&question)?, &model.generation_params()?, |_| ())?;
//! assert_eq!(answer.text, "The opposite of hot is cold.");
//! # Ok(())
//! # }
//! ```
//!
//! Tune it: [`train::Trainer`] shows how.
//!
//! The layers, each using only what stands to its left:
//! `kernels <- csrc <- ffi <- ops <- nn <- models <- generate <- rewards <- train <- cli`; [`export`] and
//! [`serve`] stand on generate.
//! [`error`], [`io`] and [`data`] know nothing of models.

pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod export;
mod ffi;
pub mod generate;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
pub mod rewards;
pub mod serve;
pub mod train;
