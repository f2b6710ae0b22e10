//! A folder as one commit of a repository on the hub.
//!
//! ```text
//! POST /api/repos/create                             the repository, unless it is there
//! POST /api/models/ID/branch/BRANCH                  the branch, unless it is there
//! POST /api/models/ID/preupload/BRANCH               which files are stored by SHA-256 (LFS) and which in git
//! POST /ID.git/info/lfs/objects/batch                which of their contents the hub lacks, and where each is put:
//! PUT  a storage server                                whole, or in parts, which POST completes
//! POST /api/models/ID/commit/BRANCH                  all files at once, a line of JSON each
//! ```
//!
//! Before the last request the repository shows nothing of the upload. Contents that arrived stay with the hub, so a second
//! upload of the same folder sends only what is missing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, StatusCode};
use ureq::{Body, SendBody};

use super::cache::files_of;
use super::client::{Broken, Client, TRIES, escaped, header};
use super::{HubOptions, Kind, OnTransfer, Repo, Transfer};

const JSON: &str = "application/json";
const LFS_JSON: &str = "application/vnd.git-lfs+json";
const ND_JSON: &str = "application/x-ndjson";
/// Files that one request asks about.
const BATCH: usize = 256;
/// How long the hub may think: it copies parts together, and makes a commit of all files.
const PATIENCE: Duration = Duration::from_secs(300);

/// A branch of a repository that may be written to.
pub struct Upload {
    options: HubOptions,
    repo: Repo,
}

/// A file that is stored by its SHA-256.
struct Large {
    path: PathBuf,
    /// In the repository.
    name: String,
    size: u64,
    oid: String,
}

/// An answer to a request: its headers and its body.
struct Answer {
    headers: HeaderMap,
    body: Body,
}

impl Upload {
    /// The branch `options.revision` of the repository `name` (`owner/name`), both created where they are not there; a new
    /// repository is private if `private` says so. Nothing else is written: a run can ask before its work begins.
    ///
    /// # Errors
    /// No token, or one that may not write; a repository that is public although `private` is asked for.
    pub fn open(name: &str, private: bool, options: HubOptions) -> Result<Upload> {
        let repo = Repo::new(Kind::Model, name).ok().filter(|repo| repo.id.contains('/'));
        let repo = repo.with_context(|| format!("{name} is not the id of a hub repository: owner/name"))?;
        ensure!(!options.offline, "offline mode forbids uploads: unset HF_HUB_OFFLINE");
        ensure!(
            options.token.is_some(),
            "uploads need a token: set HF_TOKEN to one from {}/settings/tokens that may write",
            options.endpoint
        );
        let upload = Upload { options, repo };
        upload.create(private).with_context(|| format!("creating {}", upload.repo))?;
        Ok(upload)
    }

    fn create(&self, private: bool) -> Result<()> {
        let (owner, name) = self.repo.id.split_once('/').context("owner/name")?;
        let wanted = json!({"organization": owner, "name": name, "type": "model", "private": private});
        let created =
            self.post(&self.at("/api/repos/create"), JSON, wanted.to_string().as_bytes(), &[409, 403])?;
        // Forbidden also where one may write to a repository and not create any.
        if created.is_none() {
            let there = self.get(&self.at(&format!("/api/models/{}", self.repo.id)));
            let there = there.context("the token given may not create it, and it is not there")?;
            ensure!(
                !private || there["private"] == true,
                "it is there already and public, and a private one is asked for: name another, or change it at {}/{}/settings",
                self.options.endpoint,
                self.repo.id
            );
        }
        if self.options.revision != "main" {
            let url = self.api("branch");
            self.post(&url, JSON, b"{}", &[409])?;
        }
        Ok(())
    }

