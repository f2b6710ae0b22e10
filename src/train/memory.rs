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

/// The device's memory; the machine's for the CPU.
pub fn total(on: Device) -> u64 {
    device::memory(on).map_or(0, |memory| memory.total)
}
