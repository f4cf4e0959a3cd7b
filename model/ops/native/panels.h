// Products of input rows with a panel: 64 output columns of a weight, in the order they are read.
//
// A panel lists, for every group of consecutive inputs (two of bf16, four of int8: 32 bits), that
// group of each of its columns. One thread so reads a weight as a single stream, and an input
// group meets 16 columns in one instruction, with no sum across lanes.
#pragma once

#include "simd.h"

struct Bf16 {
  using Number = bf16;
  using Sum = __m512;
  static constexpr int GROUP = 2;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i weights, int32_t inputs) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(inputs), (__m512bh)weights);
  }
};

// Inputs are unsigned: 128 more than what they stand for.
struct Int8 {
  using Number = uint8_t;
  using Sum = __m512i;
  static constexpr int GROUP = 4;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, __m512i weights, int32_t inputs) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(inputs), weights);
  }
};

constexpr int GROUP_BYTES = PANEL * 4;       // of a panel: one group of inputs of all columns
constexpr int BLOCK = 16384 / GROUP_BYTES;   // groups that stay in the first-level cache
constexpr int MANY = 96;                     // rows that one call of `products` takes

// out[i] = x[i] . panel, or that added to out[i], for M rows and `groups` groups of inputs.
template <class Kind, int M>
inline void product(const typename Kind::Number* const* x, int start, const char* panel, int groups,
                    bool add, typename Kind::Sum (*out)[VECTORS]) {
  typename Kind::Sum sums[M][VECTORS];
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = add ? out[i][v] : Kind::zero();
  for (int g = 0; g < groups; g++, panel += GROUP_BYTES) {
    __m512i weights[VECTORS];
    for (int v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(panel + 64 * v);
    for (int i = 0; i < M; i++) {
      int32_t group;
      std::memcpy(&group, x[i] + start + g * Kind::GROUP, sizeof group);
      for (int v = 0; v < VECTORS; v++) sums[i][v] = Kind::add(sums[i][v], weights[v], group);
    }
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) out[i][v] = sums[i][v];
}

template <class Kind>
inline void tile(int rows, const typename Kind::Number* const* x, int start, const char* panel,
                 int groups, bool add, typename Kind::Sum (*out)[VECTORS]) {
  switch (rows) {
    case 1: return product<Kind, 1>(x, start, panel, groups, add, out);
    case 2: return product<Kind, 2>(x, start, panel, groups, add, out);
    case 3: return product<Kind, 3>(x, start, panel, groups, add, out);
    case 4: return product<Kind, 4>(x, start, panel, groups, add, out);
    case 5: return product<Kind, 5>(x, start, panel, groups, add, out);
    default: return product<Kind, ROWS>(x, start, panel, groups, add, out);
  }
}

// out[i] = x[i] . panel, for rows x of `width` numbers, at most MANY of them.
//
// Few rows read the panel once, from memory. Many go over it block by block, so that all but the
// first find it in the first-level cache.
template <class Kind>
inline void products(int rows, const typename Kind::Number* const* x, const void* panel, int width,
                     typename Kind::Sum (*out)[VECTORS]) {
  const int all = width / Kind::GROUP, block = rows > 2 * ROWS ? BLOCK : all;
  for (int g = 0; g < all; g += block)
    for (int first = 0; first < rows; first += ROWS)
      tile<Kind>(std::min(ROWS, rows - first), x + first, g * Kind::GROUP,
                 static_cast<const char*>(panel) + g * GROUP_BYTES, std::min(block, all - g), g > 0,
                 out + first);
}
