//! The proof of an op: its value and its gradients against f64, by one rule of tolerance for all ops and dtypes.
//!
//! `rel(a, b) = ||a - b|| / ||b||` in f64, in the 2-norm and in the max-norm. A result passes where its distance to the
//! f64 reference is at most twice that of plain libtorch in the same dtype, or at most a floor of its dtype.

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::device::Generator;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Value,
    Gradient,
}

/// `rel` in the 2-norm and in the max-norm. NaN where either tensor has one.
pub fn rel(ours: &Tensor, reference: &Tensor) -> Result<[f64; 2]> {
    let (a, b) = (f64_on_cpu(ours)?, f64_on_cpu(reference)?);
    ensure!(a.size() == b.size(), "the result is {:?}, expected {:?}", a.size(), b.size());
    let difference = a.f_sub(&b)?;
    let ratio = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { part / whole };
    let two = |t: &Tensor| t.f_square()?.f_sum(Kind::Double)?.f_sqrt()?.f_double_value(&[]);
    let max = |t: &Tensor| if t.numel() == 0 { Ok(0.0) } else { t.f_abs()?.f_max()?.f_double_value(&[]) };
    Ok([ratio(two(&difference)?, two(&b)?), ratio(max(&difference)?, max(&b)?)])
}

pub fn f64_on_cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)
}

/// What is always allowed. Integers must be exact.
pub fn floor(kind: Kind, what: What) -> f64 {
    let (value, gradient) = match kind {
        Kind::Double => (1e-12, 1e-11),
        Kind::Float => (1e-6, 1e-5),
        Kind::Half => (1e-3, 2e-3),
        Kind::BFloat16 => (8e-3, 1.6e-2),
        _ => (0.0, 0.0),
    };
    if what == What::Value { value } else { gradient }
}

/// How far a result is from its reference, and how far it may be: in the 2-norm and in the max-norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    pub found: [f64; 2],
    pub allowed: [f64; 2],
    /// Of plain libtorch in the same dtype.
    pub plain: [f64; 2],
}

impl Distance {
    /// Of `ours` from `reference` (f64), with the floor of `kind`; `plain` is plain libtorch in `ours`' dtype.
    pub fn new(
        kind: Kind,
        what: What,
        ours: &Tensor,
        plain: &Tensor,
        reference: &Tensor,
    ) -> Result<Distance> {
        let (found, plain) = (rel(ours, reference)?, rel(plain, reference)?);
        Ok(Distance { found, allowed: plain.map(|plain| f64::max(2.0 * plain, floor(kind, what))), plain })
    }

    /// Of what must be the same: the share of elements that differ, of which none may.
    pub fn exact(ours: &Tensor, reference: &Tensor) -> Result<Distance> {
        let ours = ours.f_to_device(reference.device())?;
        ensure!(ours.size() == reference.size(), "{:?}, expected {:?}", ours.size(), reference.size());
        let differ =
            ours.f_ne_tensor(reference)?.f_to_kind(Kind::Double)?.f_mean(Kind::Double)?.f_double_value(&[])?;
        Ok(Distance { found: [differ; 2], allowed: [0.0; 2], plain: [0.0; 2] })
    }

    /// Not where the result has a NaN.
    pub fn is_allowed(&self) -> bool {
        self.found.iter().zip(self.allowed).all(|(&found, allowed)| found <= allowed)
    }

    /// The larger share of what is allowed; infinite where the result has a NaN.
    pub fn share(&self) -> f64 {
        let share = |(&found, &allowed): (&f64, &f64)| match found {
            0.0 => 0.0,
            _ if found.is_nan() => f64::INFINITY,
            _ => found / allowed,
        };
        self.found.iter().zip(&self.allowed).map(share).fold(0.0, f64::max)
    }
}

/// What an operand is, beside activations of the dtype that is tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// In the tested dtype, and differentiated.
    Trained,
    /// f32 (f64 in f64), and differentiated: LoRA.
    TrainedF32,
    /// In the tested dtype.
    Frozen,
    /// f32 (f64 in f64): angles.
    F32,
    /// Integers and scales, in the dtype they have.
    AsIs,
}

impl Role {
    fn is_trained(self) -> bool {
        matches!(self, Role::Trained | Role::TrainedF32)
    }

    fn kind(self, tested: Kind, own: Kind) -> Kind {
        match self {
            Role::Trained | Role::Frozen => tested,
            Role::TrainedF32 | Role::F32 if tested == Kind::Double => Kind::Double,
            Role::TrainedF32 | Role::F32 => Kind::Float,
            Role::AsIs => own,
        }
    }
}

