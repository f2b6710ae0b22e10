//! `ferrotune doctor`: what this machine has, what it lacks, and the command that mends it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde::Serialize;

use super::format::bytes;
use crate::device::{self, CudaProbe};

/// The PyTorch release whose libtorch we are built against.
const LIBTORCH: &str = "2.11";
/// libtorch 2.11 is built for CUDA 13.0 (1000 major + 10 minor), which driver 580 brought.
const OLDEST_CUDA: i32 = 13000;
/// CUDA 13 dropped everything before Turing.
const OLDEST_COMPUTE_CAPABILITY: (i32, i32) = (7, 5);

/// Reports what this machine has and lacks: processor, memory, disk, libtorch, driver, GPUs, kernels.
#[derive(clap::Args, Debug)]
pub struct DoctorArgs {
    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    ferrotune: &'static str,
    cpu: Cpu,
    memory: Memory,
    disk: Vec<Disk>,
    libtorch: Option<Libtorch>,
    driver: Option<Driver>,
    gpus: Vec<Gpu>,
    /// The kernel library, where a GPU run would find it.
    kernels: Option<PathBuf>,
    /// The CUDA compiler that builds it; needed on no machine that only runs.
    nvcc: Option<PathBuf>,
    cpu_works: bool,
    gpu_works: bool,
    problems: Vec<Problem>,
}

#[derive(Serialize, Default, PartialEq, Debug)]
struct Cpu {
    model: String,
    /// Threads that this process may use.
    threads: usize,
    /// The instruction sets that libtorch's CPU kernels choose among.
    instruction_sets: Vec<&'static str>,
}

#[derive(Serialize)]
struct Memory {
    total_bytes: u64,
    available_bytes: u64,
}

#[derive(Serialize)]
struct Disk {
    /// What is written there.
    holds: &'static str,
    path: PathBuf,
    free_bytes: u64,
}

#[derive(Serialize)]
struct Libtorch {
    folder: PathBuf,
    version: Option<String>,
    /// Whether libtorch_cuda.so lies beside it.
    cuda: bool,
}

#[derive(Serialize)]
struct Driver {
    /// As in `580.65.06`; unknown where the kernel module is not visible (WSL).
    version: Option<String>,
    /// The newest CUDA it supports, as in `13.0`.
    cuda: String,
}

#[derive(Serialize)]
struct Gpu {
    name: String,
    total_bytes: u64,
    /// As in `9.0`.
    compute_capability: String,
}

#[derive(Serialize)]
struct Problem {
    what: String,
    mend: String,
    /// Whether the CPU path is broken by it, and not only the GPU's.
    fatal: bool,
}

/// Prints the report. An error, hence exit code 1, when not even the CPU path works.
pub fn run(args: DoctorArgs) -> Result<()> {
    let report = examine()?;
    super::show(&report, args.json, render)?;
    ensure!(report.cpu_works, "this machine cannot run ferrotune yet: see `to mend` above");
    Ok(())
}

/// Where `--device cuda` looks for the kernels.
fn kernel_places() -> Result<Vec<PathBuf>> {
    super::model_args::kernel_library().map_or_else(device::kernel_places, |named| Ok(vec![named]))
}

