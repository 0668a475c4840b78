// Products of few rows with weights [O, I] as they lie in memory, nothing packed.
// few_rows.py defines MOECA_AVX512 and MOECA_BFLOAT16 where the processor has what they ask for.
#include <immintrin.h>
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t COLUMNS = 4;  // outputs a tile: their sums leave it as one vector of four
constexpr int64_t TASK = 64;    // outputs a thread takes at once
constexpr int64_t LINE = 16;    // outputs that are written to memory at once

// Loops over the sums of a tile: what is not written out ends up in memory.
#define UNROLL _Pragma("GCC unroll 16")

// What the loads put into a register stays there. Compilers read it again for every use instead,
// or move loads ahead until registers run out: up to twice the time, as they think of the processor.
template <typename V>
[[gnu::always_inline]] inline V keep(V v) {
  asm("" : "+v"(v));
  return v;
}

#ifdef MOECA_AVX512

using Sum = __m512;                   // what one output has been so far, in parts
constexpr int64_t NEAR = 16 << 10;    // bytes of weights that stay in the first cache
constexpr int64_t BLOCK = 256 << 10;  // bytes of rows that stay in the second one

Sum zero() { return _mm512_setzero_ps(); }

float total(Sum s) { return _mm512_reduce_add_ps(s); }

struct Float {
  using Element = float;
  static constexpr int64_t LANES = 16;  // elements a vector
  static constexpr int ROWS = 4;        // rows a tile
  static Sum load(const float* p) { return _mm512_loadu_ps(p); }
  static Sum load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
  static Sum add(Sum s, Sum a, Sum b) { return _mm512_fmadd_ps(a, b, s); }
  static float widened(float v) { return v; }
  static __m128 widened(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, __m128 v) { _mm_storeu_ps(p, v); }
  static void store(float* p, float v) { *p = v; }
};

#ifdef MOECA_BFLOAT16
struct Bfloat16 {
  using Element = uint16_t;
  static constexpr int64_t LANES = 32;
  static constexpr int ROWS = 4;
  static __m512bh load(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static __m512bh load(const uint16_t* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((1u << count) - 1, p);
  }
  static Sum add(Sum s, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(s, a, b); }
  static float widened(uint16_t v) { return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(v << 16))); }
  static __m128 widened(const uint16_t* p) {
    const __m128i bits = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(bits), 16));
  }
  static void store(uint16_t* p, __m128 v) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), (__m128i)_mm_cvtneps_pbh(v));
  }
  static void store(uint16_t* p, float v) {
    *p = static_cast<uint16_t>(_mm_cvtsi128_si32((__m128i)_mm_cvtneps_pbh(_mm_set_ss(v))));
  }
};
#endif

// Four sums, added up within each quarter of the vector.
Sum within(const Sum (&s)[COLUMNS]) {
  const Sum ab = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
  const Sum cd = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

Sum by_two(Sum a, Sum b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// Every row's four outputs; the additions are the same for any number of rows.
template <int R>
void totals(const Sum (&sum)[R][COLUMNS], __m128 (&row)[R]) {
  static_assert(R <= 4);
  Sum part[4];
  UNROLL
  for (int i = 0; i < 4; i++) part[i] = i < R ? within(sum[i < R ? i : 0]) : zero();
  const Sum all = by_two(by_two(part[0], part[1]), by_two(part[2], part[3]));
  const __m128 rows[4] = {_mm512_castps512_ps128(all), _mm512_extractf32x4_ps(all, 1),
                          _mm512_extractf32x4_ps(all, 2), _mm512_extractf32x4_ps(all, 3)};
  UNROLL
  for (int i = 0; i < R; i++) row[i] = rows[i];
}

#else

using Sum = __m256;
constexpr int64_t NEAR = 24 << 10;
constexpr int64_t BLOCK = 96 << 10;

Sum zero() { return _mm256_setzero_ps(); }

__m128 sums(Sum a, Sum b, Sum c, Sum d) {
  const Sum s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

float total(Sum s) { return _mm_cvtss_f32(sums(s, zero(), zero(), zero())); }

struct Float {
  using Element = float;
  static constexpr int64_t LANES = 8;
  static constexpr int ROWS = 2;  // three need every register there is, and compilers need one
  static Sum load(const float* p) { return _mm256_loadu_ps(p); }
  static Sum load(const float* p, int64_t count) {
    const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), number));
  }
  static Sum add(Sum s, Sum a, Sum b) { return _mm256_fmadd_ps(a, b, s); }
  static float widened(float v) { return v; }
  static __m128 widened(const float* p) { return _mm_loadu_ps(p); }
  static void store(float* p, __m128 v) { _mm_storeu_ps(p, v); }
  static void store(float* p, float v) { *p = v; }
};

template <int R>
void totals(const Sum (&sum)[R][COLUMNS], __m128 (&row)[R]) {
  UNROLL
  for (int i = 0; i < R; i++) row[i] = sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
}

#endif

template <typename Type>
struct Product {
  using Element = typename Type::Element;
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
      // The next weights come from memory while these are used.
      const char* ahead = reinterpret_cast<const char*>(weight + end * weight_stride);
      const char* enough = reinterpret_cast<const char*>(weight + std::min(end + wide, outputs) * weight_stride);
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

template <typename Type, typename Element = typename Type::Element>
void products(
    const Element* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const Element* const* weights, int64_t weight_stride, const Element* const* biases,
    Element* out, int64_t inputs, int64_t outputs, int64_t threads) {
  const int64_t pieces = (outputs + TASK - 1) / TASK;
  const int64_t block = std::max<int64_t>(24, BLOCK / (static_cast<int64_t>(sizeof(Element)) * inputs) / 12 * 12);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < groups * pieces; task++) {
    const int64_t group = task / pieces, first = task % pieces * TASK, stop = ends[group];
    const Product<Type> product{rows, weights[group], biases ? biases[group] : nullptr, out,
                                row_stride, weight_stride, outputs, inputs, outputs};
    for (int64_t r = group ? ends[group - 1] : 0; r < stop; r += block)
      product.columns(r, std::min(r + block, stop), first, std::min(first + TASK, outputs));
  }
}

}  // namespace

extern "C" void few_rows_float32(
    const float* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const float* const* weights, int64_t weight_stride, const float* const* biases,
    float* out, int64_t inputs, int64_t outputs, int64_t threads) {
  products<Float>(rows, row_stride, ends, groups, weights, weight_stride, biases, out, inputs, outputs, threads);
}

#ifdef MOECA_BFLOAT16
extern "C" void few_rows_bfloat16(
    const uint16_t* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const uint16_t* const* weights, int64_t weight_stride, const uint16_t* const* biases,
    uint16_t* out, int64_t inputs, int64_t outputs, int64_t threads) {
  products<Bfloat16>(rows, row_stride, ends, groups, weights, weight_stride, biases, out, inputs, outputs, threads);
}
#endif