    /// Makes one commit of the files of `folder`, without hidden ones and training checkpoints; returns its address.
    ///
    /// # Errors
    /// What the hub refuses, and a connection that fails again and again. Nothing local is changed, and calling it again
    /// continues: contents that arrived whole are not sent again.
    pub fn push(&self, folder: &Path, message: &str, on_upload: OnTransfer) -> Result<String> {
        let names = uploadable(folder)?;
        let mut commit = vec![json!({"key": "header", "value": {"summary": message, "description": ""}})];
        let mut large = Vec::new();
        for some in names.chunks(BATCH) {
            let modes = self.modes(folder, some)?;
            for name in some {
                let path = folder.join(name);
                let mode = modes.get(name);
                match mode.with_context(|| format!("preupload: {name} is not in the answer"))?.as_deref() {
                    Some("lfs") => large.push(Large::read(path, name)?),
                    Some(_) => {
                        let content =
                            BASE64.encode(fs::read(&path).with_context(|| path.display().to_string())?);
                        let value = json!({"path": name, "content": content, "encoding": "base64"});
                        commit.push(json!({"key": "file", "value": value}));
                    }
                    None => tracing::warn!("{name}: left out, as {}'s .gitignore says", self.repo),
                }
            }
        }
        self.send_missing(&large, on_upload)?;
        for file in &large {
            let value = json!({"path": file.name, "algo": "sha256", "oid": file.oid, "size": file.size});
            commit.push(json!({"key": "lfsFile", "value": value}));
        }
        let lines: String = commit.iter().map(|line| format!("{line}\n")).collect();
        let made =
            self.post(&self.api("commit"), ND_JSON, lines.as_bytes(), &[]).context("making the commit")?;
        let page = format!(
            "{}/{}/tree/{}",
            self.options.endpoint,
            self.repo.id,
            escaped(&self.options.revision, "/")
        );
        let made = made.map(read_json).transpose()?.unwrap_or_default();
        Ok(made["commitUrl"].as_str().map_or(page, str::to_owned))
    }

    /// How the hub stores each file: "lfs" or "regular", or not at all.
    fn modes(&self, folder: &Path, names: &[String]) -> Result<BTreeMap<String, Option<String>>> {
        let mut files = Vec::new();
        for name in names {
            let path = folder.join(name);
            let describe = || -> Result<Value> {
                let (mut sample, file) = (Vec::new(), File::open(&path)?);
                let size = file.metadata()?.len();
                file.take(512).read_to_end(&mut sample)?;
                Ok(json!({"path": name, "size": size, "sample": BASE64.encode(sample)}))
            };
            files.push(describe().with_context(|| path.display().to_string())?);
        }
        let question = json!({"files": files}).to_string();
        let answer = self.post(&self.api("preupload"), JSON, question.as_bytes(), &[])?;
        let answer = answer.map(read_json).transpose()?.unwrap_or_default();
        let mut modes = BTreeMap::new();
        for file in answer["files"].as_array().context("preupload: no files in the answer")? {
            let (name, mode) = (file["path"].as_str(), file["uploadMode"].as_str());
            if let (Some(name), Some(mode)) = (name, mode) {
                // A storage server takes no empty object.
                let empty = files.iter().any(|asked| asked["path"] == name && asked["size"] == 0);
                let mode = if empty { "regular" } else { mode }.to_owned();
                modes.insert(name.to_owned(), Some(mode).filter(|_| file["shouldIgnore"] != true));
            }
        }
        Ok(modes)
    }

    /// Sends the contents that the hub does not have.
    fn send_missing(&self, files: &[Large], on_upload: OnTransfer) -> Result<()> {
        // The same content in two files is one object.
        let mut seen = BTreeSet::new();
        let files: Vec<&Large> = files.iter().filter(|file| seen.insert(&file.oid)).collect();
        let url = self.at(&format!("/{}.git/info/lfs/objects/batch", self.repo.id));
        for some in files.chunks(BATCH) {
            let objects: Vec<Value> =
                some.iter().map(|file| json!({"oid": file.oid, "size": file.size})).collect();
            let question = json!({
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "hash_algo": "sha256",
                "ref": {"name": self.options.revision},
                "objects": objects,
            });
            let answer = self.post(&url, LFS_JSON, question.to_string().as_bytes(), &[])?;
            let answer = answer.map(read_json).transpose()?.unwrap_or_default();
            let objects = answer["objects"].as_array().context("LFS batch: no objects in the answer")?;
            for file in some {
                let object = objects.iter().find(|object| object["oid"] == file.oid.as_str());
                let object =
                    object.with_context(|| format!("LFS batch: {} is not in the answer", file.name))?;
                if let Some(error) = object.get("error").filter(|error| !error.is_null()) {
                    bail!(
                        "{}: the hub refuses it: {}",
                        file.name,
                        error["message"].as_str().unwrap_or("no reason given")
                    );
                }
                let actions = &object["actions"];
                if !actions["upload"].is_object() {
                    continue; // It is there.
                }
                self.send(file, &actions["upload"], on_upload)
                    .with_context(|| format!("uploading {}", file.name))?;
                if let Some(verify) = actions["verify"]["href"].as_str() {
                    let wanted = json!({"oid": file.oid, "size": file.size}).to_string();
                    self.post(verify, JSON, wanted.as_bytes(), &[])
                        .with_context(|| format!("verifying {}", file.name))?;
                }
            }
        }
        Ok(())
    }

