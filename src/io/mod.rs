//! Bytes in and out: checkpoints, configuration, downloads. No model knowledge.

mod atomic;

pub use atomic::{write_atomically, write_atomically_with};
