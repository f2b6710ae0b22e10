// The CUDA side of libtorch, loaded at run time so that one executable runs with and without it.
#pragma once

#include <ATen/core/TensorBody.h>

#include <cstdint>
#include <memory>

#include "rust/cxx.h"

namespace ferrotune {

// Shared with Rust; defined in src/ffi.rs.
struct CudaProbe;
struct MemoryStats;

// What the NVIDIA driver says, without a question to libtorch.
CudaProbe probe_cuda();
// The folder of the libtorch that this process runs on.
rust::String torch_lib_dir();
// dlopen with all symbols resolved now and visible to libraries loaded later.
void load_library(rust::Str path);
// Creates ATen's CUDA state. False where ATen was asked about CUDA before libtorch_cuda was there: it keeps that answer.
bool start_cuda();
// Makes one non-default stream of the device current for the calling thread; the same one for every thread.
void use_stream(std::int32_t index);

MemoryStats memory_stats(std::int32_t index);
// Bytes held by tensors; unlike memory_stats no question to the driver, which answers in tens of microseconds.
std::uint64_t allocated_memory(std::int32_t index);
// What this process holds of the GPU, as nvidia-smi shows it: libtorch's memory, CUDA's own and the code of all kernels.
// 0 where the driver does not tell (inside most containers).
std::uint64_t process_memory(std::int32_t index);
void reset_peak_memory(std::int32_t index);
void empty_cache();
void synchronize(std::int32_t index);
// From now on kernels of the whole process add in a fixed order, and an op of libtorch that cannot is an error.
void use_deterministic_algorithms();

// libtorch's ops run on the calling thread alone from now on.
void serial_ops();
// malloc gives memory back to the system only in large pieces.
void keep_freed_memory();
// Page-locked bytes on the host, not written.
std::unique_ptr<at::Tensor> pinned(std::int64_t bytes);
// int64 [n] on the GPU. Enqueued: through pinned memory, so that the calling thread does not wait.
std::unique_ptr<at::Tensor> upload(rust::Slice<const std::int64_t> values, std::int32_t index);
// Rows of a contiguous matrix in the host's memory, [rows, C] on the GPU; enqueued in the same way.
std::unique_ptr<at::Tensor> upload_rows(const at::Tensor& table, rust::Slice<const std::int64_t> rows, std::int32_t index);

}  // namespace ferrotune
