//! What trades a little time for memory: MLPs on 4-bit weights in runs of columns, a head in 4 bits, an embedding in the host's
//! memory.

use ferrotune::io::Weights;
use ferrotune::models::{Config, Decoder};
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{
    self, Activation, Head, Linear, Lora, LoraRun, LoraSet, MlpBlock, Nf4, Part, PartWeight, Pass, Policy,
    RmsNorm, Targets, Weight, plain,
};
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, logits, root};
use crate::gpu_nf4::on;
use crate::ops::{Op, check, norm, random};
use crate::tolerance::rel;

fn quantized(rows: i64, columns: i64) -> Nf4 {
    Nf4::quantize(&(random(&[rows, columns]).to_kind(Kind::Float) * 0.05)).unwrap()
}

fn lora(a: &Tensor, b: &Tensor) -> Lora {
    Lora { a: a.shallow_clone(), b: b.shallow_clone(), scale: 0.5, dropout: 0.0 }
}

fn mlp(
    x: &Tensor,
    (norm, gate_up, down): (&RmsNorm, &Linear, &Linear),
    activation: Activation,
    pass: Pass,
) -> Tensor {
    let block = MlpBlock { layer: 0, norm, gate_up, down, post_norm: None, activation };
    ops::mlp_block(x, &block, pass).unwrap()
}

/// The MLP block in f64 and others, recomputed and not: runs of 64 of 192 columns from 256 rows on, fewer rows whole, and 16,384
/// and more in tiles as well. LoRA on all three parts, or on one of gate and up.
pub fn mlps() -> Vec<Op> {
    const C: i64 = 256;
    const F: i64 = 192;
    let mut all = Vec::new();
    for (n, both, activation) in [
        (256, true, Activation::Silu),
        (301, true, Activation::GeluTanh),
        (300, false, Activation::Silu),
        (255, true, Activation::Silu),
        (16390, true, Activation::Silu),
    ] {
        let [gate, up, down] = [(F, C), (F, C), (C, F)].map(|(rows, columns)| quantized(rows, columns));
        let small = |shape: &[i64]| random(shape) * 0.1;
        let mut inputs = vec![random(&[n, C]), random(&[C]).abs()];
        for (rows, columns) in [(F, C), (F, C), (C, F)] {
            inputs.extend([small(&[4, columns]), small(&[rows, 4])]);
        }
        let values = [&gate, &up, &down].map(|nf4| nf4.dequantize(Kind::Double).unwrap());
        let trained = inputs.len();
        all.push(Op {
            label: format!("MLP of {n} rows in 4 bits, LoRA on gate and up: {both}"),
            inputs,
            trained,
            ours: Box::new(move |t| {
                let there = |nf4: &Nf4| PartWeight::Nf4(on(nf4, t[0].device()));
                let part = |name: &str, rows: i64, lora: Option<Lora>| Part { name: name.into(), rows, lora };
                let gate_up = Linear {
                    weight: Weight::Parts(vec![there(&gate), there(&up)]),
                    bias: None,
                    parts: vec![
                        part("gate", F, Some(lora(&t[2], &t[3]))),
                        part("up", F, both.then(|| lora(&t[4], &t[5]))),
                    ],
                };
                let down = Linear {
                    weight: Weight::Parts(vec![there(&down)]),
                    bias: None,
                    parts: vec![part("down", C, Some(lora(&t[6], &t[7])))],
                };
                let norm = norm(&t[1], 0.0);
                let pass = Pass { policies: &[Policy::RECOMPUTE], ..Pass::INFERENCE };
                let y = mlp(&t[0], (&norm, &gate_up, &down), activation, pass);
                // What has no LoRA is no input of it.
                if both { y } else { y + (t[4].sum(t[4].kind()) + t[5].sum(t[5].kind())) * 0.0 }
            }),
            plain: Box::new(move |t| {
                let kind = t[0].kind();
                let x = plain::rms_norm(&t[0], &norm(&t[1], 0.0)).unwrap();
                let linear = |x: &Tensor, index: usize, lora: bool| {
                    let weight = values[index].to_device(x.device()).to_kind(kind);
                    let y = x.matmul(&weight.transpose(0, 1));
                    let (a, b) = (&t[2 + 2 * index], &t[3 + 2 * index]);
                    let update = x.matmul(&a.transpose(0, 1)).matmul(&b.transpose(0, 1)) * 0.5;
                    if lora { y + update } else { y + update * 0.0 }
                };
                let gate_up = Tensor::cat(&[linear(&x, 0, true), linear(&x, 1, both)], 1);
                &t[0] + linear(&plain::swiglu(&gate_up, activation).unwrap(), 2, true)
            }),
        });
    }
    all
}

