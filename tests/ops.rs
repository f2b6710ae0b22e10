//! The mathematics of the fused ops: on the CPU, in f64, against autograd of a slow plain reference; f32 and bf16 too.

use std::cell::RefCell;

use ferrotune::ops::proof::{Proof, Role};
use ferrotune::ops::{self, Activation, RmsNorm, Targets, plain};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::tolerance::{What, assert_allowed, assert_close, floor, rel};

/// A differentiable function of some tensors.
pub type Call = Box<dyn Fn(&[Tensor]) -> Tensor>;

/// One function twice: ours and plain libtorch.
pub struct Op {
    pub label: String,
    /// f64 on the CPU.
    pub inputs: Vec<Tensor>,
    /// How many of the inputs are differentiated: the first ones.
    pub trained: usize,
    pub ours: Call,
    pub plain: Call,
}

/// `op` in `kind` on `device` against f64: [`Proof::distances`]. What is not differentiated are angles, f32 beside 16-bit
/// inputs.
pub fn check(op: &Op, kind: Kind, device: Device) {
    let role = |i| if i < op.trained { Role::Trained } else { Role::F32 };
    let operands: Vec<(Tensor, Role)> =
        op.inputs.iter().enumerate().map(|(i, input)| (input.shallow_clone(), role(i))).collect();
    let proof = Proof { operands: &operands, ours: &|t| Ok((op.ours)(t)), plain: &|t| Ok((op.plain)(t)) };
    for (input, distance) in proof.distances(kind, device).unwrap() {
        let what = input.map_or("value".into(), |i| format!("gradient of input {i}"));
        assert_allowed(&format!("{}, {what}, {kind:?}", op.label), distance);
    }
}

thread_local! {
    /// Of each test its own, as tests run side by side: libtorch's generator would give every run other numbers.
    static NUMBERS: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::seed_from_u64(3407));
}

/// Standard normal numbers (Box and Muller), the same in every run of a test.
pub fn random(shape: &[i64]) -> Tensor {
    let count: i64 = shape.iter().product();
    let numbers: Vec<f64> = NUMBERS.with_borrow_mut(|numbers| {
        let mut normal = || {
            let radius = (-2.0 * (1.0 - numbers.random::<f64>()).ln()).sqrt();
            radius * (std::f64::consts::TAU * numbers.random::<f64>()).cos()
        };
        (0..count).map(|_| normal()).collect()
    });
    Tensor::from_slice(&numbers).view(shape)
}

pub fn norm(weight: &Tensor, offset: f64) -> RmsNorm {
    RmsNorm { name: "model.norm.weight".into(), weight: weight.shallow_clone(), eps: 1e-5, offset }
}

pub fn plain_rms_norm(x: &Tensor, weight: &Tensor, offset: f64) -> Tensor {
    plain::rms_norm(x, &norm(weight, offset)).unwrap()
}

pub fn plain_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    plain::rope(x, cos, sin).unwrap()
}

pub fn plain_swiglu(gate_up: &Tensor, activation: Activation) -> Tensor {
    plain::swiglu(gate_up, activation).unwrap()
}

/// gelu and silu by their definitions, for f64 only.
fn slow_swiglu(gate_up: &Tensor, activation: Activation) -> Tensor {
    let parts = gate_up.chunk(2, -1);
    let (gate, up) = (&parts[0], &parts[1]);
    let activated = match activation {
        Activation::Silu => gate / (gate.neg().exp() + 1.0),
        Activation::GeluTanh => {
            let inner = (gate + gate * gate * gate * 0.044715) * (2.0 / std::f64::consts::PI).sqrt();
            gate * 0.5 * (inner.tanh() + 1.0)
        }
        _ => gate * 0.5 * ((gate / std::f64::consts::SQRT_2).erf() + 1.0),
    };
    activated * up
}

