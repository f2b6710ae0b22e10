//! The one tolerance of all numeric tests.
//!
//! `rel(a, b) = ||a - b|| / ||b||` in f64, in the 2-norm and in the max-norm. A result passes where its distance to the
//! f64 reference is at most twice that of plain libtorch in the same dtype, or at most a floor of its dtype.

use tch::{Kind, Tensor};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum What {
    Value,
    Gradient,
}

/// `rel` in the 2-norm and in the max-norm. NaN where either tensor has one.
pub fn rel(ours: &Tensor, reference: &Tensor) -> [f64; 2] {
    let (a, b) = (f64_on_cpu(ours), f64_on_cpu(reference));
    assert_eq!(a.size(), b.size(), "shapes differ");
    let difference = &a - &b;
    let ratio = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { part / whole };
    let two = |t: &Tensor| t.square().sum(Kind::Double).sqrt().double_value(&[]);
    let max = |t: &Tensor| if t.numel() == 0 { 0.0 } else { t.abs().max().double_value(&[]) };
    [ratio(two(&difference), two(&b)), ratio(max(&difference), max(&b))]
}

pub fn f64_on_cpu(tensor: &Tensor) -> Tensor {
    tensor.detach().to_device(tch::Device::Cpu).to_kind(Kind::Double)
}

pub fn floor(kind: Kind, what: What) -> f64 {
    let (value, gradient) = match kind {
        Kind::Double => (1e-12, 1e-11),
        Kind::Float => (1e-6, 1e-5),
        Kind::Half => (1e-3, 2e-3),
        Kind::BFloat16 => (8e-3, 1.6e-2),
        other => panic!("no tolerance for {other:?}"),
    };
    if what == What::Value { value } else { gradient }
}

/// Fails unless `ours` is as near to `reference` (f64) as the rule asks; `plain` is plain libtorch in `ours`' dtype.
pub fn assert_close(label: &str, what: What, ours: &Tensor, plain: &Tensor, reference: &Tensor) {
    let (found, plain) = (rel(ours, reference), rel(plain, reference));
    for (norm, i) in [("2", 0), ("max", 1)] {
        let allowed = f64::max(2.0 * plain[i], floor(ours.kind(), what));
        assert!(
            found[i] <= allowed,
            "{label}, {what:?}, {:?}: {norm}-norm distance {:.2e}, allowed {allowed:.2e} (plain libtorch {:.2e})",
            ours.kind(),
            found[i],
            plain[i]
        );
    }
}
