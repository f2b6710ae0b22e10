// Words of a step of decoding (ids, positions, lengths, pages) where its recorded graph reads them, and the ids from where they were drawn:
//   to[i] = i < n ? max(ids[i], 0) : words[i]
// Fuses two copies of the words, a clamp and a copy of the ids. The words are arguments of the launch: no memory of the host's must be kept for them.
// Moves: 8 bytes a word.
#include <cstring>

#include "chain.cuh"

namespace ferrotune {
namespace {

// The smaller, the sooner it starts.
template <int kMost>
struct Words {
  int32_t of[kMost];
};

template <int kMost>
__global__ void put_words_kernel(const __grid_constant__ Words<kMost> words, int count, const int64_t* ids, int n, int64_t* to) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  to[i] = i < n ? max(ids[i], int64_t{0}) : int64_t{words.of[i]};
}

template <int kMost>
int launch(const int32_t* words, int64_t count, const int64_t* ids, int64_t n, int64_t* to, void* stream) {
  Words<kMost> own;
  std::memcpy(own.of, words, count * sizeof *words);
  constexpr int kThreads = 256;
  put_words_kernel<kMost><<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      own, static_cast<int>(count), ids, static_cast<int>(n), to);
  return cudaGetLastError();
}

}  // namespace
}  // namespace ferrotune

using namespace ferrotune;

extern "C" int put_words(const int32_t* words, int64_t count, const int64_t* ids, int64_t n, int64_t* to, void* stream) {
  if (count < 1 || count > KERNEL_MOST_WORDS || n > count) return cudaErrorInvalidValue;
  return count <= 512 ? launch<512>(words, count, ids, n, to, stream) : launch<KERNEL_MOST_WORDS>(words, count, ids, n, to, stream);
}
