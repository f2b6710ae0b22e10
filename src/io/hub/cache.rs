//! The folder that one repository has in the cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{HubOptions, Repo};
use crate::io::write_atomically;

pub struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

impl RepoCache {
    pub fn new(options: &HubOptions, repo: &Repo) -> Self {
        let name = repo.folder_name();
        Self { root: options.cache_dir.join(&name), locks: options.cache_dir.join(".locks").join(name) }
    }

    /// The folder of a commit's files, whether it exists or not.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The snapshot that `revision` stood for when it was last downloaded.
    pub fn cached_snapshot(&self, revision: &str) -> Option<PathBuf> {
        let commit = fs::read_to_string(self.root.join("refs").join(revision));
        let folder = self.snapshot(commit.as_deref().map_or(revision, str::trim));
        folder.is_dir().then_some(folder)
    }

    /// Notes that `revision` is `commit`.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        create_parent(&path)?;
        write_atomically(&path, commit.as_bytes())
    }

    /// The finished content of that etag.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// The content of that etag as far as it has come.
    pub fn incomplete_blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Keeps other processes, Python's too, from downloading the same content until the file is dropped.
    pub fn lock(&self, etag: &str) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        file.lock().with_context(|| format!("locking {}", path.display()))?;
        Ok(file)
    }

    /// Makes `file` of the snapshot of `commit` point to the blob `etag`.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        if pointer.exists() {
            return Ok(());
        }
        create_parent(&pointer)?;
        // Relative, so that the cache can be moved. What is there but does not exist is a link to a lost blob.
        let up = "../".repeat(Path::new(file).components().count() + 1);
        let _ = fs::remove_file(&pointer);
        match std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &pointer) {
            Err(_) if pointer.exists() => Ok(()),
            linked => linked.with_context(|| format!("linking {}", pointer.display())),
        }
    }
}

/// Whether `revision` is a commit and not a branch or tag.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|byte| byte.is_ascii_hexdigit())
}

pub fn create_parent(path: &Path) -> Result<()> {
    let folder = path.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))
}

/// The files below `folder`, by their paths in it, sorted; hidden ones and dangling links left out.
pub fn files_of(folder: &Path) -> Result<Vec<String>> {
    fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) -> Result<()> {
        for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            if name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                walk(&path, &format!("{prefix}{name}/"), files)?;
            } else if path.is_file() {
                files.push(format!("{prefix}{name}"));
            }
        }
        Ok(())
    }
    let mut files = Vec::new();
    walk(folder, "", &mut files)?;
    files.sort();
    Ok(files)
}
