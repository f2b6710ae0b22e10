//! Projections in e4m3 (csrc/fp8.h) on the CPU: their bytes, their mathematics in f64, a short training, and what is refused.

use std::process::Command;

use ferrotune::data::Batch;
use ferrotune::error::Error;
use ferrotune::io::adapter::{AdapterConfig, InitLoraWeights};
use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{self, Fp8, Linear, Lora, Part, Pass, Weight};
use ferrotune::train::{Sft, Stepper, TrainingArguments};
use tch::{Device, Kind, Tensor};

use crate::golden::root;
use crate::ops::random;
use crate::tolerance::{What, assert_close, rel};

const SCALE: f64 = 0.5;

/// e4m3 of values of at most 448, worked out from the format: steps of 2^-9 below 2^-6, else of an eighth of the power of two
/// below; half to even.
fn e4m3(x: &Tensor) -> Tensor {
    let exponent = (x.abs().clamp_min(2f64.powi(-6)).log2() + 1e-12).floor().clamp(-6.0, 8.0);
    let step = (exponent - 3.0).exp2();
    (x / &step).round() * step
}

/// The least power of two with which nothing up to `largest` exceeds 448.
fn least_scale(largest: &Tensor) -> Tensor {
    (largest.clamp_min(2f64.powi(-120)) / 448.0).log2().ceil().exp2()
}

/// The rows of `x` in e4m3 with a power of two each, three bits of head room left.
pub fn quantized(x: &Tensor) -> (Tensor, Tensor) {
    let scale = least_scale(&(x.abs().amax([1], true) * 8.0));
    (e4m3(&(x / &scale)), scale)
}

/// What [`Fp8::quantize`] makes of `w`: e4m3 and one scale, four bits of head room left.
pub fn quantized_weight(w: &Tensor) -> (Tensor, Tensor) {
    let scale = least_scale(&(w.abs().max() * 16.0));
    (e4m3(&(w / &scale)), scale)
}

/// Rows and columns of very different sizes, as activations have them.
fn uneven([rows, columns]: [i64; 2]) -> Tensor {
    let x: Tensor =
        random(&[rows, columns]) * (random(&[rows, 1]) * 3.0).exp2() * (random(&[1, columns]) * 2.0).exp2();
    // Elements become e4m3 by way of f32.
    x.to_kind(Kind::Float).to_kind(Kind::Double)
}

pub fn linear(w: &Tensor, parts: &[(i64, Option<(Tensor, Tensor)>)]) -> Linear {
    let part = |(rows, lora): &(i64, Option<(Tensor, Tensor)>)| Part {
        name: "part".into(),
        rows: *rows,
        lora: lora.as_ref().map(|(a, b)| Lora {
            a: a.shallow_clone(),
            b: b.shallow_clone(),
            scale: SCALE,
            dropout: 0.0,
        }),
    };
    Linear {
        weight: Weight::Fp8(Fp8::quantize(w.shallow_clone()).unwrap()),
        bias: None,
        parts: parts.iter().map(part).collect(),
    }
}

#[test]
fn every_number_of_e4m3_stays() {
    // 0 .. 0x7e are the positive numbers in order; the largest is 448.
    let numbers: Vec<f64> = (0..127)
        .map(|i| match i {
            0..8 => f64::from(i) * 2f64.powi(-9),
            _ => (1.0 + f64::from(i % 8) / 8.0) * 2f64.powi(i / 8 - 7),
        })
        .collect();
    let x = Tensor::from_slice(&numbers).view([1, 127]);
    assert!(e4m3(&x).equal(&x));
    // Those up to 448 / 16, which is what head room leaves.
    let x = x.narrow(1, 0, 95);
    assert_eq!(x.max().double_value(&[]), 28.0);
    for scale in [1.0, 2f64.powi(-30), 2f64.powi(40)] {
        let w = Tensor::cat(&[&x * scale, -&x * scale], 0);
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let back = Fp8::quantize(w.to_kind(kind)).unwrap().dequantize(Kind::Double).unwrap();
            assert!(back.equal(&w), "{scale}, {kind:?}");
        }
    }
}

/// y = Q(x) W^T + LoRA, and its gradients: those of a plain product with the quantised matrices.
#[test]
fn products_are_those_of_their_definition() {
    for (n, in_features, rows, r) in
        [(64, 64, [32, 16], 4), (7, 33, [5, 9], 3), (1, 16, [16, 1], 1), (300, 48, [64, 64], 16)]
    {
        let all = rows[0] + rows[1];
        let operand = |shape| uneven(shape).set_requires_grad(true);
        let (x, a, b) = (operand([n, in_features]), operand([r, in_features]), operand([rows[1], r]));
        let (w, dy) = (uneven([all, in_features]), uneven([n, all]));
        let lora = Some((a.shallow_clone(), b.shallow_clone()));
        let label = format!("[{n}, {in_features}] -> {rows:?}");

        let ours =
            ops::linear(&x, &linear(&w, &[(rows[0], None), (rows[1], lora)]), Pass::INFERENCE).unwrap();
        let found = Tensor::run_backward(&[(&ours * &dy).sum(Kind::Double)], &[&x, &a, &b], true, false);

        let (w8, scale) = quantized_weight(&w);
        let (x8, x_scale) = quantized(&x.detach());
        let z = x.matmul(&a.tr());
        let update = z.matmul(&b.tr()) * SCALE;
        let none = Tensor::zeros([n, rows[0]], (Kind::Double, Device::Cpu));
        let lora = Tensor::cat(&[none, update], 1);
        let w8 = w8 * scale;
        let value = (x8 * x_scale).matmul(&w8.tr()) + &lora;
        let around = Tensor::run_backward(&[(&lora * &dy).sum(Kind::Double)], &[&x, &a, &b], false, false);
        let (dy8, dy_scale) = quantized(&dy);
        let dx = (dy8 * dy_scale).matmul(&w8) + &around[0];

        assert_close(&label, What::Value, &ours, &value, &value);
        for (found, reference) in found.iter().zip([&dx, &around[1], &around[2]]) {
            assert_close(&label, What::Gradient, found, reference, reference);
        }
    }
}