/// Rows with adapters of their own, whole, in runs of columns and as many as tiles take: what each gives as the block's LoRA.
#[test]
fn adapters_of_rows_are_those_of_the_block() {
    const C: i64 = 256;
    const F: i64 = 192;
    let _no_grad = tch::no_grad_guard();
    let adapter = |r: i64, up: bool| {
        let lora =
            |rows: i64, columns: i64| Some(lora(&(random(&[r, columns]) * 0.1), &(random(&[rows, r]) * 0.1)));
        LoraSet(vec![vec![None], vec![None], vec![lora(F, C), lora(F, C).filter(|_| up)], vec![lora(C, F)]])
    };
    let [a, b] = [adapter(4, true), adapter(8, false)];
    let [gate, up, down] = [(F, C), (F, C), (C, F)].map(|(rows, columns)| quantized(rows, columns));
    let norm = norm(&random(&[C]).abs(), 0.0);
    let linear = |weights: &[&Nf4], own: Option<&Vec<Option<Lora>>>| Linear {
        weight: Weight::Parts(weights.iter().map(|nf4| PartWeight::Nf4(on(nf4, Device::Cpu))).collect()),
        bias: None,
        parts: (0..weights.len())
            .map(|part| Part {
                name: String::new(),
                rows: weights[part].shape[0],
                lora: own.and_then(|own| own[part].as_ref()).map(|own| lora(&own.a, &own.b)),
            })
            .collect(),
    };
    let block = |x: &Tensor, own: Option<&LoraSet>, rows: &[LoraRun]| {
        let gate_up = linear(&[&gate, &up], own.map(|own| &own.0[2]));
        let down = linear(&[&down], own.map(|own| &own.0[3]));
        let pass = Pass { lora: rows, ..Pass::INFERENCE };
        mlp(x, (&norm, &gate_up, &down), Activation::Silu, pass)
    };
    for n in [100, 301, 16390] {
        let x = random(&[n, C]);
        let runs = [(0, 70, Some(&a)), (70, 11, None), (81, n - 81, Some(&b))];
        let rows = runs
            .map(|(first, rows, adapter)| LoraRun { rows: first as usize..(first + rows) as usize, adapter });
        let ours = block(&x, None, &rows);
        let each = runs.map(|(first, rows, adapter)| block(&x.narrow(0, first, rows), adapter, &[]));
        let apart = rel(&ours, &Tensor::cat(&each, 0))[0];
        assert!(apart < 1e-12, "{n} rows: {apart:.2e}");
    }
}

/// An MLP block leaves its x as it is, in tiles, too, and gives in inference what it gives where autograd watches.
pub fn check_kept_inputs(kind: Kind, device: Device, limit: f64) {
    const C: i64 = 256;
    const F: i64 = 192;
    let on_device = |shape: &[i64], factor: f64| (random(shape) * factor).to_device(device);
    let norm = norm(&on_device(&[C], 1.0).abs().to_kind(kind), 0.0);
    let linear = |rows: i64, columns: i64, r: i64| {
        let matrices = (on_device(&[r, columns], 0.1), on_device(&[rows, r], 0.1));
        let narrow = if kind == Kind::Double { kind } else { Kind::Float };
        let lora = (r > 0).then(|| lora(&matrices.0.to_kind(narrow), &matrices.1.to_kind(narrow)));
        let weight = PartWeight::Nf4(on(&quantized(rows, columns), device));
        Linear {
            weight: Weight::Parts(vec![weight]),
            bias: None,
            parts: vec![Part { name: String::new(), rows, lora }],
        }
    };
    for r in [0, 8] {
        let (gate_up, down) = (linear(2 * F, C, r), linear(C, F, r));
        for n in [100, 301, 16390] {
            let x = on_device(&[n, C], 1.0).to_kind(kind);
            let before = x.copy();
            let block = || mlp(&x, (&norm, &gate_up, &down), Activation::Silu, Pass::INFERENCE);
            let (ours, watched) = (tch::no_grad(block), block());
            assert_eq!(x, before, "{n} rows, r {r}");
            let apart = rel(&ours, &watched)[0];
            assert!(apart < limit, "{n} rows, r {r}: {apart:.2e}");
        }
    }
}

