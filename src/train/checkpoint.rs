//! `checkpoint-<step>/` folders that are either whole or absent, whenever the process is killed.
//!
//! A checkpoint is written into `checkpoint-<step>.tmp-<pid>/`, every file and the folder are synced, and the folder is
//! renamed. `trainer_state.json`, written last, holds the size and crc32c of every other file, so that damage on the
//! disk is found as well.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::io::is_unfinished;
use crate::train::early_stopping::BestMetric;

/// Everything of the loop that is not a tensor.
pub const TRAINER_STATE: &str = "trainer_state.json";
/// The effective configuration, in the output folder and in every checkpoint.
pub const RUN_CONFIG: &str = "run.yaml";
/// Moments of the optimizer.
pub const OPTIMIZER: &str = "optimizer.safetensors";

const PREFIX: &str = "checkpoint-";

/// Where a run stands after `global_step` optimizer steps: `trainer_state.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Of the ferrotune that wrote it.
    pub version: String,
    pub global_step: u64,
    /// Optimizer steps of the whole run; the schedule depends on them.
    pub max_steps: u64,
    pub epoch: f64,
    /// Where the data goes on: the cursor of the data source, as JSON.
    pub cursor: serde_json::Value,
    pub seed: u64,
    /// CPU threads: results are the same to the bit only with as many.
    pub threads: usize,
    /// Tokens seen, prompts included.
    pub num_tokens: u64,
    /// What the chat template took for the present moment, so that a run resumed on another day has the same data.
    #[serde(default)]
    pub template_now: Option<chrono::NaiveDateTime>,
    /// Best evaluation and the state of early stopping.
    #[serde(flatten)]
    pub best: BestMetric,
    /// Seconds since 1970 when the checkpoint was written.
    pub saved_at: f64,
    /// Size and checksum of each file beside this one.
    pub files: BTreeMap<String, FileRecord>,
}

/// What a file of a checkpoint must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    pub bytes: u64,
    pub crc32c: u32,
}

impl FileRecord {
    fn of(path: &Path) -> Result<Self> {
        let mut file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
        let mut record = Self { bytes: 0, crc32c: 0 };
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).with_context(|| format!("reading {}", path.display()))? {
                0 => return Ok(record),
                read => {
                    record.bytes += read as u64;
                    record.crc32c = crc32c::crc32c_append(record.crc32c, &buffer[..read]);
                }
            }
        }
    }
}

/// A whole checkpoint on disk.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    pub folder: PathBuf,
    pub state: TrainerState,
}

impl Checkpoint {
    /// Reads the state and checks every file against it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming the file that is missing, shorter or different.
    pub fn open(folder: &Path) -> Result<Self> {
        let checkpoint = Self::read(folder)?;
        for (name, expected) in &checkpoint.state.files {
            let path = folder.join(name);
            let corrupt = |reason: String| Error::Corrupt { file: path.display().to_string(), reason };
            let found = FileRecord::of(&path).map_err(|error| corrupt(format!("{:#}", error)))?;
            ensure!(
                found == *expected,
                corrupt(format!(
                    "{} bytes, crc32c {:08x}; the checkpoint was written with {} bytes, {:08x}",
                    found.bytes, found.crc32c, expected.bytes, expected.crc32c
                ))
            );
        }
        Ok(checkpoint)
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(TRAINER_STATE);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let state = serde_json::from_str(&text).map_err(|error| Error::Corrupt {
            file: path.display().to_string(),
            reason: format!("not a trainer state: {error}"),
        })?;
        Ok(Self { folder: folder.to_owned(), state })
    }
}

/// The checkpoints of one output folder, held by one run at a time.
#[derive(Debug)]
pub struct Checkpoints {
    output_dir: PathBuf,
    save_total_limit: Option<usize>,
    /// Its lock ends with the process, however that ends.
    _lock: File,
}

impl Checkpoints {
    /// Makes the folder if need be, locks it for this process and removes what a killed run left half-written.
    ///
    /// # Errors
    /// Another run is using the folder; the folder cannot be made or read.
    pub fn open(output_dir: &Path, save_total_limit: Option<usize>) -> Result<Self> {
        let shown = output_dir.display();
        fs::create_dir_all(output_dir).with_context(|| format!("--output-dir: creating {shown}"))?;
        let lock = File::open(output_dir).with_context(|| format!("--output-dir: opening {shown}"))?;
        match lock.try_lock() {
            Err(fs::TryLockError::WouldBlock) => {
                bail!(Error::Usage(format!("--output-dir {shown}: another run is writing there")))
            }
            // Some network file systems have no locks; a run there goes on without.
            Ok(()) | Err(fs::TryLockError::Error(_)) => {}
        }
        for entry in fs::read_dir(output_dir).with_context(|| format!("reading {shown}"))? {
            let path = entry?.path();
            if is_leftover(&path) {
                fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
            } else if is_unfinished(&path) {
                fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))?;
            }
        }
        Ok(Self { output_dir: output_dir.to_owned(), save_total_limit, _lock: lock })
    }

    /// Removes all checkpoints, for a run that replaces the one before.
    pub fn clear(&self) -> Result<()> {
        for (_, folder) in folders(&self.output_dir)? {
            fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        }
        Ok(())
    }

    /// Writes the checkpoint of `state.global_step`: `write` puts weights, optimizer and configuration into the folder
    /// that it is given; version, time and the records of the files are filled in here. Then removes the oldest
    /// checkpoints beyond the limit, but never this one nor that of `state.best.best_step`.
    ///
    /// # Errors
    /// Whatever `write` returns, or a failed write. All checkpoints from before are still there then; a full disk
    /// ([`is_disk_full`]) is no reason to end a run.
    pub fn save(&self, state: &TrainerState, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let step = state.global_step;
        let folder = self.output_dir.join(format!("{PREFIX}{step}"));
        let beside = self.output_dir.join(format!("{PREFIX}{step}.tmp-{}", std::process::id()));
        let written = fill(&beside, state, write).and_then(|()| put_in_place(&beside, &folder));
        if let Err(error) = written {
            // Room for the next try; nothing more can be done if this fails too.
            let _ = fs::remove_dir_all(&beside);
            return Err(error.context(format!("saving {}", folder.display())));
        }
        if let Err(error) = self.remove_oldest(step, state.best.best_step) {
            tracing::warn!("save_total_limit: {error:#}");
        }
        Ok(folder)
    }

    fn remove_oldest(&self, last: u64, best: Option<u64>) -> Result<()> {
        let Some(limit) = self.save_total_limit else { return Ok(()) };
        let saved = by_age(folders(&self.output_dir)?);
        let mut excess = saved.len().saturating_sub(limit);
        for (step, folder) in saved {
            if excess > 0 && step != last && Some(step) != best {
                fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
                excess -= 1;
            }
        }
        Ok(())
    }
}

