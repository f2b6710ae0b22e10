// Rotary position embedding, arXiv:2104.09864, in the half-split pairing of Hugging Face checkpoints.
//   y_i       = x_i cos_i - x_{i+R/2} sin_i          i < R/2
//   y_{i+R/2} = x_{i+R/2} cos_i + x_i sin_i
//   y_d       = x_d                                  R <= d < D (partial_rotary_factor)
// Fuses the four products, two sums and the copies of plain libtorch. Query and key heads stand side by side in one
// tensor, so one launch turns both. Moves: read x, write y, 2 N H D elements, and 8 N R/2 bytes of angles, which a
// thread reads once for kHeads heads.
//
// Backward: the rotation is orthogonal, so dx = J^T dy is the rotation of dy by the opposite angle: sin -> -sin.
#include "chain.cuh"

namespace ferrotune {
namespace {

// Heads that a thread turns by the angles it loaded: 4 make the x traffic twice the cached traffic of cos and sin.
// Measured on an H200 at [8192, 40, 128] bf16, copy 4.08 TB/s: 4 heads 3.97 TB/s (89 registers), 8 heads 3.88, 2 heads
// 3.98, 4 heads unpacked early 3.56 (123 registers). Blocks of 256 threads are as fast, but slower where R < D.
constexpr int kHeads = 4, kThreads = 128;

// A work item is (vector of dims, group of kHeads heads) of one token; the last vectors are those that pass through. y may be
// x: so neither is __restrict__, which would let the compiler read x again after a store to y.
template <typename T, int kWidth>
__global__ void rope_kernel(const T* x, const float* __restrict__ cos, const float* __restrict__ sin,
                            T* y, int64_t N, int H, int D, int half, int64_t x_stride, int64_t y_stride,
                            float sign) {
  next_may_start();
  inputs_ready();
  const int turned = half / kWidth, vectors = turned + (D - 2 * half) / kWidth;
  const int items = vectors * ((H + kHeads - 1) / kHeads);
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; n < N;
       n += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    for (int item = threadIdx.x; item < items; item += blockDim.x) {
      const int vector = item % vectors, head = item / vectors * kHeads;
      const int heads = H - head < kHeads ? H - head : kHeads;
      const T* x_head = x + n * x_stride + static_cast<int64_t>(head) * D;
      T* y_head = y + n * y_stride + static_cast<int64_t>(head) * D;
      if (vector >= turned) {
        const int rest = vector + turned;  // past both halves
        for (int h = 0; h < heads; ++h) store<kWidth>(y_head + h * D, rest, load<kWidth>(x_head + h * D, rest));
        continue;
      }
      Vector<T, kWidth> low[kHeads], high[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h < heads) {
          low[h] = load<kWidth>(x_head + h * D, vector);
          high[h] = load<kWidth>(x_head + h * D + half, vector);
        }
      }
      float c[kWidth], s[kWidth];
      load_float<kWidth>(cos + n * half, vector, c);
      load_float<kWidth>(sin + n * half, vector, s);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (h >= heads) break;
        keep_packed(low[h]);
        keep_packed(high[h]);
        Vector<T, kWidth> out_low, out_high;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const float a = to_float(low[h].v[i]), b = to_float(high[h].v[i]), t = sign * s[i];
          out_low.v[i] = from_float<T>(a * c[i] - b * t);
          out_high.v[i] = from_float<T>(b * c[i] + a * t);
        }
        store<kWidth>(y_head + h * D, vector, out_low);
        store<kWidth>(y_head + h * D + half, vector, out_high);
      }
    }
  }
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int rope(const void* x, const float* cos, const float* sin, void* y, int64_t N, int64_t H, int64_t D,
                    int64_t R, int64_t x_stride, int64_t y_stride, int inverse, int dtype, void* stream) {
  if (N == 0 || H == 0 || D == 0) return cudaSuccess;
  const int64_t half = R / 2;
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    const auto launch = [&](auto width) -> int {
      constexpr int kWidth = decltype(width)::value;
      const int64_t items = (half + D - R) / kWidth * ceil_div(H, kHeads);
      const unsigned threads = static_cast<unsigned>(items < kThreads ? items : kThreads);
      const dim3 block(threads, kThreads / threads);
      return launch_chained(N <= kFewRows, rope_kernel<T, kWidth>, dim3(grid_x(ceil_div(N, block.y))), block, 0, stream,
                            static_cast<const T*>(x), cos, sin, static_cast<T*>(y), N, static_cast<int>(H), static_cast<int>(D),
                            static_cast<int>(half), x_stride, y_stride, inverse ? -1.0f : 1.0f);
    };
    constexpr int kWidth = 16 / sizeof(T);
    const bool fits = half % kWidth == 0 && D % kWidth == 0 && x_stride % kWidth == 0 && y_stride % kWidth == 0 &&
                      aligned16(x) && aligned16(y) && aligned16(cos) && aligned16(sin);
    return fits ? launch(Width<kWidth>{}) : launch(Width<1>{});
  });
}
