//! Heads in 12 bits on a GPU: their bits, their products beside f64, and the models that have them.

use ferrotune::device;
use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{self, Bf12, Head};
use tch::{Kind, Tensor};

use crate::bf12::{bits, check_bits, hard};
use crate::golden::{Flat, logits};
use crate::gpu::gpu;
use crate::gpu_decode::shape;
use crate::tolerance::{What, assert_close, f64_on_cpu, rel};

#[test]
fn no_bit_is_lost() {
    let Some(device) = gpu("packing to 12 bits") else { return };
    check_bits(device);
}

/// By the tolerance rule beside the product on bf16, the same bits every time, and a row's whatever rows are beside it up to eight.
#[test]
fn products() {
    let Some(device) = gpu("products of a head in 12 bits") else { return };
    let _no_grad = tch::no_grad_guard();
    for (rows, columns) in [(16, 64), (1000, 256), (4099, 4096), (515, 576), (30_000, 128)] {
        let weight = hard(rows, columns).to_device(device);
        let packed = Bf12::pack(&weight).unwrap().expect("12 bits hold it");
        let exact = f64_on_cpu(&weight);
        for m in [1, 2, 5, 8, 9, 16, 17, 32, 33, 48, 57, 64, 65, 100, 128, 129] {
            let x = Tensor::randn([m, columns], (Kind::BFloat16, device));
            let ours = ops::head_scores(&x, Head::Bf12(&packed)).unwrap();
            assert_eq!(ours.kind(), Kind::Float);
            let plain = ops::head_scores(&x, Head::Dense(&weight)).unwrap();
            let reference = f64_on_cpu(&x).matmul(&exact.tr());
            let label = format!("[{rows}, {columns}], {m} rows");
            assert_close(&label, What::Value, &ours, &plain, &reference);
            let again = ops::head_scores(&x, Head::Bf12(&packed)).unwrap();
            assert_eq!(again, ours, "{label}: twice");
            if m <= 8 {
                let alone = ops::head_scores(&x.narrow(0, m - 1, 1), Head::Bf12(&packed)).unwrap();
                assert_eq!(alone, ours.narrow(0, m - 1, 1), "{label}: the last one alone");
            }
        }
    }
}

/// A model for inference has its head in 12 bits where its layers are in 4, an untied one, and the same weights; what it computes differs by
/// rounding, and training takes the head back.
#[test]
fn a_model_for_inference() {
    let Some(device) = gpu("a model with its head in 12 bits") else { return };
    let heads = r#""model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2"#;
    let options = LoadOptions { load_in_4bit: true, ..LoadOptions::new(Kind::BFloat16, device) };
    for (tied, load_in_4bit) in [(false, true), (true, true), (false, false)] {
        let config = shape(&format!(r#"{heads}, "tie_word_embeddings": {tied}"#));
        let options = LoadOptions { load_in_4bit, ..options };
        let mut model = FastLanguageModel::untrained(config, options, 7).unwrap();
        let weights = |model: &FastLanguageModel| model.decoder.state_dict(Kind::BFloat16).unwrap();
        let ids: Vec<i64> = (0..40).collect();
        let flat = Flat::new([&ids[..]]);
        let (before, of_dense, count) =
            (weights(&model), logits(&model.decoder, &flat), model.decoder.num_parameters());
        device::empty_cache(device).unwrap();
        model.for_inference().unwrap();
        let packed = matches!(model.decoder.head(), Head::Bf12(_));
        assert_eq!(packed, load_in_4bit && !tied, "tied {tied}, 4-bit {load_in_4bit}");
        assert_eq!(model.decoder.num_parameters(), count);
        for ((name, after), (same, before)) in weights(&model).iter().zip(&before) {
            assert_eq!((name, bits(after)), (same, bits(before)));
        }
        let apart = rel(&logits(&model.decoder, &flat), &of_dense)[0];
        assert!(apart < 1e-5, "tied {tied}: {apart:.2e}");
        model.decoder.train_module("lm_head").unwrap();
        assert!(matches!(model.decoder.head(), Head::Dense(head) if head.requires_grad()));
    }
}

/// Faster than the product on bf16 for up to 48 rows.
#[test]
fn speed() {
    let Some(device) = gpu("the speed of a head in 12 bits") else { return };
    let _no_grad = tch::no_grad_guard();
    let (rows, columns) = (128_256, 4096);
    let weight = (Tensor::randn([rows, columns], (Kind::Float, device)) * 0.02).to_kind(Kind::BFloat16);
    let packed = Bf12::pack(&weight).unwrap().expect("12 bits hold it");
    println!("{:.4} of bf16's bytes", packed.bytes() as f64 / (2 * rows * columns) as f64);
    for m in [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 128] {
        let x = Tensor::randn([m, columns], (Kind::BFloat16, device));
        let time = |head: Head| {
            let work = || (0..20).try_for_each(|_| ops::head_scores(&x, head).map(drop));
            work().unwrap();
            device::milliseconds(device, work).unwrap() / 20.0 * 1e3
        };
        let (ours, plain) = (time(Head::Bf12(&packed)), time(Head::Dense(&weight)));
        println!("{m:3} rows: {ours:.0} us, {plain:.0} of bf16");
        assert!(ours < plain || m > 48, "{m} rows: {ours:.0} us, {plain:.0} of bf16");
    }
    let time = device::milliseconds(device, || packed.unpack().map(drop)).unwrap();
    println!("unpacking: {:.0} us", time * 1e3);
}
