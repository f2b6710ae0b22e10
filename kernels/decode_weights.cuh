// defines: WeightStream: the weights of one warp on their way into shared memory, through all products of all layers.
//
// A warp has a ring of boxes of its own, 16 rows of 128 bytes, which the copy engine brings. As soon as a box is in registers the next one is
// asked for in its place, the first ones of the next product behind the last ones of this: they come while thread blocks wait for each other.
#pragma once

#include "decode.cuh"

namespace ferrotune {
namespace {

// Of a ring, where there is room. More stands in the way of what products wait for: with five boxes one row of 8B in bf16 took 4.34 ms, with two
// or four 4.20; one or two rows on NF4, whose products are slower than memory, have two.
constexpr int kMostDepth = 4, kLeastDepth = 2, kBoxBytes = kTileRows * 128;

// Of what a warp asks for: a product (of all layers' products, by number), a tile of it, and the units that follow those of this tile.
struct WeightCursor {
  int product, tile, left;
};

// Of a warp: the barriers of its boxes, and behind them its cursor, as registers are few.
constexpr int kStreamBytes = kMostDepth * 8 + 16;

template <bool kNf4>
struct WeightStream {
  static constexpr int kUnit = kNf4 ? 256 : 64;  // columns of a box

  const CUtensorMap* const maps;
  const DecodeCommon& s;
  // Shared addresses: of the barriers, and where the first box has this lane's first piece of its first row; row 8 lies 1024 bytes behind.
  unsigned barriers, low;
  // Used next.
  unsigned parity = 0;
  int slot = 0;
  // Places in the ring that nothing is under way to. Asked for next, how many follow one another, and where their map lies behind the first. All
  // lanes have the same, so that nobody waits for one that counts.
  int free, at = 0, until = 0, map = 0;

  __device__ explicit WeightStream(const DecodeStack& stack) : maps(stack.w), s(stack.common) {}

  // The row of a tile, beside row 8 behind it, that lanes 4 g .. have. Those of NF4 that are read at once, of g and g + 1, are four apart: pieces of
  // 16 bytes from different halves of all banks.
  __device__ __forceinline__ static int row_of(int g) { return kNf4 ? g / 2 + g % 2 * 4 : g; }

  // By every lane of a warp that has weights, once.
  __device__ __forceinline__ void begin(int warp) {
    const int lane = thread_number() % 32, row = row_of(lane / 4), t = lane % 4;
    const int own = warp < s.at.first_rings ? s.at.ring[0] + warp * s.depth * kBoxBytes : s.at.ring[1] + (warp - s.at.first_rings) * s.depth * kBoxBytes;
    barriers = static_cast<unsigned>(s.at.w_arrived + warp * kStreamBytes);
    free = s.depth;
    // Piece p of 16 bytes of row r lies at p ^ r % 8.
    low = static_cast<unsigned>(own + row * 128 + (((kNf4 ? t : 2 * t) ^ row) << 4));
    if (lane == 0) {
      for (int i = 0; i < s.depth; ++i) init_barrier(barriers + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      cursor() = {-1, 0, 0};
    }
    __syncwarp();
  }

  __device__ __forceinline__ WeightCursor& cursor() const { return *reinterpret_cast<WeightCursor*>(shared_at(static_cast<int>(barriers) + kMostDepth * 8)); }
  // The next tile's units, or those of the next product up to number `last`. False if there are none.
  __device__ __forceinline__ bool seek(int last) {
    WeightCursor next = cursor();
    int unit = 0;
    while (next.left == 0) {
      if (next.product >= last) return false;
      ++next.product;
      const DecodeUnits own = reinterpret_cast<const DecodeShare*>(shared_at(s.at.shares))[next.product % kPhases].units[thread_number() / 32];
      next.tile = own.tile - 1, next.left = own.count, unit = own.unit;
    }
    ++next.tile;
    const int phase = next.product % kPhases, layer_at = s.at.layers + next.product / kPhases % 2 * static_cast<int>(sizeof(DecodeLayer));
    const DecodeTile& tile = reinterpret_cast<const DecodeShare*>(shared_at(s.at.shares))[phase].tiles[next.tile];
    const DecodePart& part = reinterpret_cast<const DecodeLayer*>(shared_at(layer_at))->parts[first_part(phase) + tile.part];
    at = part.w + tile.row * s.row_steps[phase] + unit;
    until = min(s.columns[phase] / kUnit - unit, next.left);
    next.left -= until;
    map = phase * static_cast<int>(sizeof(CUtensorMap));
    __syncwarp();
    cursor() = next;
    __syncwarp();
    return true;
  }
  // The next unit into a place of the ring.
  __device__ __forceinline__ void ask(int place) {
    // Boxes begin at multiples of 1024.
    ask_once((low & ~1023u) + place * kBoxBytes, reinterpret_cast<const CUtensorMap*>(reinterpret_cast<const char*>(maps) + map), at, barriers + 8 * place,
             kBoxBytes);
    ++at, --until;
  }
  __device__ __forceinline__ void fill(int last) {
#pragma unroll 1
    while (free > 0 && (until > 0 || seek(last))) {
      ask(slot - free + (slot < free ? s.depth : 0));
      --free;
    }
  }
  // The next unit: pieces of this lane's row and of that 8 behind.
  __device__ __forceinline__ void take(uint4 (&to)[4], int last) {
    wait_phase(barriers + 8 * slot, parity);
    const unsigned box = low + slot * kBoxBytes, other = box ^ (kNf4 ? 64 : 16);
    to[0] = load_shared_4(box);
    to[1] = load_shared_4(other);
    to[2] = load_shared_4(box + 1024);
    to[3] = load_shared_4(other + 1024);
    // Before the copy engine writes there: in registers of all lanes, which meet to elect the one that asks.
    asm volatile("" ::"r"(to[0].x), "r"(to[1].x), "r"(to[2].x), "r"(to[3].x) : "memory");
    // A place that is free already had nothing to ask for.
    if (until == 0 && (free > 0 || !seek(last))) {
      ++free;
    } else {
      ask(slot);
    }
    if (++slot == s.depth) slot = 0, parity ^= 1;
  }
};

}  // namespace
}  // namespace ferrotune
