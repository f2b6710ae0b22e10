//! What a device's memory holds, and the bounds on it.

use anyhow::{Context, Result};

use super::cuda_device;
use crate::ffi::bridge;
pub use crate::ffi::bridge::MemoryStats;

/// Memory in use. On the CPU, `allocated` and `reserved` are the resident set of the process, `free` and `total` those of
/// the machine.
pub fn memory(device: tch::Device) -> Result<MemoryStats> {
    match cuda_device(device) {
        Some((_, index)) => bridge::memory_stats(index).map_err(anyhow::Error::from),
        None => host_memory(),
    }
}

/// [`MemoryStats::allocated`] of [`memory`] alone, which is quick: for every step.
pub fn allocated(device: tch::Device) -> Result<u64> {
    match cuda_device(device) {
        Some((_, index)) => bridge::allocated_memory(index).map_err(anyhow::Error::from),
        None => Ok(host_memory()?.allocated),
    }
}

/// What this process holds of a GPU's memory, as nvidia-smi shows it, in bytes; none where the driver does not tell.
pub fn process_memory(device: tch::Device) -> Option<u64> {
    let (_, index) = cuda_device(device)?;
    Some(bridge::process_memory(index)).filter(|&bytes| bytes > 0)
}

fn host_memory() -> Result<MemoryStats> {
    // "VmHWM:     1234 kB"
    let field = |file: &str, text: &str, name: &str| -> Result<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        Ok(kib.with_context(|| format!("{file}: no {name}"))? * 1024)
    };
    let read = |file: &str| std::fs::read_to_string(file).with_context(|| file.to_string());
    let (process, machine) = (read("/proc/self/status")?, read("/proc/meminfo")?);
    let resident = field("/proc/self/status", &process, "VmRSS")?;
    let peak = field("/proc/self/status", &process, "VmHWM")?;
    Ok(MemoryStats {
        allocated: resident,
        peak_allocated: peak,
        reserved: resident,
        peak_reserved: peak,
        free: field("/proc/meminfo", &machine, "MemAvailable")?,
        total: field("/proc/meminfo", &machine, "MemTotal")?,
    })
}

/// Lets the peaks of [`memory`] start again from what is in use now.
pub fn reset_peak_memory(device: tch::Device) -> Result<()> {
    match cuda_device(device) {
        Some((_, index)) => bridge::reset_peak_memory(index).map_err(anyhow::Error::from),
        // 5 is the code that resets VmHWM, proc(5).
        None => std::fs::write("/proc/self/clear_refs", "5").context("/proc/self/clear_refs"),
    }
}

/// From now on libtorch takes at most `bytes` of a GPU, beside CUDA's own memory, and tensors that wait in the host's memory at
/// most `host` bytes there, in buffers for batches of up to `rows` tokens; more is an error. Without effect on the CPU.
pub fn limit_memory(device: tch::Device, bytes: u64, host: u64, rows: u64) -> Result<()> {
    match cuda_device(device) {
        Some((_, index)) if bridge::has_cuda_library() => {
            bridge::limit_memory(index, bytes, host, rows as i64).map_err(anyhow::Error::from)
        }
        _ => Ok(()),
    }
}

/// Returns cached memory that no tensor uses to the device.
pub fn empty_cache(device: tch::Device) -> Result<()> {
    cuda_device(device).map_or(Ok(()), |_| bridge::empty_cache().map_err(anyhow::Error::from))
}

/// Keeps freed memory for the next step instead of handing it back to the system page by page. For executables: it acts
/// on the whole process.
pub fn keep_freed_memory() {
    bridge::keep_freed_memory();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_memory_is_read() {
        let stats = memory(tch::Device::Cpu).unwrap();
        assert!(stats.allocated > 1 << 20 && stats.peak_allocated >= stats.allocated);
        assert!(stats.total > stats.free && stats.free > 0);
    }
}
