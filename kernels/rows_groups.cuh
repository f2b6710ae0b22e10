// defines: launch_groups: 9 to 64 rows of x on Hopper by the kernel of rows_groups_kernel.cuh: which operands it takes, the pieces of a product, and
// where stages lie in shared memory.
#pragma once

#include <array>

#include "rows_groups_kernel.cuh"

namespace ferrotune {
namespace {

// Clusters of thread blocks of a kernel that run at once, by their size.
template <typename T, bool kNf4, int N>
int clusters_at_once(int size) {
  static const auto counts = [] {
    std::array<int, kMostPiecesOfGroup + 1> found{};
    const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (cudaFuncSetAttribute(groups_kernel<T, kNf4, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess) return found;
    for (int i = 1; i <= kMostPiecesOfGroup; ++i) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(i), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(i);
      config.blockDim = dim3(kGroupThreads);
      config.dynamicSmemBytes = shared;
      config.attrs = &cluster;
      config.numAttrs = 1;
      if (cudaOccupancyMaxActiveClusters(&found[i], groups_kernel<T, kNf4, N>, &config) != cudaSuccess) found[i] = 0, cudaGetLastError();
    }
    return found;
  }();
  return counts[size];
}

// False where these kernels cannot.
template <typename T, bool kNf4, int N>
bool plan_groups(const KernelRows& rows, const GroupExtras& extras, GroupPlan& group) {
  using Stage = GroupStage<N, kNf4>;
  bool nf4;
  int groups;
  Plan& plan = group.plan;
  plan = plan_of(rows, kGroupRows, nf4, groups);
  group.extras = extras;
  if (extras.gated && (rows.count != 2 || rows.parts[0].rows != rows.parts[1].rows || rows.y_f32)) return false;
  const auto at_most = [](int value, int most) { return value < most ? value : most; };
  group.units = plan.blocks / Stage::kBlocks;
  if (group.units == 0) return false;
  if (extras.gated) {
    group.pieces = 2;
    group.tasks = groups;
  } else {
    group.pieces = at_most(kMostPiecesOfGroup, group.units);
    while (group.pieces > 1 && clusters_at_once<T, kNf4, N>(group.pieces) < groups) --group.pieces;
    group.tasks = groups * group.pieces;
  }

  for (int64_t i = 0; i < rows.count; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    if (part.a == nullptr) continue;
    const int boxes = Stage::kBlocks * (part.lora_f32 ? 2 : 1);
    const int bytes = static_cast<int>(ceil_div(part.R, kTileRows)) * kTileRows * 128 * boxes;
    if (bytes > group.a_bytes) group.a_bytes = bytes;
  }

  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  bool fits = true;
  if constexpr (kNf4) {
    // Words of a row's scales are an odd number, so that eight rows are in different banks.
    group.scale_stride = static_cast<int>((extras.gated ? group.units : ceil_div(group.units, group.pieces)) + 3 | 1) * 4;
    group.w_at = kScalesAt + (kGroupRows * group.scale_stride + 1023) / 1024 * 1024;
    // Stages of A lie behind those of x or of W, where more have room.
    constexpr int kForX = kPairsAt - kStagesAt;
    const int for_w = limit - group.w_at, behind_x = at_most(kForX / (Stage::kXBytes + group.a_bytes), for_w / Stage::kWBytes);
    const int behind_w = at_most(kForX / Stage::kXBytes, for_w / (Stage::kWBytes + group.a_bytes));
    group.stages = at_most(behind_x > behind_w ? behind_x : behind_w, kMostStages);
    group.a_at = behind_x > behind_w ? kStagesAt + group.stages * Stage::kXBytes : group.w_at + group.stages * Stage::kWBytes;
    group.all = group.w_at + group.stages * Stage::kWBytes + (behind_x > behind_w ? 0 : group.stages * group.a_bytes);
    fits = plan.blocks % 4 == 0;
  } else {
    group.stages = at_most((limit - kStagesAt) / (Stage::kWBytes + Stage::kXBytes + group.a_bytes), kMostStages);
    group.w_at = kStagesAt + group.stages * Stage::kXBytes;
    group.a_at = group.w_at + group.stages * Stage::kWBytes;
    group.all = group.a_at + group.stages * group.a_bytes;
  }
  fits = fits && group.stages >= 2;
  const auto fours = [](const void* at, int64_t stride, int bytes) { return reinterpret_cast<uintptr_t>(at) % (4 * bytes) == 0 && stride % 4 == 0; };
  group.by_fours = fours(rows.y, rows.y_stride, rows.y_f32 ? 4 : 2) && fours(rows.residual, rows.residual_stride, 2) && fours(rows.bias, 0, 2);
  for (int64_t i = 0; i < rows.count && fits; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    group.lora = group.lora || part.a != nullptr;
    group.by_fours = group.by_fours && part.rows % 4 == 0;
    if (part.a != nullptr) {
      fits = boxes_of(group.a[i], part.a, part.lora_f32 ? 4 : 2, rows.K, part.R, rows.K * (part.lora_f32 ? 4 : 2), part.lora_f32 ? kBlock / 2 : kBlock,
                      static_cast<int>(part.R), CU_TENSOR_MAP_SWIZZLE_128B);
    }
    if constexpr (kNf4) {
      const KernelNf4& own = part.nf4;
      fits = fits &&
             (own.nested_absmax == nullptr ? aligned16(own.absmax) : plan.nested_shift[i] >= 2 && reinterpret_cast<uintptr_t>(own.absmax) % 4 == 0) &&
             boxes_of(group.w[i], own.packed, 1, rows.K / 2, part.rows, rows.K / 2, kRun / 2, kHalf, CU_TENSOR_MAP_SWIZZLE_64B);
    } else {
      fits = fits && boxes_of(group.w[i], part.w, 2, rows.K, part.rows, part.w_stride * 2, kBlock, kHalf, CU_TENSOR_MAP_SWIZZLE_128B);
    }
  }
  // More than y needs what is left of a task to stay in shared memory.
  const bool more = extras.gated || extras.x_squares != nullptr || extras.normed != nullptr;
  fits = fits && (!more || (group.by_fours && group.tasks <= device_attribute(cudaDevAttrMultiProcessorCount)));
  return fits && boxes_of(group.x, rows.x, 2, rows.K, rows.M, rows.x_stride * 2, kBlock, N, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Nothing is launched where `launches` is false.
template <typename T, bool kNf4, int N>
bool launch_groups_of(const KernelRows& rows, const GroupExtras& extras, bool launches, void* stream, int& error) {
  GroupPlan group{};
  if (!plan_groups<T, kNf4, N>(rows, extras, group)) return false;
  if (!launches) return true;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  error = cudaFuncSetAttribute(groups_kernel<T, kNf4, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, group.all);
  if (error != cudaSuccess) return true;
  // Pieces of a group are launched together, and then a block has one of them.
  const unsigned blocks = group.pieces > 1 || group.tasks < processors ? group.tasks : processors;
  error = launch_clusters(groups_kernel<T, kNf4, N>, dim3(blocks), dim3(kGroupThreads), group.all, stream, group.pieces, group);
  return true;
}

// False where these kernels cannot.
template <typename T, bool kNf4>
bool launch_groups(const KernelRows& rows, const GroupExtras& extras, bool launches, void* stream, int& error) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return false;
  if (rows.M > 32) return launch_groups_of<T, kNf4, 64>(rows, extras, launches, stream, error);
  return rows.M > 16 ? launch_groups_of<T, kNf4, 32>(rows, extras, launches, stream, error)
                     : launch_groups_of<T, kNf4, 16>(rows, extras, launches, stream, error);
}

}  // namespace
}  // namespace ferrotune
