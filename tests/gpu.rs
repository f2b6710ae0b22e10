//! The CUDA kernels: in every dtype against the f64 formula on the CPU, past 2^31 elements, and their speed.
//! Without a GPU each test says that it is skipped. On a GPU machine run these alone (`tests gpu::`): CUDA must be loaded
//! before any other test uses libtorch.

use std::collections::HashMap;
use std::process::Command;

use ferrotune::device::{self, Choice};
use ferrotune::ops::{self, Activation, AttentionSpec, Policy, Segments};
use tch::{Device, Kind, Tensor};

use crate::attention::{attentions, check_one_row};
use crate::golden::{self, Fed, Flat, checkpoints, load_on, logits, rel, root};
use crate::ops::{check, check_empty, check_entropy, norm, ops};
use crate::parity::{cases, gradients_of};
use crate::tolerance::{What, assert_close, f64_on_cpu, floor};

/// The first GPU, or a line that says what is skipped.
pub fn gpu(what: &str) -> Option<Device> {
    if device::probe().devices.is_empty() {
        println!("skipped: {what}: {}", device::probe().problem);
        return None;
    }
    Some(device::init(Choice::Cuda(0), None).unwrap())
}

#[test]
fn cuda_that_lacks_is_explained() {
    if !device::probe().devices.is_empty() {
        println!("skipped: there is a GPU");
        return;
    }
    let error = format!("{:#}", device::init(Choice::Cuda(0), None).unwrap_err());
    assert!(error.starts_with("CUDA was requested, but cannot be used: "), "{error}");
    assert_eq!(device::init(Choice::Auto, None).unwrap(), Device::Cpu);
}

/// ATen answers its first question about CUDA for good, so each order needs a process of its own.
pub fn in_child(test: &str) {
    if device::probe().devices.is_empty() {
        println!("skipped: {test}: {}", device::probe().problem);
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("FERROTUNE_TEST_CHILD", test)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

pub fn is_child(test: &str) -> bool {
    std::env::var_os("FERROTUNE_TEST_CHILD").is_some_and(|name| name == test)
}

#[test]
fn init_before_torch() {
    const TEST: &str = "gpu::init_before_torch";
    if !is_child(TEST) {
        return in_child(TEST);
    }
    let device = device::init(Choice::Auto, None).unwrap();
    assert_eq!(device, Device::Cuda(0));
    assert!(tch::Cuda::is_available());
    assert_eq!(Tensor::ones([3], (Kind::Float, device)).sum(Kind::Float).double_value(&[]), 3.0);
}

#[test]
fn torch_before_init() {
    const TEST: &str = "gpu::torch_before_init";
    if !is_child(TEST) {
        return in_child(TEST);
    }
    assert!(!tch::Cuda::is_available());
    let error = format!("{:#}", device::init(Choice::Cuda(0), None).unwrap_err());
    assert!(error.contains("before ferrotune::device::init"), "{error}");
}

#[test]
fn kernels_agree_with_formulas() {
    let Some(device) = gpu("kernels against formulas") else { return };
    check_empty(device);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
        check_entropy(kind, device);
    }
    for op in ops() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
            check(&op, kind, device);
        }
    }
}

#[test]
fn attention_agrees_with_its_definition() {
    let Some(device) = gpu("attention") else { return };
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
        check_one_row(kind, device);
    }
    for op in attentions() {
        for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
            check(&op, kind, device);
        }
    }
}

