// defines: Tile and PaddedTile (16-bit rows in shared memory), copy_rows, load_a, load_b, load_b_rows, multiply, multiply_new, pack.
// The tensor cores' m16n8k16 products, sm_80 and newer. A thread of a warp has g = lane / 4 and t = lane % 4. Of C [16, 8]
// it holds (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "vector.cuh"

namespace ferrotune {

// [rows, kCols] of T; a row is kCols / 8 pieces of 16 bytes. Piece p of row r lies at p ^ (r % 8) in rows of at least 128
// bytes, and shorter rows are turned less often, so that the eight rows of an 8x8 matrix are in eight different groups of banks.
template <typename T, int kCols>
struct Tile {
  static constexpr int kPieces = kCols / 8;
  static_assert(kPieces % 8 == 0 || kPieces == 2 || kPieces == 4 || kPieces == 6, "no swizzle is known");
  T* base;
  __device__ static int turn(int row) {
    return kPieces % 8 == 0 ? row & 7 : kPieces == 4 ? row >> 1 & 3 : row >> 2 & 1;
  }
  __device__ T* at(int row, int piece) const { return base + (row * kPieces + (piece ^ turn(row))) * 8; }
};

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// The same with rows 16 bytes further apart instead of swizzled, for tiles that threads write element by element.
template <typename T, int kCols>
struct PaddedTile {
  static constexpr int kStride = kCols + 8;
  T* base;
  __device__ T* at(int row, int piece) const { return base + row * kStride + piece * 8; }
};

// Starts the copy of 16 bytes to a shared address; zeros where not `inside`, and `from` is then not read.
__device__ inline void copy_16_bytes(unsigned to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}

// Starts the copy of rows [0, kRows) of `from`, `stride` elements apart, into the tile; rows from `limit` on and columns from
// `columns` on, a multiple of 8, become zero.
template <int kThreads, int kRows, typename T, int kCols>
__device__ inline void copy_rows(Tile<T, kCols> to, const T* from, int64_t stride, int64_t limit, int64_t columns = kCols) {
  constexpr int kPieces = kCols / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool inside = row < limit && piece * 8 < columns;
    copy_16_bytes(shared_address(to.at(row, piece)), from + (inside ? row * stride + piece * 8 : 0), inside);
  }
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices at shared addresses, one row from each lane's.
__device__ inline void load_matrices(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ inline void load_matrices_transposed(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
template <typename T>
__device__ inline void load_matrices(unsigned (&r)[4], const T* address) {
  load_matrices(r, shared_address(address));
}
template <typename T>
__device__ inline void load_matrices_transposed(unsigned (&r)[4], const T* address) {
  load_matrices_transposed(r, shared_address(address));
}

// A [16, 16]: rows row.., columns of pieces piece, piece + 1.
template <typename AnyTile>
__device__ inline void load_a(unsigned (&a)[4], AnyTile tile, int row, int piece) {
  const int lane = threadIdx.x % 32;
  load_matrices(a, tile.at(row + lane % 16, piece + lane / 16));
}

// B [16, 16] of a product with tile^T: k runs over the columns of pieces piece, piece + 1, n over rows row... b[0], b[1]
// belong to the first eight n, b[2], b[3] to the others.
template <typename AnyTile>
__device__ inline void load_b_rows(unsigned (&b)[4], AnyTile tile, int row, int piece) {
  const int lane = threadIdx.x % 32;
  load_matrices(b, tile.at(row + lane % 8 + lane / 16 * 8, piece + lane / 8 % 2));
}

// B [16, 16] of a product with the tile itself: k runs over rows row.., n over the columns of pieces piece, piece + 1.
template <typename AnyTile>
__device__ inline void load_b(unsigned (&b)[4], AnyTile tile, int row, int piece) {
  const int lane = threadIdx.x % 32;
  load_matrices_transposed(b, tile.at(row + lane % 16, piece + lane / 16));
}

// c += a b
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c = a b
__device__ inline void multiply_new(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
               : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// Two neighbours as they lie in memory.
__device__ inline unsigned pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const unsigned&>(both);
}
__device__ inline unsigned pack(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const unsigned&>(both);
}
// The same of f32 as their words, of two neighbours and of eight.
template <typename T>
__device__ inline unsigned pack_words(unsigned low, unsigned high) {
  return pack(__uint_as_float(low), __uint_as_float(high), T{});
}
template <typename T>
__device__ inline uint4 pack_words(const uint4& low, const uint4& high) {
  return make_uint4(pack_words<T>(low.x, low.y), pack_words<T>(low.z, low.w), pack_words<T>(high.x, high.y), pack_words<T>(high.z, high.w));
}

}  // namespace ferrotune
