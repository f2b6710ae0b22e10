//! The `ferrotune` command: flags, progress bars, exit codes.

pub mod banner;
pub mod config_file;
pub mod format;
pub mod progress;
pub mod signals;

use std::process::ExitCode;

/// Runs the command line and returns the process's exit code: 0 done, 1 failed, 2 usage.
pub fn run() -> ExitCode {
    ExitCode::SUCCESS
}