#[test]
fn a_block_leaves_its_input() {
    check_kept_inputs(Kind::Double, Device::Cpu, 1e-12);
}

/// In inference the MLPs of a decoder write over what attention gave, tile by tile.
#[test]
fn long_batches_in_inference_are_those_that_autograd_watches() {
    let ids: Vec<i64> = (0..13).map(|i| (i * i + 3) % 50).collect();
    let flat = Flat::new(std::iter::repeat_n(&ids[..], 1265));
    for name in ["llama_bias", "gemma2", "qwen3"] {
        let decoder = load(name, LoadOptions::new(Kind::Double, Device::Cpu)).unwrap();
        let hidden = || decoder.hidden(flat.input(), Pass::INFERENCE).unwrap();
        let apart = rel(&tch::no_grad(hidden), &hidden())[0];
        assert!(apart < 1e-12, "{name}: {apart:.2e}");
    }
}

/// A weight in 4 bits whose values are those of bf16 and of f16, so that every dtype works on the same ones: a loss is one number,
/// and of others' rounding would be as far from f64 as chance has it.
fn exact_in_16_bits(weight: &Tensor) -> Nf4 {
    let head = Nf4::quantize(weight).unwrap();
    let blocks = (weight.numel() as i64 + head.blocksize - 1) / head.blocksize;
    let exponents = Tensor::arange(blocks, (Kind::Float, Device::Cpu)).remainder(3) - 1;
    let quant_map = head.quant_map.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    Nf4 { quant_map, absmax: exponents.exp2(), nested: None, ..head }
}

/// The loss of a head in 4 bits, past one run of words and past one chunk of rows.
pub fn heads() -> Vec<Op> {
    let mut all = Vec::new();
    for (n, c, v) in [(64, 64, 512), (33, 37, 1001), (1, 64, 9000), (7, 64, 16384), (1500, 32, 8200)] {
        for softcap in [None, Some(30.0)] {
            let head = exact_in_16_bits(&random(&[v, c]).to_kind(Kind::Float));
            let labels: Vec<i64> =
                (0..n).map(|row| if n > 1 && row % 3 == 1 { -100 } else { (row * 7919) % v }).collect();
            let (values, plain_labels) = (head.dequantize(Kind::Double).unwrap(), labels.clone());
            let (head_too, values_too, labels_too) = (on(&head, Device::Cpu), values.copy(), labels.clone());
            all.push(Op {
                label: format!("log_probs [{n}, {c}] -> {v} in 4 bits, softcap {softcap:?}"),
                inputs: vec![random(&[n, c]) * 0.3],
                trained: 1,
                ours: Box::new({
                    let labels = labels.clone();
                    move |t| {
                        let targets = Targets::new(&labels, t[0].device()).unwrap();
                        let head = on(&head_too, t[0].device());
                        ops::token_log_probs(&t[0], Head::Nf4(&head), &targets, 0.7, softcap).unwrap()
                    }
                }),
                plain: Box::new(move |t| {
                    let weight = values_too.to_device(t[0].device()).to_kind(t[0].kind());
                    plain::token_log_probs(&t[0], &weight, &labels_too, 0.7, softcap).unwrap()
                }),
            });
            all.push(Op {
                label: format!("loss [{n}, {c}] -> {v} in 4 bits, softcap {softcap:?}"),
                inputs: vec![random(&[n, c]) * 0.3],
                trained: 1,
                ours: Box::new(move |t| {
                    let targets = Targets::new(&labels, t[0].device()).unwrap();
                    let head = on(&head, t[0].device());
                    ops::linear_cross_entropy(&t[0], Head::Nf4(&head), &targets, softcap).unwrap()
                }),
                plain: Box::new(move |t| {
                    let weight = values.to_device(t[0].device()).to_kind(t[0].kind());
                    plain::linear_cross_entropy(&t[0], &weight, &plain_labels, softcap).unwrap()
                }),
            });
        }
    }
    all
}

#[test]
fn formulas_agree_with_autograd() {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        for op in mlps() {
            check(&op, kind, Device::Cpu);
        }
        for op in heads() {
            check(&op, kind, Device::Cpu);
        }
    }
}

