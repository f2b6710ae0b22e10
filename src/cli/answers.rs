//! The answers of `ferrotune generate --output`: a file that grows row by row beside its place and is renamed when it is
//! whole. A run that was stopped goes on after its last row.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

/// Rows after which what is written is synced.
const SYNC_EVERY: usize = 64;

/// An answers file that is being written.
pub struct AnswerFile {
    /// The settings that it was begun with.
    pub begun: Value,
    /// The rows of answers that stood in it when it was opened.
    pub rows: Vec<Map<String, Value>>,
    path: PathBuf,
    beside: PathBuf,
    file: File,
    unsynced: usize,
}

impl AnswerFile {
    /// Opens the file beside `path`, made anew with `settings` as its first line where there is none. Each prompt has `of_prompt` rows;
    /// those of one that has fewer are dropped.
    ///
    /// # Errors
    /// A file that holds something else, or that another run writes.
    pub fn open(path: &Path, settings: Value, of_prompt: usize) -> Result<AnswerFile> {
        let name =
            path.file_name().with_context(|| format!("--output: {}: not a file name", path.display()))?;
        let beside = path.with_file_name(format!("{}.unfinished", name.to_string_lossy()));
        let shown = beside.display().to_string();
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&beside);
        let mut file = open.with_context(|| format!("--output: opening {shown}"))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("--output: another run writes {shown}"),
            // Some file systems have no locks.
            Ok(()) | Err(TryLockError::Error(_)) => {}
        }
        let mut lines = Vec::new();
        let (mut read, mut whole) = (0, 0);
        let mut reader = BufReader::new(&file);
        loop {
            let mut line = Vec::new();
            reader.read_until(b'\n', &mut line).with_context(|| format!("reading {shown}"))?;
            // A line that a killed run did not finish is written again.
            if line.last() != Some(&b'\n') {
                break;
            }
            let value: Value = serde_json::from_slice(&line).with_context(|| {
                format!("{shown}, line {}: not JSON; remove the file to start anew", lines.len() + 1)
            })?;
            read += line.len() as u64;
            lines.push(value);
            if (lines.len() - 1).is_multiple_of(of_prompt) {
                whole = read;
            }
        }
        lines.truncate(1 + lines.len().saturating_sub(1) / of_prompt * of_prompt);
        file.set_len(whole)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .with_context(|| format!("writing {shown}"))?;
        let mut lines = lines.into_iter();
        let begun = lines.next();
        let rows = lines.map(|line| match line {
            Value::Object(row) => Ok(row),
            other => bail!("{shown}: {other} is no row of answers; remove the file to start anew"),
        });
        let rows = rows.collect::<Result<_>>()?;
        let (is_new, begun) = (begun.is_none(), begun.unwrap_or(settings));
        let mut answers = AnswerFile { begun, rows, path: path.to_path_buf(), beside, file, unsynced: 0 };
        if is_new {
            let first = format!("{}\n", answers.begun);
            answers.push(&first)?;
        }
        Ok(answers)
    }

    /// Where the rows are until the file is whole.
    pub fn beside(&self) -> &Path {
        &self.beside
    }

    /// Appends lines.
    pub fn push(&mut self, lines: &str) -> Result<()> {
        self.unsynced += 1;
        let mut written = self.file.write_all(lines.as_bytes());
        if self.unsynced >= SYNC_EVERY {
            self.unsynced = 0;
            written = written.and_then(|()| self.file.sync_data());
        }
        written.with_context(|| format!("writing {}", self.beside.display()))
    }

    /// Puts the rows in their place.
    pub fn finish(self) -> Result<()> {
        let text = fs::read(&self.beside).with_context(|| format!("reading {}", self.beside.display()))?;
        let first = text.iter().position(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        crate::io::write_atomically(&self.path, &text[first..])?;
        fs::remove_file(&self.beside).with_context(|| format!("removing {}", self.beside.display()))
    }
}
