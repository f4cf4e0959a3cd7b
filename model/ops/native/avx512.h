// Sixteen lanes in one register: AVX-512 with BF16 and VNNI.
#pragma once

using Floats = __m512;
using Ints = __v16si;
using Mask = __mmask16;

// Of 32 registers 24 hold sums, so that every row meets a panel's whole width.
constexpr int ROWS = 6;  // input rows at once
constexpr int wide(int) { return VECTORS; }
constexpr int STREAMED = 2 * ROWS;  // rows up to which a panel is read through, not by blocks
constexpr int SCORED = 4;           // heads, and rows, whose scores are computed at once
constexpr int MIXED = 8;            // heads for which 32 dimensions are mixed at once

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Ints all(int32_t x) { return (Ints)_mm512_set1_epi32(x); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Ints load_words(const void* p) { return (Ints)_mm512_loadu_si512(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store_words(void* p, Ints x) { _mm512_storeu_si512(p, (__m512i)x); }

inline Floats fmadd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats fnmadd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b where one is NaN
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }

inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
inline Ints to_ints(Floats x) { return (Ints)_mm512_cvtps_epi32(x); }  // the nearest ones
inline Floats to_floats(Ints x) { return _mm512_cvtepi32_ps((__m512i)x); }
inline Floats scaled(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x * 2^n

inline Mask below(int count) { return static_cast<Mask>((1u << count) - 1); }  // lanes
inline Mask not_below(Floats x, Floats y) { return _mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ); }
inline Mask not_numbers(Floats x) { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
inline bool any(Mask mask) { return mask; }
inline Floats kept(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }  // or 0
inline Floats select(Mask mask, Floats x, Floats otherwise) {
  return _mm512_mask_mov_ps(otherwise, mask, x);
}

// A word of two bf16 numbers has the even one in its lower half.
inline Floats even(Ints pairs) { return (Floats)(pairs << 16); }
inline Floats odd(Ints pairs) { return (Floats)(pairs & all(static_cast<int32_t>(0xffff0000))); }

inline Ints widened(const bf16* p) {  // each one the lower half of a word
  return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline Ints bf16_words(Floats x) {
  return (Ints)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
}

inline Floats rounded(Floats x) { return even(bf16_words(x)); }  // to bf16
inline Ints paired(Floats even, Floats odd) { return bf16_words(even) | bf16_words(odd) << 16; }

inline void store(bf16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}

inline void store_bytes(uint8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}

// sum + a . b in every lane, for pairs of bf16.
inline Floats dot(Floats sum, Ints a, Ints b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

struct Pairs {
  Ints low, high;
};

// Pairs of one dimension of two rows each, from 32 dimensions; within 128-bit lanes, so that
// dimensions 0-3, 8-11, … are low, 4-7, 12-15, … high.
inline Pairs interleaved(Ints one, Ints two) {
  return {(Ints)_mm512_unpacklo_epi16((__m512i)one, (__m512i)two),
          (Ints)_mm512_unpackhi_epi16((__m512i)one, (__m512i)two)};
}

struct Ordered {
  Floats first, second;
};

// 32 dimensions in their order again.
inline Ordered ordered(Floats low, Floats high) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(low, first, high), _mm512_permutex2var_ps(low, second, high)};
}

// What products with panels are of: numbers, of which GROUP make a 32-bit word, in STEPS.
struct Bf16 {
  using Number = bf16;
  using Weights = Ints;
  using Sum = Floats;
  static constexpr int GROUP = 2, STEPS = 1;
  static Weights weights(Ints words, int) { return words; }
  static Sum add(Sum sum, Weights weights, int32_t inputs) { return dot(sum, all(inputs), weights); }
};

// Inputs are unsigned: 128 more than what they stand for.
struct Int8 {
  using Number = uint8_t;
  using Weights = Ints;
  using Sum = Ints;
  static constexpr int GROUP = 4, STEPS = 1;
  static Weights weights(Ints words, int) { return words; }
  static Sum add(Sum sum, Weights weights, int32_t inputs) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)all(inputs), (__m512i)weights);
  }
};

inline void part_steps() {}  // there is but one

// M rows of inputs, from number `start` on, as words for every step: those of the rows themselves.
template <class Kind, int M>
struct Words {
  const typename Kind::Number* const* rows;
  int start;
  Words(const typename Kind::Number* const* rows, int start, int) : rows(rows), start(start) {}
  int32_t at(int row, int word) const {
    int32_t found;
    std::memcpy(&found, rows[row] + start + word * Kind::GROUP, sizeof found);
    return found;
  }
};
