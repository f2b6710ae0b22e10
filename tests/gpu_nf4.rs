//! NF4 on the GPU: the bytes of the CPU, values to the bit, past 2^31 elements, and the speed.

use std::fs;
use std::path::Path;

use ferrotune::device;
use ferrotune::export;
use ferrotune::models::FastLanguageModel;
use ferrotune::nn::LoadOptions;
use ferrotune::ops::{Nested, Nf4, Nf4Quantizer, Policy};
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, assert_close, ids, logits, rel, root, tensors};
use crate::gpu::gpu;
use crate::gpu_speed::seconds;
use crate::nf4::matrices;
use crate::parity::gradients_of;
use crate::tolerance::{self, What};

pub fn on(nf4: &Nf4, device: Device) -> Nf4 {
    let there = |tensor: &Tensor| tensor.to_device(device);
    Nf4 {
        packed: there(&nf4.packed),
        quant_map: there(&nf4.quant_map),
        absmax: there(&nf4.absmax),
        nested: nf4.nested.as_ref().map(|nested| Nested {
            absmax: there(&nested.absmax),
            quant_map: there(&nested.quant_map),
            ..*nested
        }),
        ..*nf4
    }
}

fn assert_same(label: &str, ours: &Nf4, theirs: &Nf4) {
    let (a, b) = (on(ours, Device::Cpu), on(theirs, Device::Cpu));
    assert_eq!(a.packed, b.packed, "{label}: packed");
    assert_eq!(a.absmax, b.absmax, "{label}: absmax");
    let (a, b) = (a.nested.unwrap(), b.nested.unwrap());
    assert_eq!(a.absmax, b.absmax, "{label}: nested_absmax");
    assert_eq!(a.quant_map, b.quant_map, "{label}: nested_quant_map");
    assert_eq!(a.offset.to_bits(), b.offset.to_bits(), "{label}: nested_offset");
}

/// In every dtype, into a matrix of its own and into rows of wider ones.
fn assert_values(label: &str, nf4: &Nf4, device: Device) {
    let there = on(nf4, device);
    let [rows, columns] = nf4.shape;
    // f64 runs the plain formula.
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
        let expected = nf4.dequantize(kind).unwrap();
        for pad in [0, 64, 5] {
            let wide = Tensor::full([rows, columns + pad], 7.0, (kind, device));
            there.dequantize_into(&wide.narrow(1, 0, columns)).unwrap();
            assert_eq!(
                wide.narrow(1, 0, columns).to_device(Device::Cpu),
                expected,
                "{label} {kind:?} + {pad}"
            );
            assert!(bool::try_from(wide.narrow(1, columns, pad).eq(7.0).all()).unwrap(), "{label} + {pad}");
        }
    }
}

#[test]
fn nf4_is_that_of_the_cpu() {
    let Some(device) = gpu("NF4") else { return };
    let mut cases = matrices();
    for (rows, columns) in
        [(1, 1), (1, 63), (3, 64), (64, 64), (129, 200), (31, 1000), (513, 4096), (7, 4099)]
    {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
            let weight = Tensor::randn([rows, columns], (kind, Device::Cpu));
            cases.insert(format!("random [{rows}, {columns}] {kind:?}"), weight);
        }
    }
    for (name, weight) in cases {
        let ours = Nf4::quantize(&weight).unwrap();
        assert_same(&name, &Nf4::quantize(&weight.to_device(device)).unwrap(), &ours);
        // An address that no vector fits.
        let shifted = Tensor::cat(&[weight.flatten(0, -1).narrow(0, 0, 1), weight.flatten(0, -1)], 0);
        let shifted = shifted.to_device(device).narrow(0, 1, weight.numel() as i64);
        let mut quantizer = Nf4Quantizer::new(ours.shape, device).unwrap();
        quantizer.push(&shifted).unwrap();
        assert_same(&name, &quantizer.finish().unwrap(), &ours);
        assert_values(&name, &ours, device);
    }
    let broken = Tensor::randn([64, 64], (Kind::BFloat16, device));
    for poison in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let _ = broken.narrow(0, 13, 1).fill_(poison);
        assert_eq!(Nf4::quantize(&broken).unwrap_err().to_string(), "NaN or infinite values");
    }
}

