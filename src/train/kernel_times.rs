//! What a GPU did in a stretch of time, by kind of kernel.

use std::collections::HashMap;

use serde::Serialize;

use crate::device::DeviceActivity;

/// Milliseconds a step; `kinds` and `kernels` are sorted, the longest first.
#[derive(Debug, Clone, Serialize)]
pub struct KernelTimes {
    /// Some kernel, copy or memset runs.
    pub busy_ms: f64,
    /// 1 - busy / (end of the last - start of the first).
    pub idle_share: f64,
    /// Of the idle time, that in gaps of more than 5 us: the GPU waited for the host. One kernel of a graph follows the
    /// other in about 1 us.
    pub waiting_share: f64,
    pub launches: f64,
    pub kinds: Vec<Share>,
    /// The longest of them by name.
    pub kernels: Vec<Share>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Share {
    pub name: String,
    pub ms: f64,
    /// Calls a step.
    pub calls: f64,
}

/// Kernels that are listed by name.
const LISTED: usize = 24;

impl KernelTimes {
    /// Of `activities` that belong to `steps` steps.
    pub fn new(activities: &[DeviceActivity], steps: usize) -> KernelTimes {
        let steps = steps.max(1) as f64;
        let Timeline { busy, waiting, span } = Timeline::new(activities);
        let by = |name: &dyn Fn(&DeviceActivity) -> String| {
            let mut sums: HashMap<String, (u64, u64)> = HashMap::new();
            for activity in activities {
                let sum = sums.entry(name(activity)).or_default();
                *sum = (sum.0 + activity.duration_ns, sum.1 + 1);
            }
            let mut shares: Vec<Share> = sums
                .into_iter()
                .map(|(name, (ns, calls))| Share {
                    name,
                    ms: ns as f64 / 1e6 / steps,
                    calls: calls as f64 / steps,
                })
                .collect();
            shares.sort_by(|a, b| b.ms.total_cmp(&a.ms));
            shares
        };
        let mut kernels = by(&|activity| activity.name.clone());
        kernels.truncate(LISTED);
        KernelTimes {
            busy_ms: busy as f64 / 1e6 / steps,
            idle_share: 1.0 - busy as f64 / span.max(1) as f64,
            waiting_share: waiting as f64 / span.max(1) as f64,
            launches: activities.len() as f64 / steps,
            kinds: by(&|activity| kind(activity).to_string()),
            kernels,
        }
    }
}

/// Nanoseconds.
#[derive(Debug, PartialEq)]
struct Timeline {
    /// Something ran. Kernels of several streams may overlap.
    busy: u64,
    /// Nothing ran for longer than [`SHORT_GAP`].
    waiting: u64,
    /// From the first start to the last end.
    span: u64,
}

const SHORT_GAP: u64 = 5_000;

impl Timeline {
    fn new(activities: &[DeviceActivity]) -> Timeline {
        let mut intervals: Vec<(u64, u64)> =
            activities.iter().map(|a| (a.start_ns, a.start_ns + a.duration_ns)).collect();
        intervals.sort_unstable();
        let first = intervals.first().map_or(0, |interval| interval.0);
        let (mut busy, mut waiting, mut end) = (0, 0, first);
        for (start, stop) in intervals {
            let gap = start.saturating_sub(end);
            waiting += if gap > SHORT_GAP { gap } else { 0 };
            busy += stop.saturating_sub(end.max(start));
            end = end.max(stop);
        }
        Timeline { busy, waiting, span: end - first }
    }
}

/// The first kind of which a kernel's name holds a word. Libraries name their kernels as they like: these are the names of
/// libtorch 2.11, cuBLAS 13, cuDNN 9 and kernels/.
const KINDS: [(&str, &[&str]); 7] = [
    ("attention", &["sdpa", "flash", "fmha", "mha_", "attention"]),
    ("nf4", &["nf4", "dequantize", "quantize"]),
    ("norms, rope, activation", &["rms_norm", "rope", "swiglu", "gelu"]),
    ("loss", &["softmax", "cross_entropy", "scatter_gather"]),
    ("optimizer", &["multi_tensor_apply", "lpnorm", "adam"]),
    ("products", &["gemm", "nvjet", "cutlass", "gemv", "splitk", "cublas", "xmma", "lora"]),
    ("copies", &["memcpy", "memset", "copy_kernel", "catarray", "fillfunctor", "transpose"]),
];

fn kind(activity: &DeviceActivity) -> &'static str {
    if !activity.kernel {
        return "copies";
    }
    let name = activity.name.to_lowercase();
    KINDS
        .iter()
        .find(|(_, words)| words.iter().any(|word| name.contains(word)))
        .map_or("other", |found| found.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn activity(name: &str, start_ns: u64, duration_ns: u64) -> DeviceActivity {
        DeviceActivity { name: name.into(), kernel: true, start_ns, duration_ns }
    }

    #[test]
    fn overlap_counts_once() {
        let work = [
            activity("nvjet_a", 10_000, 10_000),
            activity("flash_b", 15_000, 10_000),
            activity("other", 27_000, 1_000),
            activity("nvjet_c", 45_000, 4_000),
        ];
        assert_eq!(Timeline::new(&work), Timeline { busy: 20_000, waiting: 17_000, span: 39_000 });
        let times = KernelTimes::new(&work, 2);
        assert_eq!(times.launches, 2.0);
        let kinds: Vec<(&str, f64)> =
            times.kinds.iter().map(|kind| (kind.name.as_str(), kind.ms * 2e3)).collect();
        assert_eq!(kinds.len(), 3);
        assert!(kinds.contains(&("products", 14.0)) && kinds.contains(&("attention", 10.0)), "{kinds:?}");
        assert_eq!(Timeline::new(&[]), Timeline { busy: 0, waiting: 0, span: 0 });
    }
}