/// Where gradients are summed in groups of heads, because there are many rows.
#[test]
fn attention_of_many_rows() {
    let Some(device) = gpu("long samples") else { return };
    for (cu_seqlens, heads, kv_heads, window) in [
        (vec![0, 12_288], 32, 8, None),
        (vec![0, 8_000, 12_300], 32, 8, None),
        (vec![0, 8_000, 12_300], 32, 8, Some(3_000)),
        (vec![0, 6_000, 12_000], 32, 32, Some(3_000)),
    ] {
        let n = i64::from(*cu_seqlens.last().unwrap());
        let spec = AttentionSpec {
            num_heads: heads,
            num_kv_heads: kv_heads,
            head_dim: 128,
            scale: 0.09,
            softcap: None,
            sliding_window: window,
        };
        let random = |heads: i64| Tensor::randn([n, heads, 128], (Kind::BFloat16, device));
        let (q, k, v, dy) = (random(heads), random(kv_heads), random(kv_heads), random(heads).view([n, -1]));
        let gradients = |kind: Kind| {
            let [q, k, v] = [&q, &k, &v].map(|x| x.to_kind(kind).detach().set_requires_grad(true));
            let segments = Segments::new(&cu_seqlens, device).unwrap();
            let y = ops::attention(&q, &k, &v, &segments, &spec).unwrap();
            Tensor::run_backward(&[(y * dy.to_kind(kind)).sum(kind)], &[q, k, v], false, false)
        };
        for (ours, f32s) in gradients(Kind::BFloat16).iter().zip(gradients(Kind::Float)) {
            let apart = crate::tolerance::rel(ours, &f32s);
            let label = format!("{cu_seqlens:?}, {heads} heads on {kv_heads}, window {window:?}: {apart:?}");
            assert!(apart.iter().all(|&apart| apart < floor(Kind::BFloat16, What::Gradient)), "{label}");
        }
    }
}

#[test]
fn decoders_on_the_gpu_match_transformers() {
    let Some(device) = gpu("decoders against transformers") else { return };
    let mut distances = Vec::new();
    for name in checkpoints() {
        let dir = root().join(&name);
        let decoder = load_on(&dir, Kind::Float, device);
        for (case, input_ids, expected) in cases(&dir) {
            let found = logits(&decoder, &Flat::new([&input_ids[..]])).to_device(Device::Cpu);
            distances.push((case, golden::rel(&found, &expected)));
        }
    }
    golden::assert_close(1e-5, distances);
}

/// A prompt into an empty cache, a second one behind it, and single tokens.
#[test]
fn cached_decoders_on_the_gpu_match_the_cpu() {
    let Some(device) = gpu("decoders with a cache") else { return };
    let ids: Vec<i64> = (0..40).map(|i| (i * i + 7) % 50).collect();
    let mut distances = Vec::new();
    for name in checkpoints() {
        let logits = |device| {
            let decoder = load_on(&root().join(&name), Kind::Float, device);
            let mut cached = Fed::new(&decoder, ids.len());
            let read = |fed: usize| cached.logits(&ids[..fed], fed).to_device(Device::Cpu);
            Tensor::stack(&[30, 38, 39, 40].map(read), 0)
        };
        distances.push((name.clone(), golden::rel(&logits(device), &logits(Device::Cpu))));
    }
    golden::assert_close(1e-5, distances);
}

/// Losses and gradients of packed samples: the GPU in f32 and bf16 beside the CPU in the same type, against f64.
#[test]
fn gradients_on_the_gpu_match_the_cpu() {
    let Some(device) = gpu("gradients of decoders") else { return };
    for name in checkpoints() {
        let dir = root().join(&name);
        for lengths in [&[3, 38, 1, 17][..], &[9, 9, 9]] {
            let sequences: Vec<Vec<i64>> = lengths
                .iter()
                .map(|&length| (0..length).map(|i| (i * i + 7 * length) % 50).collect())
                .collect();
            let all: Vec<&[i64]> = sequences.iter().map(Vec::as_slice).collect();
            let gradients = |kind, device, policy| {
                let mut decoder = load_on(&dir, kind, device);
                decoder.train_all().unwrap();
                gradients_of(&decoder, &all, policy)
            };
            let (_, reference) = gradients(Kind::Double, Device::Cpu, Policy::KEEP);
            for kind in [Kind::Float, Kind::BFloat16] {
                let (_, plain) = gradients(kind, Device::Cpu, Policy::KEEP);
                for policy in [Policy::KEEP, Policy::RECOMPUTE, Policy::HOST] {
                    let (_, ours) = gradients(kind, device, policy);
                    let label = format!("{name} {lengths:?}");
                    if kind == Kind::Float {
                        for (key, gradient) in &ours {
                            let label = format!("{label} {key}");
                            assert_close(&label, What::Gradient, gradient, &plain[key], &reference[key]);
                        }
                        continue;
                    }
                    // The largest error of one small tensor is chance in bf16: all gradients as one vector. Weights
                    // train in f32 whatever the activations are; the tolerance is that of the activations.
                    let joined = |found: &HashMap<String, Tensor>, kind| {
                        let flat = |key| f64_on_cpu(&found[key]).flatten(0, -1);
                        Tensor::cat(&ours.keys().map(flat).collect::<Vec<_>>(), 0).to_kind(kind)
                    };
                    let (ours, plain) = (joined(&ours, kind), joined(&plain, kind));
                    assert_close(&label, What::Gradient, &ours, &plain, &joined(&reference, Kind::Double));
                }
            }
        }
    }
}

