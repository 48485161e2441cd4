// Matrix engines: C += A B on operands stored in blocks of 32 columns.
//
//   blocked (rows, cols):   element (r, c) at  p[((c / 32) * rows + r) * 32 + c % 32]
//   paired  (rows, cols):   element (r, c) at  p[((c / 32) * rows / 2 + r / 2) * 64 + (c % 32) * 2 + r % 2]
//
// A is blocked.  B is blocked for the float engine and paired for the bf16 ones, whose instructions take two
// consecutive k at a time.  C is float, blocked.  In each, the 32 columns of a block are contiguous, so a register tile
// walks memory with unit stride whatever the matrix sizes are; rows, columns and k are padded to 32 with zeros.
//
// One engine is `Engine<float>` or `Engine<bf16>`: the storage type of its operands.
#pragma once

#include "common/dtype.h"
#include "common/simd.h"

namespace ck {
namespace CK_ISA {

constexpr int64_t kBlock = 32;

static inline int64_t pad32(int64_t v) { return (v + kBlock - 1) / kBlock * kBlock; }

// A matrix in blocks: its first element, and the elements from one block of 32 columns to the next.
template <typename T>
struct Blocks {
  T* data;
  int64_t stride;

  T* column(int64_t c) const { return data + c / kBlock * stride + c % kBlock; }  // of row 0, not for `paired`
  Blocks row(int64_t r) const { return {data + r * kBlock, stride}; }
};

// multiply: C (rows, 32 blocks) += A (rows, k) * B (k, 32 blocks), or = where not `add`; blocks <= kWidth, k a multiple
// of 32.  `soon`: k rows of as many blocks that are wanted next, in place of more of B; the float engine fetches them into the L2
// cache.  kPanelRows: rows of x worked on at a time.
template <typename T>
struct Engine;

// ---------------------------------------------------------------- float
// MR rows by NV vectors of accumulators: 6 x 4 of the 32 AVX-512 registers (two blocks), 6 x 2 of 16 in AVX2, and 4 x 2 where a
// product takes a register of its own before it is added.
#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int MR = 6, NV = 2;
#else
constexpr int MR = 4, NV = 2;
#endif

// sum += x y in one instruction, in place: left to itself GCC picks other forms here, and a copy of a register for each.
static inline void accumulate(vf* sum, vf x, vf y) {
#if defined(__FMA__) || defined(__AVX512F__)
  asm("vfmadd231ps %1, %2, %0" : "+v"(*sum) : "v"(x), "v"(y));
#else
  *sum += x * y;
#endif
}

constexpr int kLine = 16;  // floats of a cache line

// What comes nearer while a tile computes, a few lines at a time: a burst would hold up the tile's own loads (4 to 8 % of its
// rate where B and C are streamed).
struct Ahead {
  const float* a;         // of the next tile, into the L1 cache
  Blocks<const float> c;  // of the next tile, into the L1 cache
  Blocks<const float> b;  // of the next sweep, into the L2 cache
  int64_t lines;          // of each block of b, for each block of k
};

// ROWS rows by V vectors.
template <int ROWS, int V>
__attribute__((always_inline)) static inline void float_tile(Blocks<const float> a, Blocks<const float> b, int64_t k,
                                                             Blocks<float> c, bool add, Ahead ahead) {
  constexpr int kUnroll = VL > 4 ? 8 : 4;
  constexpr int kLines = (ROWS * kUnroll + kLine - 1) / kLine;  // of the next block of A
  constexpr bool kPair = V * VL > kBlock;
  vf acc[ROWS][V] = {};
  asm volatile("" : "+r"(c.data), "+r"(c.stride));  // or GCC keeps the addresses of 24 lines through the loop
  for (int64_t k0 = 0; k0 < k; k0 += kBlock, a.data += a.stride, b.data += kBlock * kBlock) {
    const float* next = k0 + kBlock < k ? a.data + a.stride : ahead.a;
    const float* end = ahead.b.data + ahead.lines * kLine;
#pragma GCC unroll 1
    for (int k1 = 0; k1 < kBlock; k1 += kUnroll, next += kLines * kLine, ahead.c.data += kLine) {
#pragma GCC unroll 4
      for (int line = 0; line < kLines; line++) __builtin_prefetch(next + line * kLine);
      __builtin_prefetch(ahead.c.data, 1);
      if (kPair) __builtin_prefetch(ahead.c.data + ahead.c.stride, 1);
      if (ahead.b.data < end) {
        __builtin_prefetch(ahead.b.data, 0, 2);
        if (kPair) __builtin_prefetch(ahead.b.data + ahead.b.stride, 0, 2);
        ahead.b.data += kLine;
      }
#pragma GCC unroll 8
      for (int kk = k1; kk < k1 + kUnroll; kk++) {
        vf bv[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) bv[v] = load(b.column(v * VL) + kk * kBlock);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
          const vf ar = broadcast(a.data[r * kBlock + kk]);
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) accumulate(&acc[r][v], ar, bv[v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* out = c.column(v * VL) + r * kBlock;
      store(out, add ? load(out) + acc[r][v] : acc[r][v]);
    }
}

template <int ROWS, int V>
static inline void float_tail(int64_t rows, Blocks<const float> a, Blocks<const float> b, int64_t k, Blocks<float> c,
                              bool add, const Ahead& ahead) {
  if (rows == ROWS)
    float_tile<ROWS, V>(a, b, k, c, add, ahead);
  else if constexpr (ROWS > 2)
    float_tail<ROWS - 2, V>(rows, a, b, k, c, add, ahead);
}

template <>
struct Engine<float> {
  static constexpr int64_t kPanelRows = 384;  // whole tiles of 6; 768 KiB at d = 512, of an L2 cache of 1 to 2 MiB
  static constexpr int64_t kWidth = 2;        // blocks of one product
  static constexpr int64_t kDepth = 96;       // k of one sweep: 96 x 64 floats of B are 24 of the 32 KiB of an L1 cache

  static void enter() {}
  static void leave() {}

  static void multiply(Blocks<const float> a, int64_t rows, Blocks<const float> b, int64_t blocks, int64_t k,
                       Blocks<float> c, bool add, Blocks<const float> soon = {}) {
    const float* following = b.data + blocks * b.stride;  // B of the product that probably comes next
    for (int64_t k0 = 0, kn; k0 < k; k0 += kn, a.data += kn / kBlock * a.stride, b.data += kn * kBlock) {
      const int64_t left = k - k0;
      kn = left <= kDepth ? left : left < 2 * kDepth ? pad32(left / 2) : kDepth;  // the last two alike
      Blocks<const float> next{kn < left ? b.data + kn * kBlock : following, b.stride};
      if (soon.data) next = {soon.data + k0 * kBlock, soon.stride};
      if (NV * VL > kBlock && blocks == kWidth)
        sweep<NV>(a, rows, b, kn, c, add || k0 > 0, next, true);
      else
        for (int64_t v = 0; v < blocks * kBlock; v += 2 * VL)
          sweep<2>(a, rows, {b.column(v), b.stride}, kn, {c.column(v), c.stride}, add || k0 > 0,
                   {next.column(v), next.stride}, v % kBlock == 0);
    }
  }

 private:
  // All rows by V vectors, while the next k rows of B come into the L2 cache where `fetch`.
  template <int V>
  static void sweep(Blocks<const float> a, int64_t rows, Blocks<const float> b, int64_t k, Blocks<float> c, bool add,
                    Blocks<const float> next, bool fetch) {
    const int64_t lines = fetch ? (kBlock * kBlock * MR / rows + kLine - 1) / kLine : 0;  // a tile's share
    const int64_t share = lines * kLine * (k / kBlock);
    for (int64_t r = 0; r < rows; r += MR, next.data += share) {
      const Blocks<float> below = c.row(r + MR);
      const Ahead ahead{a.row(r + MR).data, {below.data, below.stride}, next, lines};
      if (rows - r >= MR)
        float_tile<MR, V>(a.row(r), b, k, c.row(r), add, ahead);
      else
        float_tail<MR - 2, V>(rows - r, a.row(r), b, k, c.row(r), add, ahead);
    }
  }
};

// ---------------------------------------------------------------- bf16
#if defined(CK_ISA_amx)

struct __attribute__((packed)) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

template <>
struct Engine<bf16> {
  static constexpr int64_t kPanelRows = 512;
  static constexpr int64_t kDepth = 512;  // 512 x 32 of B are 32 KiB
  static constexpr int64_t kWidth = 1;

  static void enter() {  // eight tiles of 16 rows of 64 bytes; the barrier keeps the compiler from dropping the stores
    TileConfig config;
    std::memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = 16;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  static void leave() { _tile_release(); }

  static void multiply(Blocks<const bf16> a, int64_t rows, Blocks<const bf16> b, int64_t, int64_t k, Blocks<float> c,
                       bool add, Blocks<const float> = {}) {
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, a.data += kDepth / kBlock * a.stride, b.data += kDepth * kBlock)
      sweep(a.data, a.stride, rows, b.data, k - k0 < kDepth ? k - k0 : kDepth, c.data, add || k0 > 0);
  }

 private:
  // 2 x 2 tiles: 32 rows by the 32 columns of the block.
  static void sweep(const bf16* a, int64_t a_block, int64_t rows, const bf16* b, int64_t k, float* c, bool add) {
    for (int64_t r = 0; r < rows; r += kBlock) {
      float* cr = c + r * kBlock;
      if (add) {
        _tile_loadd(0, cr, 128);
        _tile_loadd(1, cr + 16, 128);
        _tile_loadd(2, cr + 16 * kBlock, 128);
        _tile_loadd(3, cr + 16 * kBlock + 16, 128);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const bf16 *ak = a + r * kBlock, *bk = b;
      for (int64_t k0 = 0; k0 < k; k0 += kBlock, ak += a_block, bk += kBlock * kBlock) {
        _tile_loadd(6, bk, 128);  // 16 pairs of k, the first 16 columns
        _tile_loadd(4, ak, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, bk + 32, 128);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, ak + 16 * kBlock, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, cr, 128);
      _tile_stored(1, cr + 16, 128);
      _tile_stored(2, cr + 16 * kBlock, 128);
      _tile_stored(3, cr + 16 * kBlock + 16, 128);
    }
  }
};

#elif defined(CK_ISA_avx512bf16)

// ROWS rows by the block's 32 columns; the next tile's part of C, `ahead`, comes into the L1 cache meanwhile.
template <int ROWS>
static inline void bf16_tile(const bf16* a, int64_t a_block, const bf16* b, int64_t k, float* c, bool add,
                             const float* ahead) {
  __m512 acc[ROWS][2] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kBlock, a += a_block)
#pragma GCC unroll 1
    for (int k1 = 0; k1 < kBlock; k1 += 4, ahead += kLine) {
      __builtin_prefetch(ahead, 1);
#pragma GCC unroll 2
      for (int kk = k1; kk < k1 + 4; kk += 2, b += 2 * kBlock) {
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + kBlock);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; r++) {
          int32_t pair;
          std::memcpy(&pair, a + r * kBlock + kk, 4);
          const __m512bh ar = (__m512bh)_mm512_set1_epi32(pair);
          acc[r][0] = _mm512_dpbf16_ps(acc[r][0], ar, b0);
          acc[r][1] = _mm512_dpbf16_ps(acc[r][1], ar, b1);
        }
      }
    }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < 2; v++) {
      float* out = c + r * kBlock + v * VL;
      store(out, add ? load(out) + acc[r][v] : acc[r][v]);
    }
}

template <>
struct Engine<bf16> {
  static constexpr int64_t kPanelRows = 512, kWidth = 1;
  static constexpr int64_t kDepth = 256;  // k of one sweep: 256 x 32 of B are 16 of the 32 KiB of an L1 cache

