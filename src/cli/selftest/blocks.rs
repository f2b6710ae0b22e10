//! Projections with LoRA on them, alone and in the two block ops.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::case::{Case, Operands, Rows, Subject, Work, proved};
use super::cases::{angles, attention_flops, norm};
use crate::ops::proof::Role;
use crate::ops::{
    self, Activation, AttentionBlock, AttentionSpec, Linear, Lora, MlpBlock, Nested, Nf4, Part, PartWeight,
    Pass, Policy, Segments, Weight, plain,
};

const R: i64 = 16;
const LORA_SCALE: f64 = 0.5;

/// A projection among the operands: of each part A, B and the weight, which is one tensor, or the four of NF4.
#[derive(Clone)]
struct Projection {
    width: i64,
    parts: Vec<ProjectionPart>,
}

#[derive(Clone, Copy)]
struct ProjectionPart {
    rows: i64,
    /// The operands A, B and the first of the weight.
    a: usize,
    b: usize,
    weight: usize,
    /// With the nested offset.
    nf4: Option<f64>,
}

impl Projection {
    fn new(operands: &mut Operands, width: i64, rows: &[i64], nf4: bool) -> Result<Projection> {
        let (_, device) = operands.options;
        let near_one = (width as f64).powf(-0.5);
        let mut parts = Vec::new();
        for &rows in rows {
            let a = operands.random("lora_a", &[R, width], near_one, Role::TrainedF32)?;
            let b = operands.random("lora_b", &[rows, R], (R as f64).powf(-0.5), Role::TrainedF32)?;
            if !nf4 {
                let weight = operands.random("weight", &[rows, width], near_one, Role::Frozen)?;
                parts.push(ProjectionPart { rows, a, b, weight, nf4: None });
                continue;
            }
            let dense = Tensor::f_randn([rows, width], (Kind::Float, device))?.f_mul_scalar(near_one)?;
            let quantized = Nf4::quantize(&dense)?;
            let weight = operands.add("weight", quantized.packed, Role::AsIs);
            operands.add("quant_map", quantized.quant_map, Role::AsIs);
            operands.add("absmax", quantized.absmax, Role::AsIs);
            let nested = quantized.nested.expect("what is quantised here is nested");
            operands.add("nested_absmax", nested.absmax, Role::AsIs);
            operands.add("nested_quant_map", nested.quant_map, Role::AsIs);
            parts.push(ProjectionPart { rows, a, b, weight, nf4: Some(nested.offset) });
        }
        Ok(Projection { width, parts })
    }

    fn weights(&self) -> f64 {
        self.parts.iter().map(|part| (part.rows * self.width) as f64).sum()
    }

    fn linear(&self, t: &[Tensor]) -> Linear {
        let lora = |part: &ProjectionPart| Lora {
            a: t[part.a].shallow_clone(),
            b: t[part.b].shallow_clone(),
            scale: LORA_SCALE,
            dropout: 0.0,
        };
        Linear {
            weight: Weight::Parts(self.parts.iter().map(|part| self.weight(part, t)).collect()),
            bias: None,
            parts: self
                .parts
                .iter()
                .map(|part| Part { name: "part".into(), rows: part.rows, lora: Some(lora(part)) })
                .collect(),
        }
    }

    fn weight(&self, part: &ProjectionPart, t: &[Tensor]) -> PartWeight {
        let operand = |i: usize| t[part.weight + i].shallow_clone();
        let Some(offset) = part.nf4 else { return PartWeight::Dense(operand(0)) };
        PartWeight::Nf4(Nf4 {
            shape: [part.rows, self.width],
            packed: operand(0),
            quant_map: operand(1),
            absmax: operand(2),
            blocksize: 64,
            nested: Some(Nested { absmax: operand(3), quant_map: operand(4), offset, blocksize: 256 }),
        })
    }

    /// `x W^T + scale (x A^T) B^T` of each part.
    fn plain(&self, x: &Tensor, t: &[Tensor]) -> Result<Tensor> {
        let part = |part: &ProjectionPart| -> Result<Tensor> {
            let weight = match self.weight(part, t) {
                PartWeight::Dense(weight) => weight,
                PartWeight::Nf4(nf4) => {
                    let there = on(&nf4, Device::Cpu)?.dequantize(Kind::Double)?;
                    there.f_to_kind(x.kind())?.f_to_device(x.device())?
                }
            };
            let times = |x: &Tensor, w: &Tensor| -> Result<Tensor> {
                Ok(x.f_matmul(&w.f_to_kind(x.kind())?.f_tr()?)?)
            };
            let update = times(&times(x, &t[part.a])?, &t[part.b])?.f_mul_scalar(LORA_SCALE)?;
            Ok(times(x, &weight)?.f_add(&update)?)
        };
        let parts = self.parts.iter().map(part).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&parts, 1)?)
    }
}

pub(super) fn on(nf4: &Nf4, device: Device) -> Result<Nf4> {
    let there = |tensor: &Tensor| tensor.f_to_device(device);
    let nested = |nested: &Nested| -> Result<Nested> {
        Ok(Nested { absmax: there(&nested.absmax)?, quant_map: there(&nested.quant_map)?, ..*nested })
    };
    Ok(Nf4 {
        packed: there(&nf4.packed)?,
        quant_map: there(&nf4.quant_map)?,
        absmax: there(&nf4.absmax)?,
        nested: nf4.nested.as_ref().map(nested).transpose()?,
        ..*nf4
    })
}

pub(super) fn linears() -> [Case; 2] {
    [linear("linear, LoRA", false), linear("linear, NF4 + LoRA", true)]
}

