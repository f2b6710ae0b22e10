//! Reading tests/golden and the shared test data, and the one distance that tests compare by.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use ferrotune::io::Weights;
use ferrotune::models::{Config, Decoder, Input, NewRows};
use ferrotune::nn::{KvPages, PAGE_SIZE, RopeTables};
use ferrotune::ops::Pass;
use tch::{Device, Kind, Tensor};

/// tests/golden of the package, also where the test binary runs outside cargo, in the package's folder.
pub fn root() -> PathBuf {
    PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| ".".into())).join("tests/golden")
}

/// Names of the checkpoints in tests/golden.
pub fn checkpoints() -> Vec<String> {
    folders(&root()).into_iter().filter(|name| root().join(name).join("config.json").is_file()).collect()
}

/// Names of the adapters in tests/golden/adapters.
pub fn adapters() -> Vec<String> {
    folders(&root().join("adapters"))
}

fn folders(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(!names.is_empty(), "{} is empty", dir.display());
    names
}

/// The shared test data, or a line that says what is skipped.
pub fn shared_data(what: &str) -> Option<PathBuf> {
    let dir = match std::env::var_os("FERROTUNE_TEST_DATA") {
        Some(dir) => PathBuf::from(dir),
        None => root().join("../../../shared/data"),
    };
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: {what} needs the test data; set FERROTUNE_TEST_DATA to its folder");
    None
}

/// The tensors of a .safetensors file.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .into_iter()
        .collect()
}

/// `max(||a-b|| / ||b||)` over the 2-norm and the max-norm, in f64.
pub fn rel(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let (a, b) = (a.to_kind(Kind::Double), b.to_kind(Kind::Double));
    let difference = &a - &b;
    let euclidean = difference.norm().double_value(&[]) / b.norm().double_value(&[]);
    let largest = difference.abs().max().double_value(&[]) / b.abs().max().double_value(&[]);
    // A NaN must not pass.
    if euclidean.is_nan() || largest.is_nan() { f64::INFINITY } else { euclidean.max(largest) }
}

/// Fails with every case that is further apart than `limit`, so that one run shows all of them.
pub fn assert_close(limit: f64, distances: impl IntoIterator<Item = (String, f64)>) {
    let mut count = 0;
    let far: Vec<String> = distances
        .into_iter()
        .inspect(|_| count += 1)
        .filter(|(_, distance)| *distance > limit)
        .map(|(name, distance)| format!("{name}: {distance:.2e}"))
        .collect();
    assert!(count > 0, "nothing was compared");
    assert!(far.is_empty(), "further apart than {limit:e}:\n  {}", far.join("\n  "));
}

pub fn ids(tensor: &Tensor) -> Vec<i64> {
    tensor.flatten(0, -1).try_into().unwrap()
}

pub fn load(dir: &Path, kind: Kind) -> Decoder {
    load_on(dir, kind, Device::Cpu)
}

pub fn load_on(dir: &Path, kind: Kind, device: Device) -> Decoder {
    let load = || Decoder::load(Config::from_dir(dir)?, &Weights::open(dir)?, kind, device);
    load().unwrap_or_else(|error| panic!("{}: {error:#}", dir.display()))
}

/// One or several sequences as a flat batch.
pub struct Flat {
    pub input_ids: Vec<i64>,
    pub position_ids: Vec<i64>,
    pub cu_seqlens: Vec<i32>,
}

impl Flat {
    pub fn new<'a>(sequences: impl IntoIterator<Item = &'a [i64]>) -> Flat {
        let mut flat = Flat { input_ids: vec![], position_ids: vec![], cu_seqlens: vec![0] };
        for sequence in sequences {
            flat.input_ids.extend(sequence);
            flat.position_ids.extend(0..sequence.len() as i64);
            flat.cu_seqlens.push(flat.input_ids.len() as i32);
        }
        flat
    }

    pub fn input(&self) -> Input<'_> {
        Input {
            input_ids: &self.input_ids,
            position_ids: &self.position_ids,
            cu_seqlens: &self.cu_seqlens,
            prefixes: &[],
        }
    }
}

/// Logits `[N, V]`.
pub fn logits(decoder: &Decoder, flat: &Flat) -> Tensor {
    tch::no_grad(|| decoder.logits(&decoder.hidden(flat.input(), Pass::INFERENCE).unwrap()).unwrap())
}

/// One sequence on pages of its own, in an order of their own.
pub struct Fed<'a> {
    decoder: &'a Decoder,
    pages: KvPages,
    table: Vec<i32>,
    ropes: RopeTables,
    cached: usize,
    regime: Vec<i64>,
}

impl<'a> Fed<'a> {
    pub fn new(decoder: &'a Decoder, capacity: usize) -> Fed<'a> {
        let pages = capacity.div_ceil(PAGE_SIZE);
        let table = (0..pages as i32).rev().collect();
        let ropes = RopeTables::default();
        Fed { decoder, pages: decoder.kv_pages(pages).unwrap(), table, ropes, cached: 0, regime: vec![] }
    }

    /// Logits `[V]` of the last of `ids`, of which the first `keep` stay cached if they are.
    pub fn logits(&mut self, ids: &[i64], keep: usize) -> Tensor {
        let regime = self.decoder.rope_regime(ids.len());
        let same = regime == self.regime;
        self.cached = if same { self.cached.min(keep).min(ids.len() - 1) } else { 0 };
        self.regime = regime;
        let rows = NewRows {
            input_ids: &ids[self.cached..],
            past: self.cached,
            length: ids.len(),
            pages: &self.table[..ids.len().div_ceil(PAGE_SIZE)],
        };
        let hidden = self.decoder.decode(&[rows], &self.pages, &mut self.ropes, &[]).unwrap();
        self.cached = ids.len();
        tch::no_grad(|| self.decoder.logits(&hidden.get(hidden.size()[0] - 1).unsqueeze(0)).unwrap())
            .squeeze_dim(0)
    }
}
