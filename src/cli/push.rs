//! `ferrotune push`, and the same at the end of `ferrotune export`: a folder to the Hugging Face hub.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::hub_env::hub_options;
use super::sources::Transfers;
use crate::io::hub::{Upload, uploadable};

/// Uploads a folder (an adapter, a checkpoint, GGUF files) to a repository of the Hugging Face hub, as one commit.
///
/// The token is HF_TOKEN or the one that `hf auth login` stored; HF_ENDPOINT names another hub. Run again after a failure it sends only the files
/// that have not arrived. Hidden files and folders named checkpoint-* are left out.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune push out me/my-adapter --hub-private")]
pub struct PushArgs {
    /// Folder to upload
    pub folder: PathBuf,
    /// Repository: owner/name, created where it is not there
    #[arg(value_name = "OWNER/NAME")]
    pub repository: String,
    /// Create it as a private one; one that is there and public is refused
    #[arg(long)]
    pub hub_private: bool,
    /// Branch to commit to, created where it is not there
    #[arg(long, value_name = "BRANCH", default_value = "main")]
    pub hub_revision: String,
}

/// Runs what the flags ask for.
pub fn run(args: &PushArgs) -> Result<()> {
    uploadable(&args.folder)?; // before the hub is asked for anything
    open(&args.repository, args.hub_private, &args.hub_revision)?.push(&args.folder)
}

/// A repository that may be written to, and the flags that say so.
pub struct Target {
    upload: Upload,
    flags: String,
}

/// Creates the repository and the branch where they are not there.
pub fn open(repository: &str, private: bool, revision: &str) -> Result<Target> {
    let upload = Upload::open(repository, private, hub_options(revision)?)?;
    let mut flags = repository.to_owned();
    if private {
        flags += " --hub-private";
    }
    if revision != "main" {
        flags += &format!(" --hub-revision {}", quoted(revision));
    }
    Ok(Target { upload, flags })
}

impl Target {
    /// Uploads the folder and prints where it is.
    pub fn push(&self, folder: &Path) -> Result<()> {
        let mut transfers = Transfers::new("uploading");
        let address =
            self.upload.push(folder, "Upload by ferrotune", &mut |transfer| transfers.show(transfer));
        drop(transfers);
        let address = address.with_context(|| {
            let folder = folder.display().to_string();
            format!("{folder} is kept whole; go on with: ferrotune push {} {}", quoted(&folder), self.flags)
        })?;
        writeln!(stdout(), "{address}").context("writing to stdout")
    }
}

/// One word of a POSIX shell.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./+:@=".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}