fn examine() -> Result<Report> {
    let probe = device::probe();
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get());
    let limit = read("/sys/fs/cgroup/memory.max").trim().parse().ok();
    let libtorch = loaded_library("libtorch_cpu.so", &read("/proc/self/maps")).map(|library| {
        let folder = library.parent().expect("maps names absolute paths").to_path_buf();
        Libtorch {
            version: libtorch_version(&folder),
            cuda: folder.join("libtorch_cuda.so").exists(),
            folder,
        }
    });
    let mut report = Report {
        ferrotune: env!("CARGO_PKG_VERSION"),
        cpu: Cpu { threads, ..parse_cpuinfo(&read("/proc/cpuinfo")) },
        memory: parse_meminfo(&read("/proc/meminfo"), limit),
        disk: [disk("the current folder", ".".into()), disk("Hugging Face's cache", hub_cache())]
            .into_iter()
            .flatten()
            .collect(),
        driver: (probe.driver_version > 0).then(|| Driver {
            version: parse_driver(&read("/proc/driver/nvidia/version")),
            cuda: format!("{}.{}", probe.driver_version / 1000, probe.driver_version % 1000 / 10),
        }),
        gpus: probe
            .devices
            .iter()
            .map(|device| Gpu {
                name: device.name.clone(),
                total_bytes: device.total_memory,
                compute_capability: format!("{}.{}", device.major, device.minor),
            })
            .collect(),
        kernels: kernel_places()?.into_iter().find(|place| place.exists()),
        nvcc: find_nvcc(libtorch.as_ref()),
        libtorch,
        cpu_works: false,
        gpu_works: false,
        problems: Vec::new(),
    };
    report.problems = problems(&report, probe);
    report.cpu_works = !report.problems.iter().any(|problem| problem.fatal);
    report.gpu_works = report.driver.is_some() && report.problems.is_empty();
    Ok(report)
}

/// What is missing or too old, with the command that mends it. Having no NVIDIA GPU is not a problem.
fn problems(report: &Report, probe: &CudaProbe) -> Vec<Problem> {
    let mut found = Vec::new();
    let mut add = |fatal, what: String, mend: &str| found.push(Problem { what, mend: mend.into(), fatal });
    match &report.libtorch {
        None => add(true, "libtorch is not loaded".into(), "scripts/setup"),
        Some(Libtorch { version: Some(version), folder, .. }) if !version.starts_with(LIBTORCH) => add(
            true,
            format!("{} is libtorch {version}; {LIBTORCH} is needed", folder.display()),
            "scripts/setup, then cargo build",
        ),
        Some(_) => {}
    }
    let Some(driver) = &report.driver else { return found };
    if probe.driver_version < OLDEST_CUDA {
        let version = driver.version.as_deref().unwrap_or("of unknown version");
        add(
            false,
            format!("NVIDIA driver {version} supports CUDA {}; driver 580 or newer is needed", driver.cuda),
            "install a newer driver: sudo apt install nvidia-driver-580-server, or nvidia.com/drivers",
        );
    }
    if probe.devices.is_empty() {
        add(
            false,
            format!("a driver, but {}", probe.problem),
            "nvidia-smi should list a GPU; in a container: --gpus all",
        );
    }
    for gpu in probe.devices.iter().filter(|gpu| (gpu.major, gpu.minor) < OLDEST_COMPUTE_CAPABILITY) {
        let what = format!(
            "{} has compute capability {}.{}; 7.5 (Turing) or newer is needed",
            gpu.name, gpu.major, gpu.minor
        );
        add(false, what, "use another GPU, or --device cpu");
    }
    if report.libtorch.as_ref().is_some_and(|libtorch| !libtorch.cuda) {
        add(
            false,
            "libtorch_cuda.so is missing".into(),
            "scripts/setup --cuda; for a bundle, pip install torch==2.11.0",
        );
    }
    if report.kernels.is_none() {
        add(
            false,
            "libferrotune_kernels.so is missing".into(),
            "scripts/setup --cuda; for a bundle, the same before scripts/bundle",
        );
    }
    found
}

