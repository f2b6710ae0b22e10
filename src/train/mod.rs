//! Training: the loop and everything around it.

mod arguments;
pub mod checkpoint;
mod early_stopping;
pub mod memory;
pub mod metrics;
mod objective;
pub mod observer;
mod optim;
pub mod plot;
pub mod schedule;
pub mod tensorboard;
mod trainer;

pub use arguments::{Dtype, EvalStrategy, TrainingArguments};
pub use early_stopping::BestMetric;
pub use objective::{Objective, Sft};
pub use optim::AdamW;
pub use schedule::Schedule;
pub use trainer::Trainer;
