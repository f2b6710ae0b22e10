//! AdamW with moments in 8 bits.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::case::{Case, Outcome, Work};
use crate::ops::proof::{Distance, What};
use crate::ops::{self, Moments8bit};
use crate::train::floor::time;

/// Parameter, gradient and moments of one tensor.
struct Trained {
    parameter: Tensor,
    moments: Moments8bit,
}

impl Trained {
    /// Moments as they are in a run: no second one is smaller than the map's values around a tenth of the largest.
    fn random(n: i64, device: Device) -> Result<Trained> {
        let bytes = |low: i64| Tensor::f_randint_low(low, 256, [n], (Kind::Uint8, device));
        let blocks = Moments8bit::zeros(n, device)?.absmax1.size();
        let absmax =
            || -> Result<Tensor> { Ok(Tensor::f_rand(&blocks, (Kind::Float, device))?.f_add_scalar(0.5)?) };
        let moments =
            Moments8bit { state1: bytes(0)?, state2: bytes(128)?, absmax1: absmax()?, absmax2: absmax()? };
        let parameter = Tensor::f_randn([n], (Kind::Float, device))?.f_set_requires_grad(true)?;
        let grad = Tensor::f_randn([n], (Kind::Float, device))?;
        parameter.f_mul(&grad)?.f_sum(Kind::Float)?.f_backward()?;
        Ok(Trained { parameter, moments })
    }

    /// A copy on the CPU.
    fn on_cpu(&self, kind: Kind) -> Result<Trained> {
        let copy_as = |tensor: &Tensor, kind: Kind| -> Result<Tensor> {
            Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_dtype(kind, false, true)?)
        };
        let copy = |tensor: &Tensor| copy_as(tensor, tensor.kind());
        let there = |tensor: &Tensor| copy_as(tensor, kind);
        let parameter = there(&self.parameter)?.f_set_requires_grad(true)?;
        parameter.f_mul(&there(&self.parameter.f_grad()?)?)?.f_sum(kind)?.f_backward()?;
        let from = &self.moments;
        let moments = Moments8bit {
            state1: copy(&from.state1)?,
            state2: copy(&from.state2)?,
            absmax1: copy(&from.absmax1)?,
            absmax2: copy(&from.absmax2)?,
        };
        Ok(Trained { parameter, moments })
    }
}

/// The third step of a run, on one device.
struct Step {
    /// Step, learning rate, grad_scale and skip.
    scalars: [Tensor; 4],
    maps: Tensor,
}

impl Step {
    fn new(device: Device) -> Result<Step> {
        let scalar = |value: f64| Tensor::f_full([0i64; 0], value, (Kind::Float, device));
        let scalars = [scalar(3.0)?, scalar(1e-3)?, scalar(2.0)?, scalar(0.0)?];
        Ok(Step { scalars, maps: ops::adamw_8bit_maps(device)? })
    }

    fn run(&self, trained: &[Trained]) -> Result<()> {
        let [step, learning_rate, grad_scale, skip] = &self.scalars;
        let (beta1, beta2, epsilon, weight_decay) = (0.9, 0.999, 1e-8, 0.01);
        let adamw = ops::AdamW { step, learning_rate, grad_scale, skip, beta1, beta2, epsilon, weight_decay };
        let moments: Vec<&Moments8bit> = trained.iter().map(|trained| &trained.moments).collect();
        ops::adamw_8bit_step(trained.iter().map(|trained| &trained.parameter), &moments, &self.maps, adamw)
    }
}

/// Parameters against the formula in f64; bytes on a GPU those of the CPU, and there those of the
/// formula but for values whose rounding decides.
pub fn adamw_8bit() -> Case {
    let run = |_, device: Device| {
        let sizes: [i64; 2] = if device.is_cuda() { [1 << 25, (1 << 20) + 3] } else { [1 << 18, 4099] };
        let ours = sizes.iter().map(|&n| Trained::random(n, device)).collect::<Result<Vec<_>>>()?;
        let copies = |kind| ours.iter().map(|trained| trained.on_cpu(kind)).collect::<Result<Vec<_>>>();
        let (f32_on_cpu, formula) = (copies(Kind::Float)?, copies(Kind::Double)?);
        let (there, here) = (Step::new(device)?, Step::new(Device::Cpu)?);
        there.run(&ours)?;
        here.run(&f32_on_cpu)?;
        here.run(&formula)?;
        let mut distances = Vec::new();
        for ((ours, f32_on_cpu), formula) in ours.iter().zip(&f32_on_cpu).zip(&formula) {
            let reference = &formula.parameter;
            let distance = Distance::new(Kind::Float, What::Value, &ours.parameter, reference, reference)?;
            distances.push(("parameter".to_string(), distance));
            let moments = |trained: &Trained| {
                let moments = &trained.moments;
                [moments.state1.shallow_clone(), moments.state2.shallow_clone()]
            };
            let expected = if device.is_cuda() { f32_on_cpu } else { formula };
            for (ours, expected) in moments(ours).iter().zip(&moments(expected)) {
                let mut distance = Distance::exact(ours, expected)?;
                if !device.is_cuda() {
                    distance.allowed = [1e-4; 2];
                }
                distances.push(("moments".to_string(), distance));
            }
        }
        let forward_ms = time(device, &mut || there.run(&ours))?;
        // p and two indices are read and written, g is read, and absmax of 256 elements.
        let bytes = 16.0625 * sizes.iter().sum::<i64>() as f64;
        Ok(Outcome {
            shape: format!("{sizes:?}"),
            distances,
            forward_ms,
            both_ms: None,
            work: Work::Bytes(bytes),
        })
    };
    Case { op: "adamw, 8-bit", every_dtype: false, run: Box::new(run) }
}
