// defines: GroupExtras, groups_take, launch_groups: what the products of rows_groups.cuh do besides, for all layers of a decoder (decode_groups.cu).
#pragma once

#include "kernels.h"

namespace ferrotune {

struct GroupExtras {
  // With NF4 weights x is in the order of nf4_order.cuh, and so is what a product of NF4 reads next: y where `gated`, normed.
  // Of two parts with equal rows: y [M, rows of one] = act(x W_0^T) x W_1^T, with the activation less one; 0: y as it is.
  int gated;
  // Rows of x are still to be divided by the root of their mean square, whose sums over pieces are [squares_rows, 64].
  int squares_rows;
  const float* x_squares;
  float eps;
  // What the norm behind y takes, unless null: normed [M, ..], as y lies, = y (next_weight + next_offset), and sums of y^2 over runs of 128 rows, [runs, 64].
  float next_offset;
  const void* next_weight;
  void* normed;
  float* squares;
};

// Whether launch_groups takes these operands, bf16.
bool groups_take(const KernelRows& rows, const GroupExtras& extras);
int launch_groups(const KernelRows& rows, const GroupExtras& extras, void* stream);

}  // namespace ferrotune
