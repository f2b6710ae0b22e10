// Attention with capped scores (Gemma 2, arXiv:2408.00118), causal, windowed, grouped, over packed segments, forward and
// backward, 16-bit with f32 sums. For query i and key j of one segment, j <= i and i - j < window:
//   s = scale q k^T,  z = c tanh(s / c),  p = softmax(z),  out = p v,  lse = logsumexp(z)
// Fuses the products, the cap and the softmax, tile by tile with the running maximum and sum of arXiv:2205.14135, so that
// no [T, T] tensor exists. Moves q, k, v and out once, and k and v again for each 64 queries (from the L2 cache). Bound by
// the tensor cores: 4 D operations a visible pair forward, 16 D backward.
//
// Backward, with delta = sum over D of dout out:
//   dv = p^T dout     ds = p (dout v^T - delta) (1 - (z / c)^2)     dq = scale ds k     dk = scale ds^T q
// p = e^(z - lse) is computed again. Two kernels, one for dq and one for dk and dv, repeat two of the five products
// between them; in exchange nothing is added atomically, and the result is the same bits every time.
#include "mma.cuh"

namespace ferrotune {
namespace {

// ---- device

[[maybe_unused]] constexpr float kLog2e = 1.4426950408889634f;
[[maybe_unused]] constexpr float kInfinity = __builtin_huge_valf();

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh(s / c) = 1 - 2 / (1 + e^(2 s / c)): within 2e-7, where the hardware's tanh.approx is within 5e-4.
struct Cap {
  float c, rate;  // 2 scale log2(e) / c: of the unscaled score

