//! LoRA on the GPU: its own kernel and what is folded into the large products, against f64 on the CPU.

use std::collections::HashMap;

use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::proof::{Proof, Role};
use ferrotune::ops::{self, Activation, Linear, Lora, MlpBlock, Part, Pass, Policy, RmsNorm, Weight};
use tch::{Device, Kind, Tensor};

use crate::golden::root;
use crate::gpu::gpu;
use crate::parity::gradients_of;
use crate::tolerance::{What, assert_allowed, assert_close, f64_on_cpu};

const SCALE: f64 = 0.5;

/// x, W, and A and B of each part.
fn operands(n: i64, in_features: i64, rows: &[i64], r: i64) -> Vec<(Tensor, Role)> {
    let random = |shape: [i64; 2], std: f64| Tensor::randn(shape, (Kind::Double, Device::Cpu)) * std;
    let small = (in_features as f64).powf(-0.5);
    let mut list = vec![
        (random([n, in_features], 1.0), Role::Trained),
        (random([rows.iter().sum(), in_features], small), Role::Frozen),
    ];
    for &rows in rows {
        list.push((random([r, in_features], small), Role::TrainedF32));
        list.push((random([rows, r], (r as f64).powf(-0.5)), Role::TrainedF32));
    }
    list
}

/// With A and B of each part.
fn layer(weight: Tensor, loras: &[Tensor], rows: &[i64]) -> Linear {
    let lora = |part: usize| Lora {
        a: loras[2 * part].shallow_clone(),
        b: loras[2 * part + 1].shallow_clone(),
        scale: SCALE,
        dropout: 0.0,
    };
    let parts = rows.iter().enumerate();
    Linear {
        weight: Weight::Joined(weight),
        bias: None,
        parts: parts
            .map(|(part, &rows)| Part { name: "part".into(), rows, lora: Some(lora(part)) })
            .collect(),
    }
}

fn fused(t: &[Tensor], rows: &[i64]) -> anyhow::Result<Tensor> {
    ops::linear(&t[0], &layer(t[1].shallow_clone(), &t[2..], rows), Pass::INFERENCE)
}

fn plain(t: &[Tensor], rows: &[i64]) -> anyhow::Result<Tensor> {
    let kind = t[0].kind();
    let update = |part: usize| {
        let (a, b) = (t[2 + 2 * part].to_kind(kind), t[3 + 2 * part].to_kind(kind));
        t[0].matmul(&a.tr()).matmul(&b.tr()) * SCALE
    };
    let updates: Vec<Tensor> = (0..rows.len()).map(update).collect();
    Ok(t[0].matmul(&t[1].tr()) + Tensor::cat(&updates, 1))
}

/// Rows that no tile divides, one row, parts of one and of several stripes of columns, and what the kernel leaves to cuBLAS:
/// ranks over 32 and odd sizes.
#[test]
fn gradients_of_the_parts() {
    let Some(device) = gpu("LoRA's gradients") else { return };
    for (n, in_features, rows, r) in [
        (512, 256, vec![256, 64, 64], 16),
        (1, 64, vec![8], 16),
        (300, 128, vec![520, 136], 8),
        (1000, 96, vec![1288, 72], 32),
        (2049, 40, vec![4104], 16),
        (515, 64, vec![48, 40], 24),
        (777, 200, vec![1000], 64),
        (130, 33, vec![37, 5], 3),
    ] {
        let list = operands(n, in_features, &rows, r);
        let proof = Proof { operands: &list, ours: &|t| fused(t, &rows), plain: &|t| plain(t, &rows) };
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            for (operand, distance) in proof.distances(kind, device).unwrap() {
                let what = operand.map_or("value".into(), |i| format!("gradient of operand {i}"));
                assert_allowed(
                    &format!("[{n}, {in_features}] -> {rows:?}, R {r}, {what}, {kind:?}"),
                    distance,
                );
            }
        }
    }
}

/// y += s z B^T for any number of rows, without gradients: LoRA of one and of several parts, of all ranks that the kernel takes and of
/// others, in f32 and in 16 bits.
#[test]
fn added_to_the_product() {
    let Some(device) = gpu("LoRA added to a product") else { return };
    let _no_grad = tch::no_grad_guard();
    for (n, in_features, rows, r) in [
        (65, 512, vec![256, 64, 64], 16),
        (256, 1024, vec![2048, 2048], 16),
        (300, 1472, vec![136, 72], 8),
        (97, 4096, vec![1000], 32),
        (513, 320, vec![48, 40], 64),
        (1100, 256, vec![520, 136, 1032], 24),
        (130, 33, vec![37, 5], 3),
    ] {
        let list = operands(n, in_features, &rows, r);
        let tensors: Vec<Tensor> = list.iter().map(|(tensor, _)| tensor.shallow_clone()).collect();
        let reference = plain(&tensors, &rows).unwrap();
        for (kind, lora_kind) in [
            (Kind::BFloat16, Kind::Float),
            (Kind::BFloat16, Kind::BFloat16),
            (Kind::Half, Kind::Float),
            (Kind::Float, Kind::Float),
        ] {
            let operands: Vec<Tensor> = tensors
                .iter()
                .enumerate()
                .map(|(i, tensor)| tensor.to_device(device).to_kind(if i < 2 { kind } else { lora_kind }))
                .collect();
            let label = format!("[{n}, {in_features}] -> {rows:?}, R {r}, {kind:?}, LoRA {lora_kind:?}");
            let expected = plain(&operands, &rows).unwrap();
            for _ in 0..2 {
                let ours = fused(&operands, &rows).unwrap();
                assert_close(&label, What::Value, &ours, &expected, &reference);
            }
        }
    }
}