/// A differentiable function of some tensors.
pub type Call<'a> = dyn Fn(&[Tensor]) -> Result<Tensor> + 'a;

/// One function twice, ours and plain libtorch, and what to call it with.
pub struct Proof<'a> {
    pub operands: &'a [(Tensor, Role)],
    pub ours: &'a Call<'a>,
    pub plain: &'a Call<'a>,
}

/// A value and the gradients of the trained operands, in their order.
struct Differentiated {
    value: Tensor,
    gradients: Vec<Tensor>,
}

impl Proof<'_> {
    /// Value and gradients of `(y dy).sum()` in `kind` on `device` against f64 on the CPU, both of the same rounded operands.
    /// The reference is plain libtorch on the CPU, and on a GPU our formula, which the CPU proves. First the distance of the
    /// value, then of each gradient, with the operand's number.
    pub fn distances(&self, kind: Kind, device: Device) -> Result<Vec<(Option<usize>, Distance)>> {
        let rounded = self
            .operands
            .iter()
            .map(|(tensor, role)| {
                let own = tensor.kind();
                let rounded = tensor.f_to_kind(role.kind(kind, own))?;
                Ok((rounded.f_to_kind(role.kind(Kind::Double, own))?, *role))
            })
            .collect::<Result<Vec<_>>>()?;
        let reference = if device == Device::Cpu { self.plain } else { self.ours };
        let leaves = place(&rounded, Kind::Double, Device::Cpu)?;
        let value = reference(&leaves)?;
        // The same in every run, whatever else draws.
        let dy = Tensor::f_empty(value.size(), (Kind::Double, Device::Cpu))?;
        Generator::new(Device::Cpu, 3407)?.fill_normal(&dy, 1.0)?;
        let dy = dy.f_to_kind(kind)?;
        let reference = differentiate(&rounded, &leaves, value, &dy)?;
        let run = |call: &Call| {
            let leaves = place(&rounded, kind, device)?;
            differentiate(&rounded, &leaves, call(&leaves)?, &dy)
        };
        let (ours, plain) = (run(self.ours)?, run(self.plain)?);
        let (value, by) = (&ours.value, What::Value);
        let mut distances =
            vec![(None, Distance::new(value.kind(), by, value, &plain.value, &reference.value)?)];
        let trained = rounded.iter().enumerate().filter(|(_, (_, role))| role.is_trained());
        for (i, (operand, (_, role))) in trained.enumerate() {
            let (ours, plain) = (&ours.gradients[i], &plain.gradients[i]);
            // A gradient of an f32 weight is as rough as the activations that it comes from.
            let by = if *role == Role::TrainedF32 { kind } else { ours.kind() };
            let distance = Distance::new(by, What::Gradient, ours, plain, &reference.gradients[i])?;
            distances.push((Some(operand), distance));
        }
        Ok(distances)
    }
}

/// The operands of a test in `kind` on `device`. Strides survive.
pub fn place(operands: &[(Tensor, Role)], kind: Kind, device: Device) -> Result<Vec<Tensor>> {
    let place = |(tensor, role): &(Tensor, Role)| {
        let placed = tensor.f_to_device(device)?.f_to_kind(role.kind(kind, tensor.kind()))?.f_detach()?;
        Ok(if role.is_trained() { placed.f_set_requires_grad(true)? } else { placed })
    };
    operands.iter().map(place).collect()
}

/// Those of `placed` that are differentiated.
pub fn trained<'a>(operands: &[(Tensor, Role)], placed: &'a [Tensor]) -> Vec<&'a Tensor> {
    operands.iter().zip(placed).filter(|((_, role), _)| role.is_trained()).map(|(_, leaf)| leaf).collect()
}

fn differentiate(
    operands: &[(Tensor, Role)],
    leaves: &[Tensor],
    value: Tensor,
    dy: &Tensor,
) -> Result<Differentiated> {
    let leaves = trained(operands, leaves);
    if leaves.is_empty() {
        return Ok(Differentiated { value, gradients: Vec::new() });
    }
    let dy = dy.f_to_device(value.device())?.f_to_kind(value.kind())?;
    let loss = value.f_mul(&dy)?.f_sum(value.kind())?;
    let gradients = Tensor::f_run_backward(&[loss], &leaves, false, false)?;
    Ok(Differentiated { value, gradients })
}
