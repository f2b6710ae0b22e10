// Matrices of bf16 in 12 bits an element, without loss (csrc/bf12.h says how): y = x W^T in f32 for at most 128 rows of x, and W itself.
// Fuses the decoding with the product; plain libtorch would write W out in 16 bits first. Moves: W once, 1.5 bytes an element and 8 for each
// of the few that are no code; x and y are small, and x comes from the caches.
//
// A weight is a byte of bf16's own (the lowest bit of the exponent and seven of the mantissa) and half a byte (the sign and three bits of the
// exponent), so that ten instructions on integers make the eight weights that a thread gives to a product: 2^s times the weights, with one s
// a row, which is multiplied out of the sum. The sums are those of a product on bf16, to the bit where their order is the same.
//
// Up to eight rows of x a thread block has every C-th tile of 16 rows of W, and its warps a piece of K each. More rows go through
// shared memory in pieces of 64 columns, which the warps of a block read for 32 or 64 rows of W at once.
#include "rows.cuh"

// Before compute capability 8.0 nothing calls what the products are made of.
#pragma nv_diag_suppress 177

namespace ferrotune {
namespace {

static_assert(KERNEL_MOST_BF12_ROWS == 128, "the most rows of a launch");
using T = __nv_bfloat16;
constexpr int kThreads = 32 * kWarps, kUnitBytes = kTileRows * kBlock * 3 / 2, kPlane = 512;
// Up to eight rows: units of a warp that are under way or read, and thread blocks of a processor.
constexpr int kRing = 4, kEightBlocks = 3;
// What is not a code has the least one: 2^-15 times the row's scale.
constexpr float kLeast = 0x1p-15f;

// One weight that is no code. `where`: its row of the tile above 28 bits of its column.
struct Rest {
  unsigned where;
  float w;
};
__device__ inline int row_of(const Rest& rest) { return static_cast<int>(rest.where >> 28); }
__device__ inline int column_of(const Rest& rest) { return static_cast<int>(rest.where & 0xfffffff); }
__device__ inline Rest rest_at(const KernelBf12& w, int i) {
  const uint2 v = static_cast<const uint2*>(w.rest)[i];
  return {v.x, __uint_as_float(v.y)};
}

// Sixteen weights of a row, neighbours in pairs, of their low bytes and (in `high`) their other halves.
__device__ __forceinline__ void weights_of(const uint4& low, unsigned high_0, unsigned high_1, unsigned (&out)[8]) {
  const unsigned words[4] = {low.x, low.y, low.z, low.w}, halves[2] = {high_0, high_1};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned n = halves[i];
    const unsigned even = (n << 4 & 0x80808080u) | (n & 0x07070707u) | 0x38383838u, odd = (n & 0x80808080u) | (n >> 4 & 0x07070707u) | 0x38383838u;
    out[4 * i] = __byte_perm(words[2 * i], even, 0x5140);
    out[4 * i + 1] = __byte_perm(words[2 * i], even, 0x7362);
    out[4 * i + 2] = __byte_perm(words[2 * i + 1], odd, 0x5140);
    out[4 * i + 3] = __byte_perm(words[2 * i + 1], odd, 0x7362);
  }
}

// This lane's weights of a unit: elements 16 t .. of rows g and g + 8.
__device__ __forceinline__ void unit_of(unsigned at, unsigned (&top)[8], unsigned (&bottom)[8]) {
  const uint4 a = load_shared_4(at), b = load_shared_4(at + kPlane), high = load_shared_4(at + 2 * kPlane);
  weights_of(a, high.x, high.y, top);
  weights_of(b, high.z, high.w, bottom);
}

// A sum of its own, which is then added: the tensor cores cut off where an addition rounds, and over all of K that adds up.
__device__ __forceinline__ void add_unit(float (&acc)[4], const unsigned (&top)[8], const unsigned (&bottom)[8], const uint4& low, const uint4& high) {
  const unsigned a[4] = {top[0], bottom[0], top[1], bottom[1]}, b[4] = {top[2], bottom[2], top[3], bottom[3]};
  const unsigned c[4] = {top[4], bottom[4], top[5], bottom[5]}, d[4] = {top[6], bottom[6], top[7], bottom[7]};
  float sum[4];
  multiply_new(sum, a, low.x, low.y, T{});
  multiply(sum, b, low.z, low.w, T{});
  multiply(sum, c, high.x, high.y, T{});
  multiply(sum, d, high.z, high.w, T{});
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] += sum[i];
}

