// What is done to every row by itself.

#include <cmath>
#include <vector>

#include "simd.h"

// out = x over its root mean square, rounded to bf16, times weight. dim is a multiple of 16.
extern "C" void rms_norm(const bf16* x, int64_t stride, const bf16* weight, int rows, int dim,
                         float eps, bf16* out) {
  for (int row = 0; row < rows; row++, x += stride, out += dim) {
    __m512 squares = _mm512_setzero_ps();
    for (int d = 0; d < dim; d += LANES) {
      const __m512 value = load_float(x + d);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(dim);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
    for (int d = 0; d < dim; d += LANES) {
      const __m512 normed = _mm512_mul_ps(load_float(x + d), scale);
      const __m512 rounded = to_float((__m256i)_mm512_cvtneps_pbh(normed));
      store_bf16(out + d, _mm512_mul_ps(rounded, load_float(weight + d)));
    }
  }
}

// out = silu(first half of a row) * second half; `inner` is a multiple of 16.
extern "C" void silu_mul(const bf16* gate_up, int64_t stride, int rows, int inner, bf16* out) {
  for (int row = 0; row < rows; row++, gate_up += stride, out += inner)
    for (int d = 0; d < inner; d += LANES)
      store_bf16(out + d, _mm512_mul_ps(silu(load_float(gate_up + d)),
                                        load_float(gate_up + inner + d)));
}

// Rotates pairs of x [rows, heads, dim] in place; cos and sin [rows, dim / 2]. dim is a multiple
// of 32. A pair is one 32-bit word, its even dimension in the lower half.
extern "C" void rotate(bf16* x, int64_t row_stride, int64_t head_stride, const float* cos,
                       const float* sin, int rows, int heads, int dim) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
  for (int row = 0; row < rows; row++, cos += dim / 2, sin += dim / 2)
    for (int head = 0; head < heads; head++) {
      bf16* at = x + row * row_stride + head * head_stride;
      for (int d = 0; d < dim; d += 2 * LANES) {
        const __m512i pairs = _mm512_loadu_si512(at + d);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
        const __m512 c = _mm512_loadu_ps(cos + d / 2), s = _mm512_loadu_ps(sin + d / 2);
        const __m512 turned_even = _mm512_fmsub_ps(even, c, _mm512_mul_ps(odd, s));
        const __m512 turned_odd = _mm512_fmadd_ps(even, s, _mm512_mul_ps(odd, c));
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(turned_even));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(turned_odd));
        _mm512_storeu_si512(at + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
}

namespace {

// The place of the largest of n values that is not below 0; of equal ones the first.
int largest(const float* values, int n) {
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
      const int g = std::max(largest(best.data(), groups), 0);
      std::copy_n(&scores[g * size], size, &eligible[g * size]);
      best[g] = -1.0f;
    }
    for (int k = 0; k < top_k; k++) {
      const int e = largest(eligible.data(), experts);
      ids[k] = std::max(e, 0);
      weights[k] = scores[ids[k]] * scale;
      if (e >= 0) eligible[e] = -1.0f;
    }
  }
}
