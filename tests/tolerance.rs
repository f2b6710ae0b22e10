//! The one tolerance of all numeric tests: that of `ferrotune::ops::proof`.

use ferrotune::ops::proof::{self, Distance};
pub use ferrotune::ops::proof::{What, floor};
use tch::Tensor;

pub fn rel(ours: &Tensor, reference: &Tensor) -> [f64; 2] {
    proof::rel(ours, reference).unwrap()
}

pub fn f64_on_cpu(tensor: &Tensor) -> Tensor {
    proof::f64_on_cpu(tensor).unwrap()
}

/// Fails unless `ours` is as near to `reference` (f64) as the rule asks; `plain` is plain libtorch in `ours`' dtype.
pub fn assert_close(label: &str, what: What, ours: &Tensor, plain: &Tensor, reference: &Tensor) {
    let kind = ours.kind();
    let distance = Distance::new(kind, what, ours, plain, reference).unwrap();
    assert_allowed(&format!("{label}, {what:?}, {kind:?}"), distance);
}

pub fn assert_allowed(label: &str, distance: Distance) {
    assert!(distance.is_allowed(), "{label}, in 2-norm and max-norm: {distance:?}");
}
