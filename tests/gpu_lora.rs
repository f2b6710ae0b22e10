//! LoRA on the GPU: its own kernel and what is folded into the large products, against f64 on the CPU.

use std::collections::HashMap;

use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::proof::{Proof, Role};
use ferrotune::ops::{self, Linear, Lora, Part, Pass, Policy, Weight};
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

fn fused(t: &[Tensor], rows: &[i64]) -> anyhow::Result<Tensor> {
    let lora = |part: usize| Lora {
        a: t[2 + 2 * part].shallow_clone(),
        b: t[3 + 2 * part].shallow_clone(),
        scale: SCALE,
        dropout: 0.0,
    };
    let parts = rows.iter().enumerate();
    let linear = Linear {
        weight: Weight::Joined(t[1].shallow_clone()),
        bias: None,
        parts: parts
            .map(|(part, &rows)| Part { name: "part".into(), rows, lora: Some(lora(part)) })
            .collect(),
    };
    ops::linear(&t[0], &linear, Pass::INFERENCE)
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
