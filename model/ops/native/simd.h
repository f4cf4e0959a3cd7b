// AVX-512 building blocks that all kernels share.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

using bf16 = uint16_t;

constexpr int LANES = 16;               // fp32 numbers of a register
constexpr int VECTORS = 4;              // registers of a panel's row
constexpr int PANEL = VECTORS * LANES;  // output columns that are computed together
constexpr int ROWS = 6;                 // input rows at once: ROWS * VECTORS sums fit the registers

inline __m512 to_float(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

inline __m512 load_float(const bf16* p) {
  return to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline void store_bf16(bf16* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

// e^x to about two units in the last place; 0 below -87.3, where fp32 has no normal numbers. NaN
// stays NaN, which decides the order of the operands of `min`.
inline __m512 exponential(__m512 x) {
  const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691e-4f);  // Cephes' polynomial
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.3981999e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(8.3334519e-3f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(4.1665795e-2f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.6666665e-1f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(seen, y, n);
}

inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(one, e));
}
