//! Preference training: DPO and its family on pairs of a better and a worse completion, KTO on labelled ones.

mod arguments;
mod losses;
mod objective;
mod reference;

pub use arguments::{LossType, PreferenceArguments};
pub use losses::{Kto, PairLogProbs};
pub use objective::PreferenceLoss;
pub use reference::{REFERENCE, ReferenceCache, reference_log_probs};