  __device__ float tanh(float score) const { return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(score * rate)); }
};

// Where a block works: one tile of one head of one segment.
struct Place {
  int64_t start, length;  // of the segment
  int tile;
  __device__ Place(const KernelAttention& a, int tiles) {
    const int segment = blockIdx.x / tiles;
    tile = blockIdx.x % tiles;
    start = a.cu_seqlens[segment];
    length = a.cu_seqlens[segment + 1] - start;
  }
};

[[maybe_unused]] __device__ inline bool visible(int64_t query, int64_t key, int64_t length, int64_t window) {
  return query < length && key <= query && (window == 0 || query - key < window);
}

constexpr int kRows = 64;  // queries a block of the forward and of dq works on, 16 a warp
constexpr int kRowThreads = 128;

// Keys that queries [first, first + kRows) see, from the tile that holds the earliest.
template <int kKeys>
__device__ inline int64_t first_key(int64_t first, int64_t window) {
  const int64_t earliest = window > 0 && first - window + 1 > 0 ? first - window + 1 : 0;
  return earliest / kKeys * kKeys;
}

template <typename T, int D>
__global__ void __launch_bounds__(kRowThreads)
    forward_kernel(const KernelAttention a, T* __restrict__ out, float* __restrict__ lse, int tiles) {
#if __CUDA_ARCH__ >= 800
  constexpr int kKeys = 64, kSteps = D / 16;
  extern __shared__ __align__(128) char shared[];
  const Tile<T, D> q{reinterpret_cast<T*>(shared)}, k{q.base + kRows * D}, v{k.base + kKeys * D};
  Place place(a, tiles);
  place.tile = tiles - 1 - place.tile;  // the longest work first
  const int64_t first = int64_t{place.tile} * kRows;
  if (first >= place.length) return;
  const int head = blockIdx.y, kv_head = head / (a.H / a.K);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* keys = static_cast<const T*>(a.k) + place.start * a.k_stride + kv_head * D;
  const T* values = static_cast<const T*>(a.v) + place.start * a.v_stride + kv_head * D;
  const Cap cap{a.softcap, 2.0f * a.scale * kLog2e / a.softcap};
  const float z_rate = a.softcap * kLog2e;  // z in units of log 2

  const int64_t end = min(place.length, first + kRows);
  int64_t key = first_key<kKeys>(first, a.window);
  copy_rows<kRowThreads, kRows>(q, static_cast<const T*>(a.q) + (place.start + first) * a.q_stride + head * D,
                                a.q_stride, place.length - first);
  copy_rows<kRowThreads, kKeys>(k, keys + key * a.k_stride, a.k_stride, place.length - key);
  commit_copies();

  float o[D / 8][4] = {}, m[2] = {-kInfinity, -kInfinity}, sum[2] = {};
  for (; key < end; key += kKeys) {
    wait_copies<0>();
    __syncthreads();
    copy_rows<kRowThreads, kKeys>(v, values + key * a.v_stride, a.v_stride, place.length - key);
    commit_copies();
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned fa[4], fb[4];
      load_a(fa, q, warp * 16, 2 * step);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        load_b_rows(fb, k, 16 * j, 2 * step);
        multiply(s[2 * j], fa, fb[0], fb[1], T{});
        multiply(s[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
    __syncthreads();
    if (key + kKeys < end) {
      copy_rows<kRowThreads, kKeys>(k, keys + (key + kKeys) * a.k_stride, a.k_stride, place.length - key - kKeys);
    }
    commit_copies();

    const bool masked = key + kKeys > first || a.window > 0 || first + kRows > place.length;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t query = first + warp * 16 + g + 8 * half;
      float top = m[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& z = s[j][2 * half + i];
          z = cap.tanh(z) * z_rate;
          if (masked && !visible(query, key + 8 * j + 2 * t + i, place.length, a.window)) z = -kInfinity;
          top = fmaxf(top, z);
        }
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == -kInfinity ? 0.0f : top;  // no key of this row yet
      const float shrink = exp2_fast(m[half] - base);
      m[half] = top;
      sum[half] *= shrink;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o[j][2 * half] *= shrink;
        o[j][2 * half + 1] *= shrink;
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& p = s[j][2 * half + i];
          p = exp2_fast(p - base);
          sum[half] += p;
        }
      }
    }

    wait_copies<1>();  // v; the next k may be under way
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const unsigned fa[4] = {pack(s[2 * step][0], s[2 * step][1], T{}), pack(s[2 * step][2], s[2 * step][3], T{}),
                              pack(s[2 * step + 1][0], s[2 * step + 1][1], T{}),
                              pack(s[2 * step + 1][2], s[2 * step + 1][3], T{})};
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        unsigned fb[4];
        load_b(fb, v, 16 * step, 2 * j);
        multiply(o[2 * j], fa, fb[0], fb[1], T{});
        multiply(o[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = sum[half];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int64_t query = first + warp * 16 + g + 8 * half;
    if (query >= place.length) continue;
    const int64_t row = place.start + query;
    if (t == 0) lse[head * a.N + row] = m[half] / kLog2e + logf(total);
    const float inverse = 1.0f / total;
    T* y = out + (row * a.H + head) * D + 2 * t;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<unsigned*>(y + 8 * j) = pack(o[j][2 * half] * inverse, o[j][2 * half + 1] * inverse, T{});
    }
  }
#endif
}

// delta [H, N]: a warp a row.
template <typename T>
__global__ void delta_kernel(const T* __restrict__ dout, const T* __restrict__ out, float* __restrict__ delta,
                             int64_t N, int64_t H, int64_t D) {
  const int64_t row = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (row >= N * H) return;
  float sum = 0;
  for (int64_t i = threadIdx.x % 32; i < D / 8; i += 32) {
    const auto a = load<8>(dout + row * D, i), b = load<8>(out + row * D, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += to_float(a.v[j]) * to_float(b.v[j]);
  }
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
  if (threadIdx.x % 32 == 0) delta[row % H * N + row / H] = sum;
}

struct Gradients {
  const void* dout;
  const float *lse, *delta;
  void *dq, *dk, *dv;
  int64_t dq_stride, dk_stride, dv_stride;
};

// p and ds of one pair from the score before scaling, log2(e) lse, dout v^T and delta.
struct Pair {
  float p, ds;
  __device__ Pair(const Cap& cap, float z_rate, float score, float lse, float dp, float delta, bool seen) {
    const float tanh = cap.tanh(score);
    p = seen ? exp2_fast(tanh * z_rate - lse) : 0.0f;
    ds = p * (dp - delta) * (1.0f - tanh * tanh);
  }
};

template <typename T, int D, int kKeys>
__global__ void __launch_bounds__(kRowThreads) dq_kernel(const KernelAttention a, const Gradients d, int tiles) {
#if __CUDA_ARCH__ >= 800
  constexpr int kSteps = D / 16;
  extern __shared__ __align__(128) char shared[];
  const Tile<T, D> q{reinterpret_cast<T*>(shared)}, dout{q.base + kRows * D}, k{dout.base + kRows * D},
      v{k.base + kKeys * D};
  Place place(a, tiles);
  place.tile = tiles - 1 - place.tile;
  const int64_t first = int64_t{place.tile} * kRows;
  if (first >= place.length) return;
  const int head = blockIdx.y, kv_head = head / (a.H / a.K);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const T* keys = static_cast<const T*>(a.k) + place.start * a.k_stride + kv_head * D;
  const T* values = static_cast<const T*>(a.v) + place.start * a.v_stride + kv_head * D;
  const Cap cap{a.softcap, 2.0f * a.scale * kLog2e / a.softcap};
  const float z_rate = a.softcap * kLog2e;

  copy_rows<kRowThreads, kRows>(q, static_cast<const T*>(a.q) + (place.start + first) * a.q_stride + head * D,
                                a.q_stride, place.length - first);
  copy_rows<kRowThreads, kRows>(dout, static_cast<const T*>(d.dout) + ((place.start + first) * a.H + head) * D, a.H * D,
                                place.length - first);
  const int64_t end = min(place.length, first + kRows);
  int64_t key = first_key<kKeys>(first, a.window);
  copy_rows<kRowThreads, kKeys>(k, keys + key * a.k_stride, a.k_stride, place.length - key);
  commit_copies();
  float lse[2] = {}, delta[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = first + warp * 16 + g + 8 * half;
    if (query >= place.length) continue;
    lse[half] = d.lse[head * a.N + place.start + query] * kLog2e;
    delta[half] = d.delta[head * a.N + place.start + query];
  }

  float dq[D / 8][4] = {};
  for (; key < end; key += kKeys) {
    copy_rows<kRowThreads, kKeys>(v, values + key * a.v_stride, a.v_stride, place.length - key);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    float s[kKeys / 8][4] = {}, dp[kKeys / 8][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned fa[4], fb[4];
      load_a(fa, q, warp * 16, 2 * step);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        load_b_rows(fb, k, 16 * j, 2 * step);
        multiply(s[2 * j], fa, fb[0], fb[1], T{});
        multiply(s[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
    wait_copies<0>();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned fa[4], fb[4];
      load_a(fa, dout, warp * 16, 2 * step);
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
        load_b_rows(fb, v, 16 * j, 2 * step);
        multiply(dp[2 * j], fa, fb[0], fb[1], T{});
        multiply(dp[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
    const bool masked = key + kKeys > first || a.window > 0 || first + kRows > place.length;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t query = first + warp * 16 + g + 8 * (i / 2);
        const bool seen = !masked || visible(query, key + 8 * j + 2 * t + i % 2, place.length, a.window);
        s[j][i] = Pair(cap, z_rate, s[j][i], lse[i / 2], dp[j][i], delta[i / 2], seen).ds;
      }
    }
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const unsigned fa[4] = {pack(s[2 * step][0], s[2 * step][1], T{}), pack(s[2 * step][2], s[2 * step][3], T{}),
                              pack(s[2 * step + 1][0], s[2 * step + 1][1], T{}),
                              pack(s[2 * step + 1][2], s[2 * step + 1][3], T{})};
#pragma unroll
      for (int j = 0; j < D / 16; ++j) {
        unsigned fb[4];
        load_b(fb, k, 16 * step, 2 * j);
        multiply(dq[2 * j], fa, fb[0], fb[1], T{});
        multiply(dq[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
    __syncthreads();
    if (key + kKeys < end) {
      copy_rows<kRowThreads, kKeys>(k, keys + (key + kKeys) * a.k_stride, a.k_stride, place.length - key - kKeys);
    }
    commit_copies();
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t query = first + warp * 16 + g + 8 * half;
    if (query >= place.length) continue;
    T* y = static_cast<T*>(d.dq) + (place.start + query) * d.dq_stride + head * D + 2 * t;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      *reinterpret_cast<unsigned*>(y + 8 * j) = pack(dq[j][2 * half] * a.scale, dq[j][2 * half + 1] * a.scale, T{});
    }
  }
#endif
}

// A block owns kKeys keys of one key/value head and goes over all queries that see them, of all heads of the group. Two
// warps share 16 keys: each computes p^T and ds^T for half of the queries, and then dk and dv for half of D, from p^T and
// ds^T of both in shared memory.
template <typename T, int D, int kKeys, int kQueries>
__global__ void __launch_bounds__(kKeys * 4) dkv_kernel(const KernelAttention a, const Gradients d, int tiles) {
#if __CUDA_ARCH__ >= 800
  constexpr int kThreads = kKeys * 4, kSteps = D / 16, kHalf = kQueries / 2;
  extern __shared__ __align__(128) char shared[];
  const Tile<T, D> k{reinterpret_cast<T*>(shared)}, v{k.base + kKeys * D}, q{v.base + kKeys * D},
      dout{q.base + kQueries * D};
  const PaddedTile<T, kQueries> p{dout.base + kQueries * D}, ds{p.base + kKeys * p.kStride};
  float* lse = reinterpret_cast<float*>(ds.base + kKeys * ds.kStride);
  float* delta = lse + kQueries;

  const Place place(a, tiles);
  const int64_t key0 = int64_t{place.tile} * kKeys;
  if (key0 >= place.length) return;
  const int kv_head = blockIdx.y, group = a.H / a.K;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rows = warp / 2 * 16, side = warp % 2;
  const Cap cap{a.softcap, 2.0f * a.scale * kLog2e / a.softcap};
  const float z_rate = a.softcap * kLog2e;

  copy_rows<kThreads, kKeys>(k, static_cast<const T*>(a.k) + (place.start + key0) * a.k_stride + kv_head * D, a.k_stride,
                             place.length - key0);
  copy_rows<kThreads, kKeys>(v, static_cast<const T*>(a.v) + (place.start + key0) * a.v_stride + kv_head * D, a.v_stride,
                             place.length - key0);
  const int64_t last_key = min(key0 + kKeys, place.length) - 1;
  const int64_t end = a.window > 0 ? min(place.length, last_key + a.window) : place.length;
  const int64_t begin = key0 / kQueries * kQueries;
  const int64_t steps = (end - begin + kQueries - 1) / kQueries;
  // Step i works on queries `begin + i % steps * kQueries` of head i / steps of the group.
  const auto copy_q = [&](int64_t i) {
    const int64_t head = kv_head * group + i / steps, query = begin + i % steps * kQueries;
    copy_rows<kThreads, kQueries>(q, static_cast<const T*>(a.q) + (place.start + query) * a.q_stride + head * D,
                                  a.q_stride, place.length - query);
  };
  const auto copy_dout = [&](int64_t i) {
    const int64_t head = kv_head * group + i / steps, query = begin + i % steps * kQueries;
    copy_rows<kThreads, kQueries>(dout, static_cast<const T*>(d.dout) + ((place.start + query) * a.H + head) * D,
                                  a.H * D, place.length - query);
    for (int j = threadIdx.x; j < kQueries; j += kThreads) {
      const bool inside = query + j < place.length;
      lse[j] = inside ? d.lse[head * a.N + place.start + query + j] * kLog2e : 0.0f;
      delta[j] = inside ? d.delta[head * a.N + place.start + query + j] : 0.0f;
    }
  };
  copy_q(0);
  copy_dout(0);
  commit_copies();

  float dk[D / 16][4] = {}, dv[D / 16][4] = {};
  for (int64_t step = 0; step < steps * group; ++step) {
    const int64_t query0 = begin + step % steps * kQueries;
    wait_copies<0>();
    __syncthreads();
    float s[kHalf / 8][4] = {}, dp[kHalf / 8][4] = {};
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      unsigned fa[4], fb[4];
      load_a(fa, k, rows, 2 * c);
#pragma unroll
      for (int j = 0; j < kHalf / 16; ++j) {
        load_b_rows(fb, q, side * kHalf + 16 * j, 2 * c);
        multiply(s[2 * j], fa, fb[0], fb[1], T{});
        multiply(s[2 * j + 1], fa, fb[2], fb[3], T{});
      }
      load_a(fa, v, rows, 2 * c);
#pragma unroll
      for (int j = 0; j < kHalf / 16; ++j) {
        load_b_rows(fb, dout, side * kHalf + 16 * j, 2 * c);
        multiply(dp[2 * j], fa, fb[0], fb[1], T{});
        multiply(dp[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
#pragma unroll
    for (int j = 0; j < kHalf / 8; ++j) {
      const int column = side * kHalf + 8 * j + 2 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t key = key0 + rows + g + 8 * half;
        float pair[2][2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool seen = visible(query0 + column + i, key, place.length, a.window);
          const Pair both(cap, z_rate, s[j][2 * half + i], lse[column + i], dp[j][2 * half + i], delta[column + i], seen);
          pair[0][i] = both.p;
          pair[1][i] = both.ds;
        }
        const int row = rows + g + 8 * half;
        *reinterpret_cast<unsigned*>(p.base + row * p.kStride + column) = pack(pair[0][0], pair[0][1], T{});
        *reinterpret_cast<unsigned*>(ds.base + row * ds.kStride + column) = pack(pair[1][0], pair[1][1], T{});
      }
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kQueries / 16; ++c) {
      unsigned fa[4], fb[4];
      load_a(fa, p, rows, 2 * c);
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        load_b(fb, dout, 16 * c, side * (D / 16) + 2 * j);
        multiply(dv[2 * j], fa, fb[0], fb[1], T{});
        multiply(dv[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
    __syncthreads();
    const bool more = step + 1 < steps * group;
    if (more) copy_dout(step + 1);
#pragma unroll
    for (int c = 0; c < kQueries / 16; ++c) {
      unsigned fa[4], fb[4];
      load_a(fa, ds, rows, 2 * c);
#pragma unroll
      for (int j = 0; j < D / 32; ++j) {
        load_b(fb, q, 16 * c, side * (D / 16) + 2 * j);
        multiply(dk[2 * j], fa, fb[0], fb[1], T{});
        multiply(dk[2 * j + 1], fa, fb[2], fb[3], T{});
      }
    }
    __syncthreads();
    if (more) copy_q(step + 1);
    commit_copies();
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t key = key0 + rows + g + 8 * half;
    if (key >= place.length) continue;
    const int64_t column = kv_head * D + side * (D / 2) + 2 * t;
    T* to_k = static_cast<T*>(d.dk) + (place.start + key) * d.dk_stride + column;
    T* to_v = static_cast<T*>(d.dv) + (place.start + key) * d.dv_stride + column;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      *reinterpret_cast<unsigned*>(to_k + 8 * j) = pack(dk[j][2 * half] * a.scale, dk[j][2 * half + 1] * a.scale, T{});
      *reinterpret_cast<unsigned*>(to_v + 8 * j) = pack(dv[j][2 * half], dv[j][2 * half + 1], T{});
    }
  }
#endif
}

// ---- launchers

int shared_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes, void* stream, Arguments... arguments) {
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// Calls body(T{}, Width<D>{}).
template <typename Body>
int with_heads(const KernelAttention& a, Body&& body) {
  const auto with_dim = [&](auto t) -> int {
    switch (a.D) {
      case 64:
        return body(t, Width<64>{});
      case 128:
        return body(t, Width<128>{});
      case 256:
        return body(t, Width<256>{});
    }
    return cudaErrorInvalidValue;
  };
  if (a.dtype == KERNEL_BF16) return with_dim(__nv_bfloat16{});
  return a.dtype == KERNEL_F16 ? with_dim(__half{}) : static_cast<int>(cudaErrorInvalidValue);
}

struct Grid {
  int tiles;
  dim3 blocks;
  Grid(const KernelAttention& a, int rows, int64_t heads)
      : tiles(static_cast<int>(ceil_div(a.longest, rows))),
        blocks(static_cast<unsigned>(tiles * a.segments), static_cast<unsigned>(heads)) {}
};

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int attention_softcap_forward(const KernelAttention* a, void* out, float* lse, void* stream) {
  return with_heads(*a, [&](auto t, auto dim) -> int {
    using T = decltype(t);
    constexpr int D = decltype(dim)::value;
    const Grid grid(*a, kRows, a->H);
    return launch(forward_kernel<T, D>, grid.blocks, kRowThreads, (kRows + 2 * 64) * D * sizeof(T), stream, *a,
                  static_cast<T*>(out), lse, grid.tiles);
  });
}

extern "C" int attention_softcap_backward(const KernelAttention* a, const void* dout, const void* out, const float* lse,
                                          float* delta, void* dq, void* dk, void* dv, int64_t dq_stride,
                                          int64_t dk_stride, int64_t dv_stride, void* stream) {
  return with_heads(*a, [&](auto t, auto dim) -> int {
    using T = decltype(t);
    constexpr int D = decltype(dim)::value;
    delta_kernel<T><<<static_cast<unsigned>(ceil_div(a->N * a->H, 8)), 256, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const T*>(dout), static_cast<const T*>(out), delta, a->N, a->H, a->D);
    int error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const Gradients d{dout, lse, delta, dq, dk, dv, dq_stride, dk_stride, dv_stride};

    constexpr int kKeys = D == 256 ? 32 : 64;
    const Grid rows(*a, kRows, a->H);
    error = launch(dq_kernel<T, D, kKeys>, rows.blocks, kRowThreads, 2 * (kRows + kKeys) * D * sizeof(T), stream, *a, d,
                   rows.tiles);
    if (error != cudaSuccess) return error;

    const auto dkv = [&](auto tile) -> int {
      constexpr int kTile = decltype(tile)::value;
      const Grid keys(*a, kTile, a->K);
      const size_t bytes = (4 * kTile * D + 2 * kTile * (kTile + 8)) * sizeof(T) + 2 * kTile * sizeof(float);
      return launch(dkv_kernel<T, D, kTile, kTile>, keys.blocks, kTile * 4, bytes, stream, *a, d, keys.tiles);
    };
    // 64 keys of D = 256 take 146 KiB of shared memory; consumer GPUs have 99.
    if constexpr (D == 256) {
      return shared_limit() >= 160 * 1024 ? dkv(Width<64>{}) : dkv(Width<32>{});
    } else {
      return dkv(Width<64>{});
    }
  });
}
