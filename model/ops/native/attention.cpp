// Absorbed attention of single queries over pages of the latent cache, where they lie.
//
// Online softmax, a page at a time (https://arxiv.org/abs/2205.14135). Scores are dot products
// along a cache row. For the values, which are the first elements of the same rows, two rows are
// interleaved on the fly, so that one instruction adds up two positions.

#include <cmath>

#include "simd.h"

namespace {

constexpr int PAGE = 64;       // rows of a page
constexpr int MAX_VALUE = 512;
constexpr int TILE = 4;        // heads, and rows, whose scores are computed at once

// scores[i] = sum over the lanes of tile[i], for 16 of them.
inline __m512 sums_of(const __m512* tile) {
  alignas(64) float out[TILE * TILE];
  for (int i = 0; i < TILE * TILE; i++) out[i] = _mm512_reduce_add_ps(tile[i]);
  return _mm512_load_ps(out);
}

// Scores of TILE queries with TILE cache rows: [head][row].
inline __m512 score_tile(const bf16* query, const bf16* rows, int latent) {
  __m512 tile[TILE * TILE];
  for (int i = 0; i < TILE * TILE; i++) tile[i] = _mm512_setzero_ps();
  for (int d = 0; d < latent; d += 2 * LANES) {
    __m512bh keys[TILE];
    for (int j = 0; j < TILE; j++) keys[j] = (__m512bh)_mm512_loadu_si512(rows + j * latent + d);
    for (int i = 0; i < TILE; i++) {
      const __m512bh asked = (__m512bh)_mm512_loadu_si512(query + i * latent + d);
      for (int j = 0; j < TILE; j++)
        tile[i * TILE + j] = _mm512_dpbf16_ps(tile[i * TILE + j], asked, keys[j]);
    }
  }
  return sums_of(tile);
}

template <int HEADS>
struct State {
  float most[HEADS], total[HEADS];
  alignas(64) float mixed[HEADS][MAX_VALUE];
};

// Scores of a page become shares in bf16; returns what earlier sums must be multiplied by.
template <int HEADS>
void soften(float (*scores)[PAGE], int count, State<HEADS>& state, bf16 (*shares)[PAGE],
            float* faded) {
  for (int h = 0; h < HEADS; h++) {
    for (int t = count; t < PAGE; t++) scores[h][t] = -INFINITY;  // whatever lay there
    __m512 most = _mm512_set1_ps(state.most[h]);
    for (int t = 0; t < PAGE; t += LANES) most = _mm512_max_ps(most, _mm512_load_ps(&scores[h][t]));
    const float peak = _mm512_reduce_max_ps(most);
    __m512 total = _mm512_setzero_ps();
    for (int t = 0; t < PAGE; t += LANES) {
      const __m512 share =
          exponential(_mm512_sub_ps(_mm512_load_ps(&scores[h][t]), _mm512_set1_ps(peak)));
      total = _mm512_add_ps(total, share);
      store_bf16(&shares[h][t], share);
    }
    faded[h] = std::exp(state.most[h] - peak);
    state.total[h] = state.total[h] * faded[h] + _mm512_reduce_add_ps(total);
    state.most[h] = peak;
  }
}

// mixed = mixed * faded + shares . values, 32 dimensions at a time.
template <int HEADS>
void mix(const bf16* rows, int count, int latent, int value_dim, bf16 (*shares)[PAGE],
         const float* faded, State<HEADS>& state) {
  for (int d = 0; d < value_dim; d += 2 * LANES) {
    __m512 low[HEADS], high[HEADS];
    for (int h = 0; h < HEADS; h++) {
      const __m512 fade = _mm512_set1_ps(faded[h]);
      low[h] = _mm512_mul_ps(_mm512_load_ps(&state.mixed[h][d]), fade);
      high[h] = _mm512_mul_ps(_mm512_load_ps(&state.mixed[h][d + LANES]), fade);
    }
    for (int t = 0; t < count; t += 2) {
      const __m512i one = _mm512_loadu_si512(rows + t * latent + d);
      const __m512i two = t + 1 < count ? _mm512_loadu_si512(rows + (t + 1) * latent + d)
                                        : _mm512_setzero_si512();
      const __m512bh lows = (__m512bh)_mm512_unpacklo_epi16(one, two);
      const __m512bh highs = (__m512bh)_mm512_unpackhi_epi16(one, two);
      for (int h = 0; h < HEADS; h++) {
        int32_t pair;
        std::memcpy(&pair, &shares[h][t], sizeof pair);
        const __m512bh share = (__m512bh)_mm512_set1_epi32(pair);
        low[h] = _mm512_dpbf16_ps(low[h], lows, share);
        high[h] = _mm512_dpbf16_ps(high[h], highs, share);
      }
    }
    for (int h = 0; h < HEADS; h++) {
      _mm512_store_ps(&state.mixed[h][d], low[h]);
      _mm512_store_ps(&state.mixed[h][d + LANES], high[h]);
    }
  }
}

// Unpacking works within 128-bit lanes: dimensions 0-3, 8-11, … are low, 4-7, 12-15, … high.
template <int HEADS>
void write(const State<HEADS>& state, int value_dim, bf16* out) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int h = 0; h < HEADS; h++) {
    const __m512 total = _mm512_set1_ps(state.total[h]);
    for (int d = 0; d < value_dim; d += 2 * LANES) {
      const __m512 low = _mm512_div_ps(_mm512_load_ps(&state.mixed[h][d]), total);
      const __m512 high = _mm512_div_ps(_mm512_load_ps(&state.mixed[h][d + LANES]), total);
      bf16* to = out + static_cast<int64_t>(h) * value_dim + d;
      store_bf16(to, _mm512_permutex2var_ps(low, first, high));
      store_bf16(to + LANES, _mm512_permutex2var_ps(low, second, high));
    }
  }
}