/// The matrix in rows with room behind them, where LoRA of two parts is folded into the product.
fn with_room(weight: &Tensor) -> Tensor {
    let (rows, columns) = weight.size2().unwrap();
    let wide = Tensor::zeros([rows, columns + 128], (weight.kind(), weight.device()));
    let mut inside = wide.narrow(1, 0, columns);
    inside.copy_(weight);
    inside
}

/// An MLP block of x, the norm's weight, W, A and B of gate and up, W, A and B of down.
fn mlp(t: &[Tensor], offset: f64) -> anyhow::Result<Tensor> {
    let (f, c) = (t[7].size()[1], t[7].size()[0]);
    let gate_up = layer(with_room(&t[2]), &t[3..7], &[f, f]);
    let down = layer(with_room(&t[7]), &t[8..], &[c]);
    let norm = RmsNorm { name: "norm".into(), weight: t[1].shallow_clone(), eps: 1e-5, offset };
    let block = MlpBlock {
        layer: 0,
        norm: &norm,
        gate_up: &gate_up,
        down: &down,
        post_norm: None,
        activation: Activation::Silu,
    };
    ops::mlp_block(&t[0], &block, Pass::INFERENCE)
}

fn plain_mlp(t: &[Tensor], offset: f64) -> anyhow::Result<Tensor> {
    let f = t[7].size()[1];
    let sums = if t[0].kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let x = t[0].to_kind(sums);
    let rstd = (x.square().mean_dim([-1i64].as_slice(), true, sums) + 1e-5).rsqrt();
    let normed = (x * rstd * (t[1].to_kind(sums) + offset)).to_kind(t[0].kind());
    let of = |x: Tensor, rest: &[Tensor]| -> Vec<Tensor> {
        [x].into_iter().chain(rest.iter().map(Tensor::shallow_clone)).collect()
    };
    let gated = plain(&of(normed, &t[2..7]), &[f, f])?;
    let product = gated.narrow(1, 0, f).silu() * gated.narrow(1, f, f);
    Ok(&t[0] + plain(&of(product, &t[7..]), &[t[7].size()[0]])?)
}

/// Blocks of some hundred rows, in which the norm's launch computes z, too: widths of one and two units a warp and one that it does not
/// take, all ranks that it takes and others, rows that no tile divides.
#[test]
fn z_by_the_norm() {
    let Some(device) = gpu("z by the norm") else { return };
    tch::manual_seed(5);
    for (n, c, f, r, offset) in [
        (65, 2048, 1472, 8, 0.0),
        (256, 4096, 512, 16, 0.0),
        (300, 4096, 96, 24, 1.0),
        (512, 3584, 256, 32, 0.0),
        (97, 1056, 4096, 32, 0.0),
        (130, 2080, 320, 64, 0.0),
        (256, 5120, 64, 16, 0.0),
        (2, 3072, 40, 16, 0.0),
    ] {
        let random = |shape: &[i64], std: f64| Tensor::randn(shape, (Kind::Double, Device::Cpu)) * std;
        let std = |columns: i64| (columns as f64).powf(-0.5);
        let lora = |shape: &[i64]| (random(shape, std(shape[1])), Role::TrainedF32);
        let list = vec![
            (random(&[n, c], 1.0), Role::Trained),
            (random(&[c], 1.0), Role::Trained),
            (random(&[2 * f, c], std(c)), Role::Frozen),
            lora(&[r, c]),
            lora(&[f, r]),
            lora(&[r, c]),
            lora(&[f, r]),
            (random(&[c, f], std(f)), Role::Frozen),
            lora(&[r, f]),
            lora(&[c, r]),
        ];
        let proof = Proof { operands: &list, ours: &|t| mlp(t, offset), plain: &|t| plain_mlp(t, offset) };
        for kind in [Kind::Half, Kind::BFloat16] {
            let label = format!("[{n}, {c}], F {f}, R {r}, {kind:?}");
            for (operand, distance) in proof.distances(kind, device).unwrap() {
                let what = operand.map_or("value".into(), |i| format!("gradient of operand {i}"));
                assert_allowed(&format!("{label}, {what}"), distance);
            }
            // LoRA in 16 bits is LoRA in f32 of the same values.
            let _no_grad = tch::no_grad_guard();
            let rounded: Vec<Tensor> =
                list.iter().map(|(tensor, _)| tensor.to_device(device).to_kind(kind)).collect();
            let wide = |(i, tensor): (usize, &Tensor)| match list[i].1 {
                Role::TrainedF32 => tensor.to_kind(Kind::Float),
                _ => tensor.shallow_clone(),
            };
            let wide: Vec<Tensor> = rounded.iter().enumerate().map(wide).collect();
            let (narrow, wide) = (mlp(&rounded, offset), mlp(&wide, offset));
            assert!(narrow.unwrap().equal(&wide.unwrap()), "{label}");
        }
    }
}

