//! What `ferrotune selftest` tests, one case a row of its table: an op's result against its reference, and its time.

use std::cell::RefCell;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::ops;
use crate::ops::proof::{Call, Distance, Proof, Role, place, trained};
use crate::train::floor::time;

/// An op in one dtype on one device.
pub type Run = Box<dyn Fn(Kind, Device) -> Result<Outcome>>;

pub struct Case {
    pub op: &'static str,
    /// Else in f32 alone: the op knows no other.
    pub every_dtype: bool,
    pub run: Run,
}

pub struct Outcome {
    /// That is timed; on a GPU its result is compared on fewer rows.
    pub shape: String,
    /// What was compared, and how far it is from its reference.
    pub distances: Vec<(String, Distance)>,
    pub forward_ms: f64,
    /// Forward and backward, where there is one.
    pub both_ms: Option<f64>,
    pub work: Work,
}

impl Outcome {
    /// What is nearest to its budget, or furthest beyond.
    pub fn worst(&self) -> Option<&(String, Distance)> {
        self.distances.iter().max_by(|(_, a), (_, b)| a.share().total_cmp(&b.share()))
    }
}

/// What a forward does at least.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Read and written.
    Bytes(f64),
    Flops(f64),
}

/// Operands that are drawn at random, on one device.
pub struct Operands {
    pub list: Vec<(Tensor, Role)>,
    pub options: (Kind, Device),
    /// Names for the table's user.
    names: Vec<&'static str>,
}

impl Operands {
    pub fn new(options: (Kind, Device)) -> Operands {
        Operands { list: Vec::new(), options, names: Vec::new() }
    }

    /// From N(0, scale^2); returns its number.
    pub fn random(&mut self, name: &'static str, shape: &[i64], scale: f64, role: Role) -> Result<usize> {
        let tensor = Tensor::f_randn(shape, self.options)?.f_mul_scalar(scale)?;
        Ok(self.add(name, tensor, role))
    }

    pub fn add(&mut self, name: &'static str, tensor: Tensor, role: Role) -> usize {
        self.list.push((tensor, role));
        self.names.push(name);
        self.list.len() - 1
    }
}

/// A differentiable op at one size.
pub struct Subject {
    pub shape: String,
    pub operands: Operands,
    pub ours: Box<Call<'static>>,
    pub plain: Box<Call<'static>>,
    pub work: Work,
}

/// Rows whose result is compared, and rows that are timed on a GPU: f64 on the CPU is slow, and few rows say nothing of a
/// GPU's speed.
#[derive(Clone, Copy)]
pub struct Rows {
    pub compared: i64,
    pub timed: i64,
}

/// A case of the op that `build` makes for some rows, of operands drawn in a dtype and on a device.
pub fn proved(
    op: &'static str,
    rows: Rows,
    build: impl Fn(i64, Operands) -> Result<Subject> + 'static,
) -> Case {
    let run = move |kind, device: Device| {
        let small = build(rows.compared, Operands::new((Kind::Double, Device::Cpu)))?;
        let proof = Proof { operands: &small.operands.list, ours: &*small.ours, plain: &*small.plain };
        let named = |(operand, distance): (Option<usize>, Distance)| {
            let what = operand.map_or("value".into(), |i| format!("gradient of {}", small.operands.names[i]));
            (what, distance)
        };
        let distances = proof.distances(kind, device)?.into_iter().map(named).collect();
        let large = match device {
            Device::Cpu => small,
            _ => build(rows.timed, Operands::new((kind, device)))?,
        };
        let (forward_ms, both_ms) = times(&large, kind, device)?;
        Ok(Outcome { shape: large.shape, distances, forward_ms, both_ms: Some(both_ms), work: large.work })
    };
    Case { op, every_dtype: true, run: Box::new(run) }
}

fn times(subject: &Subject, kind: Kind, device: Device) -> Result<(f64, f64)> {
    let leaves = place(&subject.operands.list, kind, device)?;
    let trained = trained(&subject.operands.list, &leaves);
    let forward = tch::no_grad(|| time(device, &mut || (subject.ours)(&leaves).map(drop)))?;
    // The loss keeps its gradient from the forward, in the memory that is then scaled: a new y each time.
    let dy = RefCell::new(None);
    let both = time(device, &mut || {
        let y = (subject.ours)(&leaves)?;
        let mut dy = dy.borrow_mut();
        let dy = match &mut *dy {
            Some(dy) => dy,
            none => none.insert(y.f_randn_like()?),
        };
        ops::backward(&y, dy, trained.iter().copied())
    })?;
    Ok((forward, both))
}
