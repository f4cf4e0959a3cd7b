// Attention of one sequence's consecutive queries over expanded keys and values.
//
// Online softmax, 64 keys at a time (https://arxiv.org/abs/2205.14135). These become panels like
// those of a weight, one of the keys and one for every 64 dimensions of the values, so that scores
// and mixtures are products of few rows with a panel.

#include <cmath>
#include <vector>

#include "panels.h"

namespace {

constexpr int QUERIES = 240;  // of one task: keys are packed once for so many

// Rows of all heads: `stride` numbers from one token to the next, `width` from head to head.
struct Heads {
  const bf16* numbers;
  int64_t stride;
  int width;
  const bf16* at(int64_t token, int head) const { return numbers + token * stride + head * width; }
};

struct Sequence {
  Heads query, key, value;
  const bf16* shared_key;
  int64_t shared_stride;
  int shared_width, queries, keys, heads;
  float scale;
  bool causal;
  bf16* out;
  float* lse;
};

// One head's attention of some consecutive queries.
struct Task {
  const Sequence& of;
  const int head, first, count, panels;
  std::vector<int32_t> keys, values;  // pairs of bf16
  std::vector<float> mixed, most, total;

  Task(const Sequence& of, int head, int first)
      : of(of), head(head), first(first), count(std::min(QUERIES, of.queries - first)),
        panels(of.value.width / PANEL), keys(of.query.width / 2 * PANEL),
        values(of.value.width * PANEL / 2), mixed(count * of.value.width),
        most(count, -INFINITY), total(count, 0.0f) {}

  // Keys `begin` and following as columns of a panel; what lies past the last one is 0.
  void pack(int begin, int seen) {
    std::fill(keys.begin(), keys.end(), 0);
    const int own = of.key.width / 2, shared = of.shared_width / 2;
    for (int t = 0; t < seen; t++) {
      scatter(of.key.at(begin + t, head), own, &keys[t]);
      scatter(of.shared_key + (begin + t) * of.shared_stride, shared, &keys[own * PANEL + t]);
    }
    for (int t = 0; t < PANEL; t += 2)
      for (int d = 0; d < of.value.width; d += LANES) {
        const Ints one = t < seen ? widened(of.value.at(begin + t, head) + d) : Ints{};
        const Ints two = t + 1 < seen ? widened(of.value.at(begin + t + 1, head) + d) : Ints{};
        int32_t* to = &values[((d / PANEL) * PANEL / 2 + t / 2) * PANEL + d % PANEL];
        store_words(to, one | two << 16);
      }
  }

  static void scatter(const bf16* row, int pairs, int32_t* column) {
    for (int i = 0; i < pairs; i++) std::memcpy(column + i * PANEL, row + 2 * i, sizeof(int32_t));
  }

  // `rows` queries from number `q` on meet the packed keys.
  void meet(int q, int rows, int begin, int seen) {
    const bf16* at[ROWS];
    Floats sums[ROWS][VECTORS];
    alignas(64) bf16 shares[ROWS][PANEL];
    float faded[ROWS];
    for (int i = 0; i < rows; i++) at[i] = of.query.at(first + q + i, head);
    products<Bf16>(rows, at, keys.data(), of.query.width, sums);
    for (int i = 0; i < rows; i++) {
      const int visible = of.causal ? first + q + i - begin + 1 : seen;
      faded[i] = soften(sums[i], std::clamp(visible, 0, seen), q + i, shares[i]);
      at[i] = shares[i];
    }
    for (int p = 0; p < panels; p++) {
      products<Bf16>(rows, at, &values[p * PANEL * PANEL / 2], PANEL, sums);
      for (int i = 0; i < rows; i++) {
        float* to = &mixed[(q + i) * of.value.width + p * PANEL];
        const Floats fade = all(faded[i]);
        for (int v = 0; v < VECTORS; v++, to += LANES)
          store(to, fmadd(load(to), fade, sums[i][v]));
      }
    }
  }

  // Scores become shares; returns what the query's earlier sums must be multiplied by.
  float soften(const Floats* scores, int visible, int q, bf16* shares) {
    const Floats scale = all(of.scale), never = all(-INFINITY);
    Floats scaled[VECTORS], peaks = all(most[q]), parts = all(0.0f);
    for (int v = 0; v < VECTORS; v++) {
      const Mask seen = below(std::clamp(visible - v * LANES, 0, LANES));
      scaled[v] = select(seen, scores[v] * scale, never);
      peaks = max(peaks, scaled[v]);
    }
    const float before = most[q], peak = most[q] = largest(peaks);
    if (peak == -INFINITY) {  // nothing is visible yet
      std::fill_n(shares, PANEL, 0);
      return 1.0f;
    }
    for (int v = 0; v < VECTORS; v++) {
      const Floats share = exponential(scaled[v] - all(peak));
      parts = parts + share;
      store(shares + v * LANES, share);
    }
    const float faded = std::exp(before - peak);
    total[q] = total[q] * faded + sum(parts);
    return faded;
  }

  void write() {
    for (int q = 0; q < count; q++) {
      const int64_t row = static_cast<int64_t>(first + q) * of.heads + head;
      for (int d = 0; d < of.value.width; d += LANES)
        store(of.out + row * of.value.width + d,
              load(&mixed[q * of.value.width + d]) / all(total[q]));
      of.lse[row] = most[q] + std::log(total[q]);
    }
  }

  void run() {
    const int last = of.causal ? first + count : of.keys;
    for (int begin = 0; begin < last; begin += PANEL) {
      const int seen = std::min(PANEL, of.keys - begin);
      pack(begin, seen);
      const int from = of.causal ? std::max(begin - first, 0) / ROWS * ROWS : 0;
      for (int q = from; q < count; q += ROWS) meet(q, std::min(ROWS, count - q), begin, seen);
    }
    write();
  }
};

}  // namespace

// query [n, heads, key_width + shared_width], key [m, heads, key_width], shared_key [m,
// shared_width], value [m, heads, value_width], with so many numbers from token to token as the
// strides say; out [n, heads, value_width], lse [n, heads]. Key widths are even, value_width is a
// multiple of 64. With `causal` query i sees keys 0 to i.
extern "C" void attend_chunk(const bf16* query, int64_t query_stride, const bf16* key,
                             int64_t key_stride, const bf16* shared_key, int64_t shared_stride,
                             const bf16* value, int64_t value_stride, int queries, int keys,
                             int heads, int key_width, int shared_width, int value_width,
                             float scale, int causal, bf16* out, float* lse, int threads) {
  const Sequence all{{query, query_stride, key_width + shared_width},
                     {key, key_stride, key_width},
                     {value, value_stride, value_width},
                     shared_key, shared_stride, shared_width, queries, keys, heads, scale,
                     causal != 0, out, lse};
  const int parts = (queries + QUERIES - 1) / QUERIES;
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int task = 0; task < heads * parts; task++)
    Task(all, task / parts, task % parts * QUERIES).run();
}
