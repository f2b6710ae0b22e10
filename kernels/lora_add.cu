// LoRA's second product (arXiv:2106.09685) of some hundred rows at most, all parts of one projection, added to what the projection gave:
//   y[:, first ..] += z_p B_p^T + residual[:, first ..]
// For z of kernels/lora_z.cu that is not folded into the projection (csrc/lora.h). Fuses the cast of B, the parts and the residual sum. Moves: z
// and B once, y twice, which after a product of a decoding step lies in the second-level cache.
//
// B's fragments stay in registers while a warp goes down 32 columns of y. Its column 2 t' + i of product j is column 8 t' + 2 j + i, so that
// each access to y is 16 bytes.
#include "chain.cuh"
#include "mma.cuh"

namespace ferrotune {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kUnit = 32, kStep = 32;  // columns of y of a warp; rows that it has under way

// ---- device

// kSlices: runs of 16 of a part's rank. A warp has 32 columns of y and `rows` rows.
template <typename T, int kSlices>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ KernelLoraAdd lora, int rows) {
#if __CUDA_ARCH__ >= 800
  next_may_start();
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int p = 0;
  for (; p < lora.count; ++p) {
    const int64_t units = (lora.parts[p].rows + kUnit - 1) / kUnit;
    if (unit < units) break;
    unit -= units;
  }
  if (p == lora.count) return;
  const KernelLoraAddPart& part = lora.parts[p];
  const int64_t first = unit * kUnit;

  unsigned b[kSlices][4][2];
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const int64_t k = 16 * s + 4 * t;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first + 8 * (g / 2) + 2 * j + g % 2, at = row * part.R + k;
      b[s][j][0] = b[s][j][1] = 0;
      if (row >= part.rows || k >= part.R) continue;
      if (part.f32) {
        const float4 v = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(part.b) + at));
        b[s][j][0] = pack(v.x, v.y, T{});
        b[s][j][1] = pack(v.z, v.w, T{});
      } else {
        const uint2 v = __ldg(reinterpret_cast<const uint2*>(static_cast<const T*>(part.b) + at));
        b[s][j][0] = v.x;
        b[s][j][1] = v.y;
      }
    }
  }
  inputs_ready();
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows, end = begin + rows < lora.N ? begin + rows : lora.N, column = part.first + first + 8 * t;
  const bool inside = first + 8 * t < part.rows;
  T* const y = static_cast<T*>(lora.y) + column;
  const T* const residual = lora.residual == nullptr ? nullptr : static_cast<const T*>(lora.residual) + column;
  const T* const z = static_cast<const T*>(lora.z) + part.z_first + 4 * t;
  constexpr int kAtOnce = kStep / 8;  // rows g, g + 8, ..
  for (int64_t row = begin + g; row - g < end; row += kStep) {
    Vector<T, 8> of_y[kAtOnce], of_residual[kAtOnce];
    uint2 of_z[kAtOnce][kSlices];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t n = row + 8 * i;
      of_residual[i] = {};
      if (inside && n < end) {
        of_y[i] = *reinterpret_cast<const Vector<T, 8>*>(y + n * lora.y_stride);
        if (residual != nullptr) of_residual[i] = *reinterpret_cast<const Vector<T, 8>*>(residual + n * lora.residual_stride);
      }
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        of_z[i][s] = make_uint2(0, 0);
        if (n < end && 16 * s + 4 * t < part.R) of_z[i][s] = *reinterpret_cast<const uint2*>(z + n * lora.z_stride + 16 * s);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i += 2) {
      float acc[4][4] = {};
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const unsigned of_rows[4] = {of_z[i][s].x, of_z[i + 1][s].x, of_z[i][s].y, of_z[i + 1][s].y};
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(acc[j], of_rows, b[s][j][0], b[s][j][1], T{});
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t n = row + 8 * (i + half);
        if (!inside || n >= end) continue;
        const auto sum = [&](int c) {
          return to_float(of_y[i + half].v[c]) + acc[c / 2][2 * half + c % 2] + to_float(of_residual[i + half].v[c]);
        };
        // Left alone, the compiler stores them one by one: three times the time.
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(y + n * lora.y_stride), "r"(pack(sum(0), sum(1), T{})),
                     "r"(pack(sum(2), sum(3), T{})), "r"(pack(sum(4), sum(5), T{})), "r"(pack(sum(6), sum(7), T{}))
                     : "memory");
      }
    }
  }
#endif
}

// ---- launchers

template <typename T, int kSlices>
int launch_add_of(const KernelLoraAdd& lora, void* stream) {
  int64_t units = 0;
  for (int64_t p = 0; p < lora.count; ++p) units += ceil_div(lora.parts[p].rows, kUnit);
  const int64_t blocks = ceil_div(units, kWarps), steps = ceil_div(lora.N, kStep);
  // As many as keep each processor's memory path busy, or one for each step.
  const int64_t wanted = ceil_div(4 * device_attribute(cudaDevAttrMultiProcessorCount), blocks), runs = wanted < steps ? wanted : steps;
  const int64_t rows = ceil_div(steps, runs) * kStep;
  return launch_chained(true, add_kernel<T, kSlices>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(lora.N, rows))),
                        dim3(kThreads), 0, stream, lora, static_cast<int>(rows));
}

template <typename T>
int launch_add(const KernelLoraAdd& lora, void* stream) {
  int64_t rank = 0;
  for (int64_t p = 0; p < lora.count; ++p) rank = lora.parts[p].R > rank ? lora.parts[p].R : rank;
  if (rank <= 16) return launch_add_of<T, 1>(lora, stream);
  return rank <= 32 ? launch_add_of<T, 2>(lora, stream) : launch_add_of<T, 4>(lora, stream);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int64_t lora_add_fits(const KernelLoraAdd* lora) {
  bool fits = lora->y_stride % 8 == 0 && aligned16(lora->y) && lora->residual_stride % 8 == 0 && aligned16(lora->residual);
  for (int64_t p = 0; p < lora->count; ++p) fits = fits && lora->parts[p].rows % 8 == 0 && lora->parts[p].first % 8 == 0;
  return fits;
}

extern "C" int lora_add(const KernelLoraAdd* lora, void* stream) {
  if (lora->N == 0) return cudaSuccess;
  return lora->dtype == KERNEL_BF16 ? launch_add<__nv_bfloat16>(*lora, stream) : launch_add<__half>(*lora, stream);
}
