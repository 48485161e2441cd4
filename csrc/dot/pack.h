// Between row-major matrices of any dtype and the engines' blocked and paired layouts (engine.h).
//
// Sources are rows [first, first + rows) of a row-major matrix with `cols` columns, of which `total` rows exist; rows
// past the end and columns past `cols` become zeros.  `rows` is a multiple of 32.
#pragma once

#include "dot/engine.h"

namespace ck {
namespace CK_ISA {

template <typename T, typename S>
static inline T convert(S v) {
  T out;
  from_float(to_float(v), &out);
  return out;
}

template <>
inline bf16 convert<bf16, bf16>(bf16 v) {
  return v;
}

template <>
inline float convert<float, float>(float v) {
  return v;
}

template <typename S>
struct Rows {
  const S* data;
  int64_t total, cols, first, rows;

  Rows from(int64_t r) const { return {data, total, cols, first + r, rows - r}; }

  template <typename T>
  T at(int64_t r, int64_t c) const {
    return first + r < total && c < cols ? convert<T>(data[(first + r) * cols + c]) : T{};
  }
};

// 32 elements of row r from column c on.
template <typename T, typename S>
static inline void copy_line(const Rows<S>& m, int64_t r, int64_t c, T* line) {
  const int64_t left = m.cols - c, count = m.first + r >= m.total ? 0 : left < kBlock ? left : kBlock;
  const S* src = m.data + (m.first + r) * m.cols + c;
  if (count == kBlock) {
    for (int i = 0; i < kBlock; i++) line[i] = convert<T>(src[i]);
  } else {
    for (int64_t i = 0; i < count; i++) line[i] = convert<T>(src[i]);
    for (int64_t i = count; i < kBlock; i++) line[i] = T{};
  }
}

// blocked (rows, cols), the rows [r0, r1): each is read from end to end
template <typename T, typename S>
static void pack_blocked(const Rows<S>& m, int64_t r0, int64_t r1, int64_t blocks, T* out, int64_t out_rows) {
  for (int64_t r = r0; r < r1; r++)
    for (int64_t cb = 0; cb < blocks; cb++) copy_line(m, r, cb * kBlock, out + (cb * out_rows + r) * kBlock);
}

#if defined(__AVX512F__)
// out = the transpose of 16 x 16 elements; rows of `in` are in_stride apart, those of `out` out_stride.
template <typename S>
static inline void transpose16(const S* in, int64_t in_stride, float* out, int64_t out_stride) {
  constexpr __mmask16 kAll = 0xffff;
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i++) a[i] = load(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    b[i] = _mm512_maskz_unpacklo_ps(kAll, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_ps(kAll, a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // fours: a[i + c] has column c of each quarter, rows i to i + 3
    for (int h = 0; h < 2; h++) {
      a[i + 2 * h] = _mm512_maskz_shuffle_ps(kAll, b[i + h], b[i + h + 2], 0x44);
      a[i + 2 * h + 1] = _mm512_maskz_shuffle_ps(kAll, b[i + h], b[i + h + 2], 0xee);
    }
  for (int c = 0; c < 4; c++) {  // quarters q and q + 2 of eight rows, then of all
    for (int q = 0; q < 2; q++) {
      b[c + 8 * q] = _mm512_maskz_shuffle_f32x4(kAll, a[c + 8 * q], a[c + 8 * q + 4], 0x88);
      b[c + 8 * q + 4] = _mm512_maskz_shuffle_f32x4(kAll, a[c + 8 * q], a[c + 8 * q + 4], 0xdd);
    }
    for (int odd = 0; odd < 2; odd++) {
      const __m512 low = b[c + 4 * odd], high = b[c + 4 * odd + 8];
      _mm512_storeu_ps(out + (c + 4 * odd) * out_stride, _mm512_maskz_shuffle_f32x4(kAll, low, high, 0x88));
      _mm512_storeu_ps(out + (c + 4 * odd + 8) * out_stride, _mm512_maskz_shuffle_f32x4(kAll, low, high, 0xdd));
    }
  }
}
#endif

// out = the transpose of 32 x 32 elements, whose rows are `stride` apart.
template <typename T, typename S>
static inline void transpose32(const S* in, int64_t stride, T* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) {
    for (int r = 0; r < kBlock; r += 16)
      for (int c = 0; c < kBlock; c += 16) transpose16(in + r * stride + c, stride, out + c * kBlock + r, kBlock);
    return;
  }
#endif
  S block[kBlock]
         [kBlock + 1];  // rows are read whole: down a column of 512, all lines are in the same few sets of the L1
  for (int r = 0; r < kBlock; r++) std::memcpy(block[r], in + r * stride, kBlock * sizeof(S));
  for (int c = 0; c < kBlock; c++)
    for (int r = 0; r < kBlock; r++) out[c * kBlock + r] = convert<T>(block[r][c]);
}

// The 32 x 32 block at (r0, c0), transposed: element (c, r) at out[c * 32 + r].
template <typename T, typename S>
static inline void transpose_block(const Rows<S>& m, int64_t r0, int64_t c0, T* out) {
  if (m.first + r0 + kBlock <= m.total && c0 + kBlock <= m.cols)
    return transpose32(m.data + (m.first + r0) * m.cols + c0, m.cols, out);
  S block[kBlock * kBlock];
  for (int r = 0; r < kBlock; r++) copy_line(m, r0 + r, c0, block + r * kBlock);
  transpose32(block, kBlock, out);
}

// blocked (cols, rows), the transpose: the row blocks [r0, r1) of the source
template <typename T, typename S>
static void pack_transposed(const Rows<S>& m, int64_t r0, int64_t r1, T* out, int64_t out_rows) {
  for (int64_t rb = r0; rb < r1; rb++)
    for (int64_t c = 0; c < out_rows; c += kBlock)
      transpose_block(m, rb * kBlock, c, out + (rb * out_rows + c) * kBlock);
}

// As the B operand with k = rows and with k = cols: blocked for float, paired for bf16.
template <typename S>
static void pack_b(const Rows<S>& m, int64_t r0, int64_t r1, int64_t blocks, float* out, int64_t out_rows) {
  pack_blocked(m, r0, r1, blocks, out, out_rows);
}

template <typename S>
static void pack_b_transposed(const Rows<S>& m, int64_t r0, int64_t r1, float* out, int64_t out_rows) {
  pack_transposed(m, r0, r1, out, out_rows);
}

// Two lines of a blocked matrix as one of a paired one.
static inline void interleave(const bf16* even, const bf16* odd, bf16* line) {
  for (int c = 0; c < kBlock; c++) line[2 * c] = even[c], line[2 * c + 1] = odd[c];
}

template <typename S>
static void pack_b(const Rows<S>& m, int64_t r0, int64_t r1, int64_t blocks, bf16* out, int64_t out_rows) {
  bf16 even[kBlock], odd[kBlock];
  for (int64_t r = r0; r < r1; r += 2)
    for (int64_t cb = 0; cb < blocks; cb++) {
      copy_line(m, r, cb * kBlock, even);
      copy_line(m, r + 1, cb * kBlock, odd);
      interleave(even, odd, out + (cb * out_rows + r) * kBlock);
    }
}

template <typename S>
static void pack_b_transposed(const Rows<S>& m, int64_t r0, int64_t r1, bf16* out, int64_t out_rows) {
  bf16 block[kBlock * kBlock];
  for (int64_t rb = r0; rb < r1; rb++)
    for (int64_t c0 = 0; c0 < out_rows; c0 += kBlock) {
      transpose_block(m, rb * kBlock, c0, block);
      for (int64_t c = 0; c < kBlock; c += 2)
        interleave(block + c * kBlock, block + (c + 1) * kBlock, out + (rb * out_rows + c0 + c) * kBlock);
    }
}

}  // namespace CK_ISA
}  // namespace ck
