//! What optimizers do to all parameters at once.

use ferrotune::ops;
use tch::{Device, Kind, Tensor};

use crate::tolerance::{What, assert_close};

/// Around the borders of the vectors and runs that kernels work in.
const SIZES: [i64; 9] = [1, 15, 16, 17, 255, 4096, 4097, 3 * 4096, 50_001];
/// One parameter has no gradient.
const WITHOUT: usize = 1;

fn scalar(value: f64) -> Tensor {
    Tensor::full([0i64; 0], value, (Kind::Float, Device::Cpu))
}

/// Parameters of `SIZES`, and gradients of very different sizes for three steps.
struct Run {
    parameters: Vec<Tensor>,
    grads: [Vec<Tensor>; 3],
}

fn random() -> Run {
    let draw = |scale: f64| -> Vec<Tensor> {
        let options = (Kind::Double, Device::Cpu);
        (0..).zip(SIZES).map(|(i, n)| Tensor::randn([n], options) * scale.powi(i - 4)).collect()
    };
    Run { parameters: draw(1.0), grads: [draw(10.0), draw(10.0), draw(10.0)] }
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
        let adamw = ops::AdamW {
            step: &scalar(step),
            learning_rate: &scalar(1e-2),
            grad_scale: &scalar(4.0),
            skip: &scalar(skip),
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
        };
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
