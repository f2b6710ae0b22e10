//! `ferrotune export`: what it writes, read by ferrotune again, and what it refuses.

mod gguf;
mod merged;
mod streamed;
mod torchscript;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::golden::root;

/// The embedded model.
pub fn tiny() -> PathBuf {
    root().join("../../examples/tiny/model")
}

pub fn export(flags: &[&str], paths: &[(&str, &Path)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
    command.arg("export").args(flags).args(["--device", "cpu", "--threads", "2"]);
    for (flag, path) in paths {
        command.arg(flag).arg(path);
    }
    command.output().unwrap()
}

pub fn done(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub fn refused(output: Output, what: &str) {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains(what), "{error}");
}
