// Products of few rows, weights [O, I] read as they lie in memory. With AVX-512 weights that meet more
// rows are packed into panels of 64 outputs; the number of rows in a group decides. With MOECA_TURNED
// weights are [I, O] and always go by panels: AVX-512, float32.

namespace {

constexpr int64_t TASK = 64;  // outputs a thread takes at once
constexpr int64_t LINE = 16;  // outputs that are written to memory at once
#ifdef MOECA_TURNED
constexpr bool TURNED = true;
#else
constexpr bool TURNED = false;
#endif

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

  // Outputs [first, last) of rows [r, stop). Not inlined: g++ 12 chooses a tile's registers by what is
  // around it, and in bfloat16 one way takes half as long again as the other.
  [[gnu::noinline]] void columns(int64_t r, int64_t stop, int64_t first, int64_t last) const {
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

#ifdef MOECA_AVX512

constexpr int TALL = 6;          // rows a tile: with what its sums are made of 29 of 32 registers
constexpr int64_t CHAIN = 256;  // additions one after another: longer chains lose digits
// Packing pays for so many units of rows on, or half as many of rows of so many bytes, which lie as far
// apart as places of the first cache that exclude each other; for most of a panel.
constexpr int64_t MUCH = 72 << 10, LONG = 4096 * PER_UNIT, MOST = PANEL * 3 / 4;

bool packing_pays(int64_t rows, int64_t inputs, int64_t outputs) {
  const bool far_apart = inputs * static_cast<int64_t>(sizeof(Element)) >= LONG;
  return outputs >= MOST && rows * inputs / PER_UNIT >= (far_apart ? MUCH / 2 : MUCH);
}

// One panel: PANEL outputs, `count` of which there are. Strides and inputs in units of 32 bits.
struct Panel {
  const float *rows, *weight, *next;  // next: weights that the next panel will be made of
  const Element* bias;
  Element* out;
  float* packed;  // [inputs, PANEL]
  int64_t row_stride, weight_stride, out_stride, inputs, count;

  // Not as a function of its own: g++ 12 drops calls of one that only asks.
  [[gnu::always_inline]] static void ask_for(const float* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

  // Rows [r, r + some), at most TALL, with weights that fetch(n, right) puts into registers.
  template <int R = TALL, typename Fetch>
  void tile(int64_t r, int64_t some, const Fetch& fetch) const {
    if constexpr (R > 1)
      if (some < R) return tile<R - 1>(r, some, fetch);
    const float* x = rows + r * row_stride;
    Sum sum[R][WIDE];
    multiply<ByUnit>(sum, std::min(CHAIN, inputs), x, row_stride, fetch);
    for (int64_t n = CHAIN; n < inputs; n += CHAIN) {
      Sum part[R][WIDE];
      const auto from_n = [&](int64_t i, Sum(&right)[WIDE]) __attribute__((always_inline)) { fetch(n + i, right); };
      multiply<ByUnit>(part, std::min(CHAIN, inputs - n), x + n, row_stride, from_n);
      UNROLL
      for (int i = 0; i < R; i++)
        UNROLL
        for (int j = 0; j < WIDE; j++) sum[i][j] = sum[i][j] + part[i][j];
    }
    UNROLL
    for (int j = 0; j < WIDE; j++) {
      const int64_t left = std::min(FLOATS, count - j * FLOATS);
      if (left <= 0) return;
      const Sum shift = bias ? Type::floats(bias + j * FLOATS, left) : zero();
      UNROLL
      for (int i = 0; i < R; i++) Type::store(out + (r + i) * out_stride + j * FLOATS, sum[i][j] + shift, left);
    }
  }

#ifdef MOECA_TURNED
  // Weights [I, O] meet the first rows while they are packed; where there are no others they are not.
  int64_t first_tile(int64_t r, int64_t stop) const {
    const auto from_memory = [=, *this](int64_t n, Sum(&right)[WIDE]) __attribute__((always_inline)) {
      // Processors look ahead within a page of memory, and here every input has its own.
      UNROLL
      for (int j = 0; j < WIDE; j++) ask_for(next + n * weight_stride + j * FLOATS);
      from<ByUnit>(weight, weight_stride)(n, right);
    };
    if (stop - r <= TALL) {
      tile(r, stop - r, from_memory);
      return stop;
    }
    tile(r, TALL, [=, *this](int64_t n, Sum(&right)[WIDE]) __attribute__((always_inline)) {
      from_memory(n, right);
      UNROLL
      for (int j = 0; j < WIDE; j++) Float::store(packed + n * PANEL + j * FLOATS, right[j]);
    });
    return r + TALL;
  }

  int64_t pack(int64_t r, int64_t stop) const {
    if (count == PANEL) return first_tile(r, stop);
    for (int64_t n = 0; n < inputs; n++) std::copy_n(weight + n * weight_stride, count, packed + n * PANEL);
    return r;
  }
#else
  int64_t pack(int64_t r, int64_t) const {
    lay_out(weight, weight_stride, count, inputs, packed,
            [=, *this](int64_t at) __attribute__((always_inline)) { ask_for(next + at); });
    return r;
  }
#endif

  // All rows [r, stop) of a group; `pack` may have computed the first ones.
  [[gnu::noinline]] void columns(int64_t r, int64_t stop) const {
    for (r = pack(r, stop); r < stop; r += TALL) tile(r, std::min<int64_t>(TALL, stop - r), from<ByUnit>(packed, PANEL));
  }
};
#endif

}  // namespace

// weight_stride: elements from the weights of one output to those of the next; of one input with MOECA_TURNED.
extern "C" void few_rows(
    const Element* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const Element* const* weights, int64_t weight_stride, const Element* const* biases,
    Element* out, int64_t inputs, int64_t outputs, int64_t threads) {
  const int64_t pieces = (outputs + TASK - 1) / TASK;
  const int64_t block = std::max<int64_t>(24, BLOCK / (static_cast<int64_t>(sizeof(Element)) * inputs) / 12 * 12);
  int64_t most = 0;  // rows of a group
  for (int64_t group = 0; group < groups; group++) most = std::max(most, ends[group] - (group ? ends[group - 1] : 0));
  const int64_t blocks = (most + block - 1) / block;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> packed;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < groups * pieces * blocks; task++) {
      const int64_t group = task / blocks / pieces, first = task / blocks % pieces * TASK, number = task % blocks;
      const int64_t start = group ? ends[group - 1] : 0, stop = ends[group];
      const int64_t r = start + number * block;
      if (r >= stop) continue;
      const Element* bias = biases ? biases[group] : nullptr;
#ifdef MOECA_AVX512
      static_assert(TASK == PANEL);
      const bool whole = (inputs | row_stride | weight_stride) % PER_UNIT == 0;
      if (TURNED || (whole && packing_pays(stop - start, inputs, outputs - first))) {
        if (number) continue;  // all rows of the group meet a panel
        const int64_t step = TURNED ? 1 : weight_stride;  // from one output to the next
        const Element* weight = weights[group] + first * step;
        const Element* next = first + PANEL < outputs ? weight + PANEL * step : weights[std::min(group + 1, groups - 1)];
        packed.resize(inputs / PER_UNIT * PANEL);
        const auto units = [](const Element* p) { return reinterpret_cast<const float*>(p); };
        const Panel panel{units(rows), units(weight), units(next), bias ? bias + first : nullptr, out + first, packed.data(),
                          row_stride / PER_UNIT, weight_stride / PER_UNIT, outputs, inputs / PER_UNIT,
                          std::min(PANEL, outputs - first)};
        panel.columns(start, stop);
        continue;
      }
#endif
      const Product product{rows, weights[group], bias, out, row_stride, weight_stride, outputs, inputs, outputs};
      product.columns(r, std::min(r + block, stop), first, std::min(first + TASK, outputs));
    }
  }
}
