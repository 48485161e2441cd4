// Between row-major matrices of any dtype and the engines' blocked and paired layouts (engine.h).
//
// Sources are rows [first, first + rows) of a row-major matrix with `cols` columns, of which `total` rows exist; rows
// past the end and columns past `cols` become zeros.  `rows` is a multiple of 32.
#pragma once

#include "engine.h"

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

  template <typename T>
  T at(int64_t r, int64_t c) const {
    return first + r < total && c < cols ? convert<T>(data[(first + r) * cols + c]) : T{};
  }
};

// blocked (rows, cols), the column blocks [c0, c1)
template <typename T, typename S>
static void pack_blocked(const Rows<S>& m, int64_t c0, int64_t c1, T* out, int64_t out_rows) {
  for (int64_t cb = c0; cb < c1; cb++)
    for (int64_t r = 0; r < m.rows; r++) {
      T* line = out + (cb * out_rows + r) * kBlock;
      if (m.first + r < m.total && (cb + 1) * kBlock <= m.cols) {
        const S* src = m.data + (m.first + r) * m.cols + cb * kBlock;
        for (int c = 0; c < kBlock; c++) line[c] = convert<T>(src[c]);
      } else {
        for (int c = 0; c < kBlock; c++) line[c] = m.template at<T>(r, cb * kBlock + c);
      }
    }
}

// The 32 x 32 block at (r0, c0), transposed: element (c, r) at out[c * 32 + r].  Rows are read whole, into a copy:
// walking down a column of a matrix of 512 would put all its lines in the same few sets of the L1 cache.
template <typename T, typename S>
static inline void transpose_block(const Rows<S>& m, int64_t r0, int64_t c0, T* out) {
  if (m.first + r0 + kBlock <= m.total && c0 + kBlock <= m.cols) {
    S block[kBlock][kBlock + 1];
    for (int r = 0; r < kBlock; r++)
      std::memcpy(block[r], m.data + (m.first + r0 + r) * m.cols + c0, kBlock * sizeof(S));
    for (int c = 0; c < kBlock; c++)
      for (int r = 0; r < kBlock; r++) out[c * kBlock + r] = convert<T>(block[r][c]);
  } else {
    for (int c = 0; c < kBlock; c++)
      for (int r = 0; r < kBlock; r++) out[c * kBlock + r] = m.template at<T>(r0 + r, c0 + c);
  }
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
static void pack_b(const Rows<S>& m, int64_t c0, int64_t c1, float* out, int64_t out_rows) {
  pack_blocked(m, c0, c1, out, out_rows);
}

template <typename S>
static void pack_b_transposed(const Rows<S>& m, int64_t r0, int64_t r1, float* out, int64_t out_rows) {
  pack_transposed(m, r0, r1, out, out_rows);
}

template <typename S>
static void pack_b(const Rows<S>& m, int64_t c0, int64_t c1, bf16* out, int64_t out_rows) {
  for (int64_t cb = c0; cb < c1; cb++)
    for (int64_t r = 0; r < m.rows; r += 2) {
      bf16* line = out + (cb * out_rows + r) * kBlock;
      for (int c = 0; c < kBlock; c++) {
        line[2 * c] = m.template at<bf16>(r, cb * kBlock + c);
        line[2 * c + 1] = m.template at<bf16>(r + 1, cb * kBlock + c);
      }
    }
}

template <typename S>
static void pack_b_transposed(const Rows<S>& m, int64_t r0, int64_t r1, bf16* out, int64_t out_rows) {
  for (int64_t rb = r0; rb < r1; rb++)
    for (int64_t c = 0; c < out_rows; c += 2) {
      bf16* line = out + (rb * out_rows + c) * kBlock;
      for (int r = 0; r < kBlock; r++) {
        line[2 * r] = m.template at<bf16>(rb * kBlock + r, c);
        line[2 * r + 1] = m.template at<bf16>(rb * kBlock + r, c + 1);
      }
    }
}

}  // namespace CK_ISA
}  // namespace ck
