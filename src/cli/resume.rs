//! Runs that continue others.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::error::Error;
use crate::train::checkpoint::{self, Checkpoint, RUN_CONFIG};
use crate::train::{Optim, TrainingArguments};

/// What `--resume-from-checkpoint` means; refuses to write over the model or another run.
pub fn checkpoint_to_resume(args: &mut TrainingArguments) -> Result<Option<Checkpoint>> {
    if let (Ok(model), Ok(output)) = (fs::canonicalize(&args.model), fs::canonicalize(&args.output_dir))
        && model == output
    {
        bail!(Error::Usage(format!("--output-dir {} is the folder of the model itself", output.display())));
    }
    let found = match args.resume_from_checkpoint.as_deref() {
        Some("auto") => checkpoint::latest(&args.output_dir)?,
        Some(folder) => Some(Checkpoint::open(Path::new(folder)).context("--resume-from-checkpoint")?),
        None if !args.overwrite_output_dir && checkpoint::exist(&args.output_dir)? => {
            bail!(Error::Usage(format!(
                "--output-dir {} holds the checkpoints of another run: continue it with --resume-from-checkpoint, replace \
                 it with --overwrite-output-dir, or name another folder",
                args.output_dir.display()
            )))
        }
        None => None,
    };
    if let Some(checkpoint) = &found {
        warn_of_changes(checkpoint, |text, file| {
            let mut before = TrainingArguments::from_yaml(text, file)?;
            // Taken over from the checkpoint if not given.
            before.threads = args.threads;
            // Versions without this flag knew one optimizer.
            let optim = before.optim.unwrap_or(Optim::AdamwTorch);
            if args.optim.is_some_and(|given| given != optim) {
                bail!(Error::Usage(format!(
                    "--optim: {} holds the moments of --optim {optim}; continue with that, or start a new run",
                    checkpoint.folder.display()
                )));
            }
            args.optim = Some(optim);
            before.optim = args.optim;
            Ok(before.differences(args))
        })?;
    }
    Ok(found)
}

/// Says what differs from the settings that the run of `checkpoint` was started with: `differences` reads them, in YAML, from the
/// text of a file.
pub fn warn_of_changes(
    checkpoint: &Checkpoint,
    differences: impl FnOnce(&str, &Path) -> Result<Vec<String>>,
) -> Result<()> {
    let file = checkpoint.folder.join(RUN_CONFIG);
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    for change in differences(&text, &file)? {
        tracing::warn!("{}: the run was started with other settings: {change}", checkpoint.folder.display());
    }
    Ok(())
}
