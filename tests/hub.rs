//! Downloads from a hub that runs in the test: a thread that answers HTTP/1.1 as huggingface.co does.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use ferrotune::io::hub::{HubOptions, Transfer, resolve_dataset, resolve_model, resolve_tokenizer};
use sha2::{Digest, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const TOKEN: &str = "hf_test";

/// One repository; a file over 1000 bytes is "large": named by its SHA-256 and served from another path.
#[derive(Clone, Default)]
struct Hub {
    page: &'static str,
    files: BTreeMap<String, Vec<u8>>,
    gated: bool,
    needs_token: bool,
    /// How many of the coming large downloads break off half way.
    broken: Arc<Mutex<usize>>,
    /// Sent instead of the content of large files.
    corrupt: bool,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn new(page: &'static str, files: &[(&str, Vec<u8>)]) -> Self {
        let files = files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect();
        Self { page, files, ..Self::default() }
    }

    /// A model with one large file.
    fn model() -> Self {
        let weights = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let text = |text: &str| text.as_bytes().to_vec();
        Self::new(
            "org/tiny",
            &[
                ("config.json", text("{}")),
                ("tokenizer.json", text("{}")),
                ("model.safetensors", weights),
                ("pytorch_model.bin", text("x")),
                ("README.md", text("x")),
            ],
        )
    }

    /// Serves from a port of its own until the process ends.
    fn start(&self, cache: &Path) -> HubOptions {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let hub = self.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let hub = hub.clone();
                // A client that hangs up is part of the test.
                thread::spawn(move || hub.answer(stream));
            }
        });
        let cache_dir = cache.to_owned();
        HubOptions { cache_dir, endpoint, token: None, offline: false, revision: "main".to_owned() }
    }

    fn answer(&self, stream: TcpStream) -> Option<()> {
        let mut lines = BufReader::new(stream.try_clone().ok()?).lines().map_while(Result::ok);
        let first = lines.next()?;
        let headers: Vec<String> =
            lines.take_while(|line| !line.is_empty()).map(|line| line.to_lowercase()).collect();
        let header = |name: &str| headers.iter().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        let (method, path) = first.strip_suffix(" HTTP/1.1")?.split_once(' ')?;
        let path = &path.replace("%20", " ");
        let range: usize = match header("range") {
            Some(range) => range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()?,
            None => 0,
        };
        let has_token = header("authorization") == Some(&format!("bearer {TOKEN}"));
        let note = format!("{method} {path} {range}{}", if has_token { " token" } else { "" });
        self.requests.lock().unwrap().push(note);
        self.route(stream, method, path, range, has_token)
    }

    fn route(
        &self,
        mut out: TcpStream,
        method: &str,
        path: &str,
        from: usize,
        has_token: bool,
    ) -> Option<()> {
        let here = out.local_addr().ok()?;
        let mut send = |status: &str, headers: &str, body: &[u8], length: usize| -> Option<()> {
            write!(
                out,
                "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
            )
            .ok()?;
            out.write_all(if method == "HEAD" { &[] } else { body }).ok()
        };
        if self.needs_token && !has_token {
            return send("401 Unauthorized", "X-Error-Code: RepoNotFound\r\n", b"", 0);
        }
        let kind = if self.page.starts_with("datasets/") { "" } else { "models/" };
        if let Some(revision) = path.strip_prefix(&format!("/api/{kind}{}/revision/", self.page)) {
            if !["main", COMMIT, "refs%2Fpr%2F1"].contains(&revision) {
                return send("404 Not Found", "X-Error-Code: RevisionNotFound\r\n", b"", 0);
            }
            let siblings: Vec<_> =
                self.files.keys().map(|name| serde_json::json!({"rfilename": name})).collect();
            let body = serde_json::json!({"sha": COMMIT, "siblings": siblings}).to_string();
            return send("200 OK", "", body.as_bytes(), body.len());
        }
        if let Some(name) = path.strip_prefix(&format!("/{}/resolve/{COMMIT}/", self.page)) {
            if self.gated {
                return send("401 Unauthorized", "X-Error-Code: GatedRepo\r\n", b"", 0);
            }
            let bytes = &self.files[name];
            if bytes.len() <= 1000 {
                let etag = format!("ETag: \"git-{}\"\r\n", name.replace('/', "-"));
                return send("200 OK", &etag, bytes, bytes.len());
            }
            // To an absolute address, as to a storage server: only within the hub are redirects relative.
            let headers = format!(
                "X-Linked-Etag: \"{}\"\r\nX-Linked-Size: {}\r\nLocation: http://{here}/cdn/{name}\r\n",
                sha256(bytes),
                bytes.len()
            );
            return send("302 Found", &headers, b"", 0);
        }
        if let Some(name) = path.strip_prefix("/cdn/") {
            let mut bytes = self.files[name].clone();
            if self.corrupt {
                bytes[500] ^= 1;
            }
            let rest = &bytes[from..];
            let mut broken = self.broken.lock().unwrap();
            let sent = if *broken > 0 { rest.len() / 2 } else { rest.len() };
            *broken = broken.saturating_sub(1);
            let status = if from > 0 { "206 Partial Content" } else { "200 OK" };
            return send(status, "", &rest[..sent], rest.len());
        }
        send("404 Not Found", "X-Error-Code: RepoNotFound\r\n", b"", 0)
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn quiet(_: Transfer) {}

#[test]
fn a_model_is_downloaded_into_the_cache_layout_of_python() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::model();
    let options = hub.start(cache.path());
    let mut seen = Vec::new();
    let folder = resolve_model("org/tiny", &options, &mut |download| {
        seen.push((download.file.to_owned(), download.done, download.total));
    });
    let folder = folder.unwrap();

    let root = cache.path().join("models--org--tiny");
    assert_eq!(folder, root.join("snapshots").join(COMMIT));
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let weights = &hub.files["model.safetensors"];
    let link = fs::read_link(folder.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(weights)));
    assert_eq!(fs::read_link(folder.join("config.json")).unwrap(), Path::new("../../blobs/git-config.json"));
    assert_eq!(&fs::read(folder.join("model.safetensors")).unwrap(), weights);
    assert!(!folder.join("pytorch_model.bin").exists() && !folder.join("README.md").exists());
    assert!(fs::read_dir(root.join("blobs")).unwrap().count() == 3, "no part of a download is left");
    let size = weights.len() as u64;
    assert!(seen.contains(&("model.safetensors".to_owned(), 0, size)));
    assert!(seen.contains(&("model.safetensors".to_owned(), size, size)));

    // A second time only the listing is asked for; offline, or given the commit, nothing at all.
    hub.requests();
    assert_eq!(resolve_model("org/tiny", &options, &mut quiet).unwrap(), folder);
    assert_eq!(hub.requests().len(), 1);
    let offline = HubOptions { offline: true, ..options.clone() };
    assert_eq!(resolve_model("org/tiny", &offline, &mut quiet).unwrap(), folder);
    let pinned = HubOptions { revision: COMMIT.to_owned(), ..options.clone() };
    assert_eq!(resolve_model("org/tiny", &pinned, &mut quiet).unwrap(), folder);
    assert_eq!(hub.requests(), [] as [&str; 0]);
    // No network: what the cache has.
    let unreachable = HubOptions { endpoint: "http://127.0.0.1:1".to_owned(), ..options };
    assert_eq!(resolve_model("org/tiny", &unreachable, &mut quiet).unwrap(), folder);
}

