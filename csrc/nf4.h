// Weights in the NF4 format of bitsandbytes (QLoRA, arXiv:2305.14314).
//
// A matrix [rows, in] is flattened; each run of `blocksize` elements shares one absmax, and an element is an index into
// 16 values in [-1, 1]:   w = quant_map[index] absmax   in f32, rounded once to the wanted dtype.
// Nested, the absmax of all blocks are themselves 8-bit indices, in runs of `nested_blocksize`:
//   absmax = nested_quant_map[index] nested_absmax + nested_offset   (two roundings, no fused multiply-add).
#pragma once

#include "ferrotune/csrc/ops.h"
#include "ferrotune/kernels/kernels.h"

namespace ferrotune {

struct Nf4 {
  int64_t rows, in;
  Tensor packed;     // uint8 [ceil(rows in / 2)], the even element in the high nibble
  Tensor quant_map;  // f32 [16]
  Tensor absmax;     // [blocks], uint8 where nested, else f32
  int64_t blocksize;
  Tensor nested_absmax;     // f32 [ceil(blocks / nested_blocksize)], undefined where not nested
  Tensor nested_quant_map;  // f32 [256]
  double nested_offset;
  int64_t nested_blocksize;

  // Throws where the sizes do not belong together.
  explicit Nf4(const Nf4View& view);
  bool nested() const { return nested_absmax.defined(); }
  // Whether rows `first`, 2 `first`, .. start with a scale of their own, and with a run of scales where these are nested.
  bool splits_at(int64_t first) const { return first * in % (blocksize * (nested() ? nested_blocksize : 1)) == 0; }
  // Rows first .. first + count, where splits_at(first).
  Nf4 some_rows(int64_t first, int64_t count) const;
};

// As a kernel takes it; y is null.
KernelNf4 kernel_nf4(const Nf4& weight);

// Writes the matrix into `destination` [rows, in], whose rows may lie apart.
void dequantize_into(const Nf4& weight, const Tensor& destination);

// Matrices of one width below each other, on a GPU by one launch.
void dequantize_into(const std::vector<const Nf4*>& weights, const Tensor& destination);

// Elements begin .. end of the flattened matrix, on the CPU.
template <typename T>
void dequantize_run(const Nf4& weight, int64_t begin, int64_t end, T* out);

}  // namespace ferrotune
