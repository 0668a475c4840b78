// Products of few rows with weights [I, O], 64 outputs of all inputs at a time. With AVX-512, float32.

namespace {

struct Turned {
  const float *rows, *panel, *bias;  // panel: weights of PANEL outputs, [inputs, PANEL]
  float* out;
  int64_t row_stride, out_stride, inputs, count;  // count: outputs of this panel

  template <int R = Type::ROWS>
  void tile(int64_t some, int64_t r) const {
    if constexpr (R > 1)
      if (some < R) return tile<R - 1>(some, r);
    Sum sum[R][WIDE];
    multiply<ByFloat>(sum, inputs, rows + r * row_stride, row_stride, panel, PANEL);
    UNROLL
    for (int j = 0; j < WIDE; j++) {
      const int64_t left = std::min(FLOATS, count - j * FLOATS);
      if (left <= 0) return;
      const Sum shift = bias ? Float::load(bias + j * FLOATS, left) : zero();
      UNROLL
      for (int i = 0; i < R; i++) Float::store(out + (r + i) * out_stride + j * FLOATS, sum[i][j] + shift, left);
    }
  }
};

}  // namespace

// weight_stride: elements from the weights of one input to those of the next.
extern "C" void few_rows_turned(
    const float* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const float* const* weights, int64_t weight_stride, const float* const* biases,
    float* out, int64_t inputs, int64_t outputs, int64_t threads) {
  const int64_t pieces = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> panel(inputs * PANEL);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * pieces; task++) {
      const int64_t group = task / pieces, first = task % pieces * PANEL;
      const int64_t start = group ? ends[group - 1] : 0, count = std::min(PANEL, outputs - first);
      if (start == ends[group]) continue;
      // Weights of many inputs lie as far apart as places of the cache that exclude each other.
      for (int64_t i = 0; i < inputs; i++)
        std::copy_n(weights[group] + i * weight_stride + first, count, panel.data() + i * PANEL);
      const Turned product{rows, panel.data(), biases ? biases[group] + first : nullptr, out + first,
                           row_stride, outputs, inputs, count};
      for (int64_t r = start, some; r < ends[group]; r += some) {
        some = std::min<int64_t>(Type::ROWS, ends[group] - r);
        product.tile(some, r);
      }
    }
  }
}