fn render(report: &Report) -> String {
    let path_or = |path: &Option<PathBuf>, none: &str| {
        path.as_ref().map_or(none.to_string(), |path| path.display().to_string())
    };
    let mut rows = vec![
        ("ferrotune", report.ferrotune.to_string()),
        (
            "cpu",
            format!(
                "{}, {} threads, {}",
                report.cpu.model,
                report.cpu.threads,
                report.cpu.instruction_sets.join(" ")
            ),
        ),
        (
            "memory",
            format!(
                "{} available of {}",
                bytes(report.memory.available_bytes),
                bytes(report.memory.total_bytes)
            ),
        ),
    ];
    rows.extend(report.disk.iter().map(|disk| {
        ("disk", format!("{} free in {} ({})", bytes(disk.free_bytes), disk.path.display(), disk.holds))
    }));
    rows.push((
        "libtorch",
        report.libtorch.as_ref().map_or("not loaded".into(), |libtorch| {
            format!(
                "{} in {}{}",
                libtorch.version.as_deref().unwrap_or("of unknown version"),
                libtorch.folder.display(),
                if libtorch.cuda { ", with CUDA" } else { ", CPU only" }
            )
        }),
    ));
    rows.push((
        "driver",
        report.driver.as_ref().map_or("no NVIDIA driver".into(), |driver| {
            format!("{}, CUDA {}", driver.version.as_deref().unwrap_or("of unknown version"), driver.cuda)
        }),
    ));
    rows.extend(report.gpus.iter().map(|gpu| {
        (
            "gpu",
            format!(
                "{}, {}, compute capability {}",
                gpu.name,
                bytes(gpu.total_bytes),
                gpu.compute_capability
            ),
        )
    }));
    rows.push(("kernels", path_or(&report.kernels, "no libferrotune_kernels.so")));
    rows.push(("nvcc", path_or(&report.nvcc, "none (only building the kernels needs it)")));
    let ready = |works| if works { "ready" } else { "not ready" };
    rows.push(("--device cpu", ready(report.cpu_works).into()));
    rows.push((
        "--device cuda",
        if report.driver.is_none() { "no GPU here".into() } else { ready(report.gpu_works).into() },
    ));
    let mut text: String = rows.iter().map(|(name, value)| format!("{name:<14} {value}\n")).collect();
    for problem in &report.problems {
        text += &format!("{:<14} {}: {}\n", "to mend", problem.what, problem.mend);
    }
    text
}

/// The file that the process has mapped under the name `library`, by the contents of /proc/self/maps: what the
/// loader really chose, whatever the run path, LD_LIBRARY_PATH or a launcher said.
fn loaded_library(library: &str, maps: &str) -> Option<PathBuf> {
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    path.into_iter().find(|path| path.file_name().is_some_and(|name| name == library)).map(Path::to_path_buf)
}

/// The version of the libtorch whose libraries lie in `folder`: PyTorch's version.py, or the zip's build-version.
fn libtorch_version(folder: &Path) -> Option<String> {
    let torch = folder.parent()?;
    let quoted = |text: String| {
        let line = text.lines().find(|line| line.starts_with("__version__"))?;
        line.split('\'').nth(1).map(str::to_string)
    };
    fs::read_to_string(torch.join("version.py"))
        .ok()
        .and_then(quoted)
        .or_else(|| fs::read_to_string(torch.join("build-version")).ok().map(|text| text.trim().into()))
}

/// Model name and the instruction sets of libtorch's dispatch, from /proc/cpuinfo.
fn parse_cpuinfo(text: &str) -> Cpu {
    let field = |key: &str| {
        let mut rows = text.lines().filter_map(|line| line.split_once(':'));
        rows.find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim()).unwrap_or_default()
    };
    let flags: Vec<&str> = field("flags").split(' ').collect();
    let known = ["avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16"];
    Cpu {
        model: field("model name").to_string(),
        threads: 0,
        instruction_sets: known.into_iter().filter(|name| flags.contains(name)).collect(),
    }
}

/// Total and available memory from /proc/meminfo, capped by the control group's `limit` in bytes (containers).
fn parse_meminfo(text: &str, limit: Option<u64>) -> Memory {
    let of_key = |key: &str| {
        let row = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap_or_default();
        row.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    let limit = limit.unwrap_or(u64::MAX);
    Memory { total_bytes: of_key("MemTotal").min(limit), available_bytes: of_key("MemAvailable").min(limit) }
}

/// The driver's version from /proc/driver/nvidia/version, of the closed or the open kernel module.
fn parse_driver(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|number| number.parse::<u32>().is_ok());
    line.split_whitespace().find(is_version).map(str::to_string)
}

