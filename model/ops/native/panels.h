// Products of input rows with a panel: 64 output columns of a weight, in the order they are read.
//
// A panel lists, for every group of consecutive inputs (two of bf16, four of int8: 32 bits), that
// group of each of its columns. One thread so reads a weight as a single stream, and an input
// group meets 16 columns in one operation, with no sum across lanes.
#pragma once

#include "simd.h"

constexpr int MANY = 16 * ROWS;  // rows that one call of `products` takes

// out[i] = x[i] . panel, or that added to out[i], for M rows and `groups` groups of inputs.
//
// Loops over rows are unrolled, so that sums are registers. Where a panel is read by columns, what
// comes after this block is fetched meanwhile: the CPU foresees only lines that follow each other.
template <class Kind, int M>
inline void product(const typename Kind::Number* const* x, int start, const char* panel, int groups,
                    bool add, typename Kind::Sum (*out)[VECTORS]) {
  constexpr int WIDE = wide(M), STEPS = Kind::STEPS;
  const Words<Kind, M> words(x, start, groups);
  for (int from = 0; from < VECTORS; from += WIDE) {
    typename Kind::Sum sums[M][WIDE];
#pragma GCC unroll ROWS
    for (int i = 0; i < M; i++)
      for (int v = 0; v < WIDE; v++) sums[i][v] = add ? out[i][from + v] : typename Kind::Sum{};
    for (int g = 0; g < groups; g++) {
      const char* at = panel + g * GROUP_BYTES + from * LANES * 4;
      for (int v = 0; v < WIDE && WIDE < VECTORS; v++)
        _mm_prefetch(at + BLOCK * GROUP_BYTES + v * LANES * 4, _MM_HINT_T1);
      for (int step = 0; step < STEPS; step++) {
        part_steps();
        typename Kind::Weights weights[WIDE];
        for (int v = 0; v < WIDE; v++)
          weights[v] = Kind::weights(load_words(at + v * LANES * 4), step);
#pragma GCC unroll ROWS
        for (int i = 0; i < M; i++) {
          const int32_t inputs = words.at(i, g * STEPS + step);
          for (int v = 0; v < WIDE; v++) sums[i][v] = Kind::add(sums[i][v], weights[v], inputs);
        }
      }
    }
#pragma GCC unroll ROWS
    for (int i = 0; i < M; i++)
      for (int v = 0; v < WIDE; v++) out[i][from + v] = sums[i][v];
  }
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
// Few rows may read the panel once, from memory. Many go over it block by block, so that all but
// the first find it in the first-level cache.
template <class Kind>
inline void products(int rows, const typename Kind::Number* const* x, const void* panel, int width,
                     typename Kind::Sum (*out)[VECTORS]) {
  const int all = width / Kind::GROUP, block = rows > STREAMED ? BLOCK : all;
  for (int g = 0; g < all; g += block)
    for (int first = 0; first < rows; first += ROWS)
      tile<Kind>(std::min(ROWS, rows - first), x + first, g * Kind::GROUP,
                 static_cast<const char*>(panel) + g * GROUP_BYTES, std::min(block, all - g), g > 0,
                 out + first);
}