#[test]
fn a_tokenizer_comes_without_the_weights() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::model();
    let options = hub.start(cache.path());
    let folder = resolve_tokenizer("org/tiny", &options, &mut quiet).unwrap();
    assert!(folder.join("tokenizer.json").exists() && folder.join("config.json").exists());
    assert!(!folder.join("model.safetensors").exists());
    let offline = HubOptions { offline: true, ..options.clone() };
    assert_eq!(resolve_tokenizer("org/tiny", &offline, &mut quiet).unwrap(), folder);
    // What is there of the model is not taken for the whole.
    let error = format!("{:#}", resolve_model("org/tiny", &offline, &mut quiet).unwrap_err());
    assert!(error.contains("only in part"), "{error}");
    assert!(resolve_model("org/tiny", &options, &mut quiet).unwrap().join("model.safetensors").exists());
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub::model();
    *hub.broken.lock().unwrap() = 2;
    let options = hub.start(cache.path());
    let folder = resolve_model("org/tiny", &options, &mut quiet).unwrap();
    let weights = &hub.files["model.safetensors"];
    assert_eq!(&fs::read(folder.join("model.safetensors")).unwrap(), weights);
    let (half, three_quarters) = (weights.len() / 2, weights.len() / 4 * 3);
    let requests = hub.requests();
    for from in [0, half, three_quarters] {
        let request = format!("GET /cdn/model.safetensors {from}");
        assert!(requests.contains(&request), "{request} is not in {requests:?}");
    }

    // The same across processes: the first half is on disk.
    let cache = tempfile::tempdir().unwrap();
    let blobs = cache.path().join("models--org--tiny/blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha256(weights))), &weights[..half]).unwrap();
    let options = HubOptions { cache_dir: cache.path().to_owned(), ..options };
    let folder = resolve_model("org/tiny", &options, &mut quiet).unwrap();
    assert_eq!(&fs::read(folder.join("model.safetensors")).unwrap(), weights);
    let requests = hub.requests();
    assert!(requests.contains(&format!("GET /cdn/model.safetensors {half}")), "{requests:?}");
    assert!(!requests.contains(&"GET /cdn/model.safetensors 0".to_owned()), "{requests:?}");
}

