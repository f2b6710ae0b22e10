// Picks the table for the processor that this runs on.
#include "cpu_kernels.h"

namespace ferrotune {

extern const CpuKernels cpu_avx512, cpu_avx2;

int64_t cpu_attention_scratch(int64_t length, int64_t dim) { return 32 * (3 * dim + 2 * length); }

const CpuKernels* cpu_kernels() {
  static const CpuKernels* const best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")
                                            ? &cpu_avx512
                                        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &cpu_avx2
                                                                                                          : nullptr;
  return best;
}

}  // namespace ferrotune