/// What we never write, but bitsandbytes may: plain absmax, other block sizes.
#[test]
fn nf4_of_other_block_sizes() {
    let Some(device) = gpu("NF4 block sizes") else { return };
    for (shape, blocksize) in [([64, 256], 32), ([33, 128], 128), ([5, 1000], 256), ([9, 4096], 4096)] {
        let n: i64 = shape[0] * shape[1];
        let blocks = (n + blocksize - 1) / blocksize;
        let random = Nf4::quantize(&Tensor::randn(shape, (Kind::Float, Device::Cpu))).unwrap();
        let bytes = Tensor::randint(256, [blocks], (Kind::Uint8, Device::Cpu));
        let nested = random.nested.unwrap();
        let cpu = |size| Tensor::rand([size], (Kind::Float, Device::Cpu));
        let plain = Nf4 { shape, absmax: cpu(blocks), blocksize, nested: None, ..random };
        assert_values(&format!("plain, blocks of {blocksize}"), &plain, device);
        let runs = (blocks + 63) / 64;
        let nested = Some(Nested { absmax: cpu(runs), blocksize: 64, ..nested });
        assert_values(
            &format!("nested, blocks of {blocksize}"),
            &Nf4 { absmax: bytes, nested, ..plain },
            device,
        );
    }
}

#[test]
fn nf4_past_two_to_the_31_elements() {
    let Some(device) = gpu("2^31 elements in NF4") else { return };
    const WIDTH: i64 = 4096;
    let middle = (1i64 << 31) / WIDTH;
    let n = middle + 100;
    let needed = 5 * (n * WIDTH) as u64;
    let free = device::memory(device).unwrap().free;
    if free < needed {
        println!("skipped: 2^31 elements: {needed} bytes are needed, {free} are free");
        return;
    }
    let weight = Tensor::randn([n, WIDTH], (Kind::BFloat16, device));
    let nf4 = Nf4::quantize(&weight).unwrap();
    let values = nf4.dequantize(Kind::BFloat16).unwrap();
    let nested = nf4.nested.as_ref().unwrap();
    // Four rows are 256 blocks, one of the second level.
    for row in [0, middle - 4, middle, middle + 96] {
        let blocks = WIDTH / 64;
        let cpu =
            |tensor: &Tensor, start: i64, length: i64| tensor.narrow(0, start, length).to_device(Device::Cpu);
        let rows = Nf4 {
            shape: [4, WIDTH],
            packed: cpu(&nf4.packed, row * WIDTH / 2, 2 * WIDTH),
            absmax: cpu(&nf4.absmax, row * blocks, 4 * blocks),
            quant_map: nf4.quant_map.to_device(Device::Cpu),
            blocksize: 64,
            nested: Some(Nested {
                absmax: cpu(&nested.absmax, row / 4, 1),
                quant_map: nested.quant_map.to_device(Device::Cpu),
                ..*nested
            }),
        };
        let source = cpu(&weight, row, 4);
        assert_eq!(rows.packed, Nf4::quantize(&source).unwrap().packed, "row {row}");
        assert_eq!(cpu(&values, row, 4), rows.dequantize(Kind::BFloat16).unwrap(), "row {row}");
        assert!(rel(&cpu(&values, row, 4), &source) < 0.3, "row {row}");
    }
}

