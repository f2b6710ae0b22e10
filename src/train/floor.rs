//! The least time that a training step can take on a machine: its large products, its attention, and the bytes that the
//! rest must move, each measured on that machine at the shapes of the step. Nothing is recomputed, weight gradients are taken
//! only where every weight trains, and nothing but these costs time.

use anyhow::Result;
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::device;
use crate::models::Config;
use crate::ops::{self, AttentionSpec, Segments};

/// The floor of one forward and backward pass.
#[derive(Debug, Clone, Serialize)]
pub struct Floor {
    /// The sum of the terms.
    pub ms: f64,
    /// Read and written by a large copy.
    pub copy_gb_per_s: f64,
    pub terms: Vec<Term>,
}

/// `calls` times the same work.
#[derive(Debug, Clone, Serialize)]
pub struct Term {
    pub name: String,
    pub shape: String,
    pub calls: usize,
    /// All calls together.
    pub ms: f64,
}

impl Floor {
    /// The floor of a step of `passes` such passes.
    pub fn scale(&mut self, passes: usize) {
        self.ms *= passes as f64;
        for term in &mut self.terms {
            term.calls *= passes;
            term.ms *= passes as f64;
        }
    }
}

/// The shapes of a step.
pub struct Work<'a> {
    pub config: &'a Config,
    pub cu_seqlens: &'a [i32],
    /// The projections of the layers are in NF4.
    pub load_in_4bit: bool,
    /// Weights have gradients, too.
    pub trains_all: bool,
    pub kind: Kind,
    pub device: Device,
}

/// A projection of the decoder, and how often it occurs.
struct Product {
    name: &'static str,
    in_features: i64,
    rows: i64,
    calls: usize,
}

/// Measures every term on random data; `progress` is called before each with its name.
pub fn measure(work: &Work, progress: &mut dyn FnMut(&str)) -> Result<Floor> {
    let n = i64::from(*work.cu_seqlens.last().unwrap_or(&0));
    let random = |rows: i64, columns: i64| -> Result<Tensor> {
        Ok(Tensor::f_randn([rows, columns], (work.kind, work.device))?)
    };
    let mut terms = Vec::new();
    for Product { name, in_features, rows, calls } in products(work.config) {
        progress(name);
        let (x, weight, dy) = (random(n, in_features)?, random(rows, in_features)?, random(n, rows)?);
        let forward = time(work.device, &mut || Ok(x.f_matmul(&weight.f_tr()?).map(drop)?))?;
        let dgrad = time(work.device, &mut || Ok(dy.f_matmul(&weight).map(drop)?))?;
        let shape = |from: i64, to: i64| format!("[{n}, {from}] x [{from}, {to}]");
        let mut measured = vec![
            ("forward", forward, shape(in_features, rows)),
            ("input gradient", dgrad, shape(rows, in_features)),
        ];
        if work.trains_all {
            let wgrad = time(work.device, &mut || Ok(dy.f_tr()?.f_matmul(&x).map(drop)?))?;
            measured.push(("weight gradient", wgrad, format!("[{rows}, {n}] x [{n}, {in_features}]")));
        }
        for (what, ms, shape) in measured {
            terms.push(Term { name: format!("{name} {what}"), shape, calls, ms: calls as f64 * ms });
        }
    }
    for (spec, calls) in counted(work.config.layers.iter().map(|layer| &layer.attention)) {
        progress("attention");
        let ms = attention(work, spec, n)?;
        let shape = format!("[{n}, {}/{}, {}]", spec.num_heads, spec.num_kv_heads, spec.head_dim);
        terms.push(Term {
            name: "attention forward and backward".into(),
            shape,
            calls,
            ms: calls as f64 * ms,
        });
    }
    progress("copies");
    let bytes_per_ms = copy_bytes_per_ms(work)?;
    let element = work.kind.elt_size_in_bytes() as f64;
    for (name, shape, calls, elements) in moved(work.config, n) {
        let bytes = calls as f64 * elements as f64 * element;
        terms.push(Term { name: name.into(), shape, calls, ms: bytes / bytes_per_ms });
    }
    if work.load_in_4bit {
        let head = work.config.hidden_size * work.config.vocab_size;
        let all: i64 =
            products(work.config).iter().map(|p| p.in_features * p.rows * p.calls as i64).sum::<i64>() - head;
        // 4.127 bits with double quantisation, read and made dense once forward and once backward.
        let ms = 2.0 * all as f64 * (4.127 / 8.0 + element) / bytes_per_ms;
        terms.push(Term { name: "nf4".into(), shape: format!("{all} weights"), calls: 2, ms });
    }
    let ms = terms.iter().map(|term| term.ms).sum();
    Ok(Floor { ms, copy_gb_per_s: bytes_per_ms / 1e6, terms })
}

