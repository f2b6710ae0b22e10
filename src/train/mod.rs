//! Training: the loop and everything around it.

mod arguments;
pub mod checkpoint;
mod early_stopping;
pub mod metrics;
pub mod observer;
pub mod plot;
pub mod schedule;
pub mod tensorboard;

pub use arguments::{Dtype, EvalStrategy, TrainingArguments};
pub use early_stopping::BestMetric;
pub use schedule::Schedule;
