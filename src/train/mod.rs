//! Training: the loop and everything around it.

mod arguments;
mod early_stopping;
pub mod schedule;

pub use arguments::{Dtype, EvalStrategy, TrainingArguments};
pub use early_stopping::BestMetric;
pub use schedule::Schedule;
