//! How fast a card is, in the six numbers that predictions need.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::device;
use crate::ops::{self, AttentionSpec, Segments};
use crate::train::floor::time;

/// Rates of one card, in bf16.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    pub name: String,
    /// Of large products.
    pub product_tflops: f64,
    /// Of causal attention, counting the pairs that are seen: 4 H D operations each forward, 10 backward.
    pub attention_forward_tflops: f64,
    pub attention_backward_tflops: f64,
    /// Read and written by a large copy.
    pub memory_gb_per_s: f64,
    /// To pinned memory of the host or back, whichever is slower.
    pub bus_gb_per_s: f64,
    /// From one kernel of a recorded step to the next.
    pub gap_us: f64,
}

impl Card {
    pub(super) fn product(&self, n: f64, inner: f64, rows: f64) -> f64 {
        let operations = 2.0 * n * inner * rows / (self.product_tflops * 1e9);
        operations.max(self.memory(2.0 * (n * inner + inner * rows + n * rows))) + self.gap()
    }

    pub(super) fn attention_forward(&self, operations: f64) -> f64 {
        operations / (self.attention_forward_tflops * 1e9) + self.gap()
    }

    pub(super) fn attention_backward(&self, operations: f64) -> f64 {
        operations / (self.attention_backward_tflops * 1e9) + self.gap()
    }

    pub(super) fn memory(&self, bytes: f64) -> f64 {
        bytes / (self.memory_gb_per_s * 1e6)
    }

    pub(super) fn bus(&self, bytes: f64) -> f64 {
        bytes / (self.bus_gb_per_s * 1e6)
    }

    pub(super) fn gap(&self) -> f64 {
        self.gap_us * 1e-3
    }

    /// Measures the GPU `device` under the name `name`, in about a second.
    pub fn measure(name: String, device: Device) -> Result<Card> {
        const N: i64 = 4096;
        let random = |shape: &[i64]| Tensor::f_randn(shape, (Kind::BFloat16, device));
        let (x, weight) = (random(&[N, 4096])?, random(&[14336, 4096])?);
        let product = time(device, &mut || Ok(x.f_matmul(&weight.f_tr()?).map(drop)?))?;
        drop((x, weight));

        let spec = AttentionSpec {
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            scale: 128f64.powf(-0.5),
            softcap: None,
            sliding_window: None,
        };
        let heads = |heads: i64| -> Result<Tensor> {
            Ok(random(&[N, heads, spec.head_dim])?.f_set_requires_grad(true)?)
        };
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
        drop((q, k, v, dy));

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
            product_tflops: 2.0 * (N * 4096 * 14336) as f64 / (product * 1e9),
            attention_forward_tflops: operations / (forward * 1e9),
            attention_backward_tflops: 2.5 * operations / ((both - forward).max(1e-6) * 1e9),
            memory_gb_per_s: 2.0 * bytes / (copy * 1e6),
            bus_gb_per_s: bytes / 4.0 / (out.max(back) * 1e6),
            gap_us: GAP_US,
        })
    }
}

/// Measured on an H200 between kernels of a CUDA graph (docs/gpu.md).
const GAP_US: f64 = 0.6;
