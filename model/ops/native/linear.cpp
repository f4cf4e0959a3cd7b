// Products with packed weights.

#include "panels.h"

// out[r][b] = x[r][b] times the transpose of weight b, for `batch` weights [outputs, inputs].
//
// x [rows, batch, inputs] and out [rows, batch, outputs], rows x_stride and out_stride numbers
// apart. Weights are panels; outputs is a multiple of 64, inputs of 2.
extern "C" void linear(const bf16* x, int64_t x_stride, const bf16* weights, int rows, int batch,
                       int inputs, int outputs, bf16* out, int64_t out_stride, int threads) {
  const int panels = outputs / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int task = 0; task < batch * panels; task++) {
    const int b = task / panels, column = task % panels * PANEL;
    const bf16* panel = weights + static_cast<int64_t>(task) * PANEL * inputs;
    for (int first = 0; first < rows; first += MANY) {
      const int count = std::min(MANY, rows - first);
      const bf16* at[MANY];
      for (int i = 0; i < count; i++) at[i] = x + (first + i) * x_stride + b * inputs;
      Floats sums[MANY][VECTORS];
      products<Bf16>(count, at, panel, inputs, sums);
      for (int i = 0; i < count; i++) {
        bf16* to = out + (first + i) * out_stride + b * outputs + column;
        for (int v = 0; v < VECTORS; v++) store(to + v * LANES, sums[i][v]);
      }
    }
  }
}
