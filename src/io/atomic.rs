//! Files that are either whole or absent: written beside, synced, renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::error::Error;

/// Writes `bytes` to `path` so that a killed process leaves the old file or the new one, never a torn one.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically_with(path, |file| Ok(file.write_all(bytes)?))
}

/// Whether `path` is what a killed [`write_atomically`] left behind.
pub fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let id = name.strip_suffix(".tmp").and_then(|rest| rest.rsplit_once('.')).map(|(_, id)| id);
    name.starts_with('.') && id.is_some_and(|id| id.parse::<u32>().is_ok()) && path.is_file()
}

/// As [`write_atomically`], with the bytes produced by `write` into a buffered file.
pub fn write_atomically_with(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let name = path.file_name().with_context(|| format!("{}: not a file name", path.display()))?;
    let beside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let written = (|| -> Result<()> {
        let mut file = BufWriter::new(File::create(&beside)?);
        write(&mut file)?;
        file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
        fs::rename(&beside, path)?;
        if let Some(folder) = path.parent() {
            // The rename itself is durable only once the folder is synced.
            File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?.sync_all()?;
        }
        Ok(())
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written.with_context(|| format!("writing {}", path.display()))
}

/// Makes folder `path` of what `write` puts into the folder that it is given: all of it or nothing. The files must be
/// synced when `write` returns.
///
/// # Errors
/// There is something at `path` already, other than an empty folder.
pub fn write_folder_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let shown = path.display();
    if fs::read_dir(path).map_or(path.exists(), |mut entries| entries.next().is_some()) {
        bail!(Error::Usage(format!("{shown} is there already: name another folder, or remove it")));
    }
    let name = path.file_name().with_context(|| format!("{shown}: not a folder name"))?;
    let beside = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = (|| -> Result<()> {
        fs::create_dir_all(&beside)?;
        write(&beside)?;
        File::open(&beside)?.sync_all()?;
        fs::rename(&beside, path)?;
        Ok(File::open(parent)?.sync_all()?)
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&beside);
    }
    written.with_context(|| format!("writing {shown}"))
}

/// Whether the disk of `folder`, which exists, has room for `bytes` more.
///
/// # Errors
/// It has not: the message says how much is free and how much is needed.
pub fn check_free_space(folder: &Path, bytes: u64) -> Result<()> {
    let shown = folder.display();
    let disk =
        rustix::fs::statvfs(folder).with_context(|| format!("asking for the free space of {shown}"))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
    if free < bytes {
        bail!("{shown}: {:.2} GiB are free, {:.2} GiB are needed", gib(free), gib(bytes));
    }
    Ok(())
}
