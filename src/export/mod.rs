//! Models in the formats that other programs read.

mod checkpoint;
mod dynamic;
mod gguf;
mod merged;
mod ollama;
mod proof;
mod torchscript;

pub use checkpoint::{Layout, Sizes, quantize, write_checkpoint};
pub use dynamic::{Calibration, CalibrationReport, DYNAMIC_PLAN, DynamicPlan, PlannedModule};
pub use gguf::{GgufFile, Quantization, write_gguf, write_gguf_lora};
pub use merged::{Merged, Shard};
pub use ollama::modelfile;
pub use proof::{Agreement, EXPORT_REPORT, Reference};
pub use torchscript::{TORCHSCRIPT_FILE, TorchScript, write_torchscript};