/// The loss with none, some and all rows labelled -100, with rows that are nearly certain, with rows past one chunk.
fn losses() -> Vec<Op> {
    let mut ops = Vec::new();
    for (n, c, v, scale, labelled) in [
        (64, 128, 512, 0.3, 1),
        (33, 37, 1001, 0.3, 2),
        (1, 64, 128, 0.3, 1),
        (9, 16, 40000, 1.0, 1),
        (5, 8, 40003, 1.0, 3),
        (1500, 32, 64, 0.5, 3),
        (40, 64, 1000, 3.0, 1),
        (17, 16, 1, 0.5, 1),
        (12, 16, 40, 0.5, 0),
    ] {
        for softcap in [None, Some(30.0)] {
            // Every `labelled`-th row has a label; every second one is the likeliest word. Not of one row alone: a loss
            // near 0 is as wrong, relatively, as the logits are absolutely.
            let (hidden, weight) = (random(&[n, c]) * scale, random(&[v, c]));
            let likeliest =
                Vec::<i64>::try_from(hidden.matmul(&weight.transpose(0, 1)).argmax(1, false)).unwrap();
            let labels: Vec<i64> = (0..n)
                .map(|row| match labelled {
                    0 => -100,
                    every if row % every != 0 => -100,
                    _ if n > 1 && row % 2 == 0 => likeliest[row as usize],
                    _ => (row * 7919) % v,
                })
                .collect();
            let temperature = if n % 2 == 0 { 1.0 } else { 0.7 };
            for in_place in [false, true] {
                // Over the memory of hidden states that nobody else holds, their gradient is the same.
                let alone = move |h: &Tensor| if in_place { h * 1.0 } else { h.shallow_clone() };
                let (labels, plain_labels) = (labels.clone(), labels.clone());
                ops.push(Op {
                    label: format!(
                        "log_probs [{n}, {c}] -> {v}, softcap {softcap:?}, temperature {temperature}, one in {labelled} \
                         labelled, in place: {in_place}"
                    ),
                    inputs: vec![hidden.shallow_clone(), weight.shallow_clone()],
                    trained: 2,
                    ours: Box::new(move |t| {
                        let targets = Targets::new(&labels, t[0].device()).unwrap();
                        ops::token_log_probs(&alone(&t[0]), &t[1], &targets, temperature, softcap).unwrap()
                    }),
                    plain: Box::new(move |t| {
                        plain::token_log_probs(&t[0], &t[1], &plain_labels, temperature, softcap).unwrap()
                    }),
                });
            }
            let plain_labels = labels.clone();
            ops.push(Op {
                label: format!("loss [{n}, {c}] -> {v}, softcap {softcap:?}, one in {labelled} labelled"),
                inputs: vec![hidden, weight],
                trained: 2,
                ours: Box::new(move |t| {
                    let targets = Targets::new(&labels, t[0].device()).unwrap();
                    ops::linear_cross_entropy(&t[0], &t[1], &targets, softcap).unwrap()
                }),
                plain: Box::new(move |t| {
                    plain::linear_cross_entropy(&t[0], &t[1], &plain_labels, softcap).unwrap()
                }),
            });
        }
    }
    ops
}

/// Every op in every shape of the tests: a power of two, odd ones, one row, rows of a wider tensor.
pub fn ops() -> Vec<Op> {
    let mut ops = Vec::new();
    for (n, heads, c, pad) in [
        (64, 1, 256, 0),
        (33, 1, 37, 0),
        (1, 1, 4096, 0),
        (7, 1, 8200, 0),
        (3, 1, 17001, 0),
        (19, 5, 128, 256),
        (21, 3, 97, 5),
    ] {
        for offset in [0.0, 1.0] {
            let x = random(&[n, heads * c + pad]).narrow(1, 0, heads * c).view([n, heads, c]);
            let x = if heads == 1 { x.squeeze_dim(1) } else { x };
            ops.push(Op {
                label: format!(
                    "rms_norm [{n}, {heads}, {c}] of {} columns, offset {offset}",
                    heads * c + pad
                ),
                inputs: vec![x, random(&[c])],
                trained: 2,
                ours: Box::new(move |t| ops::rms_norm(&t[0], &norm(&t[1], offset)).unwrap()),
                plain: Box::new(move |t| plain_rms_norm(&t[0], &t[1], offset)),
            });
        }
    }
    for (n, heads, d, r, pad) in [
        (64, 8, 128, 128, 0),
        (33, 5, 96, 96, 40),
        (1, 40, 64, 64, 64),
        (19, 3, 128, 96, 8),
        (19, 3, 33, 10, 1),
        (2, 70, 256, 256, 0),
    ] {
        let angles = random(&[n, r / 2]) * 3.0;
        ops.push(Op {
            label: format!("rope [{n}, {heads}, {d}] of {} columns, {r} turned", heads * d + pad),
            inputs: vec![
                random(&[n, heads * d + pad]).narrow(1, 0, heads * d).view([n, heads, d]),
                angles.cos().to_kind(Kind::Float).to_kind(Kind::Double),
                angles.sin().to_kind(Kind::Float).to_kind(Kind::Double),
            ],
            trained: 1,
            ours: Box::new(|t| ops::rope(&t[0], &t[1], &t[2]).unwrap()),
            plain: Box::new(|t| plain_rope(&t[0], &t[1], &t[2])),
        });
    }
    for (n, f) in [(64, 256), (33, 37), (1, 14336), (100, 8), (5, 1000)] {
        for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
            ops.push(Op {
                label: format!("swiglu [{n}, 2 * {f}] {activation:?}"),
                inputs: vec![random(&[n, 2 * f]) * 2.0],
                trained: 1,
                ours: Box::new(move |t| ops::swiglu(&t[0], activation).unwrap()),
                plain: Box::new(move |t| match t[0].kind() {
                    Kind::Double => slow_swiglu(&t[0], activation),
                    _ => plain_swiglu(&t[0], activation),
                }),
            });
        }
    }
    ops.extend(losses());
    ops
}

#[test]
fn formulas_agree_with_autograd() {
    for op in ops() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            check(&op, kind, Device::Cpu);
        }
    }
}

