// Products of few rows with weights [O, I] as they lie in memory, nothing packed.

namespace {

constexpr int64_t TASK = 64;  // outputs a thread takes at once
constexpr int64_t LINE = 16;  // outputs that are written to memory at once

struct Product {
  const Element* rows;
  const Element* weight;
  const Element* bias;
  Element* out;
  int64_t row_stride, weight_stride, out_stride, inputs, outputs;

  template <int R, int C>
  void tile(int64_t r, int64_t o) const {
    const Element* x = rows + r * row_stride;
    const Element* w = weight + o * weight_stride;
    Sum sum[R][C];
    UNROLL
    for (int i = 0; i < R; i++)
      UNROLL
      for (int j = 0; j < C; j++) sum[i][j] = zero();
    const auto step = [&](auto... where) __attribute__((always_inline)) {
      decltype(Type::load(x)) a[R];
      UNROLL
      for (int i = 0; i < R; i++) a[i] = keep(Type::load(x + i * row_stride, where...));
      UNROLL
      for (int j = 0; j < C; j++) {
        const auto b = keep(Type::load(w + j * weight_stride, where...));
        UNROLL
        for (int i = 0; i < R; i++) sum[i][j] = Type::add(sum[i][j], a[i], b);
      }
    };
    const Element* end = x + inputs / Type::LANES * Type::LANES;
    for (; x < end; x += Type::LANES, w += Type::LANES) step();
    if (inputs % Type::LANES) step(inputs % Type::LANES);
    Element* to = out + r * out_stride + o;
    if constexpr (C == COLUMNS) {
      __m128 row[R];
      totals(sum, row);
      const __m128 shift = bias ? Type::widened(bias + o) : _mm_setzero_ps();
      UNROLL
      for (int i = 0; i < R; i++) Type::store(to + i * out_stride, _mm_add_ps(row[i], shift));
    } else {
      const float shift = bias ? Type::widened(bias[o]) : 0.0f;
      for (int i = 0; i < R; i++) Type::store(to + i * out_stride, total(sum[i][0]) + shift);
    }
  }

  // Outputs [o, end) of `count` rows from r on.
  template <int R = Type::ROWS>
  void across(int64_t count, int64_t r, int64_t o, int64_t end) const {
    if constexpr (R > 1)
      if (count < R) return across<R - 1>(count, r, o, end);
    for (; o + COLUMNS <= end; o += COLUMNS) tile<R, COLUMNS>(r, o);
    for (; o < end; o++) tile<R, 1>(r, o);
  }

  // Outputs [first, last) of rows [r, stop).
  void columns(int64_t r, int64_t stop, int64_t first, int64_t last) const {
    constexpr int64_t SIZE = sizeof(Element), ROWS = Type::ROWS;
    const int64_t wide = std::clamp<int64_t>(NEAR / (SIZE * inputs) / COLUMNS * COLUMNS, COLUMNS, LINE);
    const int64_t tiles = (stop - r + ROWS - 1) / ROWS;
    for (int64_t o = first; o < last; o += wide) {
      const int64_t end = std::min(o + wide, last);
      // The next weights come from memory while these are used; parts of longer rows do not: what
      // lies between them would come along.
      const char* ahead = reinterpret_cast<const char*>(weight + end * weight_stride);
      const char* enough = weight_stride > inputs
                               ? ahead
                               : reinterpret_cast<const char*>(weight + std::min(end + wide, outputs) * weight_stride);
      const int64_t step = ((enough - ahead) / tiles + 63) / 64 * 64;
      for (int64_t i = r, count; i < stop; i += count) {
        for (const char* to = std::min(ahead + step, enough); ahead < to; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
        // The last two tiles share their rows: one of a single row takes almost as long as one of two.
        const int64_t left = stop - i;
        count = left <= ROWS ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS;
        across(count, i, o, end);
      }
    }
  }
};

}  // namespace

extern "C" void few_rows(
    const Element* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const Element* const* weights, int64_t weight_stride, const Element* const* biases,
    Element* out, int64_t inputs, int64_t outputs, int64_t threads) {
  const int64_t pieces = (outputs + TASK - 1) / TASK;
  const int64_t block = std::max<int64_t>(24, BLOCK / (static_cast<int64_t>(sizeof(Element)) * inputs) / 12 * 12);
  int64_t most = 0;  // rows of a group
  for (int64_t group = 0; group < groups; group++) most = std::max(most, ends[group] - (group ? ends[group - 1] : 0));
  const int64_t blocks = (most + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < groups * pieces * blocks; task++) {
    const int64_t group = task / blocks / pieces, first = task / blocks % pieces * TASK, stop = ends[group];
    const int64_t r = (group ? ends[group - 1] : 0) + task % blocks * block;
    if (r >= stop) continue;
    const Product product{rows, weights[group], biases ? biases[group] : nullptr, out,
                          row_stride, weight_stride, outputs, inputs, outputs};
    product.columns(r, std::min(r + block, stop), first, std::min(first + TASK, outputs));
  }
}
