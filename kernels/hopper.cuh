// defines: arrive, wait_phase, copy_box, wgmma: what sm_90a adds. Barriers of shared memory that producers and consumers of stages wait at,
// copies of boxes of a matrix by the copy engine, and m64nNk16 products of a warpgroup, C [64, N] += A [64, 16] B [16, N] in f32, of which B
// (and A) lie in shared memory.
//
// There a matrix of 64 columns has 128 bytes a row, the columns neighbours in k, and piece p of 16 bytes of row r lies at p ^ (r % 8); it
// starts at a multiple of 1024. Of A and C warp w of the group has rows 16 w .. 16 w + 15, its lanes as in mma.cuh.
#pragma once

#include <cuda.h>

#include "mma.cuh"

namespace ferrotune {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FERROTUNE_HOPPER 1
#endif

__device__ __forceinline__ void init_barrier(unsigned at, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(unsigned at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }
__device__ __forceinline__ void wait_phase(unsigned at, unsigned phase) {
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at), "r"(phase)
        : "memory");
  } while (done == 0);
}

// As `arrive`, after so many bytes more that the copy engine brings.
__device__ __forceinline__ void arrive_with_boxes(unsigned at, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// The box whose first element is (column, row), to a shared address.
__device__ __forceinline__ void copy_box(unsigned to, const CUtensorMap* matrix, int column, int row, unsigned barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(matrix), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// One lane of a warp, all of which must be there, asks for box (0, second, 0) of three dimensions, of so many bytes, which is read once: it leaves the
// second-level cache before what is read again (the policy is what createpolicy makes of L2::evict_first for all). No branch.
__device__ __forceinline__ void ask_once(unsigned to, const CUtensorMap* matrix, int second, unsigned barrier, unsigned bytes) {
  asm volatile(
      "{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\n@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%4], %6;\n"
      "@p cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, %2}], [%4], %5;\n}" ::"r"(to),
      "l"(matrix), "r"(0), "r"(second), "r"(barrier), "l"(0x12f0000000000000ull), "r"(bytes)
      : "memory");
}

#ifdef FERROTUNE_HOPPER

// What is in shared memory for this thread is there for the products.
__device__ __forceinline__ void make_visible() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Of a matrix at a shared address; 2 more is 16 columns further.
__device__ __forceinline__ uint64_t matrix_at(unsigned address) {
  return (address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Of an address that all lanes have: the compiler then knows so, and computes with it once a warp.
__device__ __forceinline__ uint64_t uniform_matrix(unsigned address) { return matrix_at(__reduce_or_sync(0xffffffff, address)); }

#define FERROTUNE_C8(c, i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define FERROTUNE_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FERROTUNE_R16 FERROTUNE_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FERROTUNE_R32 FERROTUNE_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
// A from registers, and from shared memory.
#define FERROTUNE_WGMMA(T, NAME, N, C, REGISTERS, A_REGISTERS, A, B, ...)                                                            \
  __device__ __forceinline__ void wgmma(float (&c)[N / 2], const unsigned (&a)[4], uint64_t b, T) {                                  \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, {" A_REGISTERS "}, " B ", 1, 1, 1, 0;" \
                 : __VA_ARGS__                                                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                              \
  }                                                                                                                                  \
  __device__ __forceinline__ void wgmma(float (&c)[N / 2], uint64_t a, uint64_t b, T) {                                              \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, " A ", 1, 1, 1, 0, 0;"            \
                 : __VA_ARGS__                                                                                                       \
                 : "l"(a), "l"(b));                                                                                                  \
  }
#define FERROTUNE_WGMMAS(T, NAME)                                                                                                    \
  FERROTUNE_WGMMA(T, NAME, 16, 8, FERROTUNE_R8, "%8, %9, %10, %11", "%8, %9", "%12", FERROTUNE_C8(c, 0))                              \
  FERROTUNE_WGMMA(T, NAME, 32, 16, FERROTUNE_R16, "%16, %17, %18, %19", "%16, %17", "%20", FERROTUNE_C8(c, 0), FERROTUNE_C8(c, 8))    \
  FERROTUNE_WGMMA(T, NAME, 64, 32, FERROTUNE_R32, "%32, %33, %34, %35", "%32, %33", "%36", FERROTUNE_C8(c, 0), FERROTUNE_C8(c, 8),    \
                  FERROTUNE_C8(c, 16), FERROTUNE_C8(c, 24))
FERROTUNE_WGMMAS(__nv_bfloat16, "bf16")
FERROTUNE_WGMMAS(__half, "f16")
#undef FERROTUNE_WGMMAS
#undef FERROTUNE_WGMMA
#undef FERROTUNE_R32
#undef FERROTUNE_R16
#undef FERROTUNE_R8
#undef FERROTUNE_C8

// Two products of neighbours in 16 bits.
__device__ __forceinline__ unsigned scale_pair(unsigned pair, unsigned scale, __nv_bfloat16) {
  unsigned product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(scale));
  return product;
}
__device__ __forceinline__ unsigned scale_pair(unsigned pair, unsigned scale, __half) {
  unsigned product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(scale));
  return product;
}

#endif

// The driver's cuTensorMapEncodeTiled, or null.
inline decltype(&cuTensorMapEncodeTiled) box_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
  }();
  return encode;
}

// Boxes of a matrix of elements of 1, 2 or 4 bytes, rows `stride` bytes apart. False where there are none. Rows of a box have the 128 bytes of
// SWIZZLE_128B, pieces of 16 as products want them, or the 64 of SWIZZLE_64B: piece p of row r at p ^ (r / 2 % 4).
inline bool boxes_of(CUtensorMap& boxes, const void* matrix, int element_bytes, int64_t columns, int64_t rows, int64_t stride, int box_columns,
                     int box_rows, CUtensorMapSwizzle swizzle) {
  if (box_encoder() == nullptr) return false;
  const auto type = element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  return box_encoder()(&boxes, type, 2, const_cast<void*>(matrix), sizes,
                       strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                       CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Boxes of `rows` rows of 128 bytes, turned, `stride` bytes apart, of any matrix whose rows are: box (0, i, 0) begins 128 i bytes behind `first`, and
// all of it lies before `first` + 128 `steps`.
inline bool boxes_anywhere(CUtensorMap& boxes, const void* first, int64_t steps, int64_t stride, int rows) {
  if (box_encoder() == nullptr || steps > INT32_MAX) return false;
  const cuuint64_t sizes[3] = {128, static_cast<cuuint64_t>(steps), static_cast<cuuint64_t>(rows)}, strides[2] = {128, static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[3] = {128, 1, static_cast<cuuint32_t>(rows)}, each[3] = {1, 1, 1};
  return box_encoder()(&boxes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(first), sizes, strides, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE,
                       CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace ferrotune
