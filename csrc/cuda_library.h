// Loading libferrotune_cuda.so (csrc/cuda/).
#pragma once

#include "ferrotune/csrc/cuda/cuda_library.h"
#include "rust/cxx.h"

namespace ferrotune {

// Loads the library; after it cuda_library answers.
void load_cuda_library(rust::Str path);

// The library's functions, or nullptr where it is not loaded.
const CudaLibrary* cuda_library();
bool has_cuda_library();

// CudaLibrary::limit_memory and limit_stash.
void limit_memory(std::int32_t index, std::uint64_t device_bytes, std::uint64_t host_bytes, std::int64_t rows);

// A graph that holds nothing yet.
std::unique_ptr<CudaGraph> cuda_graph();

}  // namespace ferrotune
