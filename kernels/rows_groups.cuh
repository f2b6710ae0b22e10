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

// Rows of a group and its pieces, so that most processors have a share of a product, and what is left for those that make z. Where there are more groups
// than processors a block has several. NF4 gains nothing by shorter groups: what bounds it is x for each block and the time that a unit takes a warp.
template <typename T, bool kNf4, int N>
void shape_groups(const KernelRows& rows, bool lora, GroupPlan& group) {
  const bool gated = group.extras.gated != 0;
  const auto groups = [&](int of_group) {
    int64_t sum = 0;
    for (int64_t i = 0; i < (gated ? 1 : rows.count); ++i) sum += ceil_div(rows.parts[i].rows, of_group);
    return static_cast<int>(sum);
  };
  // Whether others make z, where there is room for them: it takes as long as some units.
  const auto apart = [&](int pieces) { return lora && (gated || ceil_div(group.units, pieces) >= kLeastUnitsForZ); };
  const auto free = [&](int of_group, int pieces) { return clusters_at_once<T, kNf4, N>(pieces) - groups(of_group); };
  group.rows = kMostGroupRows;
  if (gated) {
    group.pieces = 2;
    while (!kNf4 && group.rows > kLeastGroupRows && free(group.rows - 16, 2) >= apart(2)) group.rows -= 16;
  } else {
    group.pieces = kMostPiecesOfGroup < group.units ? kMostPiecesOfGroup : group.units;
    while (group.pieces > 1 && free(group.rows, group.pieces) < apart(group.pieces)) --group.pieces;
  }
  const int some = free(group.rows, group.pieces);
  if (!apart(group.pieces) || some <= 0) return;
  int tiles = 0;
  for (int64_t i = 0; i < rows.count; ++i) tiles += rows.parts[i].a == nullptr ? 0 : static_cast<int>(ceil_div(rows.parts[i].R, kTileRows));
  const int clusters = some < tiles ? some : tiles;
  const int64_t turns = ceil_div(rows.K / kZChunk, group.pieces * (kZWarpsOfBlock / ceil_div(tiles, clusters)) * chunks_at_once<N>);
  if (turns <= kMostZTurns) group.z_blocks = clusters * group.pieces;
}

