#include "ferrotune/csrc/cuda_library.h"

#include <dlfcn.h>

#include "ferrotune/csrc/kernels.h"

namespace ferrotune {

namespace {

// Written once, by load_cuda_library, before any op runs on CUDA.
const CudaLibrary* cuda_functions = nullptr;

}  // namespace

void load_cuda_library(rust::Str path) {
  const std::string file(path);
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, dlerror());
  const auto abi = reinterpret_cast<decltype(&::ferrotune_cuda_abi)>(dlsym(library, "ferrotune_cuda_abi"));
  const auto functions =
      reinterpret_cast<decltype(&::ferrotune_cuda_library)>(dlsym(library, "ferrotune_cuda_library"));
  TORCH_CHECK(abi != nullptr && functions != nullptr && abi() == FERROTUNE_CUDA_ABI, file,
              " is of another version: build it again with scripts/build_kernels");
  cuda_functions = functions();
}

const CudaLibrary* cuda_library() { return cuda_functions; }

bool has_cuda_library() { return cuda_functions != nullptr; }

void limit_memory(std::int32_t index, std::uint64_t device_bytes, std::uint64_t host_bytes, std::int64_t rows) {
  TORCH_CHECK(cuda_functions != nullptr, "libferrotune_cuda.so is not loaded");
  cuda_functions->limit_memory(index, device_bytes);
  cuda_functions->limit_stash(index, host_bytes, rows);
}

std::unique_ptr<CudaGraph> cuda_graph() {
  TORCH_CHECK(cuda_functions != nullptr, "libferrotune_cuda.so is not loaded");
  return cuda_functions->graph(clear_memory());
}

}  // namespace ferrotune
