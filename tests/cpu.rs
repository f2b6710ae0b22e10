//! The f32 kernels of the CPU (kernels/cpu) against the f64 formulas, at shapes around the borders of their tiles.

use ferrotune::ops::{self, AttentionSpec, DropoutKey, Linear, Lora, Part, Pass, Segments, Targets, Weight};
use tch::{Device, Kind, Tensor};

use crate::attention::plain_attention;
use crate::ops::{Op, check, random};

fn check_cpu(op: &Op) {
    for kind in [Kind::Double, Kind::Float] {
        check(op, kind, Device::Cpu);
    }
}

#[test]
fn attention_agrees_with_its_definition() {
    for (cu_seqlens, softcap, sliding_window) in [
        (vec![0, 32, 64], None, None),
        (vec![0, 1, 3], None, None),
        (vec![0, 3, 100, 101, 134], None, None),
        (vec![0, 70, 133], None, Some(2)),
        (vec![0, 100, 133], None, Some(40)),
        (vec![0, 90, 133], Some(3.0), Some(33)),
        (vec![0, 90, 133], Some(3.0), None),
    ] {
        for (num_heads, num_kv_heads, head_dim) in [(8, 4, 8), (3, 1, 33), (4, 4, 64), (2, 1, 128)] {
            let n = i64::from(*cu_seqlens.last().unwrap());
            let scale = 1.0 / (head_dim as f64).sqrt();
            let spec = AttentionSpec { num_heads, num_kv_heads, head_dim, scale, softcap, sliding_window };
            let (cu, cu_plain, spec_plain) = (cu_seqlens.clone(), cu_seqlens.clone(), spec.clone());
            // Columns of a wider tensor, as q, k and v lie in the joined projection.
            let rows = |heads: i64| {
                random(&[n, heads * head_dim + 5]).narrow(1, 0, heads * head_dim).view([n, heads, head_dim])
            };
            check_cpu(&Op {
                label: format!(
                    "attention {cu_seqlens:?}, softcap {softcap:?}, window {sliding_window:?}, \
                     {num_heads} and {num_kv_heads} heads of {head_dim}"
                ),
                inputs: vec![rows(num_heads), rows(num_kv_heads), rows(num_kv_heads)],
                trained: 3,
                ours: Box::new(move |t| {
                    ops::attention(&t[0], &t[1], &t[2], &Segments::new(&cu, Device::Cpu).unwrap(), &spec)
                        .unwrap()
                }),
                plain: Box::new(move |t| plain_attention(t, &cu_plain, &spec_plain)),
            });
        }
    }
}

/// Two parts with LoRA of their own and one without, a trained weight and bias.
fn lora_op(n: i64, width: i64, rows: [i64; 3], dropout: f64) -> Op {
    let (scale, key) = (0.7, DropoutKey::new(3407, 1, 0));
    let part = move |rows: i64, lora: Option<(&Tensor, &Tensor)>| Part {
        name: "part".into(),
        rows,
        lora: lora.map(|(a, b)| Lora { a: a.shallow_clone(), b: b.shallow_clone(), scale, dropout }),
    };
    let ours = move |t: &[Tensor]| {
        let linear = Linear {
            weight: Weight::Joined(t[1].shallow_clone()),
            bias: Some(t[2].shallow_clone()),
            parts: vec![
                part(rows[0], Some((&t[3], &t[4]))),
                part(rows[1], None),
                part(rows[2], Some((&t[5], &t[6]))),
            ],
        };
        ops::linear(&t[0], &linear, Pass { dropout: Some(key), ..Pass::INFERENCE }).unwrap()
    };
    let plain = move |t: &[Tensor]| {
        let y = t[0].matmul(&t[1].tr()) + &t[2];
        let update = |a: &Tensor, b: &Tensor| t[0].matmul(&a.tr()).matmul(&b.tr()) * scale;
        let none = Tensor::zeros([n, rows[1]], (y.kind(), y.device()));
        y + Tensor::cat(&[update(&t[3], &t[4]), none, update(&t[5], &t[6])], 1)
    };
    let all = rows.iter().sum::<i64>();
    Op {
        label: format!("linear [{n}, {width}] -> {rows:?}"),
        inputs: vec![
            random(&[n, width]),
            random(&[all, width]),
            random(&[all]),
            random(&[4, width]),
            random(&[rows[0], 4]),
            random(&[16, width]),
            random(&[rows[2], 16]),
        ],
        trained: 7,
        ours: Box::new(ours),
        plain: Box::new(plain),
    }
}

/// Few rows multiply with W and the update apart, many with their sum.
#[test]
fn projections_agree_with_their_formula() {
    for (n, width, rows) in [
        (512, 64, [64, 32, 32]),
        (2, 64, [64, 32, 32]),
        (1, 33, [7, 1, 90]),
        (131, 301, [45, 300, 17]),
        (40, 700, [33, 31, 1]),
    ] {
        check_cpu(&lora_op(n, width, rows, 0.0));
    }
}

/// The mask is one function of the key: f32 draws what f64 draws, in the forward and in the backward.
#[test]
fn dropout_is_the_same_in_every_dtype() {
    let mut op = lora_op(60, 48, [20, 10, 30], 0.3);
    let again = lora_op(60, 48, [20, 10, 30], 0.3);
    op.plain = again.ours;
    check(&op, Kind::Float, Device::Cpu);
}

#[test]
fn the_loss_agrees_with_its_formula() {
    for (n, width, vocab, softcap, factor) in [
        (100, 64, 512, None, 1.0),
        (33, 40, 1003, Some(5.0), 1.0),
        (17, 24, 5, None, 1.0),
        // Logits far below zero and far apart: no row may lose its sum.
        (20, 16, 130, None, 60.0),
    ] {
        let labels = (0..n).map(|row| if row == 3 { -100 } else { row * 7919 % vocab });
        let numbers: Vec<i64> = labels.collect();
        let shifted = random(&[n, width]) - 4.0 * (factor - 1.0) / 59.0;
        let labels_plain = Tensor::from_slice(&numbers);
        check_cpu(&Op {
            label: format!("loss [{n}, {width}], {vocab} words, softcap {softcap:?}, factor {factor}"),
            inputs: vec![shifted, random(&[vocab, width]).abs() * 0.2 * factor],
            trained: 2,
            ours: Box::new(move |t| {
                let targets = Targets::new(&numbers, Device::Cpu).unwrap();
                ops::linear_cross_entropy(&t[0], &t[1], &targets, softcap).unwrap()
            }),
            plain: Box::new(move |t| {
                let mut logits = t[0].matmul(&t[1].tr());
                if let Some(cap) = softcap {
                    logits = (logits / cap).tanh() * cap;
                }
                logits.cross_entropy_loss::<Tensor>(&labels_plain, None, tch::Reduction::Sum, -100, 0.0)
            }),
        });
    }
}
