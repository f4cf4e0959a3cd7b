// Sixteen lanes at a time, whatever the CPU calls them: what all kernels are written in.
//
// The operations on lanes come from one file for each instruction set, and so do the sizes of what
// fits into its registers.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;

constexpr int LANES = 16;                   // fp32 numbers, or 32-bit words, of a value
constexpr int VECTORS = 4;                  // values of a panel's row
constexpr int PANEL = VECTORS * LANES;      // output columns that are computed together
constexpr int GROUP_BYTES = PANEL * 4;      // of a panel: one group of inputs of all columns
constexpr int BLOCK = 16384 / GROUP_BYTES;  // groups that stay in the first-level cache

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "avx512.h"
#else
#include "avx2.h"
#endif

inline Floats load(const bf16* p) { return even(widened(p)); }

// e^x to about two units in the last place; 0 below -87.3, where fp32 has no normal numbers. NaN
// stays NaN, which decides the order of the operands of `min`.
inline Floats exponential(Floats x) {
  const Mask seen = not_below(x, all(-87.3f));
  x = min(all(88.0f), x);
  const Floats n = nearest(x * all(1.44269504f));
  Floats r = fnmadd(n, all(0.693359375f), x);
  r = fnmadd(n, all(-2.12194440e-4f), r);
  Floats y = all(1.9875691e-4f);  // Cephes' polynomial
  y = fmadd(y, r, all(1.3981999e-3f));
  y = fmadd(y, r, all(8.3334519e-3f));
  y = fmadd(y, r, all(4.1665795e-2f));
  y = fmadd(y, r, all(1.6666665e-1f));
  y = fmadd(y, r, all(0.5f));
  y = fmadd(y, r * r, r) + all(1.0f);
  return kept(seen, scaled(y, n));
}

inline Floats silu(Floats x) { return x / (all(1.0f) + exponential(all(0.0f) - x)); }
