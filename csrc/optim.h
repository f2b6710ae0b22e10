// What the optimizers of the CPU share: f32 tensors as runs of elements, over which one parallel loop goes.
#pragma once

#include "ferrotune/csrc/cpu.h"

namespace ferrotune {

// LoRA has hundreds of tensors of a few thousand elements, none of which is worth a loop of its own. Where a run starts does
// not depend on the number of threads, nor does a sum over runs.
struct Run {
  size_t tensor;
  int64_t begin, count;
};

std::vector<Run> runs_of(const TensorList& tensors);

// Runs worth a thread, about 100 us of them: of plain AdamW (1.5 us a run) and of the 8-bit one (16 us).
constexpr int64_t kPlainGrain = 64, k8bitGrain = 8;

template <typename Body>
void each_run(const std::vector<Run>& runs, int64_t grain, const Body& body) {
  at::parallel_for(0, static_cast<int64_t>(runs.size()), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r, runs[r]);
  });
}

// Where every tensor is contiguous and f32 on the CPU.
const CpuKernels* cpu_kernels_for_all(const TensorList& tensors);

CpuAdamW cpu_factors(const AdamWStep& step);

}  // namespace ferrotune
