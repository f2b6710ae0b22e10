//! Models and datasets by name: a local path, or the id of a repository on the Hugging Face hub. And folders out to it ([`Upload`]).
//!
//! Downloads lie in the hub's own cache layout, so that what Python has fetched is found here and the other way round:
//! `models--org--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file> -> ../../blobs/<etag>}`.

mod cache;
mod client;
mod select;
mod upload;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use cache::RepoCache;
use client::{Client, ListingError};
pub use upload::{Upload, uploadable};

/// Where the hub is, who asks, and where downloads are kept.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// The folder of `models--org--name` and `datasets--org--name` folders.
    pub cache_dir: PathBuf,
    /// The address of the hub, without a closing slash.
    pub endpoint: String,
    /// Sent to the endpoint's own host, never to where it redirects.
    pub token: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
    /// A branch, a tag or a commit.
    pub revision: String,
}

/// How far one file is, in or out.
#[derive(Clone, Copy, Debug)]
pub struct Transfer<'a> {
    /// The file's path within the repository.
    pub file: &'a str,
    /// Bytes that are over, those of an earlier, broken download included.
    pub done: u64,
    /// Bytes of the whole file.
    pub total: u64,
}

/// Called at the start of each file that has to be transferred, and as it comes in or goes out.
pub type OnTransfer<'a> = &'a mut dyn FnMut(Transfer);

/// The local folder of a model or an adapter: `name` itself if it is a folder, or else the snapshot of the hub
/// repository `name` (`org/name` or `name`), downloaded as far as it is not in the cache: configuration, tokenizer,
/// chat template, and the safetensors files.
///
/// If the hub cannot be reached, a complete snapshot in the cache is used, with a warning.
pub fn resolve_model(name: &str, options: &HubOptions, on_download: OnTransfer) -> Result<PathBuf> {
    resolve(name, Part::Whole, options, on_download)
}

/// As [`resolve_model`], without the weights: the local folder of a model's tokenizer, chat template and configuration.
pub fn resolve_tokenizer(name: &str, options: &HubOptions, on_download: OnTransfer) -> Result<PathBuf> {
    resolve(name, Part::Tokenizer, options, on_download)
}

/// What of a model is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Whole,
    Tokenizer,
}

fn resolve(name: &str, part: Part, options: &HubOptions, on_download: OnTransfer) -> Result<PathBuf> {
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if path.exists() {
        bail!("{name} is a file; a model is a folder with config.json, tokenizer.json and *.safetensors");
    }
    let repo = Repo::new(Kind::Model, name)?;
    let cache = RepoCache::new(options, &repo);
    let in_cache = || match part {
        Part::Whole => cached_model(&cache, &repo, options),
        Part::Tokenizer => cached_tokenizer(&cache, &repo, options),
    };
    // A commit never changes: a complete snapshot of it needs no question to the hub.
    if options.offline || (cache::is_commit(&options.revision) && in_cache().is_ok()) {
        return in_cache();
    }
    let client = Client::new(options, &repo);
    let listing = match client.listing(&options.revision) {
        Ok(listing) => listing,
        Err(ListingError::Refused(error)) => return Err(error),
        Err(ListingError::Unreachable(error)) => {
            let Ok(folder) = in_cache() else { return Err(error) };
            tracing::warn!("{error:#}; using {name} from the cache: {}", folder.display());
            return Ok(folder);
        }
    };
    let files = listing.files.iter().map(String::as_str).collect();
    let wanted = match part {
        Part::Whole => select::model_files(&files),
        Part::Tokenizer => select::tokenizer_files(&files),
    };
    let mut wanted = wanted.with_context(|| repo.to_string())?;
    let folder = cache.snapshot(&listing.commit);
    // The index names the shards, so it comes first: a repository may hold the same weights in other files too.
    if let Some(index) = select::weights_index(&files).filter(|_| part == Part::Whole) {
        client.fetch(&cache, &listing.commit, index, on_download)?;
        let shards = select::shards(&folder.join(index))?;
        if let Some(missing) = shards.iter().find(|shard| !files.contains(shard.as_str())) {
            bail!("{repo}: {index} names the shard {missing}, which the repository does not have");
        }
        wanted.extend(shards);
    }
    for file in &wanted {
        client.fetch(&cache, &listing.commit, file, on_download)?;
    }
    cache.write_ref(&options.revision, &listing.commit)?;
    Ok(folder)
}