struct Product {
  KernelBf12 w;
  const T* x;
  float* y;
  int64_t x_stride, y_stride;
  int M, tiles, units;
};

// This warp's units [from, from + count) of one tile after another, through a ring in shared memory that does not run dry between tiles.
struct Units {
  const int count, skip;  // skip: bytes from a tile's last unit to the next tile's first
  const unsigned ring;
  const uint8_t* w;
  int left, tiles_left;
  unsigned slot = 0;

  __device__ Units(const Product& p, int from, int units, unsigned ring_address)
      : count(units), skip((static_cast<int>(gridDim.x) * p.units - units) * kUnitBytes), ring(ring_address) {
    const int lane = threadIdx.x % 32, first = static_cast<int>(blockIdx.x);
    w = p.w.units + (int64_t{first} * p.units + from) * kUnitBytes + lane * 16;
    tiles_left = count > 0 ? (p.tiles - first + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x) : 0;
    left = count;
#pragma unroll
    for (int s = 0; s < kRing; ++s) fetch(s * kUnitBytes);
  }
  __device__ __forceinline__ void fetch(unsigned to) {
    if (tiles_left > 0) {
#pragma unroll
      for (int i = 0; i < 3; ++i) copy_16_bytes(ring + to + i * kPlane + threadIdx.x % 32 * 16, w + i * kPlane, true);
      w += kUnitBytes;
      if (--left == 0) left = count, --tiles_left, w += skip;
    }
    commit_copies();
  }
  __device__ __forceinline__ void tile(float (&acc)[4], const T* x) {
    XOfUnit columns{};
    if (x != nullptr && count > 0) columns = load_x(x);
    float odd[4] = {};
#pragma unroll 1
    for (int unit = 0; unit < count; ++unit) {
      const XOfUnit own = columns;
      if (x != nullptr && unit + 1 < count) columns = load_x(x += kBlock);
      wait_copies<kRing - 1>();
      __syncwarp();
      unsigned top[8], bottom[8];
      unit_of(ring + slot + threadIdx.x % 32 * 16, top, bottom);
      __syncwarp();
      fetch(slot);
      slot = slot + kUnitBytes == kRing * kUnitBytes ? 0 : slot + kUnitBytes;
      multiply_pairs<T>(acc, odd, top, bottom, own);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += odd[i];
  }
};

// What is no code, of a tile: the thread's share of the first 32, one weight and one row of x each, is asked for two tiles before it is needed.
struct RestAhead {
  static constexpr int kAtOnce = kThreads / kEight;
  const Product& p;
  const int own = threadIdx.x / kEight, column = threadIdx.x % kEight, step = static_cast<int>(gridDim.x);
  int begin = 0, end = 0, next_begin = 0, next_end = 0;
  Rest rest{}, next{};
  float x = 0;

