// The launchers of libferrotune_kernels.so as a table of function pointers, and what every launch needs.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "ferrotune/kernels/kernels.h"
#include "rust/cxx.h"

namespace ferrotune {

struct Kernels {
#define FERROTUNE_ROW(name) decltype(&::name) name;
  FERROTUNE_KERNELS(FERROTUNE_ROW)
#undef FERROTUNE_ROW
};

// Loads the library; after it kernels_for answers.
void load_kernels(const std::string& path);
inline void load_kernels(rust::Str path) { load_kernels(std::string(path)); }
// Whether kernels/cpu runs on this processor.
bool has_cpu_kernels();

// The kernels, if the library is loaded and this is a GPU.
const Kernels* kernels_on(const at::Device& device);

// The kernels, if they can work on x: on CUDA, in a dtype they know, library loaded. Else nullptr: the ATen formula runs.
const Kernels* kernels_for(const at::Tensor& x);

int kernel_dtype(const at::Tensor& x);

// The launcher of a kernel that sets bytes to zero, a multiple of 4; nullptr where no library is loaded.
int (*clear_memory())(void* to, int64_t bytes, void* stream);

// Selects x's device for as long as it lives, and holds the stream to launch on.
class Launch {
 public:
  explicit Launch(const at::Tensor& x);
  void* stream() const { return stream_; }
  // At least `bytes` of this device for this stream's kernels of that name, zero when first given; never freed, since recorded
  // graphs know its address.
  void* lasting_zeros(const char* name, int64_t bytes) const;

 private:
  c10::DeviceGuard guard_;
  void* stream_;
};

// Throws for a launcher's nonzero result.
void check_launch(int error, const char* kernel);

// x [N, H, D] with its rows in order: only the token stride is free. A copy where x is not so.
struct TokenRows {
  explicit TokenRows(const at::Tensor& x);
  at::Tensor x;
  int64_t stride;  // elements from token to token
};

}  // namespace ferrotune
