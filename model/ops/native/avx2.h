// Sixteen lanes in two registers: AVX2 with FMA.
#pragma once

struct Floats {
  __m256 low, high;
};

struct Ints {
  __m256i low, high;
};

using Mask = Ints;  // all bits of a lane, or none

// Of 16 registers 10 at most hold sums, two for a row and 16 columns: more rows, fewer columns.
constexpr int ROWS = 5;      // input rows at once
constexpr int wide(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
constexpr int STREAMED = 0;  // rows up to which a panel is read through, not by blocks
constexpr int SCORED = 2;    // heads, and rows, whose scores are computed at once
constexpr int MIXED = 2;     // heads for which 32 dimensions are mixed at once

inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Ints all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

inline Floats as_floats(Ints x) {
  return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)};
}

inline Ints as_ints(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }

inline Ints load_words(const void* p) {
  const __m256i* at = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}

inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}

inline void store_words(void* p, Ints x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x.low);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, x.high);
}

inline Floats operator+(Floats a, Floats b) { return {a.low + b.low, a.high + b.high}; }
inline Floats operator-(Floats a, Floats b) { return {a.low - b.low, a.high - b.high}; }
inline Floats operator*(Floats a, Floats b) { return {a.low * b.low, a.high * b.high}; }
inline Floats operator/(Floats a, Floats b) { return {a.low / b.low, a.high / b.high}; }

inline Ints operator+(Ints a, Ints b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}

inline Ints operator-(Ints a, Ints b) {
  return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
}

inline Ints operator&(Ints a, Ints b) { return {a.low & b.low, a.high & b.high}; }
inline Ints operator|(Ints a, Ints b) { return {a.low | b.low, a.high | b.high}; }

inline Ints operator<<(Ints x, int bits) {
  return {_mm256_slli_epi32(x.low, bits), _mm256_slli_epi32(x.high, bits)};
}

inline Ints operator>>(Ints x, int bits) {  // zeros come in
  return {_mm256_srli_epi32(x.low, bits), _mm256_srli_epi32(x.high, bits)};
}

inline Floats fmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Floats fnmadd(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

inline Floats min(Floats a, Floats b) {  // b where one is NaN
  return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
}

inline Floats max(Floats a, Floats b) {
  return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

inline Floats magnitude(Floats x) { return as_floats(as_ints(x) & all(0x7fffffff)); }

inline float sum(Floats x) {
  const __m256 eight = x.low + x.high;
  const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
  const __m128 two = four + _mm_movehl_ps(four, four);
  return two[0] + two[1];
}

inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  const __m128 four =
      _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

inline Floats nearest(Floats x) {
  constexpr int HOW = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, HOW), _mm256_round_ps(x.high, HOW)};
}

inline Ints to_ints(Floats x) {  // the nearest ones
  return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}

inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }

// x * 2^n for whole n from -126 to 127; NaN where x is.
inline Floats scaled(Floats x, Floats n) { return x * as_floats((to_ints(n) + all(127)) << 23); }

inline Mask below(int count) {  // lanes
  const Ints lanes{_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                   _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
  const __m256i bound = _mm256_set1_epi32(count);
  return {_mm256_cmpgt_epi32(bound, lanes.low), _mm256_cmpgt_epi32(bound, lanes.high)};
}

inline Mask not_below(Floats x, Floats y) {
  return as_ints(
      {_mm256_cmp_ps(x.low, y.low, _CMP_NLT_UQ), _mm256_cmp_ps(x.high, y.high, _CMP_NLT_UQ)});
}

inline Mask not_numbers(Floats x) {
  return as_ints(
      {_mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q), _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q)});
}

inline bool any(Mask mask) {
  const __m256i either = mask.low | mask.high;
  return !_mm256_testz_si256(either, either);
}

inline Floats kept(Mask mask, Floats x) { return as_floats(as_ints(x) & mask); }  // or 0

inline Floats select(Mask mask, Floats x, Floats otherwise) {
  const Floats from = as_floats(mask);
  return {_mm256_blendv_ps(otherwise.low, x.low, from.low),
          _mm256_blendv_ps(otherwise.high, x.high, from.high)};
}

// A word of two bf16 numbers has the even one in its lower half.
inline Floats even(Ints pairs) { return as_floats(pairs << 16); }
inline Floats odd(Ints pairs) { return as_floats(pairs & all(static_cast<int32_t>(0xffff0000))); }

inline Ints widened(const bf16* p) {  // each one the lower half of a word
  const __m128i* at = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(at)),
          _mm256_cvtepu16_epi32(_mm_loadu_si128(at + 1))};
}

