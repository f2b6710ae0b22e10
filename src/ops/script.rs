//! TorchScript archives.

use std::path::Path;

use anyhow::Result;
use tch::Tensor;

use super::op_error;
use crate::ffi::{self, bridge};

/// Compiles `source`, the methods of a module in TorchScript, with these parameters, and saves the module to `path`.
///
/// # Errors
/// Source that is no TorchScript; a file that cannot be written.
pub fn save_script(path: &Path, source: &str, parameters: &[(String, Tensor)]) -> Result<()> {
    let names: Vec<String> = parameters.iter().map(|(name, _)| name.clone()).collect();
    let tensors = ffi::list(parameters.iter().map(|(_, tensor)| tensor));
    bridge::script_save(&path.to_string_lossy(), source, &names, &tensors).map_err(op_error)
}
