#include "ferrotune/csrc/kernels.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <map>
#include <mutex>

namespace ferrotune {

namespace {

// Written once, by load_kernels, before any op runs on CUDA.
Kernels table;
bool loaded = false;

}  // namespace

void load_kernels(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, dlerror());
  const auto symbol = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    TORCH_CHECK(function != nullptr, path, " has no ", name, ": build it again with scripts/build_kernels");
  };
  decltype(&::ferrotune_kernels_abi) abi;
  symbol(abi, "ferrotune_kernels_abi");
  TORCH_CHECK(abi() == FERROTUNE_KERNELS_ABI, path, " is of another version (interface ", abi(),
              ", expected ", FERROTUNE_KERNELS_ABI, "): build it again with scripts/build_kernels");
#define FERROTUNE_ROW(name) symbol(table.name, #name);
  FERROTUNE_KERNELS(FERROTUNE_ROW)
#undef FERROTUNE_ROW
  loaded = true;
}

const Kernels* kernels_on(const at::Device& device) { return loaded && device.is_cuda() ? &table : nullptr; }

const Kernels* kernels_for(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16 ? kernels_on(x.device()) : nullptr;
}

int (*clear_memory())(void*, int64_t, void*) {
  if (!loaded) return nullptr;
  return [](void* to, int64_t bytes, void* stream) {
    KernelFill matrix{};
    matrix.to = to;
    matrix.rows = 1;
    matrix.columns = matrix.to_stride = bytes / 4;
    return table.fill(&matrix, 1, KERNEL_F32, stream);
  };
}

int kernel_dtype(const at::Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return KERNEL_F32;
    case at::kHalf:
      return KERNEL_F16;
    case at::kBFloat16:
      return KERNEL_BF16;
    default:
      TORCH_CHECK(false, "no kernel works on ", x.scalar_type());
  }
}

Launch::Launch(const at::Tensor& x)
    : guard_(x.device()),
      stream_(c10::impl::VirtualGuardImpl(x.device().type()).getStream(x.device()).native_handle()) {}

void* Launch::lasting_zeros(const char* name, int64_t bytes) const {
  static std::mutex mutex;
  static std::map<std::tuple<c10::DeviceIndex, void*, std::string>, std::vector<at::Tensor>> known;
  const std::lock_guard lock(mutex);
  const c10::Device device = guard_.current_device();
  std::vector<at::Tensor>& buffers = known[{device.index(), stream_, name}];
  if (buffers.empty() || buffers.back().numel() < bytes) {
    buffers.push_back(at::zeros({bytes}, at::TensorOptions().dtype(at::kByte).device(device)));
  }
  return buffers.back().mutable_data_ptr();
}

void check_launch(int error, const char* kernel) {
  if (error == 0) return;
  // libtorch_cpu has loaded the CUDA run time.
  const auto describe = reinterpret_cast<const char* (*)(int)>(dlsym(RTLD_DEFAULT, "cudaGetErrorString"));
  TORCH_CHECK(false, kernel, ": CUDA error ", error, describe ? std::string(", ") + describe(error) : std::string());
}

TokenRows::TokenRows(const at::Tensor& given) : x(given) {
  const int64_t n = x.size(0), h = x.size(1), d = x.size(2);
  const bool ordered = (d == 1 || x.stride(2) == 1) && (h == 1 || x.stride(1) == d) && (n == 1 || x.stride(0) >= h * d);
  if (!ordered) x = x.contiguous();
  stride = n == 1 ? h * d : x.stride(0);
}

}  // namespace ferrotune
