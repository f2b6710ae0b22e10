//! What is asked of the hub: the list of a revision's files, and one file after the other.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Component, Path};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use super::cache::{RepoCache, create_parent};
use super::{HubOptions, Kind, OnTransfer, Repo, Transfer};

/// A server that says nothing, or takes nothing, for so long is taken for lost.
pub(super) const SILENCE: Duration = Duration::from_secs(30);
/// Tries in a row without a new byte before a transfer is given up.
pub(super) const TRIES: u32 = 5;

pub struct Client<'a> {
    pub(super) agent: Agent,
    pub(super) options: &'a HubOptions,
    pub(super) repo: &'a Repo,
}

/// A revision: its commit and the paths of its files.
pub struct Listing {
    pub commit: String,
    pub files: Vec<String>,
}

/// Why there is no listing.
pub enum ListingError {
    /// The hub answered, and said no.
    Refused(anyhow::Error),
    /// No answer, or none that means anything: the cache may serve.
    Unreachable(anyhow::Error),
}

/// What is known of a file before it is downloaded.
struct FileHead {
    etag: String,
    size: u64,
}

impl<'a> Client<'a> {
    pub fn new(options: &'a HubOptions, repo: &'a Repo) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .timeout_per_write(Some(SILENCE))
            .user_agent(concat!("ferrotune/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        Self { agent, options, repo }
    }

    pub fn listing(&self, revision: &str) -> Result<Listing, ListingError> {
        let kind = match self.repo.kind {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        };
        let url = format!(
            "{}/api/{kind}/{}/revision/{}",
            self.options.endpoint,
            self.repo.id,
            escaped(revision, "")
        );
        let mut request = self.agent.get(&url);
        if let Some(token) = &self.options.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let mut response = request.call().map_err(|error| {
            ListingError::Unreachable(anyhow!(error).context(format!(
                "cannot reach {} (check the network, set HF_ENDPOINT to a mirror, or give a local folder)",
                self.options.endpoint
            )))
        })?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(ListingError::Unreachable(self.refusal(&response, revision)));
        }
        if !status.is_success() {
            return Err(ListingError::Refused(self.refusal(&response, revision)));
        }
        let mut read = || -> Result<Listing> {
            let value: Value = serde_json::from_reader(response.body_mut().as_reader())?;
            let commit = value["sha"].as_str().context("no sha")?.to_owned();
            ensure!(is_plain_path(&commit), "sha {commit:?} is not a commit");
            let siblings = value["siblings"].as_array().context("no siblings")?;
            let files = siblings.iter().filter_map(|file| file["rfilename"].as_str());
            // The names become paths below the cache; one that leads out of it is not taken.
            Ok(Listing {
                commit,
                files: files.filter(|file| is_plain_path(file)).map(str::to_owned).collect(),
            })
        };
        read().with_context(|| url.clone()).map_err(ListingError::Unreachable)
    }

    /// Makes sure that the snapshot of `commit` has `file`: from the blobs, or by a download that goes on where an
    /// earlier one broke off.
    pub fn fetch(&self, cache: &RepoCache, commit: &str, file: &str, on_download: OnTransfer) -> Result<()> {
        // A snapshot is of one commit, so what it has is right.
        if cache.snapshot(commit).join(file).exists() {
            return Ok(());
        }
        let url =
            format!("{}/{}/resolve/{commit}/{}", self.options.endpoint, self.repo.page(), escaped(file, "/"));
        let fetched = self.head(&url, commit).and_then(|head| {
            let _lock = cache.lock(&head.etag)?;
            if !cache.blob(&head.etag).exists() {
                self.download(cache, &url, file, &head, on_download)?;
            }
            cache.link(commit, file, &head.etag)
        });
        fetched.with_context(|| format!("downloading {file} of {}", self.repo))
    }

    /// Asks for a file's etag and size. A large file is stored elsewhere: the hub itself, and not the place to which it
    /// redirects, knows the name of the content (`x-linked-etag`, its SHA-256).
    fn head(&self, url: &str, commit: &str) -> Result<FileHead> {
        let mut url = url.to_owned();
        for _ in 0..5 {
            let mut request = self
                .agent
                .head(&url)
                .header("accept-encoding", "identity")
                .config()
                .max_redirects(0)
                .max_redirects_will_error(false)
                .build();
            if let Some(token) = &self.options.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().with_context(|| format!("cannot reach {url}"))?;
            let headers = response.headers();
            // A repository that was renamed redirects within the hub.
            if let Some(path) = header(headers, "location").filter(|to| to.starts_with('/')) {
                url = format!("{}{path}", host_of(&url));
                continue;
            }
            let status = response.status();
            if !status.is_success() && !status.is_redirection() {
                return Err(self.refusal(&response, commit));
            }
            let etag =
                header(headers, "x-linked-etag").or_else(|| header(headers, "etag")).context("no etag")?;
            let etag = etag.trim_start_matches("W/").trim_matches('"').to_owned();
            ensure!(is_plain_path(&etag) && !etag.contains('/'), "etag {etag:?} cannot name a file");
            let size = header(headers, "x-linked-size").or_else(|| header(headers, "content-length"));
            let size =
                size.and_then(|size| size.parse().ok()).context("the answer does not tell the size")?;
            return Ok(FileHead { etag, size });
        }
        bail!("{url}: redirected in a circle")
    }