  __device__ explicit RestAhead(const Product& product) : p(product) {
    starts(static_cast<int>(blockIdx.x));
    begin = next_begin, end = next_end;
    next = share();
    starts(static_cast<int>(blockIdx.x) + step);
  }
  __device__ __forceinline__ void starts(int tile) {
    next_begin = next_end = 0;
    if (tile < p.tiles) next_begin = p.w.starts[tile], next_end = p.w.starts[tile + 1];
  }
  __device__ __forceinline__ Rest share() const { return begin + own < end ? rest_at(p.w, begin + own) : Rest{0, 0}; }
  // x of tile `tile`, of which the weights have been asked for, and what the tiles behind it need. begin and end are this tile's afterwards.
  __device__ __forceinline__ void of(int tile, int& own_begin, int& own_end) {
    own_begin = begin, own_end = end;
    rest = next;
    x = begin + own < end && column < p.M ? to_float(p.x[column * p.x_stride + column_of(rest)]) : 0;
    begin = next_begin, end = next_end;
    next = share();
    starts(tile + 2 * step);
  }
};

__global__ void __launch_bounds__(kThreads, kEightBlocks) eight_rows_of_bf12(const __grid_constant__ Product p) {
#if __CUDA_ARCH__ >= 800
  __shared__ float sums[2][kWarps][kEight * kSumStride];
  __shared__ Rest rests[2][RestAhead::kAtOnce];
  __shared__ float x_of_rests[2][RestAhead::kAtOnce][kEight];
  extern __shared__ uint4 dynamic[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = threadIdx.x % kTileRows, column = threadIdx.x / kTileRows;
  const int each = (p.units + kWarps - 1) / kWarps, from = min(warp * each, p.units), count = min(each, p.units - from);
  next_may_start();
  Units source(p, from, count, shared_address(dynamic) + warp * (kRing * kUnitBytes));
  RestAhead ahead(p);
  inputs_ready();
  const T* const x = g < p.M ? p.x + g * p.x_stride + from * kBlock + 16 * t : nullptr;
  int half = 0;
  for (int tile = static_cast<int>(blockIdx.x); tile < p.tiles; tile += static_cast<int>(gridDim.x), half ^= 1) {
    int begin, end;
    ahead.of(tile, begin, end);
    const float scale = p.w.scales[tile * kTileRows + row];
    float acc[4] = {};
    source.tile(acc, x);
    float* const own = sums[half][warp];
    own[2 * t * kSumStride + g] = acc[0];
    own[(2 * t + 1) * kSumStride + g] = acc[1];
    own[2 * t * kSumStride + g + 8] = acc[2];
    own[(2 * t + 1) * kSumStride + g + 8] = acc[3];
    if (begin + ahead.own < end) {
      if (ahead.column == 0) rests[half][ahead.own] = ahead.rest;
      x_of_rests[half][ahead.own][ahead.column] = ahead.x;
    }
    __syncthreads();
    const int64_t at = int64_t{tile} * kTileRows + row;
    if (column < p.M && at < p.w.rows) {
      float value = 0;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) value += sums[half][k][column * kSumStride + row];
      value *= scale;
      for (int i = begin; i < end; ++i) {
        const bool here = i - begin < RestAhead::kAtOnce;
        const Rest rest = here ? rests[half][i - begin] : rest_at(p.w, i);
        if (row_of(rest) != row) continue;
        const float its_x = here ? x_of_rests[half][i - begin][column] : to_float(p.x[column * p.x_stride + column_of(rest)]);
        value += its_x * (rest.w - kLeast * scale);
      }
      p.y[column * p.y_stride + at] = value;
    }
  }
#endif
}

// The sums of a tile, which are zero afterwards: the scales, what is no code, and out.
template <int kEights>
__device__ __forceinline__ void finish(const Product& p, int tile, float (&acc)[kEights][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const float scales[2] = {p.w.scales[tile * kTileRows + g], p.w.scales[tile * kTileRows + g + 8]};
  const auto row_of_x = [&](int e, int j) { return kEight * e + 2 * t + j; };
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[e][i] *= scales[i / 2];
  }
  const int end = p.w.starts[tile + 1];
  for (int first = p.w.starts[tile]; first < end; first += 32) {
    const Rest mine = first + lane < end ? rest_at(p.w, first + lane) : Rest{0, 0};
    // No branch: what several of them need is under way at once.
#pragma unroll kEights > 8 ? 1 : 2
    for (int i = 0; i < min(32, end - first); ++i) {
      const Rest rest{__shfl_sync(0xffffffff, mine.where, i), __shfl_sync(0xffffffff, mine.w, i)};
      const bool upper = row_of(rest) == g, lower = row_of(rest) == g + 8;
      const float w = rest.w - kLeast * (lower ? scales[1] : scales[0]);
      const T* const x = p.x + column_of(rest);
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int n = row_of_x(e, j);
          const float add = w * to_float(x[(n < p.M ? n : 0) * p.x_stride]);
          acc[e][j] += upper ? add : 0, acc[e][2 + j] += lower ? add : 0;
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kEights; ++e) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = row_of_x(e, i % 2);
      const int64_t row = int64_t{tile} * kTileRows + g + i / 2 * 8;
      if (n < p.M && row < p.w.rows) p.y[n * p.y_stride + row] = acc[e][i];
      acc[e][i] = 0;
    }
  }
}

// kEights times eight rows of x. Pieces of 64 columns of x are read by all warps, and a warp's two or four tiles of W by itself. From five on the
// sums leave room for one thread block, which then does more for each piece that its warps share, as far as there is room for that.
template <int kEights>
struct Many {
  static constexpr int kTiles = kEights > 4 && kEights <= 8 ? 4 : 2, kBlocks = kEights > 4 ? 1 : 2, kStages = 3;
  static constexpr int kTilesStage = kTiles * kUnitBytes, kXStage = kEights * kEight * kBlock * 2, kShared = kStages * (kWarps * kTilesStage + kXStage);
};

