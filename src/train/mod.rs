//! Training: the loop and everything around it.

mod arguments;
pub mod checkpoint;
mod early_stopping;
pub mod floor;
pub mod grpo;
pub mod kernel_times;
mod loss_scale;
pub mod memory;
pub mod metrics;
pub mod objective;
pub mod observer;
mod optim;
pub mod plan;
pub mod plot;
pub mod preference;
pub mod schedule;
mod source;
mod step;
pub mod tensorboard;
mod trainer;

pub use arguments::{
    BaseDtype, Dtype, EvalStrategy, GradientCheckpointing, Optim, Quant, Size, TrainingArguments,
};
pub use early_stopping::BestMetric;
pub use objective::{Objective, Sft};
pub use optim::AdamW;
pub use schedule::Schedule;
pub use source::{Evaluation, Interrupted, StepSource};
pub use step::{Predicted, Recording, RunPlan, StepOutcome, Stepper};
pub use trainer::Trainer;
