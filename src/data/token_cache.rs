//! Tokenised datasets on disk, found again by what they were made of.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::prepare::prepare_into;
use super::records::data_files;
use super::{DatasetOptions, DatasetReport, TokenDataset, Tokenizer};
use crate::io::{write_atomically, write_folder_atomically};

/// Changes with what the same input becomes, and with the files' layout.
const VERSION: &str = "ferrotune tokens 1";
const IDS: &str = "ids.u32";
const TRAINED: &str = "trained.bits";
const ENDS: &str = "ends.u64";
const REPORT: &str = "report.json";

/// A folder of tokenised datasets. Each is a folder named by the SHA-256 of all that it was made of: the bytes of the data
/// files, the tokenizer, the chat template (and its date, if it shows one) and the options; whatever changes there makes
/// another one. It holds token ids (4 bytes each), labels (1 bit each) and ends of samples (8 bytes each), in the byte order
/// of x86-64. Folders may be removed at any time.
#[derive(Clone, Debug)]
pub struct TokenCache {
    dir: PathBuf,
}

impl TokenCache {
    /// Caches in `dir`, which is made when it is needed.
    pub fn new(dir: &Path) -> TokenCache {
        TokenCache { dir: dir.to_owned() }
    }

    /// As [`prepare`](super::prepare), but the samples are in the cache's files and not in memory: made once, mapped from
    /// then on. `on_rows` hears the number of rows tokenised so far.
    ///
    /// # Errors
    /// Those of `prepare`; a folder that cannot be written; a cached dataset that was damaged.
    pub fn prepare<S: AsRef<str>>(
        &self,
        sources: &[S],
        tokenizer: &Tokenizer,
        options: &DatasetOptions,
        on_rows: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(TokenDataset, DatasetReport)> {
        let folder = self.dir.join(key(sources, tokenizer, options)?);
        if !folder.is_dir() {
            fs::create_dir_all(&self.dir).with_context(|| format!("creating {}", self.dir.display()))?;
            write_folder_atomically(&folder, |folder| write(folder, sources, tokenizer, options, on_rows))?;
        }
        load(&folder)
    }
}

/// The name of what `sources` become.
fn key<S: AsRef<str>>(sources: &[S], tokenizer: &Tokenizer, options: &DatasetOptions) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut add = |name: &str, bytes: &[u8]| {
        hasher.update(name);
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    add("version", VERSION.as_bytes());
    for file in data_files(sources)? {
        let mut contents = Sha256::new();
        let mut bytes = File::open(&file).with_context(|| format!("reading {}", file.display()))?;
        io::copy(&mut bytes, &mut contents).with_context(|| format!("reading {}", file.display()))?;
        let ending = file.extension().unwrap_or_default().to_string_lossy().into_owned();
        add(&ending, &contents.finalize());
    }
    let inner = tokenizer.inner().to_string(false).map_err(|error| anyhow!("{error}"))?;
    add("tokenizer", inner.as_bytes());
    for token in [tokenizer.bos_token(), tokenizer.eos_token(), tokenizer.pad_token()] {
        add("token", token.map_or("", |token| &token.content).as_bytes());
    }
    if let Some(template) = tokenizer.chat_template() {
        for (name, source) in template.sources() {
            add(name, source.as_bytes());
            if source.contains("strftime_now") {
                add("now", template.now().to_string().as_bytes());
            }
        }
    }
    add("options", format!("{options:?}").as_bytes());
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn write<S: AsRef<str>>(
    folder: &Path,
    sources: &[S],
    tokenizer: &Tokenizer,
    options: &DatasetOptions,
    on_rows: &mut (dyn FnMut(u64) + Send),
) -> Result<()> {
    let create = |name: &str| -> Result<BufWriter<File>> {
        let path = folder.join(name);
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(BufWriter::with_capacity(1 << 20, file))
    };
    let (mut ids, mut trained, mut ends) = (create(IDS)?, create(TRAINED)?, create(ENDS)?);
    let (mut tokens, mut bits) = (0u64, 0u64);
    let mut push = |sample: &[u32], mask: &[bool]| -> Result<()> {
        ids.write_all(bytemuck::cast_slice(sample))?;
        for is_trained in mask {
            bits |= u64::from(*is_trained) << (tokens % 64);
            tokens += 1;
            if tokens.is_multiple_of(64) {
                trained.write_all(&bits.to_le_bytes())?;
                bits = 0;
            }
        }
        Ok(ends.write_all(&tokens.to_le_bytes())?)
    };
    let report = prepare_into(sources, tokenizer, options, &mut push, on_rows)?;
    if !tokens.is_multiple_of(64) {
        trained.write_all(&bits.to_le_bytes())?;
    }
    for file in [ids, trained, ends] {
        file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    }
    write_atomically(&folder.join(REPORT), report.to_json().to_string().as_bytes())
}

fn load(folder: &Path) -> Result<(TokenDataset, DatasetReport)> {
    let path = folder.join(REPORT);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let report = serde_json::from_str::<Value>(&text)
        .map_err(anyhow::Error::from)
        .and_then(|value| DatasetReport::from_json(&value))
        .with_context(|| format!("{}: remove its folder", path.display()))?;
    let [ids, trained, ends] = [IDS, TRAINED, ENDS].map(|name| folder.join(name));
    let data = TokenDataset::map([&ids, &trained, &ends], report.samples, report.tokens)?;
    Ok((data, report))
}
