// The 8-bit "dynamic" numbers of arXiv:1511.04561 and what finds the nearest of them: read by the kernels of the CPU and of
// the GPU, written by csrc/adamw_8bit.cpp.
#pragma once

#include <stdint.h>

namespace ferrotune {

// The bits of 2^-23. No two midpoints of a map lie closer to each other than the floats above it that agree in their upper 16
// bits, and none lies below.
constexpr int32_t kDynamicFirst = 104 << 23;
// From there to 1 in steps of 2^16, and 1 itself.
constexpr int32_t kDynamicSteps = (23 << 7) + 1;

// The nearest value to y in [-1, 1]: with a = |y|, which is 1 ulp more for a negative y, so that a midpoint itself belongs to
// the smaller value, and the step of a,
//   i = below[step] + (a > magnitudes[below[step]]),   index = zero + i, or zero - min(i, zero) for a negative y.
struct DynamicMap {
  float values[256];      // ascending
  float magnitudes[256];  // the midpoints above zero, then infinity
  int32_t zero;           // where values is 0: 127, or 0 where the map has no negative values
  uint8_t below[(kDynamicSteps + 6) / 4 * 4];  // how many magnitudes lie below a step; four bytes can be read from each
};

// exp_avg has a sign, exp_avg_sq has none.
struct DynamicMaps {
  DynamicMap exp_avg, exp_avg_sq;
};

constexpr int64_t kDynamicBlock = 256;  // elements that share one absmax
constexpr float kLeastAbsmax = 1e-38f;  // none smaller is divided by

}  // namespace ferrotune