    /// Puts a file where `action` says: whole, or in parts of `chunk_size` bytes whose addresses are the headers "1", "2", ..
    fn send(&self, file: &Large, action: &Value, on_upload: OnTransfer) -> Result<()> {
        let href = action["href"].as_str().context("LFS batch: no href in the answer")?;
        let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
        let Some(chunk) = number(&action["header"]["chunk_size"]).filter(|chunk| *chunk > 0) else {
            self.put(href, &action["header"], file, (0, file.size), on_upload)?;
            return Ok(());
        };
        let mut parts = Vec::new();
        for part in 0..file.size.div_ceil(chunk) {
            let number = (part + 1).to_string();
            let place = action["header"].as_object().and_then(|header| {
                header.iter().find(|(key, _)| key.trim_start_matches('0') == number)?.1.as_str()
            });
            let place = place.with_context(|| format!("LFS batch: no address for part {number}"))?;
            let range = (part * chunk, ((part + 1) * chunk).min(file.size));
            let headers = self.put(place, &Value::Null, file, range, on_upload)?;
            let etag =
                header(&headers, "etag").with_context(|| format!("part {number}: no etag in the answer"))?;
            parts.push(json!({"partNumber": part + 1, "etag": etag}));
        }
        let whole = json!({"oid": file.oid, "parts": parts}).to_string();
        self.post(href, LFS_JSON, whole.as_bytes(), &[])?;
        Ok(())
    }

    /// Puts the bytes `from..to` of a file at an address of the storage server, which is given no token of the hub's.
    fn put(
        &self,
        url: &str,
        headers: &Value,
        file: &Large,
        (from, to): (u64, u64),
        on_upload: OnTransfer,
    ) -> Result<HeaderMap> {
        let answer = self.persist(&file.name, || {
            let mut source = File::open(&file.path)?;
            source.seek(SeekFrom::Start(from))?;
            let mut counted = Counted {
                source: source.take(to - from),
                done: from,
                total: file.size,
                file: &file.name,
                on_upload,
            };
            (counted.on_upload)(Transfer { file: &file.name, done: from, total: file.size });
            let client = Client::new(&self.options, &self.repo);
            let mut request = client.agent.put(url).header("content-length", to - from);
            for (key, value) in headers.as_object().into_iter().flatten() {
                request = request.header(key, value.as_str().unwrap_or_default());
            }
            let request = request
                .config()
                .timeout_recv_response(Some(PATIENCE))
                .timeout_per_read(Some(PATIENCE))
                .build();
            let answer = request
                .send(SendBody::from_reader(&mut counted))
                .map_err(|error| Broken(error.to_string()))?;
            self.judge(answer, &[])
        })?;
        Ok(answer.context("an answer")?.headers)
    }

    fn post(&self, url: &str, content_type: &str, body: &[u8], accepted: &[u16]) -> Result<Option<Answer>> {
        self.persist(url, || {
            let client = Client::new(&self.options, &self.repo);
            let mut request = client.agent.post(url).header("content-type", content_type);
            if content_type == LFS_JSON {
                request = request.header("accept", LFS_JSON);
            }
            // Addresses that the hub gives (verify, complete) may be another host's.
            if let Some(token) = self.options.token.as_ref().filter(|_| url.starts_with(&self.at("/"))) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let request = request
                .config()
                .timeout_recv_response(Some(PATIENCE))
                .timeout_per_read(Some(PATIENCE))
                .build();
            self.judge(request.send(body).map_err(|error| Broken(error.to_string()))?, accepted)
        })
    }

    fn get(&self, url: &str) -> Result<Value> {
        let answer = self.persist(url, || {
            let client = Client::new(&self.options, &self.repo);
            let mut request = client.agent.get(url);
            if let Some(token) = &self.options.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            self.judge(request.call().map_err(|error| Broken(error.to_string()))?, &[])
        })?;
        answer.map(read_json).transpose()?.context("an answer")
    }