/// Scores and log-probabilities of a head in 4 bits are those of its values.
#[test]
fn scores_of_a_4_bit_head() {
    let head = quantized(9000, 64);
    let (hidden, dense) = (random(&[5, 64]), head.dequantize(Kind::Double).unwrap());
    let targets = Targets::new(&[3_i64, 8191, 8192, 8999, 0], Device::Cpu).unwrap();
    for softcap in [None, Some(20.0)] {
        let ours = ops::token_log_probs(&hidden, Head::Nf4(&head), &targets, 0.7, softcap).unwrap();
        let expected = ops::token_log_probs(&hidden, &dense, &targets, 0.7, softcap).unwrap();
        assert!((ours - expected).abs().max().double_value(&[]) < 1e-12);
    }
    let ours = ops::head_scores(&hidden, Head::Nf4(&head)).unwrap();
    let expected = ops::head_scores(&hidden, Head::Dense(&dense)).unwrap();
    assert!((ours - expected).abs().max().double_value(&[]) < 1e-12);
}

fn load(name: &str, options: LoadOptions) -> anyhow::Result<Decoder> {
    let dir = root().join(name);
    Decoder::load_with(Config::from_dir(&dir)?, &Weights::open(&dir)?, options)
}

fn flat() -> Flat {
    Flat::new([&[3, 8, 5, 9, 14][..], &[7, 6, 5]])
}

/// An embedding in the host's memory gives the bits of one on the device.
pub fn check_offloaded_embedding(device: Device) {
    let options = LoadOptions::new(Kind::Float, device);
    let on_device = load("mistral", options).unwrap();
    let on_host = load("mistral", LoadOptions { offload_embedding: true, ..options }).unwrap();
    assert!(on_host.offloads_embedding());
    assert_eq!(logits(&on_host, &flat()), logits(&on_device, &flat()));
    let saved = |decoder: &Decoder| decoder.state_dict(Kind::Float).unwrap();
    for ((name, ours), (_, theirs)) in saved(&on_host).iter().zip(saved(&on_device)) {
        assert_eq!(ours.to_device(Device::Cpu), theirs.to_device(Device::Cpu), "{name}");
    }
}

#[test]
fn an_embedding_on_the_host() {
    check_offloaded_embedding(Device::Cpu);
    let options = LoadOptions { offload_embedding: true, ..LoadOptions::new(Kind::Float, Device::Cpu) };
    let error = load("gemma2", options).err().unwrap().to_string();
    assert!(error.contains("offload_embedding where the embedding is also the head"), "{error}");
    let mut decoder = load("mistral", options).unwrap();
    for error in [decoder.train_module("model.embed_tokens").unwrap_err(), decoder.train_all().unwrap_err()] {
        assert!(error.to_string().contains("with offload_embedding"), "{error}");
    }
}

/// The head that a decoder computes with is that of the checkpoint in NF4, its own one or a copy of the embedding; the copy is
/// not saved.
#[test]
fn a_head_in_4_bits() {
    for (name, tied) in [("mistral", false), ("gemma2", true)] {
        let options = LoadOptions::new(Kind::Float, Device::Cpu);
        let dense = load(name, options).unwrap();
        assert_eq!(dense.config.tie_word_embeddings, tied, "{name}");
        let mut ours =
            load(name, LoadOptions { nf4_head: true, offload_embedding: tied, ..options }).unwrap();
        let (Head::Dense(weight), Head::Nf4(nf4)) = (dense.head(), ours.head()) else { panic!("{name}") };
        let expected = Nf4::quantize(weight).unwrap();
        assert_eq!(nf4.packed, expected.packed, "{name}");
        assert!(ours.is_quantized() && ours.num_parameters() == dense.num_parameters(), "{name}");
        let hidden = tch::no_grad(|| dense.hidden(flat().input(), Pass::INFERENCE).unwrap());
        let mut scores = hidden.matmul(&expected.dequantize(Kind::Float).unwrap().transpose(0, 1));
        if let Some(cap) = dense.config.final_logit_softcapping {
            scores = (scores / cap).tanh() * cap;
        }
        let off = (logits(&ours, &flat()) - &scores).abs().max().double_value(&[]);
        assert!(off < 1e-4 * scores.abs().max().double_value(&[]), "{name}: {off:e}");
        let names = |decoder: &Decoder| -> Vec<String> {
            decoder.state_dict(Kind::Float).unwrap().into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(names(&ours), names(&dense), "{name}");
        let error = ours.train_module("lm_head").unwrap_err().to_string();
        assert!(error.contains("training a head with nf4_head"), "{error}");
    }
}
