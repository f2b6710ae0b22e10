// Attention of one new row of each sequence over keys and values in pages (arXiv:2309.06180), which are read where they lie.
// Fuses the write of the new key and value, both products, softcap, the online softmax (arXiv:1805.02867) and the sum over the
// parts of a sequence. Moves: the keys and values once, 4 D bytes a token and key/value head in 16 bits.
//
// The heads of a group are columns of m16n8k16 products, eight at a time, and keys their rows, so each key is read once for all of them. A thread block takes one
// key/value head of one run of keys of one sequence, its four warps every fourth page; runs have one length whatever else is in
// the batch (up to 8192 tokens, a longer one beyond), so that a row's result does not depend on it. Of a sequence of several runs, the thread block that comes last adds
// up what the others left:   m = max_i m_i,  l = sum_i l_i e^(m_i - m),  o = sum_i o_i e^(m_i - m) / l.
#include "paged_attention.cuh"

namespace ferrotune {
namespace {

template <typename T, int D, int kEights>
__global__ void __launch_bounds__(kPagedThreads) paged_attention_kernel(const __grid_constant__ KernelPaged p, int run_pages,
                                                                        float* partial, int32_t* arrived) {
#if __CUDA_ARCH__ >= 800
  extern __shared__ float4 shared[];
  const int head = blockIdx.y, sequence = blockIdx.z, group = static_cast<int>(p.H / p.K);
  next_may_start();
  inputs_ready();
  const T* const q = static_cast<const T*>(p.q) + sequence * p.q_stride + head * group * D;
  const PagedRun<T> run{static_cast<T*>(p.pool_k) + head * D,
                        static_cast<T*>(p.pool_v) + head * D,
                        p.K * D,
                        p.tables + sequence * p.width,
                        static_cast<int>(p.lengths[sequence]),
                        static_cast<int>(p.window),
                        static_cast<int>(blockIdx.x),
                        run_pages * kPage,
                        group,
                        p.scale,
                        p.softcap,
                        static_cast<T*>(p.out) + (int64_t{sequence} * p.H + head * group) * D,
                        partial + (int64_t{sequence} * p.K + head) * group * gridDim.x * kLeft<D>,
                        gridDim.x,
                        arrived + sequence * p.K + head};
  const auto query = [&](int row, int piece) {
    return row < group ? *reinterpret_cast<const uint4*>(q + row * D + piece * 8) : make_uint4(0, 0, 0, 0);
  };
  const auto put_new = [&](T* to_k, T* to_v) {
    const T* const k = static_cast<const T*>(p.k) + sequence * p.k_stride + head * D;
    const T* const v = static_cast<const T*>(p.v) + sequence * p.v_stride + head * D;
    for (int i = threadIdx.x; i < D / 8; i += kPagedThreads) {
      reinterpret_cast<uint4*>(to_k)[i] = reinterpret_cast<const uint4*>(k)[i];
      reinterpret_cast<uint4*>(to_v)[i] = reinterpret_cast<const uint4*>(v)[i];
    }
  };
  attend<T, D, kEights>(run, reinterpret_cast<char*>(shared), threadIdx.x, query, put_new, [] { __syncthreads(); });
#endif
}

// ---- launchers

// Calls body(T{}, Width<D>{}).
template <typename Body>
int64_t with_heads(const KernelPaged& p, int64_t otherwise, Body&& body) {
  const auto with_dim = [&](auto t) -> int64_t {
    switch (p.D) {
      case 64:
        return body(t, Width<64>{});
      case 96:
        return body(t, Width<96>{});
      case 128:
        return body(t, Width<128>{});
      case 256:
        return body(t, Width<256>{});
    }
    return otherwise;
  };
  if (p.dtype == KERNEL_BF16) return with_dim(__nv_bfloat16{});
  return p.dtype == KERNEL_F16 ? with_dim(__half{}) : otherwise;
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int64_t paged_attention_workspace(const KernelPaged* p) {
  return with_heads(*p, 0, [&](auto, auto dim) -> int64_t {
    constexpr int D = decltype(dim)::value;
    const auto aligned = [](const void* pointer, int64_t stride) { return aligned16(pointer) && stride % 8 == 0; };
    const bool fits = p->page_size == kPage && p->H / p->K <= kMostHeads && aligned(p->q, p->q_stride) &&
                      aligned(p->k, p->k_stride) && aligned(p->v, p->v_stride) && aligned(p->pool_k, 0) && aligned(p->pool_v, 0) &&
                      p->sequences < 65536 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8 &&
                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kPagedBytes<D>;
    return fits ? p->sequences * p->H * ceil_div(p->longest, pages_of_run(p->longest) * kPage) * kLeft<D> : 0;
  });
}

extern "C" int paged_attention(const KernelPaged* p, float* partial, int32_t* arrived, void* stream) {
  if (p->sequences == 0) return cudaSuccess;
  return static_cast<int>(with_heads(*p, cudaErrorInvalidValue, [&](auto t, auto dim) -> int64_t {
    constexpr int D = decltype(dim)::value;
    const auto kernel = p->H / p->K > 8 ? paged_attention_kernel<decltype(t), D, 2> : paged_attention_kernel<decltype(t), D, 1>;
    const int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPagedBytes<D>);
    if (error != cudaSuccess) return error;
    const int run_pages = pages_of_run(p->longest);
    const dim3 grid(static_cast<unsigned>(ceil_div(p->longest, run_pages * kPage)), static_cast<unsigned>(p->K),
                    static_cast<unsigned>(p->sequences));
    return launch_chained(true, kernel, grid, dim3(kPagedThreads), kPagedBytes<D>, stream, *p, run_pages, partial, arrived);
  }));
}
