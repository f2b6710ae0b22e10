//! The fused ops, each at the shapes that its paths differ by.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::blocks;
use super::case::{Case, Operands, Outcome, Rows, Subject, Work, proved};
use crate::ops::proof::{Distance, Role, What};
use crate::ops::{self, Activation, AttentionSpec, Nf4, RmsNorm, Segments, Targets, plain};
use crate::train::floor::time;

pub fn cases() -> Vec<Case> {
    let mut cases = vec![rms_norm(), rope()];
    for (op, activation) in [
        ("swiglu, silu", Activation::Silu),
        ("swiglu, gelu_tanh", Activation::GeluTanh),
        ("swiglu, gelu", Activation::Gelu),
    ] {
        cases.push(swiglu(op, activation));
    }
    cases.extend([nf4_quantize(), nf4_dequantize()]);
    cases.extend(blocks::linears());
    cases.extend([
        attention("attention, equal samples", 128, &[0.0, 0.5], None, None),
        attention("attention, packed", 128, &[0.0, 0.55, 0.7, 0.9], None, None),
        attention("attention, window", 128, &[0.0, 0.55], None, Some(0.125)),
        attention("attention, softcap", 128, &[0.0, 0.55, 0.7], Some(50.0), None),
        attention("attention, softcap, window", 256, &[0.0, 0.55], Some(50.0), Some(0.125)),
    ]);
    cases.extend([cross_entropy("cross_entropy", None), cross_entropy("cross_entropy, softcap", Some(30.0))]);
    cases.extend([log_probs("log_probs", None), log_probs("log_probs, softcap", Some(30.0))]);
    cases.extend(blocks::blocks());
    cases.extend([adamw(), super::adamw_8bit::adamw_8bit()]);
    cases
}

pub(super) fn norm(weight: &Tensor) -> RmsNorm {
    RmsNorm { name: "norm".into(), weight: weight.shallow_clone(), eps: 1e-5, offset: 0.0 }
}

/// Bytes of an element in the tested dtype.
fn size(operands: &Operands) -> f64 {
    operands.options.0.elt_size_in_bytes() as f64
}

const POINTWISE: Rows = Rows { compared: 64, timed: 16_384 };

fn rms_norm() -> Case {
    const C: i64 = 4096;
    proved("rms_norm", POINTWISE, |n, mut operands| {
        operands.random("x", &[n, C], 1.0, Role::Trained)?;
        operands.random("weight", &[C], 1.0, Role::Trained)?;
        Ok(Subject {
            shape: format!("[{n}, {C}]"),
            work: Work::Bytes(2.0 * (n * C) as f64 * size(&operands)),
            operands,
            ours: Box::new(|t| ops::rms_norm(&t[0], &norm(&t[1]))),
            plain: Box::new(|t| plain::rms_norm(&t[0], &norm(&t[1]))),
        })
    })
}

/// cos and sin of random angles, `[N, D/2]`.
pub(super) fn angles(operands: &mut Operands, n: i64, head_dim: i64) -> Result<[usize; 2]> {
    let (_, device) = operands.options;
    let angles = Tensor::f_rand([n, head_dim / 2], (Kind::Float, device))?.f_mul_scalar(6.0)?;
    let (cos, sin) = (angles.f_cos()?, angles.f_sin()?);
    Ok([operands.add("cos", cos, Role::F32), operands.add("sin", sin, Role::F32)])
}

fn rope() -> Case {
    const H: i64 = 40;
    const D: i64 = 128;
    proved("rope", POINTWISE, |n, mut operands| {
        operands.random("x", &[n, H, D], 1.0, Role::Trained)?;
        angles(&mut operands, n, D)?;
        Ok(Subject {
            shape: format!("[{n}, {H}, {D}]"),
            work: Work::Bytes(2.0 * (n * H * D) as f64 * size(&operands) + (n * D * 4) as f64),
            operands,
            ours: Box::new(|t| ops::rope(&t[0], &t[1], &t[2])),
            plain: Box::new(|t| plain::rope(&t[0], &t[1], &t[2])),
        })
    })
}

fn swiglu(op: &'static str, activation: Activation) -> Case {
    const F: i64 = 8192;
    proved(op, POINTWISE, move |n, mut operands| {
        operands.random("gate_up", &[n, 2 * F], 2.0, Role::Trained)?;
        Ok(Subject {
            shape: format!("[{n}, 2 x {F}]"),
            work: Work::Bytes(3.0 * (n * F) as f64 * size(&operands)),
            operands,
            ours: Box::new(move |t| ops::swiglu(&t[0], activation)),
            plain: Box::new(move |t| plain::swiglu(&t[0], activation)),
        })
    })
}

