#include "ferrotune/csrc/device.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <malloc.h>
#include <omp.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>

#include "ferrotune/csrc/ops.h"
#include "ferrotune/src/ffi.rs.h"

namespace ferrotune {

namespace {

c10::Device cuda(std::int32_t index) {
  return c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
}

const c10::CachingAllocator::Stat& total(const c10::CachingAllocator::StatArray& stats) {
  return stats[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
}

// cuda.h's CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT.
constexpr int kMajor = 75, kMinor = 76, kMultiprocessors = 16;
// A function of a loaded library; false where there is none.
template <typename Function>
bool find_symbol(void* library, Function*& function, const char* name) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

// CUDA_ERROR_NO_DEVICE, the result of cuInit.
constexpr int kNoDevice = 100;

}  // namespace

CudaProbe probe_cuda() {
  CudaProbe probe{};
  // Never closed: libtorch_cuda goes on using it.
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver == nullptr) {
    probe.problem = "no NVIDIA driver was found (libcuda.so.1 cannot be loaded)";
    return probe;
  }
  // Device handles (CUdevice) are ints, results (CUresult) an enum.
  const auto symbol = [&](auto*& function, const char* name) { return find_symbol(driver, function, name); };
  int (*init)(unsigned);
  int (*version)(int*);
  int (*count)(int*);
  int (*device)(int*, int);
  int (*name)(char*, int, int);
  int (*attribute)(int*, int, int);
  int (*memory)(size_t*, int);
  int (*error_string)(int, const char**);
  if (!symbol(init, "cuInit") || !symbol(version, "cuDriverGetVersion") || !symbol(count, "cuDeviceGetCount") ||
      !symbol(device, "cuDeviceGet") || !symbol(name, "cuDeviceGetName") || !symbol(attribute, "cuDeviceGetAttribute") ||
      !symbol(memory, "cuDeviceTotalMem_v2") || !symbol(error_string, "cuGetErrorString")) {
    probe.problem = std::string("libcuda.so.1 is not an NVIDIA driver: ") + dlerror();
    return probe;
  }
  int devices = 0;
  int error = version(&probe.driver_version);
  if (error == 0) error = init(0);
  if (error == 0) error = count(&devices);
  if (error != 0 && error != kNoDevice) {
    const char* text = nullptr;
    error_string(error, &text);
    probe.problem = std::string("the NVIDIA driver does not start: ") + (text ? text : std::to_string(error));
    return probe;
  }
  for (int i = 0; i < devices; ++i) {
    int handle = 0;
    char text[256] = "";
    size_t bytes = 0;
    CudaDevice found{};
    if (device(&handle, i) || name(text, sizeof text, handle) || attribute(&found.major, kMajor, handle) ||
        attribute(&found.minor, kMinor, handle) ||
        attribute(&found.multiprocessors, kMultiprocessors, handle) || memory(&bytes, handle)) {
      continue;
    }
    found.name = text;
    found.total_memory = bytes;
    probe.devices.push_back(std::move(found));
  }
  if (probe.devices.empty()) probe.problem = "the NVIDIA driver sees no GPU (does CUDA_VISIBLE_DEVICES hide it?)";
  return probe;
}

rust::String torch_lib_dir() {
  Dl_info info;
  TORCH_CHECK(dladdr(reinterpret_cast<const void*>(&at::globalContext), &info) != 0 && info.dli_fname != nullptr,
              "the folder of libtorch_cpu.so is unknown");
  return std::filesystem::canonical(info.dli_fname).parent_path().string();
}

void load_library(rust::Str path) {
  TORCH_CHECK(dlopen(std::string(path).c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr, dlerror());
}

bool start_cuda() {
  if (!at::hasCUDA()) return false;
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  return true;
}

void use_stream(std::int32_t index) {
  static std::mutex mutex;
  static std::map<std::int32_t, c10::Stream> streams;
  const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  const std::lock_guard lock(mutex);
  auto found = streams.find(index);
  if (found == streams.end()) found = streams.emplace(index, guard.getStreamFromGlobalPool(cuda(index))).first;
  guard.setDevice(cuda(index));
  guard.exchangeStream(found->second);
}

MemoryStats memory_stats(std::int32_t index) {
  const auto device = static_cast<c10::DeviceIndex>(index);
  const auto stats = at::accelerator::getDeviceStats(device);
  const auto [free, all] = at::accelerator::getMemoryInfo(device);
  const auto& allocated = total(stats.allocated_bytes);
  const auto& reserved = total(stats.reserved_bytes);
  const auto bytes = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  return MemoryStats{bytes(allocated.current), bytes(allocated.peak), bytes(reserved.current),
                     bytes(reserved.peak),     free,                  all};
}

std::uint64_t allocated_memory(std::int32_t index) {
  const auto stats = at::accelerator::getDeviceStats(static_cast<c10::DeviceIndex>(index));
  return static_cast<std::uint64_t>(total(stats.allocated_bytes).current);
}

std::uint64_t process_memory(std::int32_t index) {
  // nvml.h's nvmlProcessInfo_t.
  struct Process {
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
  };
  void* const driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* const nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  int (*bus_id)(char*, int, int);
  int (*init)();
  int (*handle)(const char*, void**);
  int (*processes)(void*, unsigned*, Process*);
  if (driver == nullptr || nvml == nullptr || !find_symbol(driver, bus_id, "cuDeviceGetPCIBusId") ||
      !find_symbol(nvml, init, "nvmlInit_v2") || !find_symbol(nvml, handle, "nvmlDeviceGetHandleByPciBusId_v2") ||
      !find_symbol(nvml, processes, "nvmlDeviceGetComputeRunningProcesses_v3")) {
    return 0;
  }
  char bus[32] = "";
  void* device = nullptr;
  std::vector<Process> found(64);
  unsigned count = found.size();
  if (bus_id(bus, sizeof bus, index) || init() || handle(bus, &device) || processes(device, &count, found.data())) {
    return 0;
  }
  for (unsigned i = 0; i < count; ++i) {
    // All ones stands for "not available".
    if (found[i].pid == static_cast<unsigned>(getpid()) && found[i].bytes != ~0ull) return found[i].bytes;
  }
  return 0;
}

void reset_peak_memory(std::int32_t index) { at::accelerator::resetPeakStats(static_cast<c10::DeviceIndex>(index)); }

void empty_cache() { at::accelerator::emptyCache(); }

void use_deterministic_algorithms() {
  // cuBLAS repeats its bits with one workspace a stream, which libtorch insists on reading from here.
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
  // An error and not a warning: flash and memory-efficient attention take their fixed order only then.
  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  // No result of ours depends on memory that nobody wrote; filling it would cost as much as writing it.
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

void serial_ops() {
  at::internal::lazy_init_num_threads();  // it would set the number again
  omp_set_num_threads(1);
}

void keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most that glibc takes
  mallopt(M_TRIM_THRESHOLD, 256 << 20);
}

void synchronize(std::int32_t index) { at::accelerator::synchronizeDevice(static_cast<c10::DeviceIndex>(index)); }

std::unique_ptr<at::Tensor> pinned(std::int64_t bytes) {
  return std::make_unique<at::Tensor>(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true)));
}

