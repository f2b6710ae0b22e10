//! What optimizers do to all parameters at once.

use ferrotune::ops::{self, Moments8bit};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::golden::{root, tensors};
use crate::tolerance::{What, assert_close, rel};

/// Around the borders of the vectors and runs that kernels work in.
const SIZES: [i64; 9] = [1, 15, 16, 17, 255, 4096, 4097, 3 * 4096, 50_001];
/// One parameter has no gradient.
const WITHOUT: usize = 1;

pub fn scalar(value: f64) -> Tensor {
    Tensor::full([0i64; 0], value, (Kind::Float, Device::Cpu))
}

/// Parameters of `SIZES`, and gradients of very different sizes for three steps.
struct Run {
    parameters: Vec<Tensor>,
    grads: [Vec<Tensor>; 3],
}

/// The same each time, beside tests that draw from libtorch's generator: where a step all but cancels a parameter, no rounding is
/// within the rule.
fn random() -> Run {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut draw = |scale: f64| -> Vec<Tensor> {
        let mut one = |i: i32, n: i64| {
            let values: Vec<f64> = (0..n).map(|_| random.random_range(-2.0..2.0)).collect();
            Tensor::from_slice(&values) * scale.powi(i - 4)
        };
        (0..).zip(SIZES).map(|(i, n)| one(i, n)).collect()
    };
    Run { parameters: draw(1.0), grads: [draw(10.0), draw(10.0), draw(10.0)] }
}

/// Those of the golden file; the scalars are step, learning rate, gradient scale and skip.
fn settings([step, learning_rate, grad_scale, skip]: &[Tensor; 4]) -> ops::AdamW<'_> {
    let (beta1, beta2, epsilon, weight_decay) = (0.9, 0.999, 1e-8, 0.1);
    ops::AdamW { step, learning_rate, grad_scale, skip, beta1, beta2, epsilon, weight_decay }
}

/// Copies that train, with those gradients.
fn with_grads(parameters: &[Tensor], grads: &[Tensor], kind: Kind) -> Vec<Tensor> {
    let copies = parameters.iter().zip(grads).enumerate().map(|(i, (parameter, grad))| {
        let copy = parameter.to_kind(kind).copy().set_requires_grad(true);
        if i != WITHOUT {
            (&copy * grad.to_kind(kind)).sum(kind).backward();
        }
        copy
    });
    copies.collect()
}

/// Three AdamW steps, the second one skipped: parameters and moments, one after the other.
fn three_steps(run: &Run, kind: Kind) -> Vec<Tensor> {
    let mut parameters: Vec<Tensor> = run.parameters.iter().map(|p| p.to_kind(kind)).collect();
    let zeros = || parameters.iter().map(Tensor::zeros_like).collect::<Vec<_>>();
    let (exp_avg, exp_avg_sq) = (zeros(), zeros());
    for (grads, (step, skip)) in run.grads.iter().zip([(1.0, 0.0), (2.0, 1.0), (2.0, 0.0)]) {
        let trained = with_grads(&parameters, grads, kind);
        let scalars = [step, 1e-2, 4.0, skip].map(scalar);
        let adamw = settings(&scalars);
        ops::adamw_step(&trained, &exp_avg, &exp_avg_sq, adamw).unwrap();
        parameters = trained.iter().map(Tensor::detach).collect();
    }
    [parameters, exp_avg, exp_avg_sq].into_iter().flatten().collect()
}

#[test]
fn adamw_in_f32_agrees_with_libtorchs() {
    let run = random();
    let (ours, reference) = (three_steps(&run, Kind::Float), three_steps(&run, Kind::Double));
    for (i, (ours, reference)) in ours.iter().zip(&reference).enumerate() {
        assert_close(&format!("adamw {i}"), What::Value, ours, reference, reference);
    }
    assert!(ours[WITHOUT].equal(&run.parameters[WITHOUT].to_kind(Kind::Float)), "it has no gradient");
}

#[test]
fn the_norm_of_all_gradients_is_summed_in_f64() {
    let Run { parameters, grads: [grads, ..] } = random();
    let norm = |kind| ops::grad_norm(&with_grads(&parameters, &grads, kind)).unwrap();
    assert_close("norm", What::Value, &norm(Kind::Float), &norm(Kind::Double), &norm(Kind::Double));
    assert_eq!(ops::grad_norm([]).unwrap().double_value(&[]), 0.0);
}

/// A parameter of `n` elements with moments in 8 bits.
pub struct Trained8bit {
    pub parameter: Tensor,
    pub moments: Moments8bit,
}

