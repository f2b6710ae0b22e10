//! The `ferrotune` command: flags, progress bars, exit codes.

pub mod config_file;

use std::process::ExitCode;

/// Runs the command line and returns the process's exit code: 0 done, 1 failed, 2 usage.
pub fn run() -> ExitCode {
    ExitCode::SUCCESS
}