/// Equal items and how many there are of each.
fn counted<T: PartialEq>(items: impl IntoIterator<Item = T>) -> Vec<(T, usize)> {
    let mut found: Vec<(T, usize)> = Vec::new();
    for item in items {
        match found.iter_mut().find(|(known, _)| *known == item) {
            Some((_, count)) => *count += 1,
            None => found.push((item, 1)),
        }
    }
    found
}

fn products(config: &Config) -> Vec<Product> {
    let (hidden, ff, layers) = (config.hidden_size, config.intermediate_size, config.layers.len());
    let mut products = Vec::new();
    let heads = config.layers.iter().map(|layer| {
        let spec = &layer.attention;
        (spec.num_heads * spec.head_dim, 2 * spec.num_kv_heads * spec.head_dim)
    });
    for ((q, kv), calls) in counted(heads) {
        products.push(Product { name: "qkv", in_features: hidden, rows: q + kv, calls });
        products.push(Product { name: "o", in_features: q, rows: hidden, calls });
    }
    products.push(Product { name: "gate_up", in_features: hidden, rows: 2 * ff, calls: layers });
    products.push(Product { name: "down", in_features: ff, rows: hidden, calls: layers });
    products.push(Product { name: "lm_head", in_features: hidden, rows: config.vocab_size, calls: 1 });
    products
}

/// (what, shape, calls, elements read and written in forward and backward) of the ops that are bound by memory. Each
/// tensor counts once where an op reads it and once where one writes it.
fn moved(config: &Config, n: i64) -> Vec<(&'static str, String, usize, i64)> {
    let (c, f, layers) = (config.hidden_size, config.intermediate_size, config.layers.len());
    let spec = &config.layers[0].attention;
    let rotated = (spec.num_heads + spec.num_kv_heads) * spec.head_dim;
    let norms = if config.post_norms { 4 } else { 2 };
    vec![
        // x -> y; then x, dy -> dx.
        ("norms", format!("[{n}, {c}]"), norms * layers + 1, 5 * n * c),
        // In place in both directions.
        ("rope", format!("[{n}, {rotated}]"), layers, 4 * n * rotated),
        // gate, up -> y; then gate, up, dy -> dgate, dup.
        ("activation", format!("[{n}, {f}]"), layers, 8 * n * f),
        // x + y, and the sum of the two gradients that meet there.
        ("residual sums", format!("[{n}, {c}]"), 2 * layers, 6 * n * c),
        // p - onehot of the logits: read once, written once.
        ("loss", format!("[{n}, {}]", config.vocab_size), 1, 2 * n * config.vocab_size),
    ]
}

fn attention(work: &Work, spec: &AttentionSpec, n: i64) -> Result<f64> {
    let random = |heads: i64| -> Result<Tensor> {
        Ok(Tensor::f_randn([n, heads, spec.head_dim], (work.kind, work.device))?.f_set_requires_grad(true)?)
    };
    let (q, k, v) = (random(spec.num_heads)?, random(spec.num_kv_heads)?, random(spec.num_kv_heads)?);
    let dy = Tensor::f_randn([n, spec.num_heads * spec.head_dim], (work.kind, work.device))?;
    let segments = Segments::new(work.cu_seqlens, work.device)?;
    time(work.device, &mut || {
        let y = ops::attention(&q, &k, &v, &segments, spec)?;
        ops::backward(&y, &dy, [&q, &k, &v])
    })
}

fn copy_bytes_per_ms(work: &Work) -> Result<f64> {
    // Far more than any cache holds.
    let elements: i64 = if work.device.is_cuda() { 1 << 29 } else { 1 << 24 };
    let from = Tensor::f_randn([elements], (work.kind, work.device))?;
    let mut to = from.f_empty_like()?;
    let ms = time(work.device, &mut || Ok(to.f_copy_(&from)?))?;
    Ok(2.0 * elements as f64 * work.kind.elt_size_in_bytes() as f64 / ms)
}

/// Milliseconds of one call: the median of several runs of many calls each, after a warm-up.
pub(crate) fn time(device: Device, call: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    const RUNS: usize = 5;
    /// Milliseconds of a run: long against the launch of its first kernel.
    const RUN_MS: f64 = 20.0;
    call()?;
    device::synchronize(device)?;
    let once = device::milliseconds(device, &mut *call)?;
    let calls = (RUN_MS / once.max(1e-3)).ceil().clamp(1.0, 1000.0) as usize;
    let mut runs = (0..RUNS)
        .map(|_| Ok(device::milliseconds(device, || (0..calls).try_for_each(|_| call()))? / calls as f64))
        .collect::<Result<Vec<f64>>>()?;
    runs.sort_by(f64::total_cmp);
    Ok(runs[RUNS / 2])
}
