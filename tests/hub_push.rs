//! Uploads to a hub that runs in the test: a thread that keeps repositories and answers as huggingface.co does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ferrotune::io::hub::{HubOptions, Upload};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::export::tiny;

const TOKEN: &str = "hf_writes";
const PART: usize = 3000;

/// What goes wrong with a request.
#[derive(Clone, Copy)]
enum Fault {
    /// The connection ends in the middle of the body.
    Drop,
    Status(u16),
}

#[derive(Default)]
struct State {
    /// id -> whether it is private
    repos: BTreeMap<String, bool>,
    branches: BTreeSet<String>,
    /// What arrived, by its SHA-256, and parts of it by their number.
    objects: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<(String, usize), Vec<u8>>,
    commits: Vec<Vec<Value>>,
    /// Used up by the first requests whose line contains the word.
    faults: Vec<(&'static str, Fault)>,
    requests: Vec<String>,
}

#[derive(Clone, Default)]
struct Hub {
    state: Arc<Mutex<State>>,
    endpoint: String,
}

impl Hub {
    fn start(faults: &[(&'static str, Fault)]) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut hub = Hub::default();
        hub.state.lock().unwrap().faults = faults.to_vec();
        hub.endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = hub.clone();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let server = server.clone();
                thread::spawn(move || server.answer(stream));
            }
        });
        hub
    }

    fn options(&self, revision: &str) -> HubOptions {
        HubOptions {
            cache_dir: "unused".into(),
            endpoint: self.endpoint.clone(),
            token: Some(TOKEN.to_owned()),
            offline: false,
            revision: revision.to_owned(),
        }
    }

    fn open(&self) -> anyhow::Result<Upload> {
        Upload::open("me/model", true, self.options("main"))
    }

    /// Requests since the last call whose line contains `word`.
    fn count(&self, word: &str) -> usize {
        self.state.lock().unwrap().requests.iter().filter(|line| line.contains(word)).count()
    }

    fn forget_requests(&self) {
        self.state.lock().unwrap().requests.clear();
    }

    /// Files of the last commit with their contents.
    fn committed(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state.lock().unwrap();
        let lines = state.commits.last().expect("a commit");
        let content = |line: &Value| {
            let value = &line["value"];
            let bytes = match line["key"].as_str()? {
                "file" => BASE64.decode(value["content"].as_str()?).unwrap(),
                "lfsFile" => state.objects[value["oid"].as_str()?].clone(),
                _ => return None,
            };
            Some((value["path"].as_str()?.to_owned(), bytes))
        };
        lines.iter().filter_map(content).collect()
    }

    fn answer(&self, stream: TcpStream) -> Option<()> {
        let mut input = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        let line = line.trim_end_matches(" HTTP/1.1\r\n").to_owned();
        let (mut length, mut token) = (0, false);
        loop {
            let mut header = String::new();
            input.read_line(&mut header).ok()?;
            let header = header.trim().to_lowercase();
            if header.is_empty() {
                break;
            }
            assert!(!header.starts_with("transfer-encoding"), "a storage server wants the length");
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
            token |= header == format!("authorization: bearer {TOKEN}");
        }
        let mut state = self.state.lock().unwrap();
        state.requests.push(line.clone());
        let fault = state.faults.iter().position(|(word, _)| line.contains(word));
        let fault = fault.map(|at| state.faults.remove(at).1);
        drop(state);
        let mut body = vec![0; if matches!(fault, Some(Fault::Drop)) { length / 2 } else { length }];
        input.read_exact(&mut body).ok()?;
        let (status, headers, answer) = match fault {
            Some(Fault::Drop) => return stream.shutdown(std::net::Shutdown::Both).ok(),
            Some(Fault::Status(status)) => (status, String::new(), json!({"error": "so it was asked"})),
            None => self.respond(&line, token, body),
        };
        let answer = answer.to_string();
        let mut out = stream;
        write!(
            out,
            "HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{answer}",
            answer.len()
        )
        .ok()
    }

