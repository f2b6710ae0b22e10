//! The speed of the fused ops on a GPU, beside plain libtorch: what does not win is to go. Each says what it skips where there
//! is no GPU.

use std::time::Instant;

use ferrotune::device;
use ferrotune::ops::{self, Activation, AttentionSpec, Segments, Targets};
use tch::{Device, Kind, Tensor};

use crate::gpu::gpu;
use crate::ops::{norm, plain_rms_norm, plain_rope, plain_swiglu};

/// Seconds of one call, by the wall clock around many.
pub fn seconds(device: Device, call: &mut dyn FnMut(usize)) -> f64 {
    const WARM: usize = 8;
    const CALLS: usize = 48;
    let mut best = f64::INFINITY;
    (0..WARM).for_each(&mut *call);
    for _ in 0..5 {
        device::synchronize(device).unwrap();
        let start = Instant::now();
        (0..CALLS).for_each(&mut *call);
        device::synchronize(device).unwrap();
        best = best.min(start.elapsed().as_secs_f64() / CALLS as f64);
    }
    best
}

type UnaryOp<'a> = Box<dyn Fn(&Tensor) -> Tensor + 'a>;

/// One line of the table of speeds.
struct Timed<'a> {
    label: &'static str,
    shape: Vec<i64>,
    /// What the forward must read and write for one of the rows.
    bytes_per_row: i64,
    ours: UnaryOp<'a>,
    plain: UnaryOp<'a>,
    /// libtorch's own fused kernel, where it has one.
    fused: Option<UnaryOp<'a>>,
}

/// Each op in bf16 beside plain libtorch: every fused op must win, in time and in memory.
#[test]
fn fused_ops_beat_plain_libtorch() {
    let Some(device) = gpu("speed") else { return };
    // Several sets of inputs, so that no run finds its data in the L2 cache.
    const SETS: usize = 4;
    const ROWS: i64 = 16384;
    let random = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device));
    let weight = random(&[4096]);
    let angles = Tensor::randn([ROWS, 64], (Kind::Float, device));
    let (cos, sin) = (angles.cos(), angles.sin());
    let copy = {
        let x: Vec<Tensor> = (0..SETS).map(|_| random(&[ROWS, 4096])).collect();
        let mut y: Vec<Tensor> = x.iter().map(|t| t.empty_like()).collect();
        let time = seconds(device, &mut |i| y[i % SETS].copy_(&x[i % SETS]));
        4.0 * (ROWS * 4096) as f64 / time / 1e9
    };
    println!(
        "{}; device copy {copy:.0} GB/s; fwd+bwd includes a product and a sum",
        device::describe(device)
    );
    println!("bf16                                   GB/s   copy  x plain  x plain  x fused  peak");
    println!("                                    forward      %  forward  fwd+bwd  forward  ratio");
    let swiglu = |label, activation| Timed {
        label,
        shape: vec![ROWS, 16384],
        bytes_per_row: 6 * 8192,
        ours: Box::new(move |x| ops::swiglu(x, activation).unwrap()),
        plain: Box::new(move |x| plain_swiglu(x, activation)),
        fused: None,
    };
    let rms_norm = Timed {
        label: "rms_norm [16384, 4096]",
        shape: vec![ROWS, 4096],
        bytes_per_row: 4 * 4096,
        ours: Box::new(|x| ops::rms_norm(x, &norm(&weight, 0.0)).unwrap()),
        plain: Box::new(|x| plain_rms_norm(x, &weight, 0.0)),
        fused: Some(Box::new(|x| x.rms_norm([4096], Some(&weight), 1e-5))),
    };
    let rope = Timed {
        label: "rope [16384, 40, 128]",
        shape: vec![ROWS, 40, 128],
        bytes_per_row: 4 * 5120 + 2 * 4 * 64,
        ours: Box::new(|x| ops::rope(x, &cos, &sin).unwrap()),
        plain: Box::new(|x| plain_rope(x, &cos, &sin)),
        fused: None,
    };
    let silu = swiglu("swiglu [16384, 2 * 8192], silu", Activation::Silu);
    let gelu_tanh = swiglu("swiglu [16384, 2 * 8192], gelu_tanh", Activation::GeluTanh);
    for row in [rms_norm, rope, silu, gelu_tanh] {
        let x: Vec<Tensor> = (0..SETS).map(|_| random(&row.shape).set_requires_grad(true)).collect();
        let forward = |f: &UnaryOp| tch::no_grad(|| seconds(device, &mut |i| drop(f(&x[i % SETS]))));
        let dy = random(&(row.ours)(&x[0]).size());
        let whole = |f: &UnaryOp| {
            device::synchronize(device).unwrap();
            device::reset_peak_memory(device).unwrap();
            let before = device::memory(device).unwrap().allocated;
            let time = seconds(device, &mut |i| {
                let loss = (f(&x[i % SETS]) * &dy).sum(Kind::BFloat16);
                drop(Tensor::run_backward(&[loss], &[&x[i % SETS]], false, false));
            });
            (time, (device::memory(device).unwrap().peak_allocated - before) as f64)
        };
        let (ours_forward, plain_forward) = (forward(&row.ours), forward(&row.plain));
        let ((ours_time, ours_peak), (plain_time, plain_peak)) = (whole(&row.ours), whole(&row.plain));
        let rate = (row.bytes_per_row * ROWS) as f64 / ours_forward / 1e9;
        let fused = row.fused.map(|f| format!("{:.2}", forward(&f) / ours_forward));
        println!(
            "{:35} {rate:7.0} {:6.0} {:8.2} {:8.2} {:>8} {:6.2}",
            row.label,
            100.0 * rate / copy,
            plain_forward / ours_forward,
            plain_time / ours_time,
            fused.unwrap_or("-".into()),
            ours_peak / plain_peak,
        );
        let wins = ours_forward < plain_forward && ours_time < plain_time && ours_peak <= plain_peak;
        assert!(wins, "{} does not beat plain libtorch", row.label);
    }
}

