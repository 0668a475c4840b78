// Attention of few queries to all keys, which lie in memory as they were made. With AVX-512.
#ifdef MOECA_AVX512

namespace {

constexpr int64_t SCORES = 256 << 10;  // bytes of scores that stay near
constexpr int64_t QUERIES = 32;        // queries a thread takes at once

struct Sizes {
  int64_t batch, heads, queries, keys, width, value_width;
  int64_t q[3], k[3], v[3], out[3];  // elements from one sample, head, row to the next
};

// Outputs are sums over weights and elements of a value.
struct ByWeight : ByFloat {
  template <typename... Where>
  static Sum load(const Element* p, Where... where) { return Type::floats(p, where...); }
};

struct Attention {
  const Element *q, *k, *v;  // of one head
  Element* out;
  const Sizes& sizes;
  float scale;
  float* scores;  // [queries, padded]
  float* turned;  // states of PANEL keys: [units, PANEL]
  int64_t padded, units;

  // Scores of one query become weights, not yet divided by their sum; one over the sum. That is no
  // number where a score is none, or where the largest is infinite.
  float weigh(float* row) const {
    const Sum none = all_of(-std::numeric_limits<float>::infinity());
    Sum most = none, sum = zero();
    for (int64_t i = 0; i < sizes.keys; i += FLOATS) {
      const Sum scaled = first(std::min(FLOATS, sizes.keys - i), times(Float::load(row + i), all_of(scale)), none);
      Float::store(row + i, scaled);
      most = larger(most, scaled);
    }
    const Sum shift = all_of(largest(most));
    for (int64_t i = 0; i < sizes.keys; i += FLOATS) {
      const Sum weight = exponential(Float::load(row + i) - shift);
      Float::store(row + i, weight);
      sum = sum + weight;
    }
    return 1.0f / total(sum);
  }

  // Values [c, c + C vectors) of R queries; `where`: how many floats of the last vector, or all.
  template <int R, int C, typename... Where>
  void values(const float* weights, const float* share, Element* to, int64_t c, Where... where) const {
    Sum sum[R][C];
    multiply<ByWeight>(sum, sizes.keys, weights, padded, from<ByWeight>(v + c, sizes.v[2], where...));
    for (int i = 0; i < R; i++)
      UNROLL
      for (int j = 0; j < C; j++)
        Type::store(to + i * sizes.out[2] + c + j * FLOATS, times(sum[i][j], all_of(share[i])), where...);
  }

  template <int R = Type::ROWS>
  void rows(int64_t count, const float* weights, const float* share, Element* to) const {
    if constexpr (R > 1)
      if (count < R) return rows<R - 1>(count, weights, share, to);
    int64_t c = 0;
    for (; c + WIDE * FLOATS <= sizes.value_width; c += WIDE * FLOATS) values<R, WIDE>(weights, share, to, c);
    for (; c < sizes.value_width; c += FLOATS)
      values<R, 1>(weights, share, to, c, std::min(FLOATS, sizes.value_width - c));
  }

  // Scores of R queries for one panel of keys.
  template <int R = Type::ROWS>
  void panel(int64_t count, const float* states, float* to) const {
    if constexpr (R > 1)
      if (count < R) return panel<R - 1>(count, states, to);
    Sum sum[R][WIDE];
    multiply<ByUnit>(sum, units, states, sizes.q[2] / PER_UNIT, from<ByUnit>(turned, PANEL));
    UNROLL
    for (int i = 0; i < R; i++)
      UNROLL
      for (int j = 0; j < WIDE; j++) Float::store(to + i * padded + j * FLOATS, sum[i][j]);
  }

  // Queries [first, first + count).
  void block(int64_t first, int64_t count) const {
    const float* states = reinterpret_cast<const float*>(q + first * sizes.q[2]);
    for (int64_t p = 0; p < sizes.keys; p += PANEL) {
      const float* keys = reinterpret_cast<const float*>(k + p * sizes.k[2]);
      lay_out(keys, sizes.k[2] / PER_UNIT, std::min(PANEL, sizes.keys - p), units, turned, [](int64_t) {});
      for (int64_t i = 0, some; i < count; i += some) {
        some = std::min<int64_t>(Type::ROWS, count - i);
        panel(some, states + i * (sizes.q[2] / PER_UNIT), scores + i * padded + p);
      }
    }
    float share[QUERIES];
    for (int64_t i = 0; i < count; i++) share[i] = weigh(scores + i * padded);
    for (int64_t i = 0, some; i < count; i += some) {
      some = std::min<int64_t>(Type::ROWS, count - i);
      rows(some, scores + i * padded, share + i, out + (first + i) * sizes.out[2]);
    }
  }
};

}  // namespace

extern "C" void few_queries(
    const Element* q, const Element* k, const Element* v, Element* out, const Sizes* sizes, float scale, int64_t threads) {
  const int64_t padded = (sizes->keys + PANEL - 1) / PANEL * PANEL;
  const int64_t units = sizes->width * sizeof(Element) / sizeof(float);
  const int64_t few = std::clamp<int64_t>(SCORES / (4 * padded) / 4 * 4, 4, QUERIES);
  const int64_t blocks = (sizes->queries + few - 1) / few;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> scores(few * padded), turned(units * PANEL);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sizes->batch * sizes->heads * blocks; task++) {
      const int64_t sample = task / blocks / sizes->heads, head = task / blocks % sizes->heads, first = task % blocks * few;
      const auto at = [&](const int64_t (&stride)[3]) { return sample * stride[0] + head * stride[1]; };
      const Attention one{q + at(sizes->q), k + at(sizes->k), v + at(sizes->v), out + at(sizes->out), *sizes, scale,
                          scores.data(), turned.data(), padded, units};
      one.block(first, std::min(few, sizes->queries - first));
    }
  }
}
#endif
