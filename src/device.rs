//! Which device a process works on: the CUDA half of libtorch is loaded here, at run time, or not at all.
//!
//! [`init`] must be the first libtorch-related act of a process. ATen caches its CUDA hooks at the first question
//! (`tch::Cuda::is_available`, `tch::manual_seed`, pinned memory): asked before `libtorch_cuda.so` is there, CUDA stays
//! off until the process ends. `main` and the entry points of this library call it; it is idempotent.
//!
//! The loaded libraries are the one global state of this crate: the dynamic linker knows no other.

mod generator;
mod memory;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use cxx::UniquePtr;
use serde::{Deserialize, Serialize};

use crate::ffi::bridge;
pub use crate::ffi::bridge::{CudaDevice, CudaProbe, DeviceActivity};
use crate::ffi::take;
pub use generator::Generator;
pub use memory::{
    MemoryStats, allocated, empty_cache, keep_freed_memory, limit_memory, memory, process_memory,
    reset_peak_memory,
};

const KERNEL_LIBRARY: &str = "libferrotune_kernels.so";
/// csrc/cuda/: what needs libtorch_cuda. Built with the kernels, and found beside them.
const CUDA_LIBRARY: &str = "libferrotune_cuda.so";
/// libtorch 2.11 is built for CUDA 13.0, which driver 580 brought.
const REQUIRED_CUDA: i32 = 13000;
/// The oldest compute capability in libtorch's CUDA 13 build.
const REQUIRED_CAPABILITY: (i32, i32) = (7, 5);

/// What a user asks for: `auto`, `cpu`, `cuda` (the first GPU) or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Choice {
    /// The first GPU where one can be used, else the CPU.
    #[default]
    Auto,
    Cpu,
    /// The GPU of this number, in the driver's order.
    Cuda(usize),
}