template <int HEADS>
void attend(const bf16* query, const bf16* cache, const int64_t* pages, int64_t length, int latent,
            int value_dim, float scale, bf16* out) {
  State<HEADS> state;
  std::fill_n(state.most, HEADS, -INFINITY);
  std::fill_n(state.total, HEADS, 0.0f);
  std::fill_n(&state.mixed[0][0], HEADS * MAX_VALUE, 0.0f);
  for (int64_t start = 0; start < length; start += PAGE) {
    const bf16* rows = cache + pages[start / PAGE] * PAGE * latent;
    const int count = static_cast<int>(std::min<int64_t>(PAGE, length - start));
    alignas(64) float scores[HEADS][PAGE];
    alignas(64) bf16 shares[HEADS][PAGE];
    float faded[HEADS];
    for (int t = 0; t < count; t += TILE)
      for (int h = 0; h < HEADS; h += TILE) {
        const __m512 tile = score_tile(query + h * latent, rows + t * latent, latent);
        const __m512 scaled = _mm512_mul_ps(tile, _mm512_set1_ps(scale));
        _mm_store_ps(&scores[h][t], _mm512_extractf32x4_ps(scaled, 0));
        _mm_store_ps(&scores[h + 1][t], _mm512_extractf32x4_ps(scaled, 1));
        _mm_store_ps(&scores[h + 2][t], _mm512_extractf32x4_ps(scaled, 2));
        _mm_store_ps(&scores[h + 3][t], _mm512_extractf32x4_ps(scaled, 3));
      }
    soften<HEADS>(scores, count, state, shares, faded);
    mix<HEADS>(rows, count, latent, value_dim, shares, faded, state);
  }
  write<HEADS>(state, value_dim, out);
}

}  // namespace

// query [batch, heads, latent], cache [pages, 64, latent], pages [batch, table], lengths [batch],
// out [batch, heads, value_dim]. heads is a multiple of 4; latent and value_dim are of 32, and
// value_dim is at most 512.
extern "C" void attend_pages(const bf16* query, const bf16* cache, const int64_t* pages,
                             const int64_t* lengths, int batch, int table, int heads, int latent,
                             int value_dim, float scale, bf16* out, int threads) {
  const int each = heads % 8 ? 4 : 8, parts = heads / each;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int task = 0; task < batch * parts; task++) {
    const int b = task / parts;
    const bf16* asked = query + static_cast<int64_t>(task) * each * latent;
    bf16* to = out + static_cast<int64_t>(task) * each * value_dim;
    const auto run = each == 8 ? attend<8> : attend<4>;
    run(asked, cache, pages + static_cast<int64_t>(b) * table, lengths[b], latent, value_dim, scale,
        to);
  }
}
