// NF4 weights (arXiv:2305.14314) to and from floats; the format is in csrc/nf4.h.
// nf4_dequantize fuses the look-up, both levels of absmax, the product and the rounding, which plain libtorch runs as a
// dozen kernels over int32 indices. Moves, an element: 4 bits, its share of absmax (8 / 64 bits, nested), and the result:
// 2.52 bytes in 16 bits. nf4_quantize gives the bytes of the CPU's loop: IEEE division and one rounding an operation.
// Moves 2.56 bytes an element of 16 bits.
#include "vector.cuh"

namespace ferrotune {
namespace {

// ---- device

// absmax of a block.
struct Absmax {
  const void* absmax;
  const float *nested, *map;
  float offset;
  int shift, nested_shift;  // log2 of the block sizes

  __device__ float operator()(int64_t block) const {
    if (nested == nullptr) return static_cast<const float*>(absmax)[block];
    const uint8_t index = static_cast<const uint8_t*>(absmax)[block];
    return __fadd_rn(__fmul_rn(map[index], nested[block >> nested_shift]), offset);
  }
};

// Vectors of 16 bytes that a thread writes. Measured on an H200 at [4096, 14336] bf16, copy 4.15 TB/s: 128 threads with 2, 4
// and 8 vectors 3.56, 3.66 and 3.65 TB/s; 256 threads 3.54, 3.64 and 3.63; 512 threads 3.46, 3.58 and 3.57; with 256
// threads and the map in shared memory 3.46, 3.41 and 3.51.
constexpr int kThreads = 128, kVectors = 4;

// Division of a 32-bit number by `width`, exact, by one multiplication: inverse = floor((2^64 - 1) / width) + 1.
struct Division {
  uint64_t inverse;
  uint32_t width;

  explicit Division(uint32_t divisor) : inverse(~uint64_t{0} / divisor + 1), width(divisor) {}
  __device__ uint32_t operator()(uint32_t v) const { return width == 1 ? v : __umul64hi(inverse, v); }
};

// The packed bytes of kWidth elements.
template <int kWidth>
struct Packed;
template <>
struct Packed<8> {
  using type = uint32_t;
};
template <>
struct Packed<4> {
  using type = uint16_t;
};

// The matrices of a launch: the grid's second dimension.
template <typename T>
struct Matrices {
  struct {
    const uint8_t* packed;
    const float* quant_map;
    Absmax absmax;
    T* y;
    int64_t units;  // vectors, or elements
  } list[3];
};

// Vector v holds kWidth elements of one row and one block. Each lane keeps one value of the map and gives it to whoever
// asks: a shuffle costs what a look-up in shared memory does, and needs no copy into it.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    nf4_dequantize_kernel(const __grid_constant__ Matrices<T> matrices, Division row_of, int64_t y_stride) {
  const auto& m = matrices.list[blockIdx.y];
  const int64_t first = int64_t{blockIdx.x} * (kThreads * kVectors) + threadIdx.x, vectors = m.units;
  if (first - threadIdx.x >= vectors) return;
  const auto* __restrict__ packed = reinterpret_cast<const typename Packed<kWidth>::type*>(m.packed);
  const Absmax absmax = m.absmax;
  T* __restrict__ y = m.y;
  const float mine = m.quant_map[threadIdx.x % 16];
  uint32_t bytes[kVectors];
  float scale[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int64_t v = min(first + k * kThreads, vectors - 1);
    bytes[k] = packed[v];
    scale[k] = absmax(v * kWidth >> absmax.shift);
  }
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    Vector<T, kWidth> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      // Byte i / 2, its high nibble first.
      const int place = 8 * (i / 2) + (i % 2 == 0 ? 4 : 0);
      const float value = __shfl_sync(0xffffffff, mine, bytes[k] >> place, 16);
      out.v[i] = from_float<T>(value * scale[k]);
    }
    const int64_t v = first + k * kThreads;
    if (v >= vectors) continue;
    const uint32_t row = row_of(static_cast<uint32_t>(v));
    store<kWidth>(y + row * y_stride, v - int64_t{row} * row_of.width, out);
  }
}