std::unique_ptr<at::Tensor> upload(rust::Slice<const std::int64_t> values, std::int32_t index) {
  const auto pinned = at::TensorOptions().dtype(at::kLong).pinned_memory(true);
  const at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, pinned);
  std::copy(values.begin(), values.end(), host.mutable_data_ptr<int64_t>());
  return std::make_unique<at::Tensor>(host.to(cuda(index), /*non_blocking=*/true));
}

std::unique_ptr<at::Tensor> upload_rows(const at::Tensor& table, rust::Slice<const std::int64_t> rows,
                                        std::int32_t index) {
  TORCH_CHECK(table.is_cpu() && table.dim() == 2 && table.is_contiguous(), "upload_rows: the table is ", table.sizes(),
              " on ", table.device(), ", expected a contiguous matrix on the CPU");
  const auto count = static_cast<int64_t>(rows.size());
  for (const int64_t row : rows) TORCH_CHECK(row >= 0 && row < table.size(0), "upload_rows: row ", row);
  const at::Tensor host = at::empty({count, table.size(1)}, table.options().pinned_memory(true));
  const size_t bytes = table.size(1) * table.element_size();
  const auto* const from = static_cast<const char*>(table.const_data_ptr());
  auto* const to = static_cast<char*>(host.mutable_data_ptr());
  constexpr int64_t kThreadBytes = 1 << 17;  // about 20 us of reading at random
  at::parallel_for(0, count, std::max<int64_t>(1, kThreadBytes / bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * bytes, from + rows[i] * bytes, bytes);
  });
  return std::make_unique<at::Tensor>(host.to(cuda(index), /*non_blocking=*/true));
}

}  // namespace ferrotune