/// Samples that start at `starts` of the rows; a window of a share of them.
fn attention(
    op: &'static str,
    head_dim: i64,
    starts: &'static [f64],
    softcap: Option<f64>,
    window: Option<f64>,
) -> Case {
    let (num_heads, num_kv_heads) = (1024 / head_dim, 256 / head_dim);
    proved(op, Rows { compared: 512, timed: 8192 }, move |n, mut operands| {
        let mut cu_seqlens: Vec<i32> = starts.iter().map(|start| (start * n as f64) as i32).collect();
        cu_seqlens.push(n as i32);
        let spec = AttentionSpec {
            num_heads,
            num_kv_heads,
            head_dim,
            scale: (head_dim as f64).powf(-0.5),
            softcap,
            sliding_window: window.map(|share| (share * n as f64) as i64),
        };
        for (name, heads) in [("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)] {
            operands.random(name, &[n, heads, head_dim], 1.0, Role::Trained)?;
        }
        let (cu, plain_spec) = (cu_seqlens.clone(), spec.clone());
        Ok(Subject {
            shape: format!("[{n}, {num_heads} on {num_kv_heads}, {head_dim}]"),
            work: Work::Flops(attention_flops(&cu, &spec)),
            operands,
            ours: Box::new(move |t| {
                ops::attention(&t[0], &t[1], &t[2], &Segments::new(&cu_seqlens, t[0].device())?, &spec)
            }),
            plain: Box::new(move |t| plain::attention(&t[0], &t[1], &t[2], &cu, &plain_spec)),
        })
    })
}

/// Two products over the pairs of positions that see each other.
pub(super) fn attention_flops(cu_seqlens: &[i32], spec: &AttentionSpec) -> f64 {
    let pairs = |length: f64| {
        let seen = spec.sliding_window.map_or(length, |window| length.min(window as f64));
        seen * (seen + 1.0) / 2.0 + (length - seen) * seen
    };
    let pairs: f64 = cu_seqlens.windows(2).map(|ends| pairs(f64::from(ends[1] - ends[0]))).sum();
    4.0 * pairs * (spec.num_heads * spec.head_dim) as f64
}

/// An op of the head, ours and plain: of hidden states, the head, labels and softcap.
type Ours = fn(&Tensor, &Tensor, &Targets, Option<f64>) -> Result<Tensor>;
type Plain = fn(&Tensor, &Tensor, &[i64], Option<f64>) -> Result<Tensor>;

/// `flops` are those of the forward, in products of the whole.
fn of_head(op: &'static str, softcap: Option<f64>, flops: f64, ours: Ours, plain: Plain) -> Case {
    const C: i64 = 1024;
    const V: i64 = 8016;
    proved(op, Rows { compared: 64, timed: 4096 }, move |n, mut operands| {
        operands.random("hidden", &[n, C], 1.0, Role::Trained)?;
        operands.random("weight", &[V, C], 0.06, Role::Frozen)?;
        // Every fourth row has no label.
        let labels: Vec<i64> = (0..n).map(|i| if i % 4 == 3 { -100 } else { i * 7919 % V }).collect();
        let targets = labels.clone();
        Ok(Subject {
            shape: format!("[{n}, {C}] -> {V}"),
            work: Work::Flops(flops * 2.0 * (n * C * V) as f64 * 0.75),
            operands,
            ours: Box::new(move |t| {
                let targets = Targets::new(&targets, t[0].device())?;
                ours(&t[0], &t[1], &targets, softcap)
            }),
            plain: Box::new(move |t| plain(&t[0], &t[1], &labels, softcap)),
        })
    })
}

/// Its forward takes the gradient of hidden as well.
fn cross_entropy(op: &'static str, softcap: Option<f64>) -> Case {
    let ours: Ours =
        |hidden, head, targets, softcap| ops::linear_cross_entropy(hidden, head, targets, softcap);
    of_head(op, softcap, 2.0, ours, plain::linear_cross_entropy)
}

fn log_probs(op: &'static str, softcap: Option<f64>) -> Case {
    let ours: Ours =
        |hidden, head, targets, softcap| ops::token_log_probs(hidden, head, targets, 0.7, softcap);
    let plain: Plain =
        |hidden, head, labels, softcap| plain::token_log_probs(hidden, head, labels, 0.7, softcap);
    of_head(op, softcap, 1.0, ours, plain)
}

/// Quantised on the device, and a copy on the CPU of what it was made from.
fn quantized(kind: Kind, device: Device) -> Result<(Tensor, Nf4)> {
    let rows = if device.is_cuda() { 4096 } else { 64 };
    let weight = Tensor::f_randn([rows, 14_336], (kind, device))?;
    let nf4 = Nf4::quantize(&weight)?;
    Ok((weight, nf4))
}

/// Bits of a weight in NF4 with double quantisation.
const NF4_BITS: f64 = 4.127;

/// The bytes of the CPU.
fn nf4_quantize() -> Case {
    let run = |kind: Kind, device| {
        let (weight, ours) = quantized(kind, device)?;
        let reference = Nf4::quantize(&weight.f_to_device(Device::Cpu)?)?;
        let mut distances = vec![
            ("weight".to_string(), Distance::exact(&ours.packed, &reference.packed)?),
            ("absmax".to_string(), Distance::exact(&ours.absmax, &reference.absmax)?),
        ];
        if let (Some(ours), Some(reference)) = (&ours.nested, &reference.nested) {
            distances.push(("nested_absmax".into(), Distance::exact(&ours.absmax, &reference.absmax)?));
        }
        let bytes = weight.numel() as f64 * (kind.elt_size_in_bytes() as f64 + NF4_BITS / 8.0);
        let forward_ms = time(device, &mut || Nf4::quantize(&weight).map(drop))?;
        let shape = format!("{:?}", weight.size());
        Ok(Outcome { shape, distances, forward_ms, both_ms: None, work: Work::Bytes(bytes) })
    };
    Case { op: "nf4_quantize", every_dtype: true, run: Box::new(run) }
}

/// The values of the CPU's formula, to the bit.
fn nf4_dequantize() -> Case {
    let run = |kind: Kind, device| {
        let (weight, nf4) = quantized(Kind::Float, device)?;
        let formula = blocks::on(&nf4, Device::Cpu)?.dequantize(Kind::Double)?;
        let values = nf4.dequantize(kind)?;
        let distances = vec![("value".to_string(), Distance::exact(&values, &formula.f_to_kind(kind)?)?)];
        let bytes = weight.numel() as f64 * (kind.elt_size_in_bytes() as f64 + NF4_BITS / 8.0);
        let forward_ms = time(device, &mut || nf4.dequantize_into(&values))?;
        let shape = format!("{:?}", weight.size());
        Ok(Outcome { shape, distances, forward_ms, both_ms: None, work: Work::Bytes(bytes) })
    };
    Case { op: "nf4_dequantize", every_dtype: true, run: Box::new(run) }
}

/// The third step of a run, over tensors of two sizes, against the formula in f64.
fn adamw() -> Case {
    const SETTINGS: [f64; 6] = [1e-3, 0.9, 0.999, 1e-8, 0.01, 2.0];
    const STEP: f64 = 3.0;
    let run = |_, device: Device| {
        let [learning_rate, beta1, beta2, epsilon, weight_decay, grad_scale] = SETTINGS;
        let shapes: Vec<i64> = if device.is_cuda() { vec![1 << 25, 1 << 20] } else { vec![1 << 18, 1000] };
        let options = (Kind::Float, device);
        let draw = || shapes.iter().map(|&n| Tensor::f_randn([n], options)).collect::<Result<Vec<_>, _>>();
        let mut params = draw()?;
        let (grads, exp_avg) = (draw()?, draw()?);
        // A mean of squares is at least the square of the mean, which bounds the update as in a run.
        let at_least =
            |(m, z): (&Tensor, &Tensor)| -> Result<Tensor> { Ok(m.f_square()?.f_add(&z.f_square()?)?) };
        let exp_avg_sq = exp_avg.iter().zip(&draw()?).map(at_least).collect::<Result<Vec<_>>>()?;
        let mut expected = Vec::new();
        for i in 0..params.len() {
            let double = |t: &Tensor| t.f_to_kind(Kind::Double);
            let g = double(&grads[i])?.f_div_scalar(grad_scale)?;
            let m = (double(&exp_avg[i])? * beta1).f_add(&(&g * (1.0 - beta1)))?;
            let v = (double(&exp_avg_sq[i])? * beta2).f_add(&(g.f_square()? * (1.0 - beta2)))?;
            let root = (&v / (1.0 - beta2.powf(STEP))).f_sqrt()?.f_add_scalar(epsilon)?;
            let update = (&m / root) * (learning_rate / (1.0 - beta1.powf(STEP)));
            expected.push([double(&params[i])? * (1.0 - learning_rate * weight_decay) - update, m, v]);
        }
        for (param, grad) in params.iter_mut().zip(&grads) {
            *param = param.f_set_requires_grad(true)?;
            param.f_mul(grad)?.f_sum(Kind::Float)?.f_backward()?;
        }
        let scalar = |value: f64| Tensor::f_full([0i64; 0], value, options);
        let (step, rate) = (scalar(STEP)?, scalar(learning_rate)?);
        let (scale, skip) = (scalar(grad_scale)?, scalar(0.0)?);
        let adamw = ops::AdamW {
            step: &step,
            learning_rate: &rate,
            grad_scale: &scale,
            skip: &skip,
            beta1,
            beta2,
            epsilon,
            weight_decay,
        };
        ops::adamw_step(&params, &exp_avg, &exp_avg_sq, adamw)?;
        let mut distances = Vec::new();
        for (i, [p, m, v]) in expected.iter().enumerate() {
            for (what, ours, expected) in
                [("parameter", &params[i], p), ("exp_avg", &exp_avg[i], m), ("exp_avg_sq", &exp_avg_sq[i], v)]
            {
                // The formula is its own plain form: the floor alone decides.
                let distance = Distance::new(Kind::Float, What::Value, ours, expected, expected)?;
                distances.push((what.to_string(), distance));
            }
        }
        let forward_ms = time(device, &mut || ops::adamw_step(&params, &exp_avg, &exp_avg_sq, adamw))?;
        // p, m and v are read and written, g is read and stored again, divided.
        let bytes = 32.0 * shapes.iter().sum::<i64>() as f64;
        let shape = format!("{shapes:?}");
        Ok(Outcome { shape, distances, forward_ms, both_ms: None, work: Work::Bytes(bytes) })
    };
    Case { op: "adamw", every_dtype: false, run: Box::new(run) }
}
