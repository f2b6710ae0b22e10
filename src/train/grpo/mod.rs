//! Group relative policy optimisation (arXiv:2402.03300) and its family: the model answers each prompt several times, rewards
//! judge the answers, and those better than their group become likelier.
//!
//! [`Rollouts`] is the source of the steps: it lets a [`generate::Engine`](crate::generate::Engine) write completions with the
//! very weights that train, judges them, and packs them without padding; [`Grpo`] is the objective. Words and defaults are those
//! of TRL's GRPOConfig.

mod advantages;
mod arguments;
mod batches;
mod loss;
mod prompts;
mod rollouts;
mod writer;

pub use advantages::{Advantages, advantages};
pub use arguments::{GrpoArguments, ImportanceSamplingLevel, ImportanceSamplingMode, LossType, ScaleRewards};
pub use batches::{Completion, step_batches};
pub use loss::{Grpo, add_log_probs};
pub use prompts::{Prompt, PromptOptions, Prompts};
pub use rollouts::{Rollouts, evaluate};