// Words whose upper half is x in bf16, the nearest one, of two the even one. NaN stays NaN: its
// upper half alone could be infinity's.
inline Ints bf16_above(Floats x) {
  const Ints bits = as_ints(x);
  const Floats nearest = as_floats(bits + all(0x7fff) + (bits >> 16 & all(1)));
  return as_ints(select(not_numbers(x), as_floats(bits | all(0x00400000)), nearest));
}

inline Floats rounded(Floats x) { return odd(bf16_above(x)); }  // to bf16

inline Ints paired(Floats even, Floats odd) {
  return bf16_above(even) >> 16 | (bf16_above(odd) & all(static_cast<int32_t>(0xffff0000)));
}

// The lower halves of 16 words that are below 65536.
inline __m256i lower_halves(Ints x) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0b11'01'10'00);
}

inline void store(bf16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), lower_halves(bf16_above(x) >> 16));
}

inline void store_bytes(uint8_t* p, Ints x) {
  const __m256i halves = lower_halves(x);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p),
      _mm_packus_epi16(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1)));
}

// sum + a . b in every lane, for pairs of bf16.
inline Floats dot(Floats sum, Ints a, Ints b) {
  return fmadd(odd(a), odd(b), fmadd(even(a), even(b), sum));
}

struct Pairs {
  Ints low, high;
};

// Pairs of one dimension of two rows each, from 32 dimensions; within 128-bit lanes, so that
// dimensions 0-3, 8-11, … are low, 4-7, 12-15, … high.
inline Pairs interleaved(Ints one, Ints two) {
  return {{_mm256_unpacklo_epi16(one.low, two.low), _mm256_unpacklo_epi16(one.high, two.high)},
          {_mm256_unpackhi_epi16(one.low, two.low), _mm256_unpackhi_epi16(one.high, two.high)}};
}

struct Ordered {
  Floats first, second;
};

// 32 dimensions in their order again.
inline Ordered ordered(Floats low, Floats high) {
  return {{_mm256_permute2f128_ps(low.low, high.low, 0x20),
           _mm256_permute2f128_ps(low.low, high.low, 0x31)},
          {_mm256_permute2f128_ps(low.high, high.high, 0x20),
           _mm256_permute2f128_ps(low.high, high.high, 0x31)}};
}

// What products with panels are of: numbers, of which GROUP make a 32-bit word, in STEPS. The even
// numbers of a word are the first step, the odd ones the second.
struct Bf16 {
  using Number = bf16;
  using Weights = Floats;
  using Sum = Floats;
  static constexpr int GROUP = 2, STEPS = 2;
  static Weights weights(Ints words, int step) { return step ? odd(words) : even(words); }
  static uint32_t inputs(uint32_t word, int step) { return step ? word & 0xffff0000 : word << 16; }
  static Sum add(Sum sum, Weights weights, int32_t inputs) {
    return fmadd(as_floats(all(inputs)), weights, sum);
  }
};

// Inputs are unsigned: 128 more than what they stand for. Numbers are widened to 16 bits, so that a
// sum of two products has 32; of bytes themselves AVX2's sum has but 16, and would be cut off.
struct Int8 {
  using Number = uint8_t;
  using Weights = Ints;
  using Sum = Ints;
  static constexpr int GROUP = 4, STEPS = 2;
  static Weights weights(Ints words, int step) {
    if (!step) words = {_mm256_slli_epi16(words.low, 8), _mm256_slli_epi16(words.high, 8)};
    return {_mm256_srai_epi16(words.low, 8), _mm256_srai_epi16(words.high, 8)};
  }
  static uint32_t inputs(uint32_t word, int step) { return word >> 8 * step & 0x00ff00ff; }
  static Sum add(Sum sum, Weights weights, int32_t inputs) {
    const __m256i both = _mm256_set1_epi32(inputs);
    sum = sum + Ints{_mm256_madd_epi16(weights.low, both), _mm256_madd_epi16(weights.high, both)};
    asm("" : "+x"(sum.low), "+x"(sum.high));  // or the products of both steps wait for one addition
    return sum;
  }
};

// Keeps steps apart: the weights of two would not fit the registers, beside the sums.
inline void part_steps() { asm volatile("" ::: "memory"); }

// M rows of inputs, from number `start` on, as words for every step: made beforehand, since all
// columns of a panel meet them.
template <class Kind, int M>
struct Words {
  int32_t words[M][BLOCK * Kind::STEPS];
  Words(const typename Kind::Number* const* rows, int start, int groups) {
    for (int i = 0; i < M; i++)
      for (int g = 0; g < groups; g++) {
        uint32_t word;
        std::memcpy(&word, rows[i] + start + g * Kind::GROUP, sizeof word);
        for (int step = 0; step < Kind::STEPS; step++)
          words[i][g * Kind::STEPS + step] = static_cast<int32_t>(Kind::inputs(word, step));
      }
  }
  int32_t at(int row, int word) const { return words[row][word]; }
};
