//! How fast a card is, in the few numbers that predictions need.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::device;
use crate::ops::{self, AttentionSpec, Segments};
use crate::train::floor::time;

/// Rates of one card, in bf16 if nothing else is said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    pub name: String,
    /// Its multiprocessors.
    pub processors: u64,
    /// Of large products.
    pub product_tflops: f64,
    pub product_f32_tflops: f64,
    /// In e4m3, a scale a row, summed fast (csrc/fp8.cpp); none where it cannot, or was not measured.
    #[serde(default)]
    pub product_fp8_tflops: Option<f64>,
    /// Of causal attention by the fastest kernel, by FlashAttention-2 (windows, `--deterministic`) and in f32.
    pub attention_tflops: Rates,
    pub flash_tflops: Rates,
    pub attention_f32_tflops: Rates,
    /// Read and written by a large copy.
    pub memory_gb_per_s: f64,
    /// To pinned memory of the host or back, whichever is slower.
    pub bus_gb_per_s: f64,
    /// From one kernel of a recorded step to the next.
    pub gap_us: f64,
}

/// Of attention, counting the pairs that are seen: 4 H D operations each forward, 10 backward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    pub forward: f64,
    pub backward: f64,
}

impl Card {
    pub(super) fn memory(&self, bytes: f64) -> f64 {
        bytes / (self.memory_gb_per_s * 1e6)
    }

    pub(super) fn bus(&self, bytes: f64) -> f64 {
        bytes / (self.bus_gb_per_s * 1e6)
    }

    pub(super) fn gap(&self) -> f64 {
        self.gap_us * 1e-3
    }

    /// Measures the GPU `device` of so many multiprocessors under the name `name`, in a second or two.
    pub fn measure(name: String, processors: u64, device: Device) -> Result<Card> {
        let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::BFloat16, device));
        let product_tflops = product(Kind::BFloat16, device)?;
        let product_f32_tflops = product(Kind::Float, device)?;
        let product_fp8_tflops = if device::supports_fp8(device) { Some(product_fp8(device)?) } else { None };
        let attention_tflops = attention(Kind::BFloat16, None, device)?;
        // A window that hides one key of the last query.
        let flash_tflops = attention(Kind::BFloat16, Some(N - 1), device)?;
        let attention_f32_tflops = attention(Kind::Float, None, device)?;

        const COPIED: i64 = 1 << 28;
        let from = random(&[COPIED])?;
        let mut to = from.f_empty_like()?;
        let copy = time(device, &mut || Ok(to.f_copy_(&from)?))?;
        let mut there = device::pinned(COPIED as u64 / 2)?.f_view_dtype(Kind::BFloat16)?;
        let mut here = to.f_narrow(0, 0, COPIED / 4)?;
        let out = time(device, &mut || Ok(there.f_copy_(&here)?))?;
        let back = time(device, &mut || Ok(here.f_copy_(&there)?))?;
        let bytes = 2.0 * COPIED as f64;
        Ok(Card {
            name,
            processors,
            product_tflops,
            product_f32_tflops,
            product_fp8_tflops,
            attention_tflops,
            flash_tflops,
            attention_f32_tflops,
            memory_gb_per_s: 2.0 * bytes / (copy * 1e6),
            bus_gb_per_s: bytes / 4.0 / (out.max(back) * 1e6),
            gap_us: GAP_US,
        })
    }
}

/// Rows that are measured on.
const N: i64 = 4096;

const INNER: i64 = 4096;
const COLUMNS: i64 = 14336;

fn product(kind: Kind, device: Device) -> Result<f64> {
    let random = |shape: &[i64]| Tensor::f_randn(shape, (kind, device));
    let (x, weight) = (random(&[N, INNER])?, random(&[COLUMNS, INNER])?);
    let ms = time(device, &mut || Ok(x.f_matmul(&weight.f_tr()?).map(drop)?))?;
    drop((x, weight));
    rate(ms, device)
}

fn product_fp8(device: Device) -> Result<f64> {
    let random = |rows: i64| -> Result<(Tensor, Tensor)> {
        let x = Tensor::f_randn([rows, INNER], (Kind::BFloat16, device))?;
        Ok((x.f_to_kind(Kind::Float8e4m3fn)?, Tensor::f_ones([rows, 1], (Kind::Float, device))?))
    };
    let ((x, x_scale), (weight, scale)) = (random(N)?, random(COLUMNS)?);
    let (none, scale) = (None::<&Tensor>, scale.f_tr()?);
    let ms = time(device, &mut || {
        let y =
            x.f_internal_scaled_mm(&weight.f_tr()?, &x_scale, &scale, none, none, Kind::BFloat16, true)?;
        drop(y);
        Ok(())
    })?;
    drop((x, weight));
    rate(ms, device)
}

fn rate(ms: f64, device: Device) -> Result<f64> {
    // What lasts, such as workspaces of libraries, is not to lie inside these large blocks.
    device::empty_cache(device)?;
    Ok(2.0 * (N * INNER * COLUMNS) as f64 / (ms * 1e9))
}

fn attention(kind: Kind, sliding_window: Option<i64>, device: Device) -> Result<Rates> {
    let spec = AttentionSpec {
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        scale: 128f64.powf(-0.5),
        softcap: None,
        sliding_window,
    };
    let random = |shape: &[i64]| Tensor::f_randn(shape, (kind, device));
    let heads =
        |heads: i64| -> Result<Tensor> { Ok(random(&[N, heads, spec.head_dim])?.f_set_requires_grad(true)?) };
    let (q, k, v) = (heads(spec.num_heads)?, heads(spec.num_kv_heads)?, heads(spec.num_kv_heads)?);
    let dy = random(&[N, spec.num_heads * spec.head_dim])?;
    let segments = Segments::new(&[0, N as i32], device)?;
    let forward = time(device, &mut || {
        let _no_grad = tch::no_grad_guard();
        ops::attention(&q, &k, &v, &segments, &spec).map(drop)
    })?;
    let both = time(device, &mut || {
        let y = ops::attention(&q, &k, &v, &segments, &spec)?;
        ops::backward(&y, &dy, [&q, &k, &v])
    })?;
    let operations = 2.0 * (spec.num_heads * spec.head_dim * N * N) as f64;
    Ok(Rates {
        forward: operations / (forward * 1e9),
        backward: 2.5 * operations / ((both - forward).max(1e-6) * 1e9),
    })
}

/// Measured on an H200 between kernels of a CUDA graph (docs/gpu.md).
const GAP_US: f64 = 0.6;
