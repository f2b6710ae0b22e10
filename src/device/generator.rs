use anyhow::{Result, bail};
use cxx::UniquePtr;
use tch::{Device, Tensor};

use crate::ffi::{borrow, bridge};

/// Random numbers in an order of their own: the same seed gives the same weights, whatever else draws in the process.
/// libtorch's generator of a device (mt19937 on the CPU, Philox on a GPU), with the numbers that `torch.manual_seed` gives.
pub struct Generator {
    device: Device,
    state: UniquePtr<bridge::Generator>,
}

impl Generator {
    /// # Errors
    /// A device other than the CPU or a CUDA GPU that [`super::init`] has started.
    pub fn new(device: Device, seed: u64) -> Result<Generator> {
        let index = match device {
            Device::Cpu => -1,
            Device::Cuda(index) => index as i32,
            other => bail!("random numbers on {other:?}, expected the CPU or a CUDA GPU"),
        };
        Ok(Generator { device, state: bridge::generator(index, seed)? })
    }

    /// Where it draws.
    pub fn device(&self) -> Device {
        self.device
    }

    /// `x ~ N(0, std^2)`, in place. `x`: floating, on [`Generator::device`].
    pub fn fill_normal(&self, x: &Tensor, std: f64) -> Result<()> {
        Ok(bridge::fill_normal(&self.state, borrow(x), std)?)
    }

    /// `x ~ U(low, high)`, in place. `x`: floating, on [`Generator::device`].
    pub fn fill_uniform(&self, x: &Tensor, low: f64, high: f64) -> Result<()> {
        Ok(bridge::fill_uniform(&self.state, borrow(x), low, high)?)
    }
}
