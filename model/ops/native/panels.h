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

// out[i] = x[i] . panel, for M rows x of `width` numbers.
template <class Kind, int M>
inline void product(const typename Kind::Number* const* x, const void* panel, int width,
                    typename Kind::Sum (*out)[VECTORS]) {
  typename Kind::Sum sums[M][VECTORS];
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) sums[i][v] = Kind::zero();
  const char* w = static_cast<const char*>(panel);
  for (int k = 0; k < width; k += Kind::GROUP, w += 64 * VECTORS) {
    __m512i weights[VECTORS];
    for (int v = 0; v < VECTORS; v++) weights[v] = _mm512_loadu_si512(w + 64 * v);
    for (int i = 0; i < M; i++) {
      int32_t group;
      std::memcpy(&group, x[i] + k, sizeof group);
      for (int v = 0; v < VECTORS; v++) sums[i][v] = Kind::add(sums[i][v], weights[v], group);
    }
  }
  for (int i = 0; i < M; i++)
    for (int v = 0; v < VECTORS; v++) out[i][v] = sums[i][v];
}

template <class Kind>
inline void products(int rows, const typename Kind::Number* const* x, const void* panel, int width,
                     typename Kind::Sum (*out)[VECTORS]) {
  switch (rows) {
    case 1: return product<Kind, 1>(x, panel, width, out);
    case 2: return product<Kind, 2>(x, panel, width, out);
    case 3: return product<Kind, 3>(x, panel, width, out);
    case 4: return product<Kind, 4>(x, panel, width, out);
    case 5: return product<Kind, 5>(x, panel, width, out);
    default: return product<Kind, ROWS>(x, panel, width, out);
  }
}