impl Trained8bit {
    pub fn new(start: &Tensor) -> Trained8bit {
        let parameter = start.copy().set_requires_grad(true);
        let moments = Moments8bit::zeros(start.numel() as i64, start.device()).unwrap();
        Trained8bit { parameter, moments }
    }

    pub fn states(&self) -> [&Tensor; 4] {
        let moments = &self.moments;
        [&moments.state1, &moments.state2, &moments.absmax1, &moments.absmax2]
    }
}

/// A step with these gradients: the settings of the golden file.
pub fn step_8bit(trained: &[Trained8bit], grads: &[Tensor], step: i64, skip: f64) {
    let device = trained[0].parameter.device();
    let scalars = [step as f64, 1e-2, 1.0, skip].map(|value| scalar(value).to_device(device));
    for (Trained8bit { parameter, .. }, grad) in trained.iter().zip(grads) {
        let mut parameter = parameter.shallow_clone();
        parameter.zero_grad();
        (&parameter * grad.to_kind(parameter.kind()).to_device(device)).sum(parameter.kind()).backward();
    }
    let adamw = settings(&scalars);
    let moments: Vec<&Moments8bit> = trained.iter().map(|trained| &trained.moments).collect();
    let maps = ops::adamw_8bit_maps(device).unwrap();
    ops::adamw_8bit_step(trained.iter().map(|trained| &trained.parameter), &moments, &maps, adamw).unwrap();
}

#[test]
fn bytes_are_those_of_bitsandbytes() {
    check_golden(Device::Cpu);
}

pub fn check_golden(device: Device) {
    let golden = tensors(&root().join("optim.safetensors"));
    for name in ["short_end", "with_zeros"] {
        let of = |key: &str| &golden[&format!("{name}.{key}")];
        let trained = [Trained8bit::new(&of("param").to_kind(Kind::Float).to_device(device))];
        for step in 1..=5 {
            let grad = of("grad").to_kind(Kind::Float).roll([37 * step], [0]) * 0.5f64.powi(step as i32);
            step_8bit(&trained, &[grad], step, 0.0);
        }
        for (key, ours) in ["state1", "state2", "absmax1", "absmax2"].into_iter().zip(trained[0].states()) {
            assert_eq!(&ours.to_device(Device::Cpu), of(key), "{name}.{key}");
        }
        let distance = rel(&trained[0].parameter, of("updated"));
        assert!(distance.iter().all(|&distance| distance <= 1e-6), "{name}: {distance:?}");
    }
}

#[test]
fn adamw_in_8_bits_agrees_with_its_formula() {
    let Run { parameters, grads } = random();
    let [ours, reference] = [Kind::Float, Kind::Double].map(|kind| {
        let trained: Vec<Trained8bit> =
            parameters.iter().map(|parameter| Trained8bit::new(&parameter.to_kind(kind))).collect();
        step_8bit(&trained, &grads[0], 1, 0.0);
        let before: Vec<Tensor> = trained.iter().map(|trained| trained.parameter.detach().copy()).collect();
        let states: Vec<Tensor> = trained.iter().flat_map(Trained8bit::states).map(Tensor::copy).collect();
        step_8bit(&trained, &grads[1], 2, 1.0);
        assert!(before.iter().zip(&trained).all(|(before, after)| before.equal(&after.parameter)));
        assert!(states.iter().zip(trained.iter().flat_map(Trained8bit::states)).all(|(a, b)| a.equal(b)));
        step_8bit(&trained, &grads[2], 2, 0.0);
        trained
    });
    for (i, (ours, reference)) in ours.iter().zip(&reference).enumerate() {
        // Where a value lies between two of the map but for its rounding, the bytes differ by 1, and by another 1 in the next step.
        for (ours, reference) in ours.states().into_iter().zip(reference.states()).take(2) {
            let difference = (ours.to_kind(Kind::Int) - reference.to_kind(Kind::Int)).abs();
            let share = difference.ne(0).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!(difference.max().int64_value(&[]) <= 2 && share <= 1e-3, "{i}: {share}");
        }
        for (ours, reference) in ours.states().into_iter().zip(reference.states()).skip(2) {
            assert_close(&format!("absmax {i}"), What::Value, ours, reference, reference);
        }
        let (ours, reference) = (&ours.parameter, &reference.parameter);
        assert!(rel(ours, reference)[0] <= 1e-5, "{i}: {:?}", rel(ours, reference));
    }
}
