// Products of few rows with weights [I, O], 64 outputs of all inputs at a time. With AVX-512, float32.

namespace {

constexpr int ROWS = 6;  // a tile: its sums and what they are made of take 29 of 32 registers

struct Turned {
  const float *rows, *bias;
  float* out;
  int64_t row_stride, out_stride, inputs, count;  // count: outputs of this panel

  // Rows [r, r + some), at most ROWS, with weights that fetch(n, right) puts into registers.
  template <int R = ROWS, typename Fetch>
  void tile(int64_t r, int64_t some, const Fetch& fetch) const {
    if constexpr (R > 1)
      if (some < R) return tile<R - 1>(r, some, fetch);
    Sum sum[R][WIDE];
    multiply<ByFloat>(sum, inputs, rows + r * row_stride, row_stride, fetch);
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
    // Weights of many inputs lie as far apart as places of the cache that exclude each other: what
    // more than one tile needs is laid next to each other.
    std::vector<float> panel(inputs * PANEL);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * pieces; task++) {
      const int64_t group = task / pieces, piece = task % pieces, first = piece * PANEL;
      const int64_t stop = ends[group], count = std::min(PANEL, outputs - first);
      int64_t r = group ? ends[group - 1] : 0;
      if (r == stop) continue;
      const float* weight = weights[group] + first;
      // Processors look ahead within a page of memory, and here every input has its own.
      const float* next = piece + 1 < pieces ? weight + PANEL : weights[std::min(group + 1, groups - 1)];
      const Turned product{rows, biases ? biases[group] + first : nullptr, out + first,
                           row_stride, outputs, inputs, count};
      const auto tile = [&](const auto& fetch) {
        const int64_t some = std::min<int64_t>(ROWS, stop - r);
        product.tile(r, some, fetch);
        r += some;
      };
      const auto from_memory = [&](int64_t n, Sum(&right)[WIDE]) __attribute__((always_inline)) {
        UNROLL
        for (int j = 0; j < WIDE; j++)
          _mm_prefetch(reinterpret_cast<const char*>(next + n * weight_stride + j * FLOATS), _MM_HINT_T0);
        from<ByFloat>(weight, weight_stride)(n, right);
      };
      if (count < PANEL) {
        for (int64_t n = 0; n < inputs; n++) std::copy_n(weight + n * weight_stride, count, &panel[n * PANEL]);
      } else if (stop - r <= ROWS) {
        tile(from_memory);
      } else {
        tile([&](int64_t n, Sum(&right)[WIDE]) __attribute__((always_inline)) {
          from_memory(n, right);
          UNROLL
          for (int j = 0; j < WIDE; j++) Float::store(&panel[n * PANEL + j * FLOATS], right[j]);
        });
      }
      while (r < stop) tile(from<ByFloat>(panel.data(), PANEL));
    }
  }
}