impl FromStr for Choice {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Choice> {
        let wrong = || anyhow!("device \"{text}\": expected auto, cpu, cuda or cuda:N");
        match text.split_once(':') {
            None if text == "auto" => Ok(Choice::Auto),
            None if text == "cpu" => Ok(Choice::Cpu),
            None if text == "cuda" => Ok(Choice::Cuda(0)),
            Some(("cuda", index)) => Ok(Choice::Cuda(index.parse().map_err(|_| wrong())?)),
            _ => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Choice {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Choice> {
        text.parse()
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Choice::Auto => f.write_str("auto"),
            Choice::Cpu => f.write_str("cpu"),
            Choice::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl From<Choice> for String {
    fn from(choice: Choice) -> String {
        choice.to_string()
    }
}

/// Loads what `choice` needs and returns the device to put tensors on.
///
/// For CUDA: `libtorch_cuda.so` from beside the `libtorch_cpu.so` in use, then `libferrotune_kernels.so` from `kernels`
/// if given, else from the executable's folder, `../lib` or the build folder, and `libferrotune_cuda.so` from beside it.
/// Without the kernel library the ops run their ATen formulas, and a warning says so. The calling thread then works on a stream of the pool, never on the
/// legacy default stream, on which no CUDA graph can be captured; every thread that works on the GPU calls `init`.
///
/// # Errors
/// CUDA is asked for and there is no GPU, no such GPU, too old a driver or GPU, no `libtorch_cuda.so`, or libtorch was
/// asked about CUDA before. `Auto` goes on with the CPU instead and says why through `tracing`.
pub fn init(choice: Choice, kernels: Option<&Path>) -> Result<tch::Device> {
    let index = match choice {
        Choice::Cpu => return Ok(tch::Device::Cpu),
        Choice::Auto => 0,
        Choice::Cuda(index) => index,
    };
    match start(index, kernels) {
        Ok(device) => Ok(device),
        Err(error) if choice == Choice::Auto => {
            static ONCE: OnceLock<()> = OnceLock::new();
            ONCE.get_or_init(|| {
                if probe().devices.is_empty() {
                    tracing::info!("running on the CPU: {error:#}");
                } else {
                    tracing::warn!("there is a GPU, but this runs on the CPU: {error:#}");
                }
            });
            Ok(tch::Device::Cpu)
        }
        Err(error) => Err(error.context("CUDA was requested, but cannot be used")),
    }
}

/// What came of looking for the kernel library.
static KERNELS: OnceLock<Result<(), String>> = OnceLock::new();

/// Whether this processor has what kernels/cpu needs.
pub(crate) fn has_cpu_kernels() -> bool {
    bridge::has_cpu_kernels()
}

/// Whether the fused CUDA kernels are there for tensors on a GPU.
pub(crate) fn has_kernels() -> bool {
    matches!(KERNELS.get(), Some(Ok(())))
}

fn start(index: usize, kernels: Option<&Path>) -> Result<tch::Device> {
    check(probe(), index)?;
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| load_libtorch_cuda().map_err(|error| format!("{error:#}")));
    loaded.clone().map_err(anyhow::Error::msg)?;
    let found = KERNELS.get_or_init(|| {
        let result = load_kernels(kernels).map_err(|error| format!("{error:#}"));
        if let (Err(error), None) = (&result, kernels) {
            tracing::warn!("the fused CUDA kernels are not used: {error}");
        }
        result
    });
    // A library that was named must work; one that was only looked for may be absent.
    if kernels.is_some() {
        found.clone().map_err(anyhow::Error::msg)?;
    }
    bridge::use_stream(index as i32)?;
    Ok(tch::Device::Cuda(index))
}

/// What the NVIDIA driver says, asked once a process. It does not touch libtorch.
pub fn probe() -> &'static CudaProbe {
    static PROBE: OnceLock<CudaProbe> = OnceLock::new();
    PROBE.get_or_init(bridge::probe_cuda)
}

fn check(probe: &CudaProbe, index: usize) -> Result<()> {
    ensure!(
        probe.driver_version == 0 || probe.driver_version >= REQUIRED_CUDA,
        "the NVIDIA driver supports CUDA {}.{}, and CUDA 13.0 is needed: install driver 580 or newer",
        probe.driver_version / 1000,
        probe.driver_version % 1000 / 10,
    );
    ensure!(!probe.devices.is_empty(), "{}", probe.problem);
    let device = probe.devices.get(index).with_context(|| {
        format!("there is no cuda:{index}; the driver sees {} GPU(s)", probe.devices.len())
    })?;
    ensure!(
        (device.major, device.minor) >= REQUIRED_CAPABILITY,
        "{} has compute capability {}.{}, and libtorch needs 7.5 or newer",
        device.name,
        device.major,
        device.minor,
    );
    Ok(())
}

fn load_libtorch_cuda() -> Result<()> {
    let path = PathBuf::from(bridge::torch_lib_dir()?).join("libtorch_cuda.so");
    ensure!(path.exists(), "{} was not found: run scripts/setup --cuda", path.display());
    bridge::load_library(text(&path)?).map_err(|error| {
        anyhow!("{} cannot be loaded ({error}): run scripts/setup --cuda", path.display())
    })?;
    ensure!(
        bridge::start_cuda()?,
        "libtorch was asked about CUDA before ferrotune::device::init, and remembers that there was none: call init \
         before any other use of libtorch"
    );
    Ok(())
}

fn load_kernels(given: Option<&Path>) -> Result<()> {
    let places = kernel_places()?;
    let Some(kernels) = given.or_else(|| places.iter().map(PathBuf::as_path).find(|place| place.exists()))
    else {
        bail!(
            "{KERNEL_LIBRARY} was not found (looked for {}): run scripts/build_kernels",
            places.iter().map(|place| place.display().to_string()).collect::<Vec<_>>().join(", ")
        );
    };
    bridge::load_kernels(text(kernels)?).map_err(|error| anyhow!("{error}"))?;
    bridge::load_cuda_library(text(&kernels.with_file_name(CUDA_LIBRARY))?)
        .map_err(|error| anyhow!("{error}"))
}

/// Beside the executable, in a bundle's `lib`, and where scripts/build_kernels puts it: `target/kernels`, seen from
/// `target/debug` and from `target/debug/deps`.
pub(crate) fn kernel_places() -> Result<Vec<PathBuf>> {
    let executable = std::env::current_exe().context("the path of this executable")?;
    let folder = executable.parent().context("an executable lies in a folder")?;
    let mut places = vec![folder.join(KERNEL_LIBRARY)];
    let above: Vec<&Path> = folder.ancestors().skip(1).take(2).collect();
    places.extend(above.first().map(|folder| folder.join("lib").join(KERNEL_LIBRARY)));
    places.extend(above.iter().map(|folder| folder.join("kernels").join(KERNEL_LIBRARY)));
    Ok(places)
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{}: the path is not UTF-8", path.display()))
}

fn cuda_device(device: tch::Device) -> Option<(&'static CudaDevice, i32)> {
    let tch::Device::Cuda(index) = device else { return None };
    probe().devices.get(index).map(|found| (found, index as i32))
}

/// Lets the calling thread enqueue its work where the thread that called [`init`] does: on a stream of our own, which CUDA graphs
/// need. Without it a further thread has CUDA's default stream.
pub fn use_on_this_thread(device: tch::Device) -> Result<()> {
    cuda_device(device).map_or(Ok(()), |(_, index)| bridge::use_stream(index).map_err(anyhow::Error::from))
}

/// The device for people: `NVIDIA H200, 139.8 GiB, sm_90` or `CPU, 16 threads`.
pub fn describe(device: tch::Device) -> String {
    match cuda_device(device) {
        Some((found, _)) => format!(
            "{}, {:.1} GiB, sm_{}{}",
            found.name,
            found.total_memory as f64 / f64::from(1 << 30),
            found.major,
            found.minor
        ),
        None => format!("CPU, {} threads", tch::get_num_threads()),
    }
}

/// Whether the device computes in bf16 itself: any CPU, GPUs of compute capability 8.0 or newer.
pub fn supports_bf16(device: tch::Device) -> bool {
    cuda_device(device).is_none_or(|(found, _)| found.major >= 8)
}

/// Whether the device multiplies in fp8: any CPU, where it is emulated, and GPUs of compute capability 8.9 or newer.
pub fn supports_fp8(device: tch::Device) -> bool {
    cuda_device(device).is_none_or(|(found, _)| (found.major, found.minor) >= (8, 9))
}

/// Threads that load tensors side by side, each with serial libtorch ops: an OpenMP team a thread would be more threads
/// than cores, for which the OpenMP run time lets every later barrier of the process sleep instead of spin.
pub(crate) fn reading_threads() -> Result<rayon::ThreadPool> {
    Ok(rayon::ThreadPoolBuilder::new().start_handler(|_| bridge::serial_ops()).build()?)
}

/// Makes GPUs repeat their results bit for bit from now on, in the whole process: attention's backward in a fixed order,
/// libtorch's deterministic algorithms, and an error from an op that has none. The CPU does so anyway.
pub fn use_deterministic_algorithms() {
    bridge::use_deterministic_algorithms();
}

/// Waits until the device has done all work enqueued so far.
pub fn synchronize(device: tch::Device) -> Result<()> {
    cuda_device(device).map_or(Ok(()), |(_, index)| bridge::synchronize(index).map_err(anyhow::Error::from))
}

/// uint8 `[bytes]` in page-locked memory of the host, between which and a GPU copies run at the rate of the bus; not written.
pub fn pinned(bytes: u64) -> Result<tch::Tensor> {
    Ok(take(bridge::pinned(bytes as i64)?))
}

/// int64 `[n]` on `device`, without waiting for the work that it has still to do.
pub fn upload(values: &[i64], device: tch::Device) -> Result<tch::Tensor> {
    match cuda_device(device) {
        Some((_, index)) => Ok(take(bridge::upload(values, index)?)),
        None => Ok(tch::Tensor::f_from_slice(values)?.f_to_device(device)?),
    }
}

/// Rows of `table`, a contiguous matrix in the host's memory, on `device`: `[rows, C]`, in the same way.
pub fn upload_rows(table: &tch::Tensor, rows: &[i64], device: tch::Device) -> Result<tch::Tensor> {
    match cuda_device(device) {
        Some((_, index)) => Ok(take(bridge::upload_rows(crate::ffi::borrow(table), rows, index)?)),
        None => Ok(table.f_index_select(0, &tch::Tensor::f_from_slice(rows)?)?.f_to_device(device)?),
    }
}

/// A tensor in the host's memory, pinned, that a GPU writes: what is enqueued after that does not delay it.
pub struct Download {
    host: tch::Tensor,
    arrived: UniquePtr<bridge::Event>,
}

impl Download {
    /// `host`, which work enqueued on `device` writes.
    ///
    /// # Errors
    /// `device` is no GPU.
    pub fn new(host: tch::Tensor, device: tch::Device) -> Result<Download> {
        let (_, index) = cuda_device(device).context("only a GPU's work is waited for")?;
        Ok(Download { host, arrived: bridge::record_event(index)? })
    }

    /// The tensor on the CPU; the calling thread waits for it.
    pub fn wait(self) -> Result<tch::Tensor> {
        bridge::wait_for(&self.arrived)?;
        Ok(self.host)
    }
}

/// Milliseconds that the device takes for `work`: between two events of its own on a GPU, by the clock on the CPU.
pub fn milliseconds(device: tch::Device, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let Some((_, index)) = cuda_device(device) else {
        let start = Instant::now();
        work()?;
        return Ok(start.elapsed().as_secs_f64() * 1e3);
    };
    let start = bridge::record_event(index)?;
    work()?;
    let end = bridge::record_event(index)?;
    Ok(bridge::elapsed_ms(&start, &end)?)
}

/// Every kernel, copy and memset that `work` made the GPU run, in no order.
///
/// # Errors
/// `device` is no GPU.
pub fn profile(device: tch::Device, work: impl FnOnce() -> Result<()>) -> Result<Vec<DeviceActivity>> {
    let (_, index) = cuda_device(device).context("only a GPU's work can be profiled")?;
    bridge::start_profile(index)?;
    let result = work();
    let activities = bridge::stop_profile(index);
    result?;
    Ok(activities?)
}

/// Work of the calling thread's stream, recorded once and launched as a whole: a CUDA graph. It reads and writes the
/// memory that it was recorded on, so every tensor that lives across replays must be kept.
pub struct Graph(UniquePtr<bridge::CudaGraph>);

impl Graph {
    /// Whether work on `device` can be recorded: on a GPU, with `libferrotune_cuda.so` loaded.
    pub fn available(device: tch::Device) -> bool {
        device.is_cuda() && bridge::has_cuda_library()
    }

    /// Records what `work` enqueues, which does not run.
    ///
    /// # Errors
    /// Those of `work`, and work that cannot be recorded: it waits for the device, or copies from pageable memory.
    pub fn record<T>(work: impl FnOnce() -> Result<T>) -> Result<(Graph, T)> {
        let mut graph = bridge::cuda_graph()?;
        graph.pin_mut().begin()?;
        let result = work();
        // Also after an error: the stream must leave the capture.
        let ended = graph.pin_mut().end();
        let result = result?;
        ended?;
        Ok((Graph(graph), result))
    }

    /// Enqueues the recorded work.
    pub fn replay(&mut self) -> Result<()> {
        self.0.pin_mut().replay().map_err(anyhow::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_parsed_and_shown() {
        for (text, choice) in [
            ("auto", Choice::Auto),
            ("cpu", Choice::Cpu),
            ("cuda:0", Choice::Cuda(0)),
            ("cuda:12", Choice::Cuda(12)),
        ] {
            assert_eq!(text.parse::<Choice>().unwrap(), choice);
            assert_eq!(choice.to_string(), text);
            assert_eq!(serde_json::from_value::<Choice>(text.into()).unwrap(), choice);
        }
        assert_eq!("cuda".parse::<Choice>().unwrap(), Choice::Cuda(0));
        for wrong in ["", "gpu", "cuda:", "cuda:-1", "cpu:0"] {
            let error = wrong.parse::<Choice>().unwrap_err().to_string();
            assert!(error.contains("expected auto, cpu, cuda or cuda:N"), "{error}");
        }
    }

    #[test]
    fn what_lacks_is_named() {
        let gpu = |major, minor| CudaDevice {
            name: "a GPU".into(),
            major,
            minor,
            multiprocessors: 132,
            total_memory: 1 << 34,
        };
        let with = |driver_version, devices| CudaProbe { driver_version, devices, problem: "no GPU".into() };
        assert!(check(&with(13000, vec![gpu(7, 5)]), 0).is_ok());
        for (probe, index, says) in [
            (with(0, vec![]), 0, "no GPU"),
            (with(12080, vec![]), 0, "supports CUDA 12.8"),
            (with(13010, vec![gpu(9, 0)]), 1, "there is no cuda:1; the driver sees 1 GPU(s)"),
            (with(13000, vec![gpu(7, 0)]), 0, "compute capability 7.0"),
        ] {
            let error = check(&probe, index).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