// False where these kernels cannot.
template <typename T, bool kNf4, int N>
bool plan_groups(const KernelRows& rows, const GroupExtras& extras, GroupPlan& group) {
  using Stage = GroupStage<N, kNf4>;
  group.extras = extras;
  if (extras.gated && (rows.count != 2 || rows.parts[0].rows != rows.parts[1].rows || rows.y_f32)) return false;
  const auto at_most = [](int value, int most) { return value < most ? value : most; };
  group.units = static_cast<int>(rows.K / kBlock) / Stage::kBlocks;
  if (group.units == 0) return false;
  bool lora = false;
  for (int64_t i = 0; i < rows.count; ++i) lora = lora || rows.parts[i].a != nullptr;
  shape_groups<T, kNf4, N>(rows, lora, group);
  group.w_bytes = group.rows * Stage::kRowBytes;
  bool nf4;
  int groups;
  Plan& plan = group.plan;
  plan = plan_of(rows, group.rows, nf4, groups);
  group.tasks = extras.gated ? groups : groups * group.pieces;

  group.a_in_stages = lora && group.z_blocks == 0;
  for (int64_t i = 0; i < rows.count && group.a_in_stages; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    if (part.a == nullptr) continue;
    const int bytes = plan.a_tiles[i] * kTileRows * 128 * Stage::kBlocks * (part.lora_f32 ? 2 : 1);
    if (bytes > group.a_bytes) group.a_bytes = bytes;
  }
  char* const z = static_cast<char*>(rows.workspace) + kGroupZAt;
  group.z_counters = reinterpret_cast<int*>(z), group.z = z + 256;

  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  bool fits = true;
  if constexpr (kNf4) {
    // Words of a row's scales are an odd number, so that eight rows are in different banks.
    group.scale_stride = static_cast<int>((extras.gated ? group.units : ceil_div(group.units, group.pieces)) + 3 | 1) * 4;
    group.w_at = kScalesAt + (group.rows * group.scale_stride + 1023) / 1024 * 1024;
    constexpr int kForX = kPairsAt - kStagesAt;
    // Stages of A lie behind those of x or of W, where more have room.
    const int for_w = limit - group.w_at, behind_x = at_most(kForX / (Stage::kXBytes + group.a_bytes), for_w / group.w_bytes);
    const int behind_w = at_most(kForX / Stage::kXBytes, for_w / (group.w_bytes + group.a_bytes));
    group.stages = at_most(behind_x > behind_w ? behind_x : behind_w, kMostStages);
    group.a_at = behind_x > behind_w ? kStagesAt + group.stages * Stage::kXBytes : group.w_at + group.stages * group.w_bytes;
    group.all = group.w_at + group.stages * group.w_bytes + (behind_x > behind_w ? 0 : group.stages * group.a_bytes);
    fits = plan.blocks % 4 == 0;
  } else {
    // Products of a warpgroup read its 64 rows, of which the last may have fewer.
    const int behind = (kMostGroupRows - group.rows) % 64 * Stage::kRowBytes;
    group.stages = at_most((limit - kStagesAt - behind) / (group.w_bytes + Stage::kXBytes + group.a_bytes), kMostStages);
    group.w_at = kStagesAt + group.stages * Stage::kXBytes;
    group.a_at = group.w_at + group.stages * group.w_bytes;
    group.all = group.a_at + group.stages * group.a_bytes + behind;
  }
  fits = fits && group.stages >= 2;
  const auto fours = [](const void* at, int64_t stride, int bytes) { return reinterpret_cast<uintptr_t>(at) % (4 * bytes) == 0 && stride % 4 == 0; };
  group.by_fours = fours(rows.y, rows.y_stride, rows.y_f32 ? 4 : 2) && fours(rows.residual, rows.residual_stride, 2) && fours(rows.bias, 0, 2);
  for (int64_t i = 0; i < rows.count && fits; ++i) {
    const KernelRowsPart& part = rows.parts[i];
    group.by_fours = group.by_fours && part.rows % 4 == 0;
    if (part.a != nullptr && group.a_in_stages) {
      fits = boxes_of(group.a[i], part.a, part.lora_f32 ? 4 : 2, rows.K, part.R, rows.K * (part.lora_f32 ? 4 : 2), part.lora_f32 ? kBlock / 2 : kBlock,
                      static_cast<int>(part.R), CU_TENSOR_MAP_SWIZZLE_128B);
    }
    if constexpr (kNf4) {
      const KernelNf4& own = part.nf4;
      fits = fits &&
             (own.nested_absmax == nullptr ? aligned16(own.absmax) : plan.nested_shift[i] >= 2 && reinterpret_cast<uintptr_t>(own.absmax) % 4 == 0) &&
             boxes_of(group.w[i], own.packed, 1, rows.K / 2, part.rows, rows.K / 2, kRun / 2, group.rows / 2, CU_TENSOR_MAP_SWIZZLE_64B);
    } else {
      fits = fits && boxes_of(group.w[i], part.w, 2, rows.K, part.rows, part.w_stride * 2, kBlock, group.rows / 2, CU_TENSOR_MAP_SWIZZLE_128B);
    }
  }
  // More than y needs what is left of a task to stay in shared memory.
  const bool more = extras.gated || extras.x_squares != nullptr || extras.normed != nullptr;
  fits = fits && (!more || (group.by_fours && group.tasks + group.z_blocks <= device_attribute(cudaDevAttrMultiProcessorCount)));
  return fits && boxes_of(group.x, rows.x, 2, rows.K, rows.M, rows.x_stride * 2, kBlock, N, CU_TENSOR_MAP_SWIZZLE_128B);
}

// Nothing is launched where `launches` is false.
template <typename T, bool kNf4, int N>
bool launch_groups_of(const KernelRows& rows, const GroupExtras& extras, bool launches, void* stream, int& error) {
  GroupPlan group{};
  if (!plan_groups<T, kNf4, N>(rows, extras, group)) return false;
  if (!launches) return true;
  // Pieces of a group are launched together, and then a block has one of them.
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const unsigned blocks = group.pieces > 1 || group.tasks < processors ? group.tasks + group.z_blocks : processors;
  const auto kernel = groups_kernel<T, kNf4, N>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, group.all);
  if (error == cudaSuccess) error = launch_clusters(kernel, dim3(blocks), dim3(kGroupThreads), group.all, stream, group.pieces, group);
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