#[test]
fn content_that_is_not_what_its_etag_says_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub { corrupt: true, ..Hub::model() };
    let error = resolve_model("org/tiny", &hub.start(cache.path()), &mut quiet).unwrap_err();
    assert!(format!("{error:#}").contains("not what its etag says"), "{error:#}");
    assert!(
        !cache.path().join("models--org--tiny/snapshots").join(COMMIT).join("model.safetensors").exists()
    );
}

#[test]
fn the_token_is_sent_and_its_absence_explained() {
    let cache = tempfile::tempdir().unwrap();
    let hub = Hub { needs_token: true, ..Hub::model() };
    let options = hub.start(cache.path());
    let error = resolve_model("org/tiny", &options, &mut quiet).unwrap_err().to_string();
    assert!(error.contains("no model org/tiny") && error.contains("HF_TOKEN"), "{error}");
    let options = HubOptions { token: Some(TOKEN.to_owned()), ..options };
    resolve_model("org/tiny", &options, &mut quiet).unwrap();
    assert!(hub.requests().iter().skip(1).all(|request| request.ends_with(" token")));

    let hub = Hub { gated: true, ..Hub::model() };
    let options = HubOptions { cache_dir: cache.path().join("other"), ..hub.start(cache.path()) };
    let error = format!("{:#}", resolve_model("org/tiny", &options, &mut quiet).unwrap_err());
    let page = format!("accept its licence at {}/org/tiny", options.endpoint);
    assert!(error.contains("gated") && error.contains(&page) && error.contains("HF_TOKEN"), "{error}");
}

#[test]
fn what_is_not_there_is_named() {
    let cache = tempfile::tempdir().unwrap();
    let options = Hub::model().start(cache.path());
    let refused = |name: &str, options: &HubOptions| {
        format!("{:#}", resolve_model(name, options, &mut quiet).unwrap_err())
    };
    let error = refused("org/none", &options);
    assert!(error.contains("no model org/none"), "{error}");
    let error = refused("org/tiny", &HubOptions { revision: "v9".to_owned(), ..options.clone() });
    assert!(error.contains("no branch, tag or commit v9"), "{error}");
    let error = refused("org/tiny", &HubOptions { offline: true, ..options.clone() });
    assert!(error.contains("not in the cache") && error.contains("HF_HUB_OFFLINE"), "{error}");
    let error =
        refused("org/tiny", &HubOptions { endpoint: "http://127.0.0.1:1".to_owned(), ..options.clone() });
    assert!(error.contains("cannot reach http://127.0.0.1:1"), "{error}");
    let error = refused("./no/such/folder", &options);
    assert!(error.contains("no such file or folder"), "{error}");
    let text = |text: &str| text.as_bytes().to_vec();
    let pickled = Hub::new("org/old", &[("config.json", text("{}")), ("pytorch_model.bin", text("x"))]);
    let error = refused("org/old", &pickled.start(cache.path()));
    assert!(error.contains("no safetensors") && error.contains("pytorch_model.bin"), "{error}");
}