template <int kEights>
__global__ void __launch_bounds__(kThreads, Many<kEights>::kBlocks) many_rows_of_bf12(const __grid_constant__ Product p) {
#if __CUDA_ARCH__ >= 800
  using Sizes = Many<kEights>;
  constexpr int kTiles = Sizes::kTiles, kStages = Sizes::kStages, kPieces = kEights * kEight * 8;
  extern __shared__ uint4 dynamic[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const unsigned x_ring = shared_address(dynamic), w_ring = x_ring + kStages * Sizes::kXStage + warp * (kStages * Sizes::kTilesStage) + lane * 16;
  const int groups = (p.tiles + kTiles * kWarps - 1) / (kTiles * kWarps), first_group = static_cast<int>(blockIdx.x), group_step = static_cast<int>(gridDim.x);
  const int steps = (groups - first_group + group_step - 1) / group_step * p.units;
  int w_step = 0, w_unit = 0, w_group = first_group;
  // A step's units of this warp's tiles, or of the last tile where there are fewer.
  const auto fetch_w = [&](int stage) {
    if (w_step++ >= steps) return;
#pragma unroll
    for (int h = 0; h < kTiles; ++h) {
      const int tile = min((w_group * kWarps + warp) * kTiles + h, p.tiles - 1);
      const uint8_t* const from = p.w.units + (int64_t{tile} * p.units + w_unit) * kUnitBytes + lane * 16;
#pragma unroll
      for (int i = 0; i < 3; ++i) copy_16_bytes(w_ring + stage * Sizes::kTilesStage + h * kUnitBytes + i * kPlane, from + i * kPlane, true);
    }
    if (++w_unit == p.units) w_unit = 0, w_group += group_step;
  };
  // Piece c of row n is at c ^ (n % 2): what eight neighbouring lanes read is in different banks.
  const auto fetch_x = [&](int step, int stage) {
    if (step >= steps) return;
    const T* const from = p.x + step % p.units * kBlock;
#pragma unroll
    for (int i = 0; i < kPieces; i += kThreads) {
      const int piece = i + static_cast<int>(threadIdx.x), n = piece / 8, c = piece % 8;
      if (kPieces % kThreads != 0 && piece >= kPieces) continue;
      copy_16_bytes(x_ring + stage * Sizes::kXStage + n * (kBlock * 2) + (c ^ (n & 1)) * 16, from + (n < p.M ? n : 0) * p.x_stride + c * 8, n < p.M);
    }
  };
  next_may_start();
  // Without x, which may not be there yet.
  for (int s = 0; s < kStages - 1; ++s) fetch_w(s);
  inputs_ready();
  for (int s = 0; s < kStages - 1; ++s) fetch_x(s, s), commit_copies();
  int stage = 0, unit = 0, group = first_group;
  float acc[kTiles][kEights][4] = {};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    const int free = stage == 0 ? kStages - 1 : stage - 1;
    fetch_w(free);
    fetch_x(step + kStages - 1, free);
    commit_copies();
#pragma unroll
    for (int two = 0; two < kTiles; two += 2) {
      unsigned top[2][8], bottom[2][8];
#pragma unroll
      for (int h = 0; h < 2; ++h) unit_of(w_ring + stage * Sizes::kTilesStage + (two + h) * kUnitBytes, top[h], bottom[h]);
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
        const unsigned at = x_ring + stage * Sizes::kXStage + (kEight * e + g) * (kBlock * 2);
        const uint4 low = load_shared_4(at + ((2 * t) ^ (g & 1)) * 16), high = load_shared_4(at + ((2 * t + 1) ^ (g & 1)) * 16);
#pragma unroll
        for (int h = 0; h < 2; ++h) add_unit(acc[two + h][e], top[h], bottom[h], low, high);
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (++unit < p.units) continue;
    unit = 0;
#pragma unroll
    for (int h = 0; h < kTiles; ++h) {
      const int tile = (group * kWarps + warp) * kTiles + h;
      if (tile < p.tiles) finish<kEights>(p, tile, acc[h]);
    }
    group += group_step;
  }
#endif
}

// W of one tile, as it was: the codes, whose scale is added to the exponent, and what is no code over them.
__global__ void __launch_bounds__(kThreads) unpack_bf12(KernelBf12 w, int64_t first, int64_t count, T* y, int units) {
  const int tile = static_cast<int>(blockIdx.x), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t from_tile = first / kTileRows + tile, K = int64_t{units} * kBlock;
  const uint8_t* const from = w.units + from_tile * units * kUnitBytes;
  for (int unit = threadIdx.x / 32; unit < units; unit += kWarps) {
    const auto* const planes = reinterpret_cast<const uint4*>(from + int64_t{unit} * kUnitBytes) + lane;
    const uint4 high = planes[2 * kPlane / 16];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = g + 8 * h;
      const float scale = w.scales[from_tile * kTileRows + row];
      // Of a row of zeros the scale is zero.
      const unsigned shift = ((__float_as_uint(scale) >> 23) - 127u) << 7 & 0xffffu, shifts = shift | shift << 16;
      unsigned out[8];
      weights_of(planes[h * kPlane / 16], h == 0 ? high.x : high.z, h == 0 ? high.y : high.w, out);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = scale == 0 ? 0 : __vadd2(out[i], shifts);
      // Of a pair of lanes each writes half of both's 32 bytes: whole sectors at once.
      const bool odd = t % 2 == 1;
      uint4 own[2] = {make_uint4(out[0], out[1], out[2], out[3]), make_uint4(out[4], out[5], out[6], out[7])}, given = own[odd ? 0 : 1];
      given = make_uint4(__shfl_xor_sync(0xffffffff, given.x, 1), __shfl_xor_sync(0xffffffff, given.y, 1), __shfl_xor_sync(0xffffffff, given.z, 1),
                         __shfl_xor_sync(0xffffffff, given.w, 1));
      if (int64_t{tile} * kTileRows + row >= count) continue;
      auto* const to = reinterpret_cast<uint4*>(y + (int64_t{tile} * kTileRows + row) * K + unit * kBlock + 16 * (t - odd)) + odd;
      to[0] = odd ? given : own[0];
      to[2] = odd ? own[1] : given;
    }
  }
  __syncthreads();
  for (int i = w.starts[from_tile] + threadIdx.x; i < w.starts[from_tile + 1]; i += kThreads) {
    const Rest rest = rest_at(w, i);
    const int64_t row = int64_t{tile} * kTileRows + row_of(rest);
    if (row < count) y[row * K + column_of(rest)] = __float2bfloat16_rn(rest.w);
  }
}

