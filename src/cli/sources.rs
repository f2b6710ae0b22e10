//! Models and datasets by the names that users give: local paths or hub ids, with downloads shown.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use super::format::bytes;
use super::hub_env::hub_options;
use super::progress::BARS;
use crate::data::is_data_file;
use crate::io::hub::{HubOptions, OnTransfer, Transfer, resolve_dataset, resolve_model, resolve_tokenizer};

const DEFAULT_REVISION: &str = "main";

/// The folder of a model or an adapter, downloaded if need be.
pub fn model_dir(name: &str, revision: Option<&str>) -> Result<PathBuf> {
    dir(name, revision, resolve_model)
}

/// The folder of a model's tokenizer and configuration, downloaded if need be; the weights are not.
pub fn tokenizer_dir(name: &str, revision: Option<&str>) -> Result<PathBuf> {
    dir(name, revision, resolve_tokenizer)
}

fn dir(
    name: &str,
    revision: Option<&str>,
    resolve: impl Fn(&str, &HubOptions, OnTransfer) -> Result<PathBuf>,
) -> Result<PathBuf> {
    // A folder needs nothing of the hub's, not even a place for downloads.
    if Path::new(name).is_dir() {
        return Ok(name.into());
    }
    let options = hub_options(revision.unwrap_or(DEFAULT_REVISION))?;
    let mut downloads = Transfers::new("downloading");
    resolve(name, &options, &mut |download| downloads.show(download))
}

/// The data files (or patterns of them) of all `names`, downloaded if need be.
pub fn dataset_files(names: &[String], split: &str) -> Result<Vec<String>> {
    let options = hub_options(DEFAULT_REVISION)?;
    let mut downloads = Transfers::new("downloading");
    let mut files = Vec::new();
    for name in names {
        check_is_there(name)?;
        let found = resolve_dataset(name, split, &options, &mut |download| downloads.show(download))?;
        files.extend(found.into_iter().map(|file| file.display().to_string()));
    }
    Ok(files)
}

/// A data file that is not there is no repository either: one in a repository stands behind `org/name/`.
fn check_is_there(name: &str) -> Result<()> {
    let path = Path::new(name);
    let local = is_data_file(path) && name.matches('/').count() < 2 && !name.contains(['*', '?', '[']);
    ensure!(!local || path.exists(), "{name}: no such file");
    Ok(())
}

/// Shows the file that is coming in or going out: a bar on a terminal, one line a file on a pipe.
pub struct Transfers {
    /// "downloading" or "uploading".
    doing: &'static str,
    file: String,
    bar: Option<ProgressBar>,
}

impl Transfers {
    pub fn new(doing: &'static str) -> Self {
        Self { doing, file: String::new(), bar: None }
    }

    pub fn show(&mut self, transfer: Transfer) {
        if self.file != transfer.file {
            self.clear();
            self.file = transfer.file.to_owned();
            if io::stderr().is_terminal() {
                let style = ProgressStyle::with_template(
                    "{msg} {bar:20.cyan/blue} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} ETA {eta}",
                );
                let bar = ProgressBar::new(transfer.total).with_message(self.file.clone());
                self.bar = Some(BARS.add(style.map_or(bar.clone(), |style| bar.with_style(style))));
            } else {
                let _ = writeln!(io::stderr(), "{} {}, {}", self.doing, transfer.file, bytes(transfer.total));
            }
        }
        if let Some(bar) = &self.bar {
            bar.set_position(transfer.done);
        }
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Transfers {
    fn drop(&mut self) {
        self.clear();
    }
}
