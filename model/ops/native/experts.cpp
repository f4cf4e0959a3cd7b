// The routed experts of one rank: sorted by expert, through gate and up, down, and added up.
//
// With int8 weights the inputs are quantized as well, row by row, so that products are of whole
// numbers; scales of a weight's rows and of the inputs come in at the end.

#include <cmath>
#include <vector>

#include "panels.h"

namespace {

// A stack of weights [experts, outputs, inputs] as panels; scales and sums [experts, outputs] are
// those of int8: what a row was divided by, and the sum of its numbers.
struct Weights {
  const char* panels;
  const float* scales;
  const int32_t* sums;
};

// Entries, which are pairs of a row and an expert, in the order of the experts.
struct Entries {
  std::vector<int> rows;
  std::vector<float> shares;
  std::vector<int> experts, begins;  // experts that have any, and where each one's begin
};

Entries sorted(const int64_t* ids, const float* weights, int picks, int top_k, int first,
               int experts) {
  std::vector<int> counts(experts + 1);
  const auto here = [&](int p) { return ids[p] >= first && ids[p] < first + experts; };
  for (int p = 0; p < picks; p++)
    if (here(p)) counts[ids[p] - first + 1]++;
  Entries found;
  for (int e = 0; e < experts; e++) {
    if (counts[e + 1]) found.experts.push_back(e), found.begins.push_back(counts[e]);
    counts[e + 1] += counts[e];
  }
  found.begins.push_back(counts[experts]);
  found.rows.resize(counts[experts]);
  found.shares.resize(counts[experts]);
  for (int p = 0; p < picks; p++) {
    if (!here(p)) continue;
    const int place = counts[ids[p] - first]++;
    found.rows[place] = p / top_k;
    found.shares[place] = weights[p];
  }
  return found;
}

// Rows as a kind of product takes them; `quantize` fills one.
template <class Kind>
struct Inputs;

template <>
struct Inputs<Bf16> {
  const bf16* numbers;
  int width;
  Inputs(const bf16* source, int, int width) : numbers(source), width(width) {}
  const bf16* row(int i) const { return numbers + static_cast<int64_t>(i) * width; }
  void quantize(int) {}
  Floats value(Floats sum, int, const Weights&, int64_t) const { return sum; }
};

template <>
struct Inputs<Int8> {
  const bf16* source;
  int width;
  std::vector<uint8_t> numbers;
  std::vector<float> scales;
  Inputs(const bf16* source, int rows, int width)
      : source(source), width(width), numbers(static_cast<size_t>(rows) * width), scales(rows) {}
  const uint8_t* row(int i) const { return &numbers[static_cast<int64_t>(i) * width]; }

  // The largest magnitude becomes 127; 128 is added to what is stored. NaN makes the scale NaN,
  // and so all that comes of the row.
  void quantize(int i) {
    const bf16* from = source + static_cast<int64_t>(i) * width;
    Floats magnitudes = all(0.0f);
    Mask lost{};
    for (int d = 0; d < width; d += LANES) {
      const Floats value = load(from + d);
      lost = lost | not_numbers(value);
      magnitudes = max(magnitudes, magnitude(value));
    }
    const float most = largest(magnitudes);
    scales[i] = any(lost) ? NAN : most / 127.0f;
    const Floats factor = all(most > 0 ? 127.0f / most : 0.0f);
    uint8_t* to = &numbers[static_cast<int64_t>(i) * width];
    for (int d = 0; d < width; d += LANES)
      store_bytes(to + d, to_ints(load(from + d) * factor) + all(128));
  }

  // What the sum over column `column` and the 15 after it stands for.
  Floats value(Ints sum, int i, const Weights& weights, int64_t column) const {
    const Ints offset = load_words(weights.sums + column) << 7;
    return to_floats(sum - offset) * (load(weights.scales + column) * all(scales[i]));
  }
};

template <class Kind>
struct Layer {
  using Number = typename Kind::Number;
  using Sum = typename Kind::Sum;

  const Entries& entries;
  Weights gate_up, down;
  int n, width, inner_width;
  Inputs<Kind> hidden, inner;
  bf16* inner_rows;
  float* out;  // [width / 64][n][64]: a thread's share lies together

  static const char* panel(const Weights& weights, int64_t number, int inputs) {
    return weights.panels + number * PANEL * inputs * (4 / Kind::GROUP);
  }