// One element a thread, for sizes and addresses that do not divide.
template <typename T>
__global__ void nf4_dequantize_scalar_kernel(const __grid_constant__ Matrices<T> matrices, int64_t in, int64_t y_stride) {
  const auto& m = matrices.list[blockIdx.y];
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < m.units; i += int64_t{gridDim.x} * blockDim.x) {
    const int index = i % 2 == 0 ? m.packed[i / 2] >> 4 : m.packed[i / 2] & 15;
    const int64_t row = i / in;
    m.y[row * y_stride + (i - row * in)] = from_float<T>(m.quant_map[index] * m.absmax(i >> m.absmax.shift));
  }
}

constexpr int kBlock = 64, kElements = 8;  // of a thread: 8 threads share a block
constexpr int kRounds = 8;
constexpr float kLeast = 1e-38f;

__device__ constexpr float kQuantMap[16] = {-1.0f,
                                            -0.6961928009986877f,
                                            -0.5250730514526367f,
                                            -0.39491748809814453f,
                                            -0.28444138169288635f,
                                            -0.18477343022823334f,
                                            -0.09105003625154495f,
                                            0.0f,
                                            0.07958029955625534f,
                                            0.16093020141124725f,
                                            0.24611230194568634f,
                                            0.33791524171829224f,
                                            0.44070982933044434f,
                                            0.5626170039176941f,
                                            0.7229568362236023f,
                                            1.0f};

// The index of a scaled element is the number of midpoints below it. A step of the range is narrower than the space
// between two midpoints, so a look-up by step and one comparison find it; each lane keeps the entry of its step. Exact,
// because step() never decreases.
struct Midpoints {
  float midpoint;  // in this lane's step, or infinity
  int below;       // midpoints in the steps before

  // 1 to 31 for y in [-1, 1], in the low five bits: the sum with 1.5 * 2^23 rounds to an integer there.
  static __device__ int step(float y) { return __float_as_int(__fmaf_rn(y, 15.4f, 12582928.0f)); }

  __device__ Midpoints() {
    const int lane = threadIdx.x % 32;
    midpoint = __int_as_float(0x7f800000);
    below = 0;
#pragma unroll
    for (int t = 0; t < 15; ++t) {
      const float value = (kQuantMap[t] + kQuantMap[t + 1]) / 2;
      const int place = step(value) & 31;
      if (place < lane) ++below;
      if (place == lane) midpoint = value;
    }
  }

  // By all lanes of a warp together.
  __device__ int index(float y) const {
    const int from = step(y);
    return __shfl_sync(0xffffffff, below, from) + (y > __shfl_sync(0xffffffff, midpoint, from));
  }
};

// kWhole: n is a multiple of 64 and x and packed are aligned.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kThreads)
    nf4_quantize_kernel(const T* __restrict__ x, uint8_t* __restrict__ packed, float* __restrict__ absmax, int64_t n) {
  const Midpoints midpoints;
  const int64_t threads = (n + kBlock - 1) / kBlock * (kBlock / kElements);
  // A warp takes its steps together, because its lanes exchange what they know.
  for (int64_t warp = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / 32 * 32; warp < threads;
       warp += int64_t{gridDim.x} * kThreads) {
    const int64_t thread = warp + threadIdx.x % 32, first = thread * kElements;
    float values[kElements] = {};
    if constexpr (kWhole) {
      if (thread < threads) load_float<kElements>(x, thread, values);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (first + i < n) values[i] = to_float(x[first + i]);
      }
    }
    // By the bits, which order non-negative floats: an infinity or a NaN comes out as itself.
    int bits = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) bits = max(bits, __float_as_int(values[i]) & 0x7fffffff);