/// Causal attention of libtorch over samples of one length, by the kernel it chooses: q `[N, H, D]`, k and v `[N, K, D]`.
fn torch_attention(q: &Tensor, k: &Tensor, v: &Tensor, length: i64) -> Tensor {
    let by_head = |x: &Tensor| x.view([-1, length, x.size()[1], x.size()[2]]).transpose(1, 2);
    let y = Tensor::scaled_dot_product_attention::<Tensor>(
        &by_head(q),
        &by_head(k),
        &by_head(v),
        None,
        0.0,
        true,
        None,
        true,
    );
    y.transpose(1, 2).reshape([q.size()[0], -1])
}

/// TFLOP/s of attention, counting the pairs that are seen: 4 H D operations a pair forward, 10 backward.
#[test]
fn attention_speed() {
    let Some(device) = gpu("speed of attention") else { return };
    println!("{}; bf16, 32 heads of 128 on 8 unless said", device::describe(device));
    println!(
        "                                             forward  fwd+bwd   libtorch: forward  fwd+bwd  TFLOP/s"
    );
    let ragged = |n: i32| vec![0, n / 2, n * 45 / 64, n * 55 / 64, n * 61 / 64, n];
    for (label, cu_seqlens, heads, kv_heads, head_dim, softcap, sliding_window) in [
        ("2 x 2048", vec![0, 2048, 4096], 32, 8, 128, None, None),
        ("4096 as 2000, 2096", vec![0, 2000, 4096], 32, 8, 128, None, None),
        ("4096 packed", ragged(4096), 32, 8, 128, None, None),
        ("1 x 16384", vec![0, 16384], 32, 8, 128, None, None),
        ("16384 packed", ragged(16384), 32, 8, 128, None, None),
        ("1 x 16384, window 4096", vec![0, 16384], 32, 8, 128, None, Some(4096)),
        ("2 x 4096, 16 of 256, softcap", vec![0, 4096, 8192], 16, 8, 256, Some(50.0), None),
        ("8192 packed, 16 of 256, softcap", ragged(8192), 16, 8, 256, Some(50.0), None),
        ("1 x 16384, 16 of 256, softcap, window 4096", vec![0, 16384], 16, 8, 256, Some(50.0), Some(4096)),
    ] {
        let n = i64::from(*cu_seqlens.last().unwrap());
        let scale = 1.0 / (head_dim as f64).sqrt();
        let (num_heads, num_kv_heads) = (heads, kv_heads);
        let spec = AttentionSpec { num_heads, num_kv_heads, head_dim, scale, softcap, sliding_window };
        let random = |heads| Tensor::randn([n, heads, head_dim], (Kind::BFloat16, device));
        let inputs = [heads, kv_heads, kv_heads].map(|heads| random(heads).set_requires_grad(true));
        let dy = random(heads).view([n, -1]);
        let pairs: f64 = (cu_seqlens.windows(2))
            .map(|segment| {
                let length = f64::from(segment[1] - segment[0]);
                let window = sliding_window.map_or(length, |window: i64| length.min(window as f64));
                window * (window + 1.0) / 2.0 + (length - window) * window
            })
            .sum();
        let operations = 4.0 * (heads * head_dim) as f64 * pairs / 1e12;
        let rates = |f: &dyn Fn() -> Tensor| {
            let forward = tch::no_grad(|| seconds(device, &mut |_| drop(f())));
            let both = seconds(device, &mut |_| {
                let loss = (f() * &dy).sum(Kind::BFloat16);
                drop(Tensor::run_backward(&[loss], &inputs, false, false));
            });
            [operations / forward, 3.5 * operations / both]
        };
        let segments = Segments::new(&cu_seqlens, device).unwrap();
        let [q, k, v] = &inputs;
        let [forward, both] = rates(&|| ops::attention(q, k, v, &segments, &spec).unwrap());
        let length = i64::from(cu_seqlens[1]);
        let torch =
            if softcap.is_none() && sliding_window.is_none() && n % length == 0 && cu_seqlens.len() < 4 {
                let [forward, both] = rates(&|| torch_attention(q, k, v, length));
                format!("{forward:18.0} {both:8.0}")
            } else {
                String::new()
            };
        println!("{label:44} {forward:7.0} {both:8.0} {torch}");
    }
}