/// The newest whole checkpoint of the folder, None if there is none. Damaged ones are passed over with a warning.
pub fn latest(output_dir: &Path) -> Result<Option<Checkpoint>> {
    for (_, folder) in by_age(folders(output_dir)?).into_iter().rev() {
        match Checkpoint::open(&folder) {
            Ok(checkpoint) => return Ok(Some(checkpoint)),
            Err(error) => tracing::warn!("{} is damaged and passed over: {error:#}", folder.display()),
        }
    }
    Ok(None)
}

/// Whether the folder holds checkpoints, whole or not.
pub fn exist(output_dir: &Path) -> Result<bool> {
    Ok(!folders(output_dir)?.is_empty())
}

/// Whether the error comes from a disk or quota that is full.
pub fn is_disk_full(error: &anyhow::Error) -> bool {
    let kinds = [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge];
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| kinds.contains(&cause.kind()))
}

/// Checks that the disk of `output_dir` (which exists) has room for checkpoints of `checkpoint_bytes` each. The text is
/// a warning: there is room for the first one, but not for as many as will be kept (at least two: the previous one
/// stays until the next is whole).
///
/// # Errors
/// Not even one fits.
pub fn check_free_space(output_dir: &Path, checkpoint_bytes: u64, kept: u64) -> Result<Option<String>> {
    let shown = output_dir.display();
    let disk =
        rustix::fs::statvfs(output_dir).with_context(|| format!("asking for the free space of {shown}"))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64);
    if free < checkpoint_bytes {
        bail!(Error::Usage(format!(
            "--output-dir {shown}: {} free, and one checkpoint needs {}",
            gib(free),
            gib(checkpoint_bytes)
        )));
    }
    let needed = checkpoint_bytes.saturating_mul(kept.max(2));
    Ok((free < needed).then(|| {
        format!(
            "{shown}: {} free, but {} checkpoints of {} need {}; lower --save-total-limit or free some space",
            gib(free),
            kept.max(2),
            gib(checkpoint_bytes),
            gib(needed)
        )
    }))
}

fn fill(beside: &Path, state: &TrainerState, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    fs::create_dir(beside).with_context(|| format!("creating {}", beside.display()))?;
    write(beside)?;
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(beside)? {
        let path = entry?.path();
        // What `write` left in the page cache must be on the disk before the name says that it is.
        File::open(&path)?.sync_all().with_context(|| format!("syncing {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        files.insert(name, FileRecord::of(&path)?);
    }
    let saved_at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let state =
        TrainerState { version: env!("CARGO_PKG_VERSION").to_owned(), saved_at, files, ..state.clone() };
    crate::io::write_atomically(&beside.join(TRAINER_STATE), &serde_json::to_vec_pretty(&state)?)
}

/// Renames the finished folder. One of the same step (of a run that was resumed from before it) is moved aside first.
fn put_in_place(beside: &Path, folder: &Path) -> Result<()> {
    let replaced = beside.with_extension(format!("tmp-{}-replaced", std::process::id()));
    let replaces = folder.exists();
    if replaces {
        fs::rename(folder, &replaced)?;
    }
    fs::rename(beside, folder)?;
    if let Some(parent) = folder.parent() {
        File::open(parent)?.sync_all()?;
    }
    if replaces {
        fs::remove_dir_all(&replaced)?;
    }
    Ok(())
}

fn is_leftover(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let step = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once(".tmp-")).map(|(step, _)| step);
    step.is_some_and(|step| step.parse::<u64>().is_ok()) && path.is_dir()
}

/// The `checkpoint-<step>` folders, whole or not.
fn folders(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(output_dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("reading {}", output_dir.display()))?,
    };
    let mut folders = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(step) = name.strip_prefix(PREFIX).and_then(|step| step.parse().ok())
            && path.is_dir()
        {
            folders.push((step, path));
        }
    }
    Ok(folders)
}

/// Oldest first, by the time in their state: after resuming from an earlier checkpoint, a higher step may be the older
/// one. Those without a readable state count as oldest.
fn by_age(folders: Vec<(u64, PathBuf)>) -> Vec<(u64, PathBuf)> {
    let saved_at =
        |folder: &Path| Checkpoint::read(folder).map_or(0.0, |checkpoint| checkpoint.state.saved_at);
    let mut aged: Vec<(f64, (u64, PathBuf))> =
        folders.into_iter().map(|entry| (saved_at(&entry.1), entry)).collect();
    aged.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.0.cmp(&b.1.0)));
    aged.into_iter().map(|(_, entry)| entry).collect()
}
