//! The few failures that calling code branches on. Everything else is a plain [`anyhow::Error`].
//!
//! Functions return [`anyhow::Result`]; find one of these with `error.downcast_ref::<ferrotune::error::Error>()`.

use thiserror::Error;

#[derive(Debug, Error)]
pub enum Error {
    /// `config.json` names an architecture or a feature that no decoder here implements.
    #[error("{what} is not supported (supported: {supported})")]
    Unsupported { what: String, supported: String },

    /// The checkpoint has no tensor of this name.
    #[error("{file}: no tensor named {name}")]
    MissingTensor { file: String, name: String },

    /// A tensor of the checkpoint does not have the shape that config.json implies.
    #[error("{file}: tensor {name} has shape {found:?}, expected {expected:?}")]
    ShapeMismatch { file: String, name: String, expected: Vec<i64>, found: Vec<i64> },

    /// A file is not what its name says: torn, truncated, hostile or of an unknown format.
    #[error("{file}: {reason}")]
    Corrupt { file: String, reason: String },

    /// The device has too little memory for what was asked.
    #[error("out of memory on {device}: {advice}")]
    OutOfMemory { device: String, advice: String },

    /// The command line or the configuration asks for something that makes no sense (exit code 2).
    #[error("{0}")]
    Usage(String),

    /// The user pressed Ctrl-C or the process was told to stop; the state was saved.
    #[error("interrupted: {0}")]
    Interrupted(String),
}