/// Products with ones in the diagonal hand on what the norm writes: the bits of the kernel that does nothing else.
#[test]
fn what_is_normed_with_z_is_the_same_to_the_bit() {
    let Some(device) = gpu("normed with z") else { return };
    let _no_grad = tch::no_grad_guard();
    tch::manual_seed(6);
    for (n, c, offset) in [(65, 1056, 0.0), (256, 2048, 0.0), (300, 3584, 1.0), (512, 4096, 0.0)] {
        for (kind, weight_kind) in
            [(Kind::BFloat16, Kind::BFloat16), (Kind::BFloat16, Kind::Float), (Kind::Half, Kind::Half)]
        {
            let random = |shape: &[i64]| Tensor::randn(shape, (Kind::Float, device)).to_kind(kind);
            let (r, ones) = (16, Tensor::eye(c, (kind, device)));
            let none = Tensor::zeros([c, r], (kind, device));
            let x = random(&[n, c]) * 3.0;
            let weight = Tensor::randn([c], (Kind::Float, device)).to_kind(weight_kind);
            let norm = RmsNorm { name: "norm".into(), weight: weight.shallow_clone(), eps: 1e-5, offset };
            let operands = [
                x.shallow_clone(),
                weight,
                Tensor::cat(&[&ones, &ones], 0),
                random(&[r, c]),
                none.shallow_clone(),
                random(&[r, c]),
                none.shallow_clone(),
                ones,
                random(&[r, c]),
                none,
            ];
            let normed = ops::rms_norm(&x, &norm).unwrap();
            let expected = &x + ops::swiglu(&Tensor::cat(&[&normed, &normed], 1), Activation::Silu).unwrap();
            let ours = mlp(&operands, offset).unwrap();
            assert!(ours.equal(&expected), "[{n}, {c}], {kind:?}, weight {weight_kind:?}");
        }
    }
}

#[test]
fn gradients_repeat_bit_for_bit() {
    let Some(device) = gpu("repeated LoRA gradients") else { return };
    let rows = [1024, 512];
    let list: Vec<Tensor> = operands(3000, 512, &rows, 16)
        .into_iter()
        .map(|(tensor, role)| {
            let kind = if role == Role::TrainedF32 { Kind::Float } else { Kind::BFloat16 };
            tensor.to_device(device).to_kind(kind).set_requires_grad(role != Role::Frozen)
        })
        .collect();
    let trained: Vec<&Tensor> = list.iter().filter(|tensor| tensor.requires_grad()).collect();
    let gradients = || {
        let y = fused(&list, &rows).unwrap();
        Tensor::run_backward(&[y.square().sum(Kind::Float)], &trained, false, false)
    };
    let (first, second) = (gradients(), gradients());
    assert!(first.iter().zip(&second).all(|(a, b)| a.equal(b)));
}

/// A whole decoder: gradients go from block to block in rows with room for G. All of them as one vector, for in bf16 the
/// largest error of one small tensor is chance.
#[test]
fn folded_into_the_products() {
    let Some(device) = gpu("LoRA inside the products") else { return };
    let samples: Vec<Vec<i64>> =
        [40, 7, 100].iter().map(|&n| (0..n).map(|i| (i * i + 3 * n) % 50).collect()).collect();
    let samples: Vec<&[i64]> = samples.iter().map(Vec::as_slice).collect();
    for (name, load_in_4bit) in [("mixed", false), ("nested", false), ("source", false), ("source", true)] {
        let gradients = |kind, device, policy| {
            let options = LoadOptions { load_in_4bit, ..LoadOptions::new(kind, device) };
            let dir = root().join("nf4").join(name);
            let mut model = FastLanguageModel::from_pretrained_with(&dir, options).unwrap();
            model.load_adapter(&root().join("adapters/llama_nf4")).unwrap();
            gradients_of(&model.decoder, &samples, policy).1
        };
        let reference = gradients(Kind::Double, Device::Cpu, Policy::KEEP);
        for kind in [Kind::BFloat16, Kind::Half] {
            let joined = |found: &HashMap<String, Tensor>, kind| {
                let flat = |key| f64_on_cpu(&found[key]).flatten(0, -1);
                Tensor::cat(&reference.keys().map(flat).collect::<Vec<_>>(), 0).to_kind(kind)
            };
            let plain = joined(&gradients(kind, Device::Cpu, Policy::KEEP), kind);
            for policy in [Policy::KEEP, Policy::RECOMPUTE, Policy::HOST] {
                let ours = joined(&gradients(kind, device, policy), kind);
                let label = format!("{name}, 4-bit {load_in_4bit}, {policy:?}");
                assert_close(&label, What::Gradient, &ours, &plain, &joined(&reference, Kind::Double));
            }
        }
    }
}