  static void enter() {}
  static void leave() {}

  static void multiply(Blocks<const bf16> a, int64_t rows, Blocks<const bf16> b, int64_t, int64_t k, Blocks<float> c,
                       bool add, Blocks<const float> = {}) {
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, a.data += kDepth / kBlock * a.stride, b.data += kDepth * kBlock)
      sweep(a.data, a.stride, rows, b.data, k - k0 < kDepth ? k - k0 : kDepth, c.data, add || k0 > 0);
  }

 private:
  static void sweep(const bf16* a, int64_t a_block, int64_t rows, const bf16* b, int64_t k, float* c, bool add) {
    for (; rows >= 12; rows -= 12, a += 12 * kBlock, c += 12 * kBlock)
      bf16_tile<12>(a, a_block, b, k, c, add, c + 12 * kBlock);
    if (rows == 8) bf16_tile<8>(a, a_block, b, k, c, add, c);
    if (rows == 4) bf16_tile<4>(a, a_block, b, k, c, add, c);
  }
};

#elif defined(CK_ISA_neonbf16)

// ROWS rows by 16 of the block's 32 columns: 24 of the 32 registers are sums at 6 rows, and 6 hold four pairs of k of A.
template <int ROWS>
static inline void bf16_tile(const bf16* a, int64_t a_block, const bf16* b, int64_t k, float* c, bool add) {
  constexpr int V = 4;
  float32x4_t acc[ROWS][V] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kBlock, a += a_block)
#pragma GCC unroll 1
    for (int kk = 0; kk < kBlock; kk += 8, b += 8 * kBlock) {
      bfloat16x8_t ar[ROWS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) ar[r] = load_as<bfloat16x8_t>(a + r * kBlock + kk);
#define CK_PAIR(pair)                                                                                                 \
  _Pragma("GCC unroll 4") for (int v = 0; v < V; v++) {                                                               \
    const bfloat16x8_t bv = load_as<bfloat16x8_t>(b + pair * 2 * kBlock + v * 8);                                     \
    _Pragma("GCC unroll 8") for (int r = 0; r < ROWS; r++) acc[r][v] = vbfdotq_laneq_f32(acc[r][v], bv, ar[r], pair); \
  }
      CK_PAIR(0)
      CK_PAIR(1)
      CK_PAIR(2)
      CK_PAIR(3)
#undef CK_PAIR
    }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < V; v++) {
      float* out = c + r * kBlock + v * VL;
      store(out, add ? load(out) + reinterpret_cast<vf>(acc[r][v]) : reinterpret_cast<vf>(acc[r][v]));
    }
}