    fn download(
        &self,
        cache: &RepoCache,
        url: &str,
        file: &str,
        head: &FileHead,
        on_download: OnTransfer,
    ) -> Result<()> {
        let path = cache.incomplete_blob(&head.etag);
        create_parent(&path)?;
        let mut failures = 0;
        loop {
            let before = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            let failure = match self.continue_download(url, &path, file, head, on_download) {
                Ok(()) => break,
                Err(failure) => failure,
            };
            let after = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            failures = if after > before { 1 } else { failures + 1 };
            if failures == TRIES || !failure.is::<Broken>() {
                return Err(failure.context(format!("{after} of {} bytes have come and are kept", head.size)));
            }
            tracing::warn!("{file}: {failure:#}; going on from byte {after}");
            thread::sleep(Duration::from_millis(250) * 2_u32.pow(failures));
        }
        fs::rename(&path, cache.blob(&head.etag)).with_context(|| path.display().to_string())
    }

    /// One request for what is missing at `path`, which is whole and verified after it.
    fn continue_download(
        &self,
        url: &str,
        path: &Path,
        file: &str,
        head: &FileHead,
        on_download: OnTransfer,
    ) -> Result<()> {
        let mut out = OpenOptions::new().create(true).append(true).read(true).open(path)?;
        let mut done = out.metadata()?.len();
        if done > head.size {
            out.set_len(0)?;
            done = 0;
        }
        let resumed = done > 0;
        let mut hash = Sha256::new();
        if resumed {
            std::io::copy(&mut File::open(path)?, &mut hash)?;
        }
        on_download(Transfer { file, done, total: head.size });
        if done < head.size {
            let mut request = self.agent.get(url).header("accept-encoding", "identity");
            if resumed {
                request = request.header("range", format!("bytes={done}-"));
            }
            if let Some(token) = &self.options.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| Broken(error.to_string()))?;
            match response.status() {
                StatusCode::PARTIAL_CONTENT => {}
                // A server without ranges sends everything again.
                StatusCode::OK => {
                    out.set_len(0)?;
                    done = 0;
                    hash = Sha256::new();
                }
                status if status.is_server_error() => bail!(Broken(format!("HTTP {status}"))),
                _ => return Err(self.refusal(&response, "")),
            }
            let mut body = response.into_body().into_reader();
            let mut buffer = vec![0; 1 << 20];
            while done < head.size {
                let count = match body.read(&mut buffer) {
                    Ok(0) => bail!(Broken("the connection was closed early".to_owned())),
                    Ok(count) => count,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => bail!(Broken(error.to_string())),
                };
                out.write_all(&buffer[..count]).with_context(|| path.display().to_string())?;
                hash.update(&buffer[..count]);
                done += count as u64;
                on_download(Transfer { file, done, total: head.size });
            }
        }
        out.sync_all()?;
        let sum: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        // Only large files are named by their SHA-256; the etags of others are of git.
        if done != head.size || (head.etag.len() == sum.len() && head.etag != sum) {
            out.set_len(0)?;
            let wrong = "the content is not what its etag says";
            // What an earlier download left may be to blame: once more from the start.
            ensure!(!resumed, Broken(wrong.to_owned()));
            bail!(wrong);
        }
        Ok(())
    }

    /// The reason for an answer that is not a success, and what to do.
    fn refusal(&self, response: &Response<Body>, revision: &str) -> anyhow::Error {
        let (status, endpoint, repo) = (response.status(), &self.options.endpoint, self.repo);
        let page = format!("{endpoint}/{}", repo.page());
        let has_token = self.options.token.is_some();
        match header(response.headers(), "x-error-code") {
            Some("GatedRepo") if has_token => {
                anyhow!(
                    "{repo} is gated, and the token given has no access yet: accept its licence at {page}"
                )
            }
            Some("GatedRepo") => anyhow!(
                "{repo} is gated: accept its licence at {page}, then set HF_TOKEN (a token from {endpoint}/settings/tokens)"
            ),
            Some("RevisionNotFound") => {
                anyhow!("{repo} has no branch, tag or commit {revision}: see {page}/tree/main")
            }
            _ => match status {
                // To those without a token, the hub does not tell a private repository from none.
                StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND if !has_token => {
                    anyhow!(
                        "no {repo} at {endpoint} (HTTP {status}); if it is private or gated, set HF_TOKEN"
                    )
                }
                StatusCode::NOT_FOUND => {
                    anyhow!("no {repo} at {endpoint}, or the token given may not see it")
                }
                StatusCode::UNAUTHORIZED => {
                    anyhow!("{endpoint} does not know the token given (HTTP {status}): see HF_TOKEN")
                }
                StatusCode::FORBIDDEN => anyhow!(
                    "{endpoint} does not allow it (HTTP {status}): accept the licence at {page} and set HF_TOKEN"
                ),
                _ => anyhow!("{endpoint} answered HTTP {status} for {repo}"),
            },
        }
    }
}

/// A failure of the line, after which trying again makes sense.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Broken(pub String);

pub(super) fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// `https://host:port` of a URL.
fn host_of(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    url[start..].find('/').map_or(url, |end| &url[..start + end])
}

/// Percent-encoded for a URL's path, but for the characters of `keep`.
pub(super) fn escaped(text: &str, keep: &str) -> String {
    let plain =
        |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || keep.as_bytes().contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// Whether a name from outside stays below the folder it is joined to.
fn is_plain_path(path: &str) -> bool {
    !path.is_empty() && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)))
}