/// Samples long enough that attention's output goes to the host beside the blocks' inputs, and that the MLP goes in tiles.
#[test]
fn what_lies_on_the_host_gives_the_same_gradients() {
    let Some(device) = gpu("long samples on the host") else { return };
    let sequences: Vec<Vec<i64>> =
        [8200, 8199].iter().map(|&n| (0..n).map(|i| (i * i + 3 * i) % 50).collect()).collect();
    let all: Vec<&[i64]> = sequences.iter().map(Vec::as_slice).collect();
    for name in ["llama_gqa_llama3", "gemma2"] {
        let gradients = |policy| {
            let mut decoder = load_on(&root().join(name), Kind::Float, device);
            decoder.train_all().unwrap();
            gradients_of(&decoder, &all, policy).1
        };
        let kept = gradients(Policy::KEEP);
        for policy in [Policy::RECOMPUTE, Policy::HOST] {
            for (key, gradient) in gradients(policy) {
                // Sums of 16,399 rows in f32, tile by tile or at once.
                let distance = rel(&gradient, &kept[&key]);
                assert!(distance < 1e-5, "{name} {policy:?} {key}: {distance:e}");
            }
        }
    }
}

#[test]
fn weight_gradient_repeats_bit_for_bit() {
    let Some(device) = gpu("repeated weight gradient") else { return };
    let x = Tensor::randn([5000, 1024], (Kind::BFloat16, device)).set_requires_grad(true);
    let weight = Tensor::randn([1024], (Kind::Float, device)).set_requires_grad(true);
    let gradients = || {
        let y = ops::rms_norm(&x, &norm(&weight, 0.0)).unwrap();
        Tensor::run_backward(&[y.square().sum(Kind::Float)], &[&x, &weight], false, false)
    };
    let (first, second) = (gradients(), gradients());
    assert!(first.iter().zip(&second).all(|(a, b)| a.equal(b)));
}

#[test]
fn recorded_steps_are_the_same_steps() {
    let Some(device) = gpu("recorded steps") else { return };
    crate::step::check_recorded_steps(device);
    crate::step::check_bad_steps(device);
    crate::step::check_resumed_steps(device);
}

/// In a process of its own: what is deterministic stays so.
#[test]
fn deterministic_steps_repeat_bit_for_bit() {
    const TEST: &str = "gpu::deterministic_steps_repeat_bit_for_bit";
    if !is_child(TEST) {
        return in_child(TEST);
    }
    let device = device::init(Choice::Cuda(0), None).unwrap();
    crate::step::check_deterministic_steps(device);
    // Every weight of every architecture: no op is without a deterministic algorithm.
    let sequences = [3, 38, 1, 17].map(|n: i64| (0..n).map(|i| (i * i + 7 * n) % 50).collect::<Vec<_>>());
    let sequences = sequences.each_ref().map(Vec::as_slice);
    for name in checkpoints() {
        for kind in [Kind::Float, Kind::BFloat16] {
            let gradients = || {
                let mut decoder = load_on(&root().join(&name), kind, device);
                decoder.train_all().unwrap();
                gradients_of(&decoder, &sequences, Policy::KEEP).1
            };
            let (first, second) = (gradients(), gradients());
            assert!(first.iter().all(|(key, a)| a.equal(&second[key])), "{name} {kind:?}");
        }
    }
}

#[test]
fn recording_may_fail() {
    let Some(device) = gpu("a recording that fails") else { return };
    let x = Tensor::randn([64], (Kind::Float, device));
    let error =
        device::Graph::record(|| Ok(x.f_sum(Kind::Float)?.f_double_value(&[])?)).err().expect("it waits");
    println!("{error:#}");
    assert!(Tensor::randn([64], (Kind::Float, device)).f_isfinite().unwrap().all().int64_value(&[]) == 1);
    let (mut graph, y) = device::Graph::record(|| Ok(&x * 2.0)).unwrap();
    graph.replay().unwrap();
    assert!(y.equal(&(&x + &x)));
}