  // A panel has 32 of the gate's columns, and the same ones of the up projection.
  void gate_and_up(int which, int panel_number) {
    const int expert = entries.experts[which], panels = inner_width * 2 / PANEL;
    const int64_t number = static_cast<int64_t>(expert) * panels + panel_number;
    for (int p = entries.begins[which]; p < entries.begins[which + 1]; p += MANY) {
      const int count = std::min(MANY, entries.begins[which + 1] - p);
      const Number* at[MANY];
      for (int i = 0; i < count; i++) at[i] = hidden.row(entries.rows[p + i]);
      Sum sums[MANY][VECTORS];
      products<Kind>(count, at, panel(gate_up, number, width), width, sums);
      for (int i = 0; i < count; i++) {
        bf16* to = inner_rows + static_cast<int64_t>(p + i) * inner_width + panel_number * PANEL / 2;
        Floats said[VECTORS];
        for (int v = 0; v < VECTORS; v++)
          said[v] = hidden.value(sums[i][v], entries.rows[p + i], gate_up,
                                 number * PANEL + v * LANES);
        store(to, silu(said[0]) * said[2]);
        store(to + LANES, silu(said[1]) * said[3]);
      }
    }
  }

  void down_and_add(int which, int panel_number) {
    const int expert = entries.experts[which], panels = width / PANEL;
    const int64_t number = static_cast<int64_t>(expert) * panels + panel_number;
    for (int p = entries.begins[which]; p < entries.begins[which + 1]; p += MANY) {
      const int count = std::min(MANY, entries.begins[which + 1] - p);
      const Number* at[MANY];
      for (int i = 0; i < count; i++) at[i] = inner.row(p + i);
      Sum sums[MANY][VECTORS];
      products<Kind>(count, at, panel(down, number, inner_width), inner_width, sums);
      for (int i = 0; i < count; i++) {
        float* to = out + (static_cast<int64_t>(panel_number) * n + entries.rows[p + i]) * PANEL;
        const Floats share = all(entries.shares[p + i]);
        for (int v = 0; v < VECTORS; v++) {
          const Floats said = inner.value(sums[i][v], p + i, down, number * PANEL + v * LANES);
          store(to + v * LANES, fmadd(share, said, load(to + v * LANES)));
        }
      }
    }
  }
};

template <class Kind>
void run(const bf16* hidden, int n, const Entries& entries, Weights gate_up, Weights down,
         int width, int inner_width, bf16* out, int threads) {
  const int picked = static_cast<int>(entries.rows.size());
  const int active = static_cast<int>(entries.experts.size());
  std::vector<bf16> inner(static_cast<size_t>(picked) * inner_width);
  std::vector<float> sums(static_cast<size_t>(n) * width);
  Layer<Kind> layer{entries, gate_up, down, n, width, inner_width, {hidden, n, width},
                    {inner.data(), picked, inner_width}, inner.data(), sums.data()};
  const int inner_panels = inner_width * 2 / PANEL, panels = width / PANEL;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int row = 0; row < n; row++) layer.hidden.quantize(row);
#pragma omp for schedule(dynamic, 4)
    for (int task = 0; task < active * inner_panels; task++)
      layer.gate_and_up(task / inner_panels, task % inner_panels);
#pragma omp for schedule(static)
    for (int entry = 0; entry < picked; entry++) layer.inner.quantize(entry);
    // A thread has columns of its own, so that experts may add to the same rows.
#pragma omp for schedule(static)
    for (int number = 0; number < panels; number++) {
      for (int which = 0; which < active; which++) layer.down_and_add(which, number);
      for (int row = 0; row < n; row++)
        for (int v = 0; v < VECTORS; v++) {
          const float* from = &sums[(static_cast<int64_t>(number) * n + row) * PANEL + v * LANES];
          store(out + static_cast<int64_t>(row) * width + number * PANEL + v * LANES, load(from));
        }
    }
  }
}

}  // namespace

// out [n, width] = the weighted sum over those experts of each row that are here.
//
// hidden [n, width]; ids and weights [n, top_k]; gate_up [experts, 2 * inner_width, width] with 32
// rows of the gate, 32 of the up projection and so on; down [experts, width, inner_width]. Both
// are panels of bf16, or with scales of int8. Widths are multiples of 64.
extern "C" void weighted_experts(const bf16* hidden, const int64_t* ids, const float* weights,
                                 int n, int top_k, int first, int experts, int width,
                                 int inner_width, const char* gate_up, const float* gate_up_scales,
                                 const int32_t* gate_up_sums, const char* down,
                                 const float* down_scales, const int32_t* down_sums, bf16* out,
                                 int threads) {
  const Entries entries = sorted(ids, weights, n * top_k, top_k, first, experts);
  const auto kind = gate_up_scales ? run<Int8> : run<Bf16>;
  kind(hidden, n, entries, {gate_up, gate_up_scales, gate_up_sums},
       {down, down_scales, down_sums}, width, inner_width, out, threads);
}
