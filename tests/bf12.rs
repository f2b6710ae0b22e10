//! Matrices in 12 bits: the bits of bf16, and what a head in them computes.

use ferrotune::ops::{self, Bf12, Head, Targets};
use tch::{Device, Kind, Tensor};

use crate::ops::random;
use crate::tolerance::rel;

/// bf16 with rows that are hard to pack: of zeros, of zeros in between and of both signs, far from 1 both ways, with subnormals, with one
/// large value beside small ones.
pub fn hard(rows: i64, columns: i64) -> Tensor {
    let weight = (random(&[rows, columns]) * 0.02).to_kind(Kind::BFloat16);
    if rows > 64 {
        let row = |at: i64| weight.get(at);
        let _ = row(3).zero_();
        let _ = row(5).slice(0, 0, 40, 3).zero_();
        let _ = row(7).g_mul_scalar_(1e-30);
        let _ = row(9).get(5).fill_(20.0);
        let _ = row(20).narrow(0, 0, 10).fill_(1e-9);
        let _ = row(21).get(7).fill_(-0.0);
        let _ = row(33).g_mul_scalar_(1e12);
        // More of a tile than products ask for at once.
        let _ = row(35).narrow(0, 0, 40).zero_();
        let _ = row(36).get(1).fill_(1e-39);
    }
    weight
}

pub fn bits(tensor: &Tensor) -> Tensor {
    tensor.view_dtype(Kind::Int16).to_device(Device::Cpu)
}

/// A matrix that is packed on a device has its bits there, and so have its runs of words.
pub fn check_bits(device: Device) {
    for (rows, columns) in [(1, 64), (16, 64), (1000, 256), (4099, 448), (515, 576)] {
        let weight = hard(rows, columns).to_device(device);
        let packed =
            Bf12::pack(&weight).unwrap().unwrap_or_else(|| panic!("[{rows}, {columns}] is not packed"));
        assert_eq!(packed.shape, [rows, columns]);
        assert_eq!(bits(&packed.unpack().unwrap()), bits(&weight), "[{rows}, {columns}]");
        let most = 0.79 * 2.0 * (rows * columns) as f64 + 20_000.0;
        assert!((packed.bytes() as f64) < most, "[{rows}, {columns}]: {} bytes", packed.bytes());
    }
}

#[test]
fn no_bit_is_lost() {
    check_bits(Device::Cpu);
}

#[test]
fn what_12_bits_do_not_hold_is_not_packed() {
    let narrow = random(&[64, 96]).to_kind(Kind::BFloat16);
    assert!(Bf12::pack(&narrow).unwrap().is_none());
    // Sizes from 1 to 2^-31 in each row.
    let exponents = Tensor::arange(64, (Kind::Float, Device::Cpu)) * -0.5;
    let wide = (random(&[64, 64]).sign() * exponents.exp2()).to_kind(Kind::BFloat16);
    assert!(Bf12::pack(&wide).unwrap().is_none());
    let nan = random(&[64, 64]).to_kind(Kind::BFloat16);
    let _ = nan.get(3).get(3).fill_(f64::NAN);
    assert!(Bf12::pack(&nan).unwrap().is_none());
    let error = Bf12::pack(&random(&[64, 64])).unwrap_err().to_string();
    assert!(error.contains("the weight is Double, expected bf16"), "{error}");
    let error = Bf12::pack(&narrow.view([-1])).unwrap_err().to_string();
    assert!(error.contains("expected [rows, in]"), "{error}");
}

/// Scores, losses and gradients of a head in 12 bits are those of its values, past a run of words.
#[test]
fn a_head_in_12_bits() {
    let weight = hard(8300, 128);
    let packed = Bf12::pack(&weight).unwrap().unwrap();
    let dense = weight.to_kind(Kind::Double);
    let targets = Targets::new(&[3_i64, 8191, -100, 8192, 8299], Device::Cpu).unwrap();
    let given = random(&[5, 128]);
    let results = |head: Head| {
        let hidden = given.copy().set_requires_grad(true);
        let loss = ops::linear_cross_entropy(&hidden, head, &targets, Some(20.0)).unwrap();
        loss.backward();
        let again = given.copy().set_requires_grad(true);
        let log_probs = ops::token_log_probs(&again, head, &targets, 0.7, None).unwrap();
        log_probs.sum(Kind::Double).backward();
        let scores = tch::no_grad(|| ops::head_scores(&given, head).unwrap());
        [scores, loss, hidden.grad(), log_probs.detach(), again.grad()]
    };
    for (ours, plain) in results(Head::Bf12(&packed)).iter().zip(results(Head::Dense(&dense))) {
        assert!(rel(ours, &plain)[0] < 1e-12, "{:?}", rel(ours, &plain));
    }
    let error = ops::head_scores(&random(&[5, 64]), Head::Bf12(&packed)).unwrap_err().to_string();
    assert!(error.contains("head_scores: hidden is [5, 64], expected [N, 128]"), "{error}");
}
