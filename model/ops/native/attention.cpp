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

// Scores of SCORED queries with SCORED cache rows, for positions `t` and after.
inline void score(const bf16* query, const bf16* rows, int latent, float scale, int t,
                  float (*scores)[PAGE]) {
  Floats tile[SCORED][SCORED] = {};
  for (int d = 0; d < latent; d += 2 * LANES) {
    Ints keys[SCORED];
    for (int j = 0; j < SCORED; j++) keys[j] = load_words(rows + (t + j) * latent + d);
    for (int i = 0; i < SCORED; i++) {
      const Ints asked = load_words(query + i * latent + d);
      for (int j = 0; j < SCORED; j++) tile[i][j] = dot(tile[i][j], asked, keys[j]);
    }
  }
  for (int i = 0; i < SCORED; i++)
    for (int j = 0; j < SCORED; j++) scores[i][t + j] = sum(tile[i][j]) * scale;
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
    Floats most = all(state.most[h]);
    for (int t = 0; t < PAGE; t += LANES) most = max(most, load(&scores[h][t]));
    const float peak = largest(most);
    Floats total = all(0.0f);
    for (int t = 0; t < PAGE; t += LANES) {
      const Floats share = exponential(load(&scores[h][t]) - all(peak));
      total = total + share;
      store(&shares[h][t], share);
    }
    faded[h] = std::exp(state.most[h] - peak);
    state.total[h] = state.total[h] * faded[h] + sum(total);
    state.most[h] = peak;
  }
}

// mixed = mixed * faded + shares . values, 32 dimensions at a time.
template <int HEADS>
void mix(const bf16* rows, int count, int latent, int value_dim, bf16 (*shares)[PAGE],
         const float* faded, State<HEADS>& state) {
  constexpr int TOGETHER = std::min(HEADS, MIXED);
  for (int d = 0; d < value_dim; d += 2 * LANES)
    for (int first = 0; first < HEADS; first += TOGETHER) {
      Floats low[TOGETHER], high[TOGETHER];
      for (int h = 0; h < TOGETHER; h++) {
        const float* from = &state.mixed[first + h][d];
        low[h] = load(from) * all(faded[first + h]);
        high[h] = load(from + LANES) * all(faded[first + h]);
      }
      for (int t = 0; t < count; t += 2) {
        const Ints one = load_words(rows + t * latent + d);
        const Ints two = t + 1 < count ? load_words(rows + (t + 1) * latent + d) : Ints{};
        const auto [lows, highs] = interleaved(one, two);
        for (int h = 0; h < TOGETHER; h++) {
          int32_t pair;
          std::memcpy(&pair, &shares[first + h][t], sizeof pair);
          low[h] = dot(low[h], lows, all(pair));
          high[h] = dot(high[h], highs, all(pair));
        }
      }
      for (int h = 0; h < TOGETHER; h++) {
        float* to = &state.mixed[first + h][d];
        store(to, low[h]);
        store(to + LANES, high[h]);
      }
    }
}

template <int HEADS>
void write(const State<HEADS>& state, int value_dim, bf16* out) {
  for (int h = 0; h < HEADS; h++)
    for (int d = 0; d < value_dim; d += 2 * LANES) {
      const float* from = &state.mixed[h][d];
      const auto [first, second] = ordered(load(from), load(from + LANES));
      bf16* to = out + static_cast<int64_t>(h) * value_dim + d;
      store(to, first / all(state.total[h]));
      store(to + LANES, second / all(state.total[h]));
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
    for (int t = 0; t < count; t += SCORED)
      for (int h = 0; h < HEADS; h += SCORED)
        score(query + h * latent, rows, latent, scale, t, &scores[h]);
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
