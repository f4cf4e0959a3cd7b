// What is done to every row by itself.

#include <cmath>
#include <vector>

#include "simd.h"

// out = x over its root mean square, rounded to bf16, times weight. dim is a multiple of 16.
extern "C" void rms_norm(const bf16* x, int64_t stride, const bf16* weight, int rows, int dim,
                         float eps, bf16* out) {
  for (int row = 0; row < rows; row++, x += stride, out += dim) {
    Floats squares = all(0.0f);
    for (int d = 0; d < dim; d += LANES) {
      const Floats value = load(x + d);
      squares = fmadd(value, value, squares);
    }
    const float mean = sum(squares) / static_cast<float>(dim);
    const Floats scale = all(1.0f / std::sqrt(mean + eps));
    for (int d = 0; d < dim; d += LANES)
      store(out + d, rounded(load(x + d) * scale) * load(weight + d));
  }
}

// out = silu(first half of a row) * second half; `inner` is a multiple of 16.
extern "C" void silu_mul(const bf16* gate_up, int64_t stride, int rows, int inner, bf16* out) {
  for (int row = 0; row < rows; row++, gate_up += stride, out += inner)
    for (int d = 0; d < inner; d += LANES)
      store(out + d, silu(load(gate_up + d)) * load(gate_up + inner + d));
}

// Rotates pairs of x [rows, heads, dim] in place; cos and sin [rows, dim / 2]. dim is a multiple
// of 32. A pair is one 32-bit word, its even dimension in the lower half.
extern "C" void rotate(bf16* x, int64_t row_stride, int64_t head_stride, const float* cos,
                       const float* sin, int rows, int heads, int dim) {
  for (int row = 0; row < rows; row++, cos += dim / 2, sin += dim / 2)
    for (int head = 0; head < heads; head++) {
      bf16* at = x + row * row_stride + head * head_stride;
      for (int d = 0; d < dim; d += 2 * LANES) {
        const Ints pairs = load_words(at + d);
        const Floats x0 = even(pairs), x1 = odd(pairs);
        const Floats c = load(cos + d / 2), s = load(sin + d / 2);
        store_words(at + d, paired(x0 * c - x1 * s, x0 * s + x1 * c));
      }
    }
}

namespace {

// The place of the largest of n values that is not below 0; of equal ones the first.
int likeliest(const float* values, int n) {
  int best = -1;
  float most = -1.0f;
  for (int i = 0; i < n; i++)
    if (values[i] > most) most = values[best = i];
  return best;
}

}  // namespace

// Softmax over all experts; of the groups_kept groups with the likeliest experts, the top_k
// likeliest. Writes ids and weights [rows, top_k]. A row with NaN gets the first experts and NaN.
extern "C" void route(const float* logits, int rows, int experts, int top_k, int groups,
                      int groups_kept, float scale, int64_t* ids, float* weights) {
  const int size = experts / groups;
  std::vector<float> scores(experts), eligible(experts), best(groups);
  for (int row = 0; row < rows; row++, logits += experts, ids += top_k, weights += top_k) {
    const float most = *std::max_element(logits, logits + experts);
    float total = 0.0f;
    for (int e = 0; e < experts; e++) total += scores[e] = std::exp(logits[e] - most);
    for (int e = 0; e < experts; e++) scores[e] /= total;
    for (int g = 0; g < groups; g++)
      best[g] = *std::max_element(&scores[g * size], &scores[g * size] + size);
    std::fill(eligible.begin(), eligible.end(), -1.0f);
    for (int kept = 0; kept < groups_kept; kept++) {
      const int g = std::max(likeliest(best.data(), groups), 0);
      std::copy_n(&scores[g * size], size, &eligible[g * size]);
      best[g] = -1.0f;
    }
    for (int k = 0; k < top_k; k++) {
      const int e = likeliest(eligible.data(), experts);
      ids[k] = std::max(e, 0);
      weights[k] = scores[ids[k]] * scale;
      if (e >= 0) eligible[e] = -1.0f;
    }
  }
}
