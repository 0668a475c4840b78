// Attention of few queries to all keys, which lie in memory as they were made.
#include <ATen/cpu/vec/functional.h>

namespace {

using Lanes = at::vec::Vectorized<float>;  // what torch has for floats, and its exponential function
constexpr int64_t SCORES = 256 << 10;  // bytes of scores that stay near
constexpr int64_t QUERIES = 32;       // queries a thread takes at once
constexpr int WIDE = 4;               // vectors of values a tile

struct Sizes {
  int64_t batch, heads, queries, keys, width, value_width;
  int64_t q[3], k[3], v[3], out[3];  // elements from one sample, head, row to the next
};

template <typename Type>
struct Attention {
  using Element = typename Type::Element;
  const Element *q, *k, *v;  // of one head
  Element* out;
  const Sizes& sizes;
  float scale;
  float* scores;  // [queries, padded]
  int64_t padded;

  // Scores of one query become weights, not yet divided by their sum; one over the sum.
  float weigh(float* row) const {
    const Lanes none(-std::numeric_limits<float>::infinity());
    Lanes most = none, sum(0.0f);
    for (int64_t i = 0; i < padded; i += Lanes::size()) {
      const int64_t keys = std::min<int64_t>(Lanes::size(), sizes.keys - i);
      const Lanes scaled = Lanes::set(none, Lanes::loadu(row + i) * Lanes(scale), keys);
      scaled.store(row + i);
      most = at::vec::maximum(most, scaled);  // NaN where one is
    }
    const float shift = at::vec::vec_reduce_all<float>([](Lanes& a, Lanes& b) { return at::vec::maximum(a, b); }, most);
    // exp_u20 knows numbers only.
    if (!std::isfinite(shift)) return std::numeric_limits<float>::quiet_NaN();
    for (int64_t i = 0; i < padded; i += Lanes::size()) {
      const Lanes weight = (Lanes::loadu(row + i) - Lanes(shift)).exp_u20();
      weight.store(row + i);
      sum = sum + weight;
    }
    return 1.0f / at::vec::vec_reduce_all<float>([](Lanes& a, Lanes& b) { return a + b; }, sum);
  }

  // Values [c, c + C vectors) of R queries; `where`: how many floats of the last vector, or all.
  template <int R, int C, typename... Where>
  void values(const float* weights, const float* share, Element* to, int64_t c, Where... where) const {
    Sum sum[R][C];
    UNROLL
    for (int i = 0; i < R; i++)
      UNROLL
      for (int j = 0; j < C; j++) sum[i][j] = zero();
    const Element* value = v + c;
    for (int64_t key = 0; key < sizes.keys; key++, value += sizes.v[2]) {
      Sum b[C];
      UNROLL
      for (int j = 0; j < C; j++) b[j] = keep(Type::floats(value + j * FLOATS, where...));
      UNROLL
      for (int i = 0; i < R; i++) {
        const Sum a = keep(all_of(weights[i * padded + key]));
        UNROLL
        for (int j = 0; j < C; j++) sum[i][j] = plus_product(sum[i][j], a, b[j]);
      }
    }
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
    for (; c + FLOATS <= sizes.value_width; c += FLOATS) values<R, 1>(weights, share, to, c);
    if (c < sizes.value_width) values<R, 1>(weights, share, to, c, sizes.value_width - c);
  }

  // Queries [first, first + count).
  void block(int64_t first, int64_t count) const {
    const Element* start = q + first * sizes.q[2];
    const Product<Type, float> product{start, k, nullptr, scores, sizes.q[2], sizes.k[2], padded, sizes.width, sizes.keys};
    product.columns(0, count, 0, sizes.keys);
    float share[QUERIES];
    for (int64_t i = 0; i < count; i++) share[i] = weigh(scores + i * padded);
    for (int64_t i = 0, some; i < count; i += some) {
      some = std::min<int64_t>(Type::ROWS, count - i);
      rows(some, scores + i * padded, share + i, out + (first + i) * sizes.out[2]);
    }
  }
};

template <typename Type, typename Element = typename Type::Element>
void attention(const Element* q, const Element* k, const Element* v, Element* out, const Sizes& sizes, float scale, int64_t threads) {
  const int64_t padded = (sizes.keys + Lanes::size() - 1) / Lanes::size() * Lanes::size();
  const int64_t few = std::clamp<int64_t>(SCORES / (4 * padded) / 4 * 4, 4, QUERIES);
  const int64_t blocks = (sizes.queries + few - 1) / few;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> scores(few * padded);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < sizes.batch * sizes.heads * blocks; task++) {
      const int64_t sample = task / blocks / sizes.heads, head = task / blocks % sizes.heads, first = task % blocks * few;
      const auto at = [&](const int64_t (&stride)[3]) { return sample * stride[0] + head * stride[1]; };
      const Attention<Type> one{q + at(sizes.q), k + at(sizes.k), v + at(sizes.v), out + at(sizes.out), sizes, scale, scores.data(), padded};
      one.block(first, std::min(few, sizes.queries - first));
    }
  }
}

}  // namespace

extern "C" void few_queries_float32(
    const float* q, const float* k, const float* v, float* out, const Sizes* sizes, float scale, int64_t threads) {
  attention<Float>(q, k, v, out, *sizes, scale, threads);
}

#ifdef MOECA_BFLOAT16
extern "C" void few_queries_bfloat16(
    const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, const Sizes* sizes, float scale, int64_t threads) {
  attention<Bfloat16>(q, k, v, out, *sizes, scale, threads);
}
#endif