template <int kEights>
int launch_many(const Product& p, void* stream) {
  using Sizes = Many<kEights>;
  const int groups = static_cast<int>(ceil_div(p.tiles, Sizes::kTiles * kWarps)), most = Sizes::kBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
  return launch_with(many_rows_of_bf12<kEights>, dim3(static_cast<unsigned>(groups < most ? groups : most)), kThreads, Sizes::kShared, stream, p);
}

int launch(const KernelBf12& w, const T* x, int64_t M, int64_t K, int64_t x_stride, float* y, int64_t y_stride, void* stream) {
  const int tiles = static_cast<int>(ceil_div(w.rows, kTileRows)), units = static_cast<int>(K / kBlock);
  const Product p{w, x, y, x_stride, y_stride, static_cast<int>(M), tiles, units};
  switch (ceil_div(M, kEight)) {
    case 1: {
      const int most = kEightBlocks * device_attribute(cudaDevAttrMultiProcessorCount);
      return launch_with(eight_rows_of_bf12, dim3(static_cast<unsigned>(tiles < most ? tiles : most)), kThreads, kWarps * kRing * kUnitBytes, stream, p);
    }
    case 2:
      return launch_many<2>(p, stream);
    case 3:
    case 4:
      return launch_many<4>(p, stream);
    case 5:
    case 6:
      return launch_many<6>(p, stream);
    case 7:
    case 8:
      return launch_many<8>(p, stream);
  }
  return M <= 96 ? launch_many<12>(p, stream) : launch_many<16>(p, stream);
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int bf12_product(const KernelBf12* w, const void* x, int64_t M, int64_t K, int64_t x_stride, float* y, int64_t y_stride, void* stream) {
  if (M > KERNEL_MOST_BF12_ROWS) return cudaErrorInvalidValue;
  // Less shared memory than Hopper's has room for 32 rows.
  const int64_t most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= Many<8>::kShared ? KERNEL_MOST_BF12_ROWS : 32;
  for (int64_t first = 0; first < M; first += most) {
    const int64_t rows = M - first < most ? M - first : most;
    const int error = launch(*w, static_cast<const T*>(x) + first * x_stride, rows, K, x_stride, y + first * y_stride, y_stride, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

extern "C" int bf12_unpack(const KernelBf12* w, int64_t first, int64_t count, int64_t K, void* y, void* stream) {
  if (count == 0) return cudaSuccess;
  unpack_bf12<<<static_cast<unsigned>(ceil_div(count, kTileRows)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*w, first, count, static_cast<T*>(y),
                                                                                                                  static_cast<int>(K / kBlock));
  return cudaGetLastError();
}