/// Kernels that a graph launches are seen too.
#[test]
fn work_is_timed_and_profiled() {
    let Some(device) = gpu("profile") else { return };
    let x = Tensor::randn([2048, 2048], (Kind::BFloat16, device));
    drop(x.matmul(&x));
    let (mut graph, y) = device::Graph::record(|| Ok(x.matmul(&x))).unwrap();
    let ms = device::milliseconds(device, || graph.replay()).unwrap();
    assert!(ms > 1e-3 && ms < 1e3, "{ms} ms");
    assert!(y.equal(&x.matmul(&x)));
    let work = device::profile(device, || {
        graph.replay()?;
        drop(x.f_exp()?);
        Ok(())
    })
    .unwrap();
    println!("{work:?}");
    assert!(work.len() >= 2 && work.iter().all(|kernel| kernel.duration_ns > 0), "{work:?}");
}

#[test]
fn memory_is_counted() {
    let Some(device) = gpu("memory statistics") else { return };
    let before = device::memory(device).unwrap();
    let tensor = Tensor::zeros([1 << 28], (Kind::Uint8, device));
    device::synchronize(device).unwrap();
    let after = device::memory(device).unwrap();
    // Other tests allocate at the same time, so only bounds hold.
    assert!(after.peak_allocated >= 1 << 28 && after.reserved >= 1 << 28, "{before:?} {after:?}");
    assert!(after.total > after.free && after.total > 1 << 30, "{after:?}");
    drop(tensor);
}

/// Rows of a result, first, last and around element 2^31, against the f64 formula on just these rows.
#[test]
fn past_two_to_the_31_elements() {
    let Some(device) = gpu("2^31 elements") else { return };
    const WIDTH: i64 = 4096;
    let n = (1i64 << 31) / WIDTH + 100;
    let needed = 6 * 2 * (n * WIDTH) as u64;
    let free = device::memory(device).unwrap().free;
    if free < needed {
        println!("skipped: 2^31 elements: {needed} bytes are needed, {free} are free");
        return;
    }
    let middle = (1i64 << 31) / WIDTH;
    let rows = Tensor::from_slice(&[0, 1, middle - 1, middle, middle + 1, n - 1]);
    let options = (Kind::BFloat16, device);
    let wide = Tensor::randn([n, WIDTH], options).set_requires_grad(true);
    let weight = Tensor::randn([WIDTH], options);
    let angles = Tensor::randn([n, 64], (Kind::Float, device));
    let (cos, sin) = (angles.cos(), angles.sin());
    let sample = |t: &Tensor| t.index_select(0, &rows.to_device(t.device()));
    type Rowwise = Box<dyn Fn(&Tensor, &Tensor, &Tensor, &Tensor) -> Tensor>;
    let ops: [(&str, Rowwise); 3] = [
        ("rms_norm", Box::new(|x, w, _, _| ops::rms_norm(x, &norm(w, 0.0)).unwrap())),
        ("rope", Box::new(|x, _, c, s| ops::rope(&x.view([-1, 32, 128]), c, s).unwrap().view([-1, WIDTH]))),
        ("swiglu", Box::new(|x, _, _, _| ops::swiglu(x, Activation::Silu).unwrap())),
    ];
    for (label, op) in ops {
        let y = op(&wide, &weight, &cos, &sin);
        let dy = Tensor::randn(y.size(), options);
        let dx = Tensor::run_backward(&[(&y * &dy).sum(Kind::BFloat16)], &[&wide], false, false).remove(0);
        let f64_of = |t: &Tensor| sample(&t.detach()).to_device(Device::Cpu).to_kind(Kind::Double);
        let x = f64_of(&wide).set_requires_grad(true);
        let w = weight.to_device(Device::Cpu).to_kind(Kind::Double);
        let reference = op(&x, &w, &f64_of(&cos), &f64_of(&sin));
        let gradient =
            Tensor::run_backward(&[(&reference * f64_of(&dy)).sum(Kind::Double)], &[&x], false, false);
        // The reference is its own plain form: the floors alone decide.
        assert_close(label, What::Value, &sample(&y), &reference, &reference);
        assert_close(label, What::Gradient, &sample(&dx), &gradient[0], &gradient[0]);
    }
}