    fn respond(&self, line: &str, token: bool, body: Vec<u8>) -> (u16, String, Value) {
        let mut state = self.state.lock().unwrap();
        let plain = |status: u16, answer: Value| (status, String::new(), answer);
        let (method, path) = line.split_once(' ').unwrap();
        if let Some(place) = path.strip_prefix("/store/") {
            assert!(!token, "the token is the hub's alone");
            let (oid, part) = place.split_once('/').unwrap_or((place, ""));
            let etag = format!("etag: \"{}\"\r\n", &sha256(&body)[..8]);
            match part.parse() {
                Ok(part) => drop(state.parts.insert((oid.to_owned(), part), body)),
                Err(_) => {
                    assert_eq!(sha256(&body), oid);
                    state.objects.insert(oid.to_owned(), body);
                }
            }
            return (200, etag, json!({}));
        }
        if !token {
            return plain(401, json!({"error": "Invalid username or password."}));
        }
        if path == "/api/models/me/model" {
            return plain(200, json!({"private": state.repos["me/model"]}));
        }
        assert_eq!(method, "POST");
        let text = String::from_utf8(body).unwrap();
        let asked: Value = serde_json::from_str(&text).unwrap_or_default();
        let oid = |value: &Value| value["oid"].as_str().unwrap().to_owned();
        match path {
            "/api/repos/create" => {
                let id = format!(
                    "{}/{}",
                    asked["organization"].as_str().unwrap(),
                    asked["name"].as_str().unwrap()
                );
                let there = state.repos.contains_key(&id);
                let private = asked["private"].as_bool().unwrap();
                state.repos.entry(id).or_insert(private);
                plain(if there { 409 } else { 200 }, json!({}))
            }
            "/api/models/me/model/branch/dev%2Fx" => {
                let new = state.branches.insert("dev/x".to_owned());
                plain(if new { 200 } else { 409 }, json!({}))
            }
            "/me/model.git/info/lfs/objects/batch" => {
                let action = |object: &Value| {
                    let (id, size) = (oid(object), object["size"].as_u64().unwrap() as usize);
                    if state.objects.contains_key(&id) {
                        return json!({"oid": id, "size": size});
                    }
                    let href = format!("{}/store/{id}", self.endpoint);
                    let verify = json!({"href": format!("{}/verify", self.endpoint)});
                    if size <= 2 * PART {
                        return json!({"oid": id, "size": size, "actions": {"upload": {"href": href}, "verify": verify}});
                    }
                    let mut header = json!({"chunk_size": PART.to_string()});
                    for part in 1..=size.div_ceil(PART) {
                        header[format!("{part:05}")] = format!("{href}/{part}").into();
                    }
                    let upload =
                        json!({"href": format!("{}/complete/{id}", self.endpoint), "header": header});
                    json!({"oid": id, "size": size, "actions": {"upload": upload, "verify": verify}})
                };
                let objects: Vec<Value> = asked["objects"].as_array().unwrap().iter().map(action).collect();
                plain(200, json!({"transfer": "basic", "objects": objects}))
            }
            "/verify" => {
                let right = state.objects[&oid(&asked)].len() as u64 == asked["size"].as_u64().unwrap();
                plain(if right { 200 } else { 400 }, json!({}))
            }
            _ if path.starts_with("/complete/") => {
                let id = oid(&asked);
                let mut whole = Vec::new();
                for part in asked["parts"].as_array().unwrap() {
                    let bytes = &state.parts[&(id.clone(), part["partNumber"].as_u64().unwrap() as usize)];
                    assert_eq!(part["etag"], format!("\"{}\"", &sha256(bytes)[..8]));
                    whole.extend_from_slice(bytes);
                }
                assert_eq!(sha256(&whole), id);
                state.objects.insert(id, whole);
                plain(200, json!({}))
            }
            _ if path.contains("/preupload/") => {
                let mode = |file: &Value| {
                    let name = file["path"].as_str().unwrap();
                    let large = [".safetensors", ".gguf"].iter().any(|end| name.ends_with(end));
                    let ignored = name.ends_with(".log");
                    json!({"path": name, "uploadMode": if large { "lfs" } else { "regular" }, "shouldIgnore": ignored})
                };
                let known = |file: &&Value| !file["path"].as_str().unwrap().ends_with(".lost");
                let files = asked["files"].as_array().unwrap();
                let files: Vec<Value> = files.iter().filter(known).map(mode).collect();
                plain(200, json!({"files": files}))
            }
            _ if path.contains("/commit/") => {
                state.commits.push(text.lines().map(|line| serde_json::from_str(line).unwrap()).collect());
                plain(
                    200,
                    json!({"commitUrl": format!("{}/me/model/commit/{}", self.endpoint, state.commits.len())}),
                )
            }
            _ => plain(404, json!({"error": "Not Found"})),
        }
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A large file for many parts, one for a single request, its copy, an empty one and small ones; and what stays at home.
fn folder(place: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = |count: u32, seed: u32| -> Vec<u8> { (0..count).map(|i| ((i * seed) >> 5) as u8).collect() };
    let files = [
        ("config.json", b"{}".to_vec()),
        ("a b/tokenizer.json", bytes(700, 3)),
        ("model.safetensors", bytes(20_000, 77)),
        ("adapter.safetensors", bytes(5_000, 5)),
        ("a b/copy.safetensors", bytes(5_000, 5)),
        ("empty.safetensors", Vec::new()),
    ];
    fs::create_dir_all(place.join("a b")).unwrap();
    fs::create_dir_all(place.join("checkpoint-5")).unwrap();
    for (name, bytes) in &files {
        fs::write(place.join(name), bytes).unwrap();
    }
    for name in [".hidden", "train.log", "checkpoint-5/model.safetensors"] {
        fs::write(place.join(name), "stays").unwrap();
    }
    files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect()
}

#[test]
fn a_folder_becomes_one_commit_and_nothing_is_sent_twice() {
    let place = tempfile::tempdir().unwrap();
    let wanted = folder(place.path());
    let hub = Hub::start(&[]);
    let upload = hub.open().unwrap();
    let mut seen = BTreeMap::new();
    let address = upload
        .push(place.path(), "first", &mut |transfer| {
            seen.insert(transfer.file.to_owned(), (transfer.done, transfer.total));
        })
        .unwrap();
    assert_eq!(address, format!("{}/me/model/commit/1", hub.endpoint));
    assert_eq!(hub.committed(), wanted);
    assert!(hub.state.lock().unwrap().repos["me/model"], "private");
    // 7 parts of one, and the two equal ones once.
    assert_eq!(hub.count("PUT /store/"), 8);
    assert_eq!(seen["model.safetensors"], (20_000, 20_000));

    hub.forget_requests();
    hub.open().unwrap().push(place.path(), "second", &mut |_| ()).unwrap();
    assert_eq!(hub.count("PUT"), 0);
    assert_eq!(hub.committed(), wanted);

    // Another branch; the repository is there.
    let other = Upload::open("me/model", true, hub.options("dev/x")).unwrap();
    other.push(place.path(), "third", &mut |_| ()).unwrap();
    assert!(hub.state.lock().unwrap().branches.contains("dev/x"));
    assert_eq!(hub.count("/commit/dev%2Fx"), 1);
}

#[test]
fn what_the_line_and_the_server_lose_is_sent_again() {
    let place = tempfile::tempdir().unwrap();
    let wanted = folder(place.path());
    let hub = Hub::start(&[
        ("/repos/create", Fault::Drop),
        ("/preupload/", Fault::Status(503)),
        ("/objects/batch", Fault::Drop),
        ("/3", Fault::Drop),
        ("/5", Fault::Status(500)),
        ("/complete/", Fault::Status(502)),
        ("/verify", Fault::Drop),
        ("/commit/", Fault::Status(409)),
    ]);
    hub.open().unwrap().push(place.path(), "first", &mut |_| ()).unwrap();
    assert_eq!(hub.committed(), wanted);
    assert_eq!(hub.state.lock().unwrap().commits.len(), 1);
    assert!(hub.state.lock().unwrap().faults.is_empty());
    // The part that broke off and the one that the server refused, not the whole file.
    assert_eq!(hub.count("PUT /store/"), 10);
}

#[test]
fn a_failed_upload_continues() {
    let place = tempfile::tempdir().unwrap();
    let wanted = folder(place.path());
    let hub = Hub::start(&[("/commit/", Fault::Status(403))]);
    let upload = hub.open().unwrap();
    let error = format!("{:#}", upload.push(place.path(), "first", &mut |_| ()).unwrap_err());
    assert!(
        error.contains("may not write to model me/model") && error.contains("so it was asked"),
        "{error}"
    );
    assert!(hub.state.lock().unwrap().commits.is_empty());
    hub.forget_requests();
    upload.push(place.path(), "again", &mut |_| ()).unwrap();
    assert_eq!(hub.count("PUT"), 0);
    assert_eq!(hub.committed(), wanted);
}

#[test]
fn refusals_come_before_the_work_and_say_what_to_do() {
    let hub = Hub::start(&[]);
    let refused = |name: &str, options: HubOptions| {
        format!("{:#}", Upload::open(name, true, options).err().expect("a refusal"))
    };
    let options = hub.options("main");
    let error = refused("me/model", HubOptions { token: None, ..options.clone() });
    assert!(error.contains("uploads need a token: set HF_TOKEN"), "{error}");
    let error = refused("me/model", HubOptions { token: Some("hf_other".to_owned()), ..options.clone() });
    assert!(
        error.contains("does not know the token given (HTTP 401") && error.contains("Invalid"),
        "{error}"
    );
    let error = refused("me/model", HubOptions { offline: true, ..options.clone() });
    assert!(error.contains("HF_HUB_OFFLINE"), "{error}");
    for name in ["model", "me/model/more", "../model"] {
        let error = refused(name, options.clone());
        assert!(error.contains("is not the id of a hub repository: owner/name"), "{error}");
    }
    assert!(hub.state.lock().unwrap().repos.is_empty());
    // What should stay private is not put where everyone can see it.
    hub.state.lock().unwrap().repos.insert("me/model".to_owned(), false);
    let error = refused("me/model", options);
    assert!(error.contains("public, and a private one is asked for"), "{error}");
    // One that may not create may still write.
    let hub = Hub::start(&[("/repos/create", Fault::Status(403))]);
    hub.state.lock().unwrap().repos.insert("me/model".to_owned(), true);
    hub.open().unwrap();
}

/// A file that the hub says nothing of is not one that it ignores: it must not stay behind unnoticed.
#[test]
fn a_file_that_the_hub_says_nothing_of_fails_the_upload() {
    let hub = Hub::start(&[]);
    let place = tempfile::tempdir().unwrap();
    for name in ["config.json", "a.lost"] {
        std::fs::write(place.path().join(name), "{}").unwrap();
    }
    let error = hub.open().unwrap().push(place.path(), "first", &mut |_| ()).unwrap_err();
    assert!(format!("{error:#}").contains("a.lost is not in the answer"), "{error:#}");
    assert!(hub.state.lock().unwrap().commits.is_empty());
}

/// What is wrong with the folder is said before a token is asked for, and before a repository is made.
#[test]
fn a_folder_with_nothing_to_upload_is_refused_first() {
    let hub = Hub::start(&[]);
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(place.path().join("out/checkpoint-1")).unwrap();
    for file in ["out/checkpoint-1/model.safetensors", "out/.hidden"] {
        std::fs::write(place.path().join(file), "x").unwrap();
    }
    for (folder, reason) in
        [("absent", "no such folder"), ("out", "nothing to upload"), ("out/.hidden", "no such folder")]
    {
        let folder = place.path().join(folder);
        for token in ["", TOKEN] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
            command.arg("push").arg(&folder).arg("me/model").env("HF_HOME", place.path());
            let output = command.env("HF_ENDPOINT", &hub.endpoint).env("HF_TOKEN", token).output().unwrap();
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{error}");
            assert!(error.contains(reason) && error.contains(folder.to_str().unwrap()), "{error}");
        }
    }
    assert!(hub.state.lock().unwrap().repos.is_empty());
}

/// The command: the export is there whatever the upload does, and the line it prints continues.
#[test]
fn an_export_survives_its_upload() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let run = |hub: &Hub, args: &[&str]| -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        command
            .args(args)
            .env("HF_HOME", place.path())
            .env("HF_ENDPOINT", &hub.endpoint)
            .env("HF_TOKEN", TOKEN);
        command.output().unwrap()
    };
    let (model, folder) = (tiny().display().to_string(), out.display().to_string());
    let hub = Hub::start(&[("/commit/", Fault::Status(403))]);
    let export =
        ["export", "--format", "merged-16bit", "--device", "cpu", "--model", &model, "--output-dir", &folder];
    let push = ["--push-to-hub", "me/model", "--hub-private", "--hub-revision", "dev/x"];
    let failed = run(&hub, &[&export[..], &push[..]].concat());
    let error = String::from_utf8_lossy(&failed.stderr).into_owned();
    assert_eq!(failed.status.code(), Some(1), "{error}");
    let goes_on = format!("ferrotune push {folder} me/model --hub-private --hub-revision dev/x");
    assert!(error.contains(&goes_on) && error.contains("uploading model.safetensors"), "{error}");
    assert!(out.join("model.safetensors").exists());

    hub.forget_requests();
    let done = run(&hub, &goes_on.split(' ').skip(1).collect::<Vec<_>>());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(String::from_utf8_lossy(&done.stdout).contains("/me/model/commit/1"));
    assert_eq!(hub.count("PUT"), 0);
    let weights = fs::read(out.join("model.safetensors")).unwrap();
    assert_eq!(hub.committed()["model.safetensors"], weights);

    // A token that is refused costs no export.
    let hub = Hub::start(&[("/repos/create", Fault::Status(401))]);
    let elsewhere = place.path().join("elsewhere").display().to_string();
    let mut args = [&export[..], &push[..]].concat();
    args[8] = &elsewhere;
    let failed = run(&hub, &args);
    assert!(!failed.status.success() && !Path::new(&elsewhere).exists());
}
