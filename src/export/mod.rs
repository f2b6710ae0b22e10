//! Models in the formats that other programs read.

mod dynamic;
mod quantize;

pub use dynamic::{Calibration, CalibrationReport, DYNAMIC_PLAN, DynamicPlan, PlannedModule};
pub use quantize::{Quantized, quantize};