#[test]
fn the_shards_are_those_of_the_index() {
    let cache = tempfile::tempdir().unwrap();
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#.to_vec();
    let shard = vec![7; 2000];
    let files = [
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index),
        ("model-1.safetensors", shard.clone()),
        ("model-2.safetensors", vec![8; 3000]),
        ("consolidated.safetensors", vec![9; 4000]),
    ];
    let hub = Hub::new("org/sharded", &files);
    let options = hub.start(cache.path());
    let folder = resolve_model("org/sharded", &options, &mut quiet).unwrap();
    assert_eq!(fs::read(folder.join("model-1.safetensors")).unwrap(), shard);
    assert!(folder.join("model-2.safetensors").exists() && !folder.join("consolidated.safetensors").exists());
    // A shard that was lost is fetched again, and offline it is missed.
    fs::remove_file(folder.join("model-2.safetensors")).unwrap();
    let offline = HubOptions { offline: true, ..options.clone() };
    let error = format!("{:#}", resolve_model("org/sharded", &offline, &mut quiet).unwrap_err());
    assert!(error.contains("only in part") && error.contains("model-2.safetensors"), "{error}");
    resolve_model("org/sharded", &options, &mut quiet).unwrap();
    resolve_model("org/sharded", &offline, &mut quiet).unwrap();
}

#[test]
fn a_dataset_is_the_files_of_its_split() {
    let cache = tempfile::tempdir().unwrap();
    let rows = b"{\"text\": \"x\"}\n".to_vec();
    let files = [
        ("README.md", rows.clone()),
        ("main/train 1.jsonl", rows.clone()),
        ("main/test.jsonl", rows.clone()),
        ("../../escape.jsonl", rows.clone()),
    ];
    let options = Hub::new("datasets/org/data", &files).start(cache.path());
    let snapshot = cache.path().join("datasets--org--data/snapshots").join(COMMIT);
    let train = resolve_dataset("org/data/main", "train", &options, &mut quiet).unwrap();
    assert_eq!(train, [snapshot.join("main/train 1.jsonl")]);
    let test = resolve_dataset("org/data", "test", &options, &mut quiet).unwrap();
    assert_eq!(test, [snapshot.join("main/test.jsonl")]);
    let offline = HubOptions { offline: true, ..options };
    assert_eq!(resolve_dataset("org/data/main", "test", &offline, &mut quiet).unwrap(), test);
    assert_eq!(resolve_dataset("*.jsonl", "train", &offline, &mut quiet).unwrap(), [Path::new("*.jsonl")]);
    assert_eq!(resolve_dataset(snapshot.to_str().unwrap(), "test", &offline, &mut quiet).unwrap(), test);
}

/// The variables of Hugging Face's tools reach the downloads of a command.
#[test]
fn the_command_reads_hugging_face_s_environment() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub { needs_token: true, ..Hub::model() };
    let endpoint = hub.start(home.path()).endpoint;
    let score = |variables: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        for name in ["HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"] {
            command.env_remove(name);
        }
        command.args(["score", "--model", "org/tiny", "--text", "x", "--device", "cpu"]);
        command.env("HF_HOME", home.path()).env("HF_ENDPOINT", format!("{endpoint}/"));
        let output = command.envs(variables.iter().copied()).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let weights = |cache: &str| {
        home.path()
            .join(cache)
            .join("models--org--tiny/snapshots")
            .join(COMMIT)
            .join("model.safetensors")
            .exists()
    };

    let error = score(&[("HF_HUB_OFFLINE", "1"), ("HF_TOKEN", TOKEN)]);
    assert!(error.contains("not in the cache") && hub.requests().is_empty(), "{error}");
    let error = score(&[]);
    assert!(error.contains("set HF_TOKEN"), "{error}");
    fs::write(home.path().join("token"), format!("{TOKEN}\n")).unwrap();
    // The model that is served has an empty config.json: what comes after the download fails.
    let error = score(&[]);
    assert!(error.contains("downloading model.safetensors") && weights("hub"), "{error}");
    fs::remove_file(home.path().join("token")).unwrap();
    let elsewhere = home.path().join("elsewhere");
    let error = score(&[("HF_TOKEN", TOKEN), ("HF_HUB_CACHE", elsewhere.to_str().unwrap())]);
    assert!(weights("elsewhere"), "{error}");
}