#pragma unroll
    for (int lane = 1; lane < kBlock / kElements; lane *= 2) bits = max(bits, __shfl_xor_sync(0xffffffff, bits, lane));
    float most = __int_as_float(bits);
    const int64_t block = thread / (kBlock / kElements);
    const bool complete = kWhole || (block + 1) * kBlock <= n;
    // A NaN stays.
    const float divisor = most < kLeast ? kLeast : most;
    if (!complete) most = divisor;
    const float inverse = 1.0f / divisor;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const uint32_t index = midpoints.index(complete ? values[i] * inverse : values[i] / divisor);
      word |= index << (8 * (i / 2) + (i % 2 == 0 ? 4 : 0));
    }
    if (thread >= threads) continue;
    if (first % kBlock == 0) absmax[block] = most;
    if constexpr (kWhole) {
      reinterpret_cast<uint32_t*>(packed)[thread] = word;
    } else {
#pragma unroll
      for (int i = 0; i < kElements; i += 2) {
        if (first + i < n) packed[(first + i) / 2] = static_cast<uint8_t>(word >> (4 * i));
      }
    }
  }
}

// ---- launchers

int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t{1} << shift) < power) ++shift;
  return shift;
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int nf4_dequantize(const KernelNf4* given, int64_t count, int64_t in, int64_t y_stride, int dtype, void* stream) {
  if (count > 3) return cudaErrorInvalidValue;
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    constexpr int kWidth = 16 / sizeof(T);
    Matrices<T> matrices{};
    int64_t largest = 0;
    bool fits = in % kWidth == 0 && y_stride % kWidth == 0;
    for (int64_t i = 0; i < count; ++i) {
      const KernelNf4& m = given[i];
      const int64_t n = m.rows * in;
      matrices.list[i] = {m.packed,
                          m.quant_map,
                          {m.absmax, m.nested_absmax, m.nested_quant_map, m.nested_offset, log2_of(m.blocksize),
                           log2_of(m.nested_blocksize)},
                          static_cast<T*>(m.y),
                          n};
      largest = n > largest ? n : largest;
      fits = fits && n / kWidth <= 0xffffffff && aligned16(m.y) &&
             reinterpret_cast<uintptr_t>(m.packed) % sizeof(typename Packed<kWidth>::type) == 0;
    }
    if (largest == 0) return cudaSuccess;
    const auto to = static_cast<cudaStream_t>(stream);
    const auto grid = [&](int64_t blocks) { return dim3(grid_x(blocks), static_cast<unsigned>(count)); };
    if (fits) {
      for (int64_t i = 0; i < count; ++i) matrices.list[i].units /= kWidth;
      nf4_dequantize_kernel<T, kWidth><<<grid(ceil_div(largest / kWidth, kThreads * kVectors)), kThreads, 0, to>>>(
          matrices, Division(static_cast<uint32_t>(in / kWidth)), y_stride);
    } else {
      nf4_dequantize_scalar_kernel<T><<<grid(ceil_div(largest, kThreads)), kThreads, 0, to>>>(matrices, in, y_stride);
    }
    return cudaGetLastError();
  });
}

extern "C" int nf4_quantize(const void* x, uint8_t* packed, float* absmax, int64_t n, int dtype, void* stream) {
  if (n == 0) return cudaSuccess;
  return with_type(dtype, [&](auto t) -> int {
    using T = decltype(t);
    // A few rounds for each warp, so that making its table costs little.
    const unsigned grid = grid_x(ceil_div(ceil_div(n, kBlock) * (kBlock / kElements), kThreads * kRounds));
    const auto to = static_cast<cudaStream_t>(stream);
    const T* in = static_cast<const T*>(x);
    if (n % kBlock == 0 && aligned16(x) && reinterpret_cast<uintptr_t>(packed) % 4 == 0) {
      nf4_quantize_kernel<T, true><<<grid, kThreads, 0, to>>>(in, packed, absmax, n);
    } else {
      nf4_quantize_kernel<T, false><<<grid, kThreads, 0, to>>>(in, packed, absmax, n);
    }
    return cudaGetLastError();
  });
}
