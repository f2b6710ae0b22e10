// defines: WeightStream: the weights of one warp on their way into shared memory, through all products of all layers.
//
// A warp has a ring of boxes of its own, 16 rows of 128 bytes, which the copy engine brings. As soon as a box is in registers the next one is
// asked for in its place, the first ones of the next product behind the last ones of this: they come while thread blocks wait for each other.
#pragma once

#include "decode.cuh"

namespace ferrotune {
namespace {

// Of a ring, where there is room. More stands in the way of what products wait for: with five boxes one row of 8B in bf16 took 4.34 ms, with two
// or four 4.20.
constexpr int kMostDepth = 4, kLeastDepth = 2, kBoxBytes = kTileRows * 128;

// What a warp asks for next: `left` units of a product (of all layers' products, by number), as many as `of_tile` of this tile.
struct alignas(16) WeightCursor {
  int at, of_tile, left, product, tile;
};

template <bool kNf4>
struct WeightStream {
  static constexpr int kUnit = kNf4 ? 256 : 64;  // columns of a box

  const CUtensorMap* const maps;
  const DecodeCommon& s;
  unsigned ring, barriers;  // shared addresses
  int low;                  // where a box has this lane's first piece of its first row; row 8 lies 1024 bytes behind
  // Used next.
  unsigned parity = 0;
  int slot = 0;
  int free;  // places in the ring, behind the ones that are under way; of the lane that asks

  __device__ explicit WeightStream(const DecodeStack& stack) : maps(stack.w), s(stack.common) {}

  // By every lane of a warp that has weights, once.
  __device__ __forceinline__ void begin(int warp) {
    const int lane = thread_number() % 32, g = lane / 4, t = lane % 4;
    const int own = warp < s.at.first_rings ? s.at.ring[0] + warp * s.depth * kBoxBytes : s.at.ring[1] + (warp - s.at.first_rings) * s.depth * kBoxBytes;
    ring = static_cast<unsigned>(own);
    barriers = static_cast<unsigned>(s.at.w_arrived + warp * kMostDepth * 8);
    // Piece p of 16 bytes of row r lies at p ^ r % 8.
    free = s.depth;
    low = g * 128 + (((kNf4 ? t : 2 * t) ^ g) << 4);
    if (lane == 0) {
      for (int i = 0; i < s.depth; ++i) init_barrier(barriers + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      WeightCursor& next = cursor();
      next.product = 0;
      enter(next);
    }
    __syncwarp();
  }

  // ---- by one lane

  // In shared memory: registers are few.
  __device__ __forceinline__ WeightCursor& cursor() const { return reinterpret_cast<WeightCursor*>(shared_at(s.at.cursors))[thread_number() / 32]; }
  __device__ __forceinline__ const DecodeShare& share(int phase) const { return reinterpret_cast<const DecodeShare*>(shared_at(s.at.shares))[phase]; }
  __device__ __forceinline__ void seek(WeightCursor& next, int unit) const {
    const int phase = next.product % kPhases, layer_at = s.at.layers + next.product / kPhases % 2 * static_cast<int>(sizeof(DecodeLayer));
    const DecodeTile& tile = share(phase).tiles[next.tile];
    const DecodePart& part = reinterpret_cast<const DecodeLayer*>(shared_at(layer_at))->parts[first_part(phase) + tile.part];
    next.at = part.w + tile.row * s.row_steps[phase] + unit;
    next.of_tile = s.columns[phase] / kUnit - unit;
  }
  __device__ __forceinline__ void enter(WeightCursor& next) const {
    const DecodeUnits own = share(next.product % kPhases).units[thread_number() / 32];
    next.tile = own.tile, next.left = own.count;
    if (own.count > 0) seek(next, own.unit);
  }
  // Asks for the next unit of the products up to number `last`. False if there is none.
  __device__ __forceinline__ bool ask(int last) {
    WeightCursor& next = cursor();
    int4 now = *reinterpret_cast<const int4*>(&next);
    if (now.z == 0) {
      while (next.left == 0) {
        if (next.product >= last) return false;
        ++next.product;
        enter(next);
      }
      now = *reinterpret_cast<const int4*>(&next);
    }
    const int place = slot - free + (slot < free ? s.depth : 0);
    const unsigned barrier = barriers + 8 * place;
    arrive_with_boxes(barrier, kBoxBytes);
    copy_box(ring + place * kBoxBytes, maps + now.w % kPhases, now.x, 0, 0, barrier);
    --free;
    *reinterpret_cast<int4*>(&next) = make_int4(now.x + 1, now.y - 1, now.z - 1, now.w);
    if (now.y == 1 && now.z > 1) {
      ++next.tile;
      seek(next, 0);
    }
    return true;
  }

  // ---- by all

  __device__ __forceinline__ void fill(int last) {
    if (thread_number() % 32 == 0) {
#pragma unroll 1
      while (free > 0 && ask(last)) {}
    }
    __syncwarp();
  }
  // The next unit: pieces of rows g and g + 8.
  __device__ __forceinline__ void take(uint4 (&to)[4], int last) {
    wait_phase(barriers + 8 * slot, parity);
    const char* const box = shared_at(static_cast<int>(ring) + slot * kBoxBytes);
    constexpr int kOther = kNf4 ? 64 : 16;
    to[0] = *reinterpret_cast<const uint4*>(box + low);
    to[1] = *reinterpret_cast<const uint4*>(box + (low ^ kOther));
    to[2] = *reinterpret_cast<const uint4*>(box + 1024 + low);
    to[3] = *reinterpret_cast<const uint4*>(box + 1024 + (low ^ kOther));
    if (++slot == s.depth) slot = 0, parity ^= 1;
    // Before the copy engine writes there: in registers of all lanes.
    asm volatile("" ::"r"(to[0].x), "r"(to[1].x), "r"(to[2].x), "r"(to[3].x) : "memory");
    __syncwarp();
    if (thread_number() % 32 == 0) {
      ++free;
      ask(last);
    }
    __syncwarp();
  }
};

}  // namespace
}  // namespace ferrotune