template <>
struct Engine<bf16> {
  static constexpr int64_t kPanelRows = 384, kWidth = 1;
  static constexpr int64_t kDepth = 256;  // k of one sweep: 256 x 32 of B are 16 KiB of an L1 cache of 64

  static void enter() {}
  static void leave() {}

  static void multiply(Blocks<const bf16> a, int64_t rows, Blocks<const bf16> b, int64_t, int64_t k, Blocks<float> c,
                       bool add, Blocks<const float> = {}) {
    for (int64_t k0 = 0; k0 < k; k0 += kDepth, a.data += kDepth / kBlock * a.stride, b.data += kDepth * kBlock)
      for (int64_t col = 0; col < kBlock; col += 16)
        sweep(a.data, a.stride, rows, b.data + 2 * col, k - k0 < kDepth ? k - k0 : kDepth, c.data + col, add || k0 > 0);
  }

 private:
  static void sweep(const bf16* a, int64_t a_block, int64_t rows, const bf16* b, int64_t k, float* c, bool add) {
    for (; rows >= 6; rows -= 6, a += 6 * kBlock, c += 6 * kBlock) bf16_tile<6>(a, a_block, b, k, c, add);
    if (rows == 4) bf16_tile<4>(a, a_block, b, k, c, add);
    if (rows == 2) bf16_tile<2>(a, a_block, b, k, c, add);
  }
};

#endif

}  // namespace CK_ISA
}  // namespace ck