fn linear(op: &'static str, nf4: bool) -> Case {
    const C: i64 = 2048;
    const ROWS: [i64; 3] = [2048, 512, 512];
    proved(op, Rows { compared: 64, timed: 8192 }, move |n, mut operands| {
        operands.random("x", &[n, C], 1.0, Role::Trained)?;
        let projection = Projection::new(&mut operands, C, &ROWS, nf4)?;
        let plain_projection = projection.clone();
        Ok(Subject {
            shape: format!("[{n}, {C}] -> {ROWS:?}"),
            work: Work::Flops(2.0 * n as f64 * projection.weights()),
            operands,
            ours: Box::new(move |t| ops::linear(&t[0], &projection.linear(t), Pass::INFERENCE)),
            plain: Box::new(move |t| plain_projection.plain(&t[0], t)),
        })
    })
}

/// Both blocks, keeping what the backward needs and computing it again.
pub(super) fn blocks() -> [Case; 4] {
    [
        attention_block("attention_block, keep", false, Policy::KEEP),
        attention_block("attention_block, NF4, recompute", true, Policy::RECOMPUTE),
        mlp_block("mlp_block, keep", false, Policy::KEEP),
        mlp_block("mlp_block, NF4, recompute", true, Policy::RECOMPUTE),
    ]
}

const BLOCK_ROWS: Rows = Rows { compared: 64, timed: 8192 };
const C: i64 = 1024;

fn attention_block(op: &'static str, nf4: bool, policy: Policy) -> Case {
    const H: i64 = 8;
    const K: i64 = 2;
    const D: i64 = 128;
    proved(op, BLOCK_ROWS, move |n, mut operands| {
        let x = operands.random("x", &[n, C], 1.0, Role::Trained)?;
        let weight = operands.random("norm", &[C], 1.0, Role::Frozen)?;
        let [cos, sin] = angles(&mut operands, n, D)?;
        let qkv = Projection::new(&mut operands, C, &[H * D, K * D, K * D], nf4)?;
        let o = Projection::new(&mut operands, H * D, &[C], nf4)?;
        let spec = AttentionSpec {
            num_heads: H,
            num_kv_heads: K,
            head_dim: D,
            scale: (D as f64).powf(-0.5),
            softcap: None,
            sliding_window: None,
        };
        let cu_seqlens = [0, (n * 5 / 8) as i32, n as i32];
        let flops = 2.0 * n as f64 * (qkv.weights() + o.weights()) + attention_flops(&cu_seqlens, &spec);
        let (plain_qkv, plain_o, plain_spec) = (qkv.clone(), o.clone(), spec.clone());
        Ok(Subject {
            shape: format!("[{n}, {C}], {H} on {K} x {D}"),
            work: Work::Flops(flops),
            operands,
            ours: Box::new(move |t| {
                let block = AttentionBlock {
                    layer: 0,
                    norm: &norm(&t[weight]),
                    qkv: &qkv.linear(t),
                    o: &o.linear(t),
                    q_norm: None,
                    k_norm: None,
                    post_norm: None,
                    spec: &spec,
                };
                let segments = Segments::new(&cu_seqlens, t[x].device())?;
                let rows = ops::Rows { cos: &t[cos], sin: &t[sin], keys: ops::Keys::Segments(&segments) };
                ops::attention_block(&t[x], &block, &rows, Pass { policies: &[policy], ..Pass::INFERENCE })
            }),
            plain: Box::new(move |t| {
                let projected = plain_qkv.plain(&plain::rms_norm(&t[x], &norm(&t[weight]))?, t)?;
                let parts = projected.f_view([n, H + 2 * K, D])?.f_split_with_sizes([H, K, K], 1)?;
                let turned = |x: &Tensor| plain::rope(x, &t[cos], &t[sin]);
                let (q, k) = (turned(&parts[0])?, turned(&parts[1])?);
                let attended = plain::attention(&q, &k, &parts[2], &cu_seqlens, &plain_spec)?;
                Ok(t[x].f_add(&plain_o.plain(&attended, t)?)?)
            }),
        })
    })
}

fn mlp_block(op: &'static str, nf4: bool, policy: Policy) -> Case {
    const F: i64 = 2816;
    proved(op, BLOCK_ROWS, move |n, mut operands| {
        let x = operands.random("x", &[n, C], 1.0, Role::Trained)?;
        let weight = operands.random("norm", &[C], 1.0, Role::Frozen)?;
        let gate_up = Projection::new(&mut operands, C, &[F, F], nf4)?;
        let down = Projection::new(&mut operands, F, &[C], nf4)?;
        let (plain_gate_up, plain_down) = (gate_up.clone(), down.clone());
        Ok(Subject {
            shape: format!("[{n}, {C}], 2 x {F}"),
            work: Work::Flops(2.0 * n as f64 * (gate_up.weights() + down.weights())),
            operands,
            ours: Box::new(move |t| {
                let block = MlpBlock {
                    layer: 0,
                    norm: &norm(&t[weight]),
                    gate_up: &gate_up.linear(t),
                    down: &down.linear(t),
                    post_norm: None,
                    activation: Activation::Silu,
                };
                ops::mlp_block(&t[x], &block, Pass { policies: &[policy], ..Pass::INFERENCE })
            }),
            plain: Box::new(move |t| {
                let gated = plain_gate_up.plain(&plain::rms_norm(&t[x], &norm(&t[weight]))?, t)?;
                let product = plain::swiglu(&gated, Activation::Silu)?;
                Ok(t[x].f_add(&plain_down.plain(&product, t)?)?)
            }),
        })
    })
}