/// No rows: no values, zero gradient of the weight.
pub fn check_empty(device: Device) {
    let options = (Kind::Float, device);
    let x = Tensor::zeros([0, 64], options).set_requires_grad(true);
    let weight = Tensor::ones([64], options).set_requires_grad(true);
    let y = ops::rms_norm(&x, &norm(&weight, 0.0)).unwrap();
    assert_eq!(y.size(), [0, 64]);
    let gradients = Tensor::run_backward(&[y.sum(Kind::Float)], &[&x, &weight], false, false);
    assert_eq!(gradients[0].size(), [0, 64]);
    assert_eq!(gradients[1].abs().sum(Kind::Float).double_value(&[]), 0.0);
    let angles = Tensor::zeros([0, 8], options);
    let q = Tensor::zeros([0, 2, 16], options);
    assert_eq!(ops::rope(&q, &angles, &angles).unwrap().size(), [0, 2, 16]);
    assert_eq!(ops::swiglu(&x, Activation::Silu).unwrap().size(), [0, 32]);
}

/// Entropies against `-sum p log p` in f64, with rows past one chunk, and the log-probabilities beside them.
pub fn check_entropy(kind: Kind, device: Device) {
    for (n, c, v, scale, softcap) in
        [(70, 32, 1001, 0.3, None), (1100, 16, 64, 2.0, Some(5.0)), (3, 8, 40000, 1.0, None)]
    {
        let (hidden, weight) = ((random(&[n, c]) * scale).to_kind(kind), random(&[v, c]).to_kind(kind));
        let labels: Vec<i64> = (0..n).map(|row| if row % 4 == 1 { -100 } else { (row * 7919) % v }).collect();
        let plain = |kind, device| {
            let [h, w] = [&hidden, &weight].map(|t| t.to_device(device).to_kind(kind));
            let mut z = h.matmul(&w.transpose(0, 1));
            if let Some(cap) = softcap {
                z = (z / cap).tanh() * cap;
            }
            let acc = if kind == Kind::Double { Kind::Double } else { Kind::Float };
            let log_p = (z.to_kind(acc) / 0.7).log_softmax(-1, acc);
            let none = Tensor::from_slice(&labels).to_device(device).lt(0);
            (log_p.exp() * log_p).sum_dim_intlist(-1, false, acc).neg().masked_fill(&none, 0.0)
        };
        let [h, w] = [&hidden, &weight].map(|t| t.to_device(device));
        let targets = Targets::new(&labels, device).unwrap();
        let (log_probs, ours) = ops::token_log_probs_and_entropy(&h, &w, &targets, 0.7, softcap).unwrap();
        let label = format!("entropy [{n}, {c}] -> {v}, softcap {softcap:?}");
        assert_close(&label, What::Value, &ours, &plain(kind, device), &plain(Kind::Double, Device::Cpu));
        let alone = ops::token_log_probs(&h, &w, &targets, 0.7, softcap).unwrap();
        if device == Device::Cpu {
            assert_eq!(log_probs, alone, "{label}");
        } else {
            // Chunks of another size: products of another order.
            assert!(rel(&log_probs, &alone)[1] <= floor(kind, What::Value), "{label}");
        }
    }
}

/// The gradient of hidden states lies in their own memory where only the op holds them, and else beside it.
#[test]
fn log_probs_write_their_gradient_over_the_hidden_states() {
    let weight = random(&[40, 16]);
    for labels in [vec![3; 8], vec![3, -100, 5, -100, -100, 0, 1, 2]] {
        for held in [false, true] {
            let leaf = random(&[8, 16]).set_requires_grad(true);
            // The gradient of this sum is passed on as it is.
            let hidden = &leaf + 0.0;
            let memory = hidden.data_ptr();
            let targets = Targets::new(&labels, Device::Cpu).unwrap();
            let log_probs = ops::token_log_probs(&hidden, &weight, &targets, 1.0, None).unwrap();
            let kept = held.then(|| hidden.shallow_clone());
            drop(hidden);
            log_probs.sum(Kind::Double).backward();
            assert_eq!(leaf.grad().data_ptr() == memory, kept.is_none(), "{labels:?}");
        }
    }
}

#[test]
fn entropies() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        check_entropy(kind, Device::Cpu);
    }
}

#[test]
fn no_rows() {
    check_empty(Device::Cpu);
}

#[test]
fn wrong_shapes_are_named() {
    let says = |result: anyhow::Result<Tensor>, text: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(text) && error.lines().count() == 1, "{error}");
    };
    says(
        ops::rms_norm(&random(&[2, 8]), &norm(&random(&[7]), 0.0)),
        "x is [2, 8], weight is [7], expected [.., C] and [C]",
    );
    says(ops::rope(&random(&[2, 1, 8]), &random(&[2, 5]), &random(&[2, 5])), "with R <= D");
    says(ops::swiglu(&random(&[2, 7]), Activation::Silu), "gate_up is [2, 7], expected [N, 2F]");
    says(
        ops::swiglu(&Tensor::zeros([2, 8], (Kind::Int64, Device::Cpu)), Activation::Silu),
        "expected a float dtype",
    );
}