    /// Tries again after a failure of the line or of the server, a few times.
    fn persist<T>(&self, what: &str, mut request: impl FnMut() -> Result<T>) -> Result<T> {
        for failures in 1.. {
            match request() {
                Err(failure) if failure.is::<Broken>() && failures < TRIES => {
                    tracing::warn!("{what}: {failure:#}; trying again");
                    thread::sleep(Duration::from_millis(250) * 2_u32.pow(failures));
                }
                Err(failure) if failure.is::<Broken>() => {
                    return Err(failure.context(format!("{what}: failed {TRIES} times")));
                }
                result => return result,
            }
        }
        unreachable!("the loop ends by returning")
    }

    /// The answer, none for a status in `accepted`, or the reason why there is none.
    fn judge(&self, response: ureq::http::Response<Body>, accepted: &[u16]) -> Result<Option<Answer>> {
        let status = response.status();
        if status.is_success() {
            let (parts, body) = response.into_parts();
            return Ok(Some(Answer { headers: parts.headers, body }));
        }
        if accepted.contains(&status.as_u16()) {
            return Ok(None);
        }
        let told = header(response.headers(), "x-error-message").map(str::to_owned);
        let body = response.into_body().read_to_string().unwrap_or_default();
        let body = serde_json::from_str::<Value>(&body).unwrap_or_default();
        let told = told.or_else(|| body["error"].as_str().map(str::to_owned));
        let told = told.map_or(String::new(), |told| format!(": {told}"));
        let (endpoint, repo) = (&self.options.endpoint, &self.repo);
        match status {
            StatusCode::UNAUTHORIZED => {
                bail!("{endpoint} does not know the token given (HTTP {status}{told}): see HF_TOKEN")
            }
            StatusCode::FORBIDDEN => bail!(
                "the token given may not write to {repo} (HTTP {status}{told}): make one that may at {endpoint}/settings/tokens"
            ),
            StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED => {
                Err(Broken(format!("something else is changing {repo} (HTTP {status}{told})")).into())
            }
            _ if status.is_server_error()
                || [StatusCode::TOO_MANY_REQUESTS, StatusCode::REQUEST_TIMEOUT].contains(&status) =>
            {
                Err(Broken(format!("HTTP {status}{told}")).into())
            }
            _ => Err(anyhow!("HTTP {status}{told}")),
        }
    }

    fn at(&self, path: &str) -> String {
        format!("{}{path}", self.options.endpoint)
    }

    fn api(&self, what: &str) -> String {
        self.at(&format!("/api/models/{}/{what}/{}", self.repo.id, escaped(&self.options.revision, "")))
    }
}

/// The files of `folder` that [`Upload::push`] sends: no hidden ones, no training checkpoints.
///
/// # Errors
/// No such folder, and one without such files.
pub fn uploadable(folder: &Path) -> Result<Vec<String>> {
    ensure!(folder.is_dir(), "{}: no such folder", folder.display());
    let mut names = files_of(folder)?;
    names.retain(|name| !name.split_once('/').is_some_and(|(top, _)| top.starts_with("checkpoint-")));
    ensure!(!names.is_empty(), "{}: there is nothing to upload", folder.display());
    Ok(names)
}

impl Large {
    fn read(path: PathBuf, name: &str) -> Result<Large> {
        let mut hash = Sha256::new();
        let size = File::open(&path).and_then(|mut file| std::io::copy(&mut file, &mut hash));
        let size = size.with_context(|| path.display().to_string())?;
        let oid = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Large { path, name: name.to_owned(), size, oid })
    }
}

fn read_json(mut answer: Answer) -> Result<Value> {
    serde_json::from_reader(answer.body.as_reader()).context("the answer is no JSON")
}

/// Tells how much of a file was read.
struct Counted<'a, 'b> {
    source: std::io::Take<File>,
    done: u64,
    total: u64,
    file: &'a str,
    on_upload: &'a mut (dyn FnMut(Transfer) + 'b),
}

impl Read for Counted<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.done += count as u64;
        (self.on_upload)(Transfer { file: self.file, done: self.done, total: self.total });
        Ok(count)
    }
}