/// Losses of LoRA steps on one batch, with projections in fp8 or not.
pub fn losses(mut model: FastLanguageModel, steps: usize, learning_rate: f64) -> Vec<f64> {
    let config =
        AdapterConfig { init_lora_weights: InitLoraWeights::KaimingUniform, ..AdapterConfig::default() };
    model.get_peft_model(config, 1).unwrap();
    let vocab = model.decoder.config.vocab_size.min(256);
    let ids: Vec<i64> = (0..512).map(|i| (i * i * 7 + i) % vocab).collect();
    let samples: Vec<&[i64]> = ids.chunks_exact(64).collect();
    let batch = Batch::from_samples(samples.iter().map(|sample| (*sample, *sample)));
    let arguments = TrainingArguments::default();
    let mut stepper = Stepper::new(&Sft, &arguments, &model.decoder).unwrap();
    let mut step = |number| {
        stepper.run(&model.decoder, std::slice::from_ref(&batch), number as u64, learning_rate).unwrap().loss
    };
    (0..steps).map(&mut step).collect()
}

#[test]
fn training_follows_that_without_fp8() {
    let dir = root().join("../../examples/tiny/model");
    let run = |base_fp8| {
        let options = LoadOptions { base_fp8, ..LoadOptions::new(Kind::Float, Device::Cpu) };
        losses(FastLanguageModel::from_pretrained_with(&dir, options).unwrap(), 12, 2e-3)
    };
    let (without, with) = (run(false), run(true));
    println!("f32 {without:.4?}\nfp8 {with:.4?}");
    assert!(with[11] < 0.9 * with[0], "{with:?}");
    for (a, b) in with.iter().zip(&without) {
        assert!((a - b).abs() < 0.02 * b, "{with:?}, {without:?}");
    }
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = root().join("llama");
    let cpu = LoadOptions { base_fp8: true, ..LoadOptions::new(Kind::Float, Device::Cpu) };
    let both = LoadOptions { load_in_4bit: true, ..cpu };
    let error = FastLanguageModel::from_pretrained_with(&dir, both).map(drop).unwrap_err();
    assert!(matches!(error.downcast_ref(), Some(Error::Unsupported { .. })), "{error:#}");
    let mut model = FastLanguageModel::from_pretrained_with(&dir, cpu).unwrap();
    assert!(model.decoder.is_fp8() && !model.decoder.is_quantized());
    let error = model.train_all().unwrap_err();
    assert!(format!("{error:#}").contains("fp8"), "{error:#}");

    let nan = Tensor::full([2, 2], f64::NAN, (Kind::Float, Device::Cpu));
    assert!(Fp8::quantize(nan).is_err());
}

/// The weights under their names are those that the products take: near the checkpoint's.
#[test]
fn weights_come_back_near_what_they_were() {
    let dir = root().join("llama");
    let load = |base_fp8| {
        let options = LoadOptions { base_fp8, ..LoadOptions::new(Kind::Float, Device::Cpu) };
        FastLanguageModel::from_pretrained_with(&dir, options)
            .unwrap()
            .decoder
            .state_dict(Kind::Float)
            .unwrap()
    };
    for ((name, fp8), (_, dense)) in load(true).iter().zip(&load(false)) {
        let apart = rel(fp8, dense)[0];
        let projection = name.contains("_proj");
        assert!(if projection { apart > 1e-3 && apart < 0.05 } else { apart == 0.0 }, "{name}: {apart}");
    }
}

/// Flags that fp8 does not go with, and commands that do not know it.
#[test]
fn flags_that_do_not_go_together_are_refused() {
    for (command, flags, expected) in [
        ("train", &["--load-in-4bit"][..], "--base-dtype fp8 and --load-in-4bit"),
        ("train", &["--full-finetuning"], "--base-dtype fp8 and --full-finetuning"),
        ("dpo", &[], "--base-dtype is for `ferrotune train`"),
        ("grpo", &["--reward-funcs", "exact"], "--base-dtype is for `ferrotune train`"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_ferrotune"))
            .args([
                command,
                "--model",
                "none",
                "--dataset",
                "none",
                "--output-dir",
                "none",
                "--base-dtype",
                "fp8",
            ])
            .args(flags)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(expected), "{command} {flags:?}: {error}");
    }
}