/// The loss over Llama-3's vocabulary: effective TFLOP/s of forward and backward (two products of 2 N C V), and memory
/// beyond the hidden states and their gradient.
#[test]
fn loss_speed_and_memory() {
    let Some(device) = gpu("speed of the loss") else { return };
    const C: i64 = 4096;
    const V: i64 = 128_256;
    let needed = (3 * V * C * 2 + 2 * 65_536 * C * 2) as u64;
    let free = device::memory(device).unwrap().free;
    if free < needed {
        println!("skipped: the loss: {needed} bytes are needed, {free} are free");
        return;
    }
    let weight = Tensor::randn([V, C], (Kind::BFloat16, device)) * 0.02;
    for (n, kept) in [(4096, 1), (65_536, 1), (65_536, 2)] {
        let hidden = Tensor::randn([n, C], (Kind::BFloat16, device)).set_requires_grad(true);
        let labels: Vec<i64> = (0..n).map(|i| if i % kept == 0 { i * 31 % V } else { -100 }).collect();
        let targets = Targets::new(&labels, device).unwrap();
        device::synchronize(device).unwrap();
        device::reset_peak_memory(device).unwrap();
        let before = device::memory(device).unwrap().allocated;
        let run = || {
            let loss = ops::linear_cross_entropy(&hidden, &weight, &targets, None).unwrap();
            Tensor::run_backward(&[loss], &[&hidden], false, false)
        };
        drop(run());
        device::synchronize(device).unwrap();
        let calls = (65_536 / n).max(3);
        let start = Instant::now();
        (0..calls).for_each(|_| drop(run()));
        device::synchronize(device).unwrap();
        let time = start.elapsed().as_secs_f64() / calls as f64;
        let rate = 4.0 * ((n / kept) * C * V) as f64 / time / 1e12;
        let peak = device::memory(device).unwrap().peak_allocated - before - (n * C * 2) as u64;
        let gib = peak as f64 / f64::from(1 << 30);
        println!(
            "loss of {} targets in {n} rows: {:.2} ms, {rate:.0} TFLOP/s, {gib:.2} GiB beyond hidden states",
            n / kept,
            1e3 * time
        );
        assert!(gib < 1.0, "the loss takes {gib:.2} GiB");
    }
}
