//! What a run uses of its device's memory, in bytes.

use tch::Device;

/// In use now: tensors on a GPU, the process's resident set on the CPU.
pub fn in_use(device: Device) -> u64 {
    match device {
        Device::Cuda(_) => 0,
        _ => status("VmRSS:"),
    }
}

/// The highest so far: of tensors on a GPU, of the process's resident set on the CPU.
pub fn peak(device: Device) -> u64 {
    match device {
        Device::Cuda(_) => 0,
        _ => status("VmHWM:"),
    }
}

/// The device's memory; the machine's for the CPU.
pub fn total(device: Device) -> u64 {
    match device {
        Device::Cuda(_) => 0,
        _ => kibibytes("/proc/meminfo", "MemTotal:"),
    }
}

fn status(key: &str) -> u64 {
    kibibytes("/proc/self/status", key)
}

/// The value of a `Key:  n kB` line of a file in /proc, in bytes; 0 where there is none.
fn kibibytes(path: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let value = text.lines().find_map(|line| line.strip_prefix(key));
    value.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10
}