#[test]
fn models_in_4_bits_on_the_gpu() {
    let Some(device) = gpu("4-bit models") else { return };
    let load = |dir: &Path, kind, device, load_in_4bit| {
        let options = LoadOptions { load_in_4bit, ..LoadOptions::new(kind, device) };
        FastLanguageModel::from_pretrained_with(dir, options).unwrap_or_else(|error| panic!("{error:#}"))
    };
    let nf4 = root().join("nf4");
    let distance = |name: &str| {
        let model = load(&nf4.join(name), Kind::Float, device, false);
        let golden = tensors(&nf4.join(name).join("golden.safetensors"));
        let found = logits(&model.decoder, &Flat::new([&ids(&golden["input_ids"])[..]]));
        (name.to_string(), rel(&found.to_device(Device::Cpu), &golden["logits"]))
    };
    assert_close(1e-5, ["nested", "plain_bf16_storage", "mixed"].map(distance));
    let flat = Flat::new([&[5, 9, 3, 7, 11, 2][..]]);
    let flagged = load(&nf4.join("source"), Kind::Float, device, true);
    let stored = load(&nf4.join("nested"), Kind::Float, device, false);
    assert_eq!(logits(&flagged.decoder, &flat), logits(&stored.decoder, &flat));

    let gradients_on = |sequences: &[&[i64]], kind, device, policy| {
        let mut model = load(&nf4.join("mixed"), kind, device, false);
        model.load_adapter(&root().join("adapters/llama_nf4")).unwrap();
        gradients_of(&model.decoder, sequences, policy).1
    };
    let gradients =
        |kind, device, policy| gradients_on(&[&[3, 8, 5, 9, 14], &[7, 6, 5]], kind, device, policy);
    let reference = gradients(Kind::Double, Device::Cpu, Policy::KEEP);
    let plain = gradients(Kind::Float, Device::Cpu, Policy::KEEP);
    for policy in [Policy::KEEP, Policy::RECOMPUTE] {
        let ours = gradients(Kind::Float, device, policy);
        for (key, found) in &ours {
            // LoRA is f32 in every model, and so are its gradients; the reference's activations are f64.
            tolerance::assert_close(key, What::Gradient, found, &plain[key], &reference[key]);
        }
    }

    // In tiles, and with attention's output on the host.
    let long: Vec<i64> = (0..16_400).map(|i| (i * i + 3 * i) % 50).collect();
    let [whole, tiled] = [Policy::KEEP, Policy::HOST].map(|p| gradients_on(&[&long], Kind::Float, device, p));
    for (key, found) in &tiled {
        let distance = rel(found, &whole[key]);
        assert!(distance < 1e-5, "{key}: {distance:e}");
    }

    let place = tempfile::tempdir().unwrap();
    let write = |device, name: &str| {
        export::quantize(&nf4.join("source"), &place.path().join(name), device, None, |_, _| ()).unwrap();
        fs::read(place.path().join(name).join("model.safetensors")).unwrap()
    };
    assert!(write(Device::Cpu, "cpu") == write(device, "cuda"), "the files differ");
}

/// Dequantisation beside a device copy, in bytes read and written.
#[test]
fn nf4_speed() {
    let Some(device) = gpu("NF4 speed") else { return };
    const SETS: usize = 4;
    let [rows, columns] = [4096, 14336];
    let elements = (rows * columns) as f64;
    let weights: Vec<Tensor> =
        (0..SETS).map(|_| Tensor::randn([rows, columns], (Kind::BFloat16, device))).collect();
    let nf4: Vec<Nf4> = weights.iter().map(|weight| Nf4::quantize(weight).unwrap()).collect();
    let mut copies: Vec<Tensor> = weights.iter().map(Tensor::empty_like).collect();
    let copy = seconds(device, &mut |i| copies[i % SETS].copy_(&weights[i % SETS]));
    let rate = |bytes: f64, time: f64| bytes * elements / time / 1e9;
    let copy_rate = rate(4.0, copy);
    println!("{}; device copy {copy_rate:.0} GB/s", device::describe(device));
    let plain = seconds(device, &mut |i| {
        let nf4 = &nf4[i % SETS];
        let index =
            Tensor::stack(&[nf4.packed.bitwise_right_shift_tensor_scalar(4), nf4.packed.bitwise_and(15)], 1);
        let absmax = nf4.absmax.to_kind(Kind::Float).repeat_interleave_self_int(64, 0, None);
        let values = nf4.quant_map.index_select(0, &index.flatten(0, -1).to_kind(Kind::Int)) * absmax;
        drop(values.to_kind(Kind::BFloat16));
    });
    for (kind, bytes, pad) in
        [(Kind::BFloat16, 2.0, 0), (Kind::BFloat16, 2.0, 64), (Kind::Half, 2.0, 0), (Kind::Float, 4.0, 0)]
    {
        let wide: Vec<Tensor> = (0..SETS)
            .map(|_| Tensor::empty([rows, columns + pad], (kind, device)).narrow(1, 0, columns))
            .collect();
        let time = seconds(device, &mut |i| nf4[i % SETS].dequantize_into(&wide[i % SETS]).unwrap());
        let found = rate(bytes + 0.5 + 1.0 / 64.0 + 4.0 / 16384.0, time);
        println!(
            "nf4_dequantize [4096, 14336 + {pad}] {kind:?}: {:.1} us, {found:.0} GB/s, {:.0} % of a copy, {:.1} x plain",
            1e6 * time,
            100.0 * found / copy_rate,
            plain / time
        );
        assert!(time < plain);
    }
}
