//! 8-bit AdamW on the GPU: the bytes of the CPU, and the speed.

use ferrotune::device::{self, Graph};
use ferrotune::ops::{self, Moments8bit};
use tch::{Device, Kind, Tensor};

use crate::gpu::gpu;
use crate::gpu_speed::seconds;
use crate::optim::{Trained8bit, check_golden, scalar, step_8bit};
use crate::tolerance::rel;

fn random(n: i64) -> Tensor {
    Tensor::randn([n], (Kind::Float, Device::Cpu))
}

#[test]
fn bytes_are_those_of_the_cpu() {
    let Some(device) = gpu("8-bit AdamW") else { return };
    check_golden(device);
    // More tensors than a launch takes, around the borders of blocks.
    let sizes: Vec<i64> =
        (0..600).map(|i| [1, 255, 256, 257, 511, 4096, 4099, 100_003][i % 8] + 8 * i as i64).collect();
    let starts: Vec<Tensor> = sizes.iter().map(|&n| random(n)).collect();
    let cpu: Vec<Trained8bit> = starts.iter().map(Trained8bit::new).collect();
    let cuda: Vec<Trained8bit> =
        starts.iter().map(|start| Trained8bit::new(&start.to_device(device))).collect();
    for (step, skip) in [(1, 0.0), (2, 0.0), (3, 1.0), (3, 0.0), (1000, 0.0)] {
        let spread = |n: i64| random(n) * (random(n) * 4.0).exp() * 1e-3;
        let grads: Vec<Tensor> = sizes.iter().map(|&n| spread(n)).collect();
        step_8bit(&cpu, &grads, step, skip);
        step_8bit(&cuda, &grads, step, skip);
        for (i, (cpu, cuda)) in cpu.iter().zip(&cuda).enumerate() {
            for (state, (a, b)) in cpu.states().into_iter().zip(cuda.states()).enumerate() {
                assert_eq!(a, &b.to_device(Device::Cpu), "state {state} of tensor {i}, step {step}");
            }
            let distance = rel(&cuda.parameter, &cpu.parameter);
            assert!(distance.iter().all(|&distance| distance <= 1e-6), "{i}, step {step}: {distance:?}");
        }
    }
}

/// Addresses that no vector fits, and gradients in columns of a wider tensor.
#[test]
fn any_address_will_do() {
    let Some(device) = gpu("8-bit AdamW at odd addresses") else { return };
    let there = |tensor: &Tensor| tensor.to_device(device);
    let (start, grads) = (random(5001), [random(5000), random(5000)]);
    let odd = |tensor: &Tensor| there(tensor).narrow(0, 1, 5000);
    let shifted = Trained8bit {
        parameter: odd(&start).set_requires_grad(true),
        moments: Moments8bit {
            state1: odd(&Tensor::zeros([5001], (Kind::Uint8, Device::Cpu))),
            state2: odd(&Tensor::zeros([5001], (Kind::Uint8, Device::Cpu))),
            ..Moments8bit::zeros(5000, device).unwrap()
        },
    };
    let [shifted, cpu] = [[shifted], [Trained8bit::new(&start.narrow(0, 1, 5000))]];
    for (step, grad) in (1..).zip(&grads) {
        step_8bit(&shifted, &[grad.shallow_clone()], step, 0.0);
        step_8bit(&cpu, &[grad.shallow_clone()], step, 0.0);
    }
    for (a, b) in cpu[0].states().into_iter().zip(shifted[0].states()) {
        assert_eq!(a, &b.to_device(Device::Cpu));
    }
}

/// LoRA r = 16 on all seven projections of Llama-3.1-8B: 448 tensors, 41.9 million elements.
fn lora_8b() -> Vec<i64> {
    const SIDES: [(i64, i64); 7] = [
        (4096, 4096),
        (1024, 4096),
        (1024, 4096),
        (4096, 4096),
        (14_336, 4096),
        (14_336, 4096),
        (4096, 14_336),
    ];
    (0..32).flat_map(|_| SIDES).flat_map(|(rows, columns)| [16 * columns, 16 * rows]).collect()
}

#[test]
fn speed() {
    let Some(device) = gpu("the speed of AdamW") else { return };
    let sizes = lora_8b();
    let n: i64 = sizes.iter().sum();
    let options = (Kind::Float, device);
    let trained: Vec<Trained8bit> =
        sizes.iter().map(|&n| Trained8bit::new(&Tensor::randn([n], options))).collect();
    let grads: Vec<Tensor> = sizes.iter().map(|&n| Tensor::randn([n], options)).collect();
    step_8bit(&trained, &grads, 1, 0.0);
    let there = |value: f64| scalar(value).to_device(device);
    let (step, rate, scale, skip) = (there(2.0), there(1e-4), there(1.0), there(0.0));
    let adamw = ops::AdamW {
        step: &step,
        learning_rate: &rate,
        grad_scale: &scale,
        skip: &skip,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        weight_decay: 0.001,
    };
    let params: Vec<&Tensor> = trained.iter().map(|trained| &trained.parameter).collect();
    let moments: Vec<&Moments8bit> = trained.iter().map(|trained| &trained.moments).collect();
    let maps = ops::adamw_8bit_maps(device).unwrap();
    let full: Vec<[Tensor; 2]> =
        sizes.iter().map(|&n| [Tensor::zeros([n], options), Tensor::zeros([n], options)]).collect();
    let in_8_bits = || ops::adamw_8bit_step(params.iter().copied(), &moments, &maps, adamw).unwrap();
    let in_f32 = || {
        ops::adamw_step(
            params.iter().copied(),
            full.iter().map(|m| &m[0]),
            full.iter().map(|m| &m[1]),
            adamw,
        )
        .unwrap();
    };
    let norm = || drop(ops::grad_norm(params.iter().copied()).unwrap());
    let (from, mut to) = (Tensor::zeros([n], options), Tensor::zeros([n], options));
    let copy = 8.0 * n as f64 / seconds(device, &mut |_| to.copy_(&from)) / 1e9;
    println!("{} tensors, {n} elements; device copy {copy:.0} GB/s", sizes.len());
    let mut times = Vec::new();
    let works: [(&str, f64, &dyn Fn()); 3] =
        [("8-bit", 16.0625, &in_8_bits), ("f32", 32.0, &in_f32), ("norm", 4.0, &norm)];
    for (name, bytes, call) in works {
        let eager = seconds(device, &mut |_| call());
        let (mut graph, ()) = Graph::record(|| {
            call();
            Ok(())
        })
        .unwrap();
        let replayed = seconds(device, &mut |_| graph.replay().unwrap());
        let rate = bytes * n as f64 / replayed / 1e9;
        println!(
            "{name:6} {:7.1} us launched by itself, {:7.1} us as a graph: {rate:.0} GB/s, {:.0} % of the copy",
            eager * 1e6,
            replayed * 1e6,
            100.0 * rate / copy
        );
        times.push(replayed);
    }
    device::synchronize(device).unwrap();
    assert!(times[0] < times[1], "8 bits are not faster: {times:?}");
}
