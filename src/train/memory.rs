//! What a run uses of its device's memory, in bytes; 0 where the system does not say.

use tch::Device;

use crate::device;

/// In use now: by tensors on a GPU, the process's resident set on the CPU.
pub fn in_use(on: Device) -> u64 {
    device::allocated(on).unwrap_or(0)
}

/// The highest so far of [`in_use`].
pub fn peak(on: Device) -> u64 {
    device::memory(on).map_or(0, |memory| memory.peak_allocated)
}

/// What this process held of a GPU at most, CUDA's own memory included; none on the CPU and where the driver does not tell.
pub fn process_peak(on: Device) -> Option<u64> {
    let process = device::process_memory(on)?;
    let memory = device::memory(on).ok()?;
    Some(process.saturating_sub(memory.reserved) + memory.peak_reserved)
}

/// The device's memory; the machine's for the CPU.
pub fn total(on: Device) -> u64 {
    device::memory(on).map_or(0, |memory| memory.total)
}
