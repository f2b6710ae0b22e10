//! The products of few rows on a GPU, beside f64 and beside themselves alone.

use ferrotune::ops::{self, Linear, Lora, Nf4, Part, PartWeight, Pass, Weight};
use tch::{Device, Kind, Tensor};

use crate::gpu::gpu;
use crate::tolerance::{What, assert_close, f64_on_cpu};

/// What a part of a projection is made of.
#[derive(Debug, Clone, Copy)]
enum Stored {
    Dense,
    Nf4,
}

/// What it is made of, rows, and LoRA's rank.
type PartOf = (Stored, i64, i64);

struct Projection {
    linear: Linear,
    /// W + sum of scale B A, f64 on the CPU.
    merged: Tensor,
    bias: Option<Tensor>,
}

fn projection(
    parts: &[PartOf],
    k: i64,
    kind: Kind,
    lora_kind: Kind,
    bias: bool,
    device: Device,
) -> Projection {
    let random = |shape: &[i64], kind| (Tensor::randn(shape, (Kind::Float, device)) * 0.05).to_kind(kind);
    let (mut weights, mut named, mut merged) = (Vec::new(), Vec::new(), Vec::new());
    for &(stored, rows, rank) in parts {
        let dense = random(&[rows, k], kind);
        let (weight, value) = match stored {
            Stored::Dense => (PartWeight::Dense(dense.shallow_clone()), f64_on_cpu(&dense)),
            Stored::Nf4 => {
                let nf4 = Nf4::quantize(&dense).unwrap();
                let value = nf4.dequantize(Kind::Double).unwrap().to_device(Device::Cpu);
                (PartWeight::Nf4(nf4), value)
            }
        };
        let lora = (rank > 0).then(|| Lora {
            a: random(&[rank, k], lora_kind),
            b: random(&[rows, rank], lora_kind),
            scale: 0.5,
            dropout: 0.0,
        });
        let update = lora.as_ref().map(|lora| f64_on_cpu(&lora.b).matmul(&f64_on_cpu(&lora.a)) * lora.scale);
        merged.push(update.map_or(value.shallow_clone(), |update| value + update));
        weights.push(weight);
        named.push(Part { name: String::new(), rows, lora });
    }
    let all_dense = parts.iter().all(|(stored, ..)| matches!(stored, Stored::Dense));
    let weight = if all_dense {
        let dense: Vec<Tensor> = weights
            .iter()
            .map(|weight| match weight {
                PartWeight::Dense(tensor) => tensor.shallow_clone(),
                PartWeight::Nf4(_) => unreachable!(),
            })
            .collect();
        Weight::Joined(Tensor::cat(&dense, 0))
    } else {
        Weight::Parts(weights)
    };
    let rows: i64 = parts.iter().map(|(_, rows, _)| rows).sum();
    let bias = bias.then(|| random(&[rows], kind));
    let linear = Linear { weight, bias: bias.as_ref().map(Tensor::shallow_clone), parts: named };
    Projection { linear, merged: Tensor::cat(&merged, 0), bias }
}

#[test]
fn products_of_few_rows() {
    let Some(device) = gpu("products of few rows") else { return };
    let _no_grad = tch::no_grad_guard();
    use Stored::{Dense, Nf4};
    let cases: [(&[PartOf], i64); 11] = [
        (&[(Nf4, 128, 0)], 64),
        (&[(Nf4, 512, 16), (Nf4, 128, 16), (Nf4, 128, 16)], 1024),
        (&[(Nf4, 200, 64), (Nf4, 72, 8)], 1472),
        (&[(Nf4, 300, 0), (Dense, 130, 16), (Nf4, 30, 0)], 576),
        (&[(Dense, 513, 0)], 2048),
        (&[(Dense, 512, 32), (Dense, 128, 16), (Dense, 144, 0)], 768),
        (&[(Nf4, 4096, 16)], 14_336),
        (&[(Dense, 4096, 16)], 4096),
        // More groups of 256 rows than a GPU has processors.
        (&[(Nf4, 36_000, 16)], 256),
        (&[(Dense, 36_000, 16)], 320),
        // K that the kernel does not take.
        (&[(Nf4, 64, 16)], 96),
    ];
    for (parts, k) in cases {
        for kind in [Kind::BFloat16, Kind::Half] {
            for (m, lora_kind, bias) in [
                (1, Kind::Float, false),
                (2, kind, true),
                (3, Kind::Float, false),
                (8, Kind::Float, true),
                (9, kind, false),
                (16, Kind::Float, true),
                (17, Kind::Float, false),
                (32, kind, true),
                (33, Kind::Float, false),
                (64, Kind::Float, true),
                (65, Kind::Float, true),
            ] {
                let Projection { linear, merged, bias } = projection(parts, k, kind, lora_kind, bias, device);
                let x = Tensor::randn([m, k], (kind, device));
                let reference = f64_on_cpu(&x).matmul(&merged.tr());
                let plain = x.matmul(&merged.to_kind(kind).to_device(device).tr());
                let (reference, plain) = match &bias {
                    Some(bias) => (reference + f64_on_cpu(bias), plain + bias),
                    None => (reference, plain),
                };
                let label = format!("{parts:?}, K {k}, {m} rows, LoRA {lora_kind:?}");
                for again in 0..3 {
                    let y = ops::linear(&x, &linear, Pass::INFERENCE).unwrap();
                    assert_close(&format!("{label}, call {again}"), What::Value, &y, &plain, &reference);
                }
            }
        }
    }
}

/// To the bit: a row among up to eight is the row alone.
#[test]
fn a_row_of_eight_is_the_row_alone() {
    let Some(device) = gpu("rows side by side") else { return };
    let _no_grad = tch::no_grad_guard();
    for rank in [8, 16, 64] {
        let parts = [(Stored::Nf4, 4096, rank), (Stored::Nf4, 1040, rank)];
        let Projection { linear, .. } = projection(&parts, 4096, Kind::BFloat16, Kind::Float, false, device);
        let x = Tensor::randn([8, 4096], (Kind::BFloat16, device));
        let of = |x: &Tensor| ops::linear(x, &linear, Pass::INFERENCE).unwrap();
        let all = of(&x);
        for rows in 1..8 {
            for first in [0, 8 - rows] {
                let some = of(&x.narrow(0, first, rows).copy());
                assert_eq!(some, all.narrow(0, first, rows), "LoRA r {rank}, {rows} rows from {first} on");
            }
        }
    }
}