/// Where Hugging Face's cache is: HF_HUB_CACHE, HF_HOME, or ~/.cache/huggingface.
fn hub_cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME"))
        .or_else(|| set("HOME").map(|home| home.join(".cache/huggingface")))
        .unwrap_or_else(|| PathBuf::from("."))
}

/// Free bytes where `path` is, or where its nearest existing parent is.
fn disk(holds: &'static str, path: PathBuf) -> Option<Disk> {
    let existing = path.ancestors().find_map(|path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        fs::canonicalize(path).ok()
    })?;
    let space = rustix::fs::statvfs(&existing).ok()?;
    Some(Disk { holds, path: existing, free_bytes: space.f_bavail * space.f_frsize })
}

fn first_existing(candidates: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    candidates.into_iter().find(|path| path.exists())
}

/// nvcc: the one that `scripts/setup --cuda` fetched, or the first on PATH.
fn find_nvcc(libtorch: Option<&Libtorch>) -> Option<PathBuf> {
    let fetched =
        libtorch.and_then(|libtorch| Some(libtorch.folder.ancestors().nth(2)?.join("nvidia/cu13/bin")));
    let path = std::env::var_os("PATH").unwrap_or_default();
    first_existing(fetched.into_iter().chain(std::env::split_paths(&path)).map(|folder| folder.join("nvcc")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_version_of_both_kernel_modules() {
        let closed =
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:18:37 UTC 2025\nGCC";
        let open =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build  (root@x)";
        assert_eq!(parse_driver(closed).as_deref(), Some("580.65.06"));
        assert_eq!(parse_driver(open).as_deref(), Some("570.124.06"));
        assert_eq!(parse_driver(""), None);
    }

    #[test]
    fn memory_is_capped_by_the_control_group() {
        let text = "MemTotal:       24000000 kB\nMemFree:  1 kB\nMemAvailable:   21000000 kB\n";
        assert_eq!(parse_meminfo(text, None).available_bytes, 21_000_000 * 1024);
        assert_eq!(parse_meminfo(text, Some(1 << 30)).total_bytes, 1 << 30);
    }

    #[test]
    fn cpu_of_cpuinfo() {
        let cpu =
            parse_cpuinfo("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f_not fma\n");
        assert_eq!(cpu.model, "Some CPU");
        assert_eq!(cpu.instruction_sets, ["avx2", "fma"]);
    }

    #[test]
    fn loaded_library_of_maps() {
        let maps =
            "7f00-7f01 r-xp 00000000 08:01 42   /opt/a torch/lib/libtorch_cpu.so\n7f02-7f03 rw-p 0 00:00 0\n";
        let expected = Some(PathBuf::from("/opt/a torch/lib/libtorch_cpu.so"));
        assert_eq!(loaded_library("libtorch_cpu.so", maps), expected);
        assert_eq!(loaded_library("libc10.so", maps), None);
    }

    #[test]
    fn what_a_gpu_lacks_is_no_problem_of_the_cpu() {
        let mut report = examine().unwrap();
        report.driver = Some(Driver { version: Some("535.54.03".into()), cuda: "12.2".into() });
        let volta = device::CudaDevice {
            name: "Tesla V100".into(),
            major: 7,
            minor: 0,
            multiprocessors: 80,
            total_memory: 16 << 30,
        };
        let probe = CudaProbe { driver_version: 12020, devices: vec![volta], problem: String::new() };
        let found = problems(&report, &probe);
        for says in ["driver 535.54.03 supports CUDA 12.2", "Tesla V100 has compute capability 7.0"] {
            let problem = found.iter().find(|problem| problem.what.contains(says)).expect(says);
            assert!(!problem.fatal);
        }
    }

    #[test]
    fn no_driver_is_no_problem() {
        let report = Report { driver: None, ..examine().unwrap() };
        let probe = CudaProbe { driver_version: 0, devices: vec![], problem: "no driver".into() };
        assert!(
            problems(&report, &probe).iter().all(|problem| problem.what.contains("libtorch is not loaded"))
        );
    }
}