/// The data files of one split of a dataset.
///
/// `name` is a file or a pattern (returned as it is), a folder, or a hub repository; a path inside the repository
/// (`org/name/folder`, `org/name/folder/file.jsonl`) narrows the choice. `split` is a word of the file's path, as
/// `train` in `data/train-00000-of-00001.parquet`; files without any split's word are `train`.
pub fn resolve_dataset(
    name: &str,
    split: &str,
    options: &HubOptions,
    on_download: OnTransfer,
) -> Result<Vec<PathBuf>> {
    let path = Path::new(name);
    if path.is_file() || name.contains(['*', '?', '[']) {
        return Ok(vec![path.to_owned()]);
    }
    if path.is_dir() {
        return local_dataset(path, "", split).with_context(|| name.to_owned());
    }
    let repo = Repo::new(Kind::Dataset, name)?;
    let cache = RepoCache::new(options, &repo);
    let in_cache = || cached_dataset(&cache, &repo, split, options);
    if options.offline {
        return in_cache();
    }
    let client = Client::new(options, &repo);
    let listing = match client.listing(&options.revision) {
        Ok(listing) => listing,
        Err(ListingError::Refused(error)) => return Err(error),
        Err(ListingError::Unreachable(error)) => {
            let Ok(files) = in_cache() else { return Err(error) };
            tracing::warn!("{error:#}; using {name} from the cache");
            return Ok(files);
        }
    };
    let files = listing.files.iter().map(String::as_str).collect();
    let wanted = select::dataset_files(&files, &repo.inside, split).with_context(|| repo.to_string())?;
    for file in &wanted {
        client.fetch(&cache, &listing.commit, file, on_download)?;
    }
    cache.write_ref(&options.revision, &listing.commit)?;
    let folder = cache.snapshot(&listing.commit);
    Ok(wanted.into_iter().map(|file| folder.join(file)).collect())
}

fn cached_model(cache: &RepoCache, repo: &Repo, options: &HubOptions) -> Result<PathBuf> {
    let folder = cached(cache, repo, options)?;
    let files = cache::files_of(&folder)?;
    let files: BTreeSet<&str> = files.iter().map(String::as_str).collect();
    let complete = select::model_files(&files).and_then(|_| {
        let Some(index) = select::weights_index(&files) else { return Ok(()) };
        match select::shards(&folder.join(index))?.into_iter().find(|shard| !files.contains(shard.as_str())) {
            Some(missing) => bail!("{missing} is not there"),
            None => Ok(()),
        }
    });
    complete.with_context(|| format!("{repo} is in the cache only in part ({})", folder.display()))?;
    Ok(folder)
}

fn cached_tokenizer(cache: &RepoCache, repo: &Repo, options: &HubOptions) -> Result<PathBuf> {
    let folder = cached(cache, repo, options)?;
    let files = cache::files_of(&folder)?;
    select::tokenizer_files(&files.iter().map(String::as_str).collect())
        .with_context(|| format!("{repo} is in the cache only in part ({})", folder.display()))?;
    Ok(folder)
}

fn cached_dataset(cache: &RepoCache, repo: &Repo, split: &str, options: &HubOptions) -> Result<Vec<PathBuf>> {
    let folder = cached(cache, repo, options)?;
    local_dataset(&folder, &repo.inside, split)
        .with_context(|| format!("{repo}, as far as it is in the cache"))
}

fn cached(cache: &RepoCache, repo: &Repo, options: &HubOptions) -> Result<PathBuf> {
    cache.cached_snapshot(&options.revision).with_context(|| {
        format!(
            "{repo} (revision {}) is not in the cache {}, and offline mode forbids to download it: unset HF_HUB_OFFLINE",
            options.revision,
            options.cache_dir.display()
        )
    })
}

fn local_dataset(folder: &Path, inside: &str, split: &str) -> Result<Vec<PathBuf>> {
    let files = cache::files_of(folder)?;
    let files = files.iter().map(String::as_str).collect();
    let wanted = select::dataset_files(&files, inside, split)?;
    Ok(wanted.into_iter().map(|file| folder.join(file)).collect())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Model,
    Dataset,
}

/// A repository, and for datasets a path inside it.
#[derive(Clone, Debug)]
struct Repo {
    kind: Kind,
    id: String,
    inside: String,
}

impl Repo {
    fn new(kind: Kind, name: &str) -> Result<Self> {
        let mut parts = name.splitn(3, '/');
        let id = parts.by_ref().take(2).collect::<Vec<_>>().join("/");
        let inside = parts.next().unwrap_or_default().trim_end_matches('/').to_owned();
        let is_word = |word: &str| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            !word.is_empty() && word.len() <= 96 && word.chars().all(plain) && !word.starts_with(['.', '-'])
        };
        if !id.split('/').all(is_word) || (kind == Kind::Model && !inside.is_empty()) {
            bail!("{name}: no such file or folder, and not the id of a hub repository either (org/name)");
        }
        Ok(Self { kind, id, inside })
    }

    /// The folder of its cache.
    fn folder_name(&self) -> String {
        let kind = match self.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        format!("{kind}--{}", self.id.replace('/', "--"))
    }

    /// Its page, below the endpoint.
    fn page(&self) -> String {
        match self.kind {
            Kind::Model => self.id.clone(),
            Kind::Dataset => format!("datasets/{}", self.id),
        }
    }
}

impl std::fmt::Display for Repo {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let kind = match self.kind {
            Kind::Model => "model",
            Kind::Dataset => "dataset",
        };
        write!(f, "{kind} {}", self.id)
    }
}
