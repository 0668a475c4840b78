// What the kernels compute with: a vector of floats, and elements that are read into one.
// native.py puts it before a kernel's file and defines MOECA_AVX512, MOECA_BFLOAT16 as asked for.
#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr int64_t COLUMNS = 4;  // outputs a tile: their sums leave it as one vector of four
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
constexpr int64_t FLOATS = 16;        // of such a vector
constexpr int WIDE = 4;               // vectors a tile of `multiply`
constexpr int64_t PANEL = WIDE * FLOATS;

Sum zero() { return _mm512_setzero_ps(); }

Sum all_of(float v) { return _mm512_set1_ps(v); }

Sum times(Sum a, Sum b) { return _mm512_mul_ps(a, b); }

Sum plus_product(Sum s, Sum a, Sum b) { return _mm512_fmadd_ps(a, b, s); }

float total(Sum s) { return _mm512_reduce_add_ps(s); }

// b where one of them is no number.
Sum larger(Sum a, Sum b) { return _mm512_max_ps(a, b); }

float largest(Sum s) { return _mm512_reduce_max_ps(s); }

// e to the power of x <= 0, to 1e-7 of it; 0 from some -104 on (Cephes: range reduction, polynomial).
Sum exponential(Sum x) {
  const Sum bounded = larger(all_of(-110.0f), x);
  const Sum n = _mm512_roundscale_ps(times(bounded, all_of(1.44269504f)), 0);
  const Sum r = _mm512_fnmadd_ps(n, all_of(-2.12194440e-4f), _mm512_fnmadd_ps(n, all_of(0.693359375f), bounded));
  Sum p = all_of(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = plus_product(all_of(c), p, r);
  return _mm512_scalef_ps(plus_product(plus_product(all_of(1.0f), r, all_of(1.0f)), times(p, r), r), n);
}

// The first `count` of a, else b.
Sum first(int64_t count, Sum a, Sum b) { return _mm512_mask_blend_ps((1u << count) - 1, b, a); }

// Rows become columns.
void turn(Sum (&s)[16]) {
  Sum t[16];
  UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(s[i], s[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(s[i], s[i + 1]);
  }
  UNROLL
  for (int i = 0; i < 16; i++) {  // column i % 4 of every four, of rows i / 4 * 4 and the next three
    const int from = i / 4 * 4 + i % 4 / 2;
    const __m512d a = _mm512_castps_pd(t[from]), b = _mm512_castps_pd(t[from + 2]);
    s[i] = _mm512_castpd_ps(i % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
  }
  UNROLL
  for (int i = 0; i < 4; i++) {
    const Sum a = _mm512_shuffle_f32x4(s[i], s[4 + i], 0x88), b = _mm512_shuffle_f32x4(s[i], s[4 + i], 0xdd);
    const Sum c = _mm512_shuffle_f32x4(s[8 + i], s[12 + i], 0x88), d = _mm512_shuffle_f32x4(s[8 + i], s[12 + i], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  UNROLL
  for (int i = 0; i < 16; i++) s[i] = t[i];
}

struct Float {
  using Element = float;
  static constexpr int64_t LANES = 16;  // elements a vector
  static constexpr int ROWS = 4;        // rows a tile
  static Sum load(const float* p) { return _mm512_loadu_ps(p); }
  static Sum load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps((1u << count) - 1, p); }
  static Sum add(Sum s, Sum a, Sum b) { return plus_product(s, a, b); }
  // Floats of elements, and back; all or the first `count`.
  static Sum floats(const float* p) { return load(p); }
  static Sum floats(const float* p, int64_t count) { return load(p, count); }
  static void store(float* p, Sum v) { _mm512_storeu_ps(p, v); }
  static void store(float* p, Sum v, int64_t count) { _mm512_mask_storeu_ps(p, (1u << count) - 1, v); }
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
  static Sum floats(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
  static Sum floats(const uint16_t* p) { return floats(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Sum floats(const uint16_t* p, int64_t count) { return floats(_mm256_maskz_loadu_epi16((1u << count) - 1, p)); }
  static void store(uint16_t* p, Sum v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void store(uint16_t* p, Sum v, int64_t count) {
    _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)_mm512_cvtneps_pbh(v));
  }
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

// Up to PANEL rows of units, `stride` apart, side by side in `to`: [units, PANEL]. ask(at): once for
// every vector, by its place behind `rows`.
template <typename Ask>
[[gnu::always_inline]] inline void lay_out(
    const float* rows, int64_t stride, int64_t count, int64_t units, float* to, const Ask& ask) {
  for (int64_t i = 0; i < count; i += FLOATS)
    for (int64_t u = 0; u < units; u += FLOATS) {
      Sum part[FLOATS];
      UNROLL
      for (int j = 0; j < FLOATS; j++) {
        const int64_t at = (i + j) * stride + u;
        ask(at);
        part[j] = i + j < count ? Float::load(rows + at, std::min(FLOATS, units - u)) : zero();
      }
      turn(part);
      UNROLL
      for (int j = 0; j < FLOATS; j++)
        if (u + j < units) Float::store(to + (u + j) * PANEL + i, part[j]);
    }
}

// One step of a sum of products: a number of the left, a vector of the right.
struct ByFloat {
  static Sum all_of(const float* p) { return ::all_of(*p); }
  static Sum load(const float* p) { return Float::load(p); }
  static Sum add(Sum s, Sum a, Sum b) { return plus_product(s, a, b); }
};

// Puts the vectors of step n of a sum of products into registers: those at b + n * stride, all of them
// or, of a last one, as much as `where` says.
template <typename By, typename Right, typename... Where>
auto from(const Right* b, int64_t stride, Where... where) {
  return [=](int64_t n, auto& right) __attribute__((always_inline)) {
    UNROLL
    for (size_t j = 0; j < std::size(right); j++) right[j] = keep(By::load(b + n * stride + j * FLOATS, where...));
  };
}

// sum[i][j] of a[i][n] times the vectors that fetch(n, right) puts into right[j], over n.
template <typename By, int R, int C, typename Fetch>
[[gnu::always_inline]] inline void multiply(
    Sum (&sum)[R][C], int64_t count, const float* a, int64_t a_stride, const Fetch& fetch) {
  UNROLL
  for (int i = 0; i < R; i++)
    UNROLL
    for (int j = 0; j < C; j++) sum[i][j] = zero();
  for (int64_t n = 0; n < count; n++) {
    Sum right[C];
    fetch(n, right);
    UNROLL
    for (int i = 0; i < R; i++) {
      const Sum left = keep(By::all_of(a + i * a_stride + n));
      UNROLL
      for (int j = 0; j < C; j++) sum[i][j] = By::add(sum[i][j], left, right[j]);
    }
  }
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

#ifdef MOECA_BFLOAT16
using Type = Bfloat16;
#else
using Type = Float;
#endif
using Element = Type::Element;

#ifdef MOECA_AVX512
constexpr int64_t PER_UNIT = sizeof(float) / sizeof(Element);  // elements in 32 bits

// One step of a sum over 32 bits of both sides, one float or two bfloat16.
struct ByUnit : ByFloat {
  static Sum add(Sum s, Sum a, Sum b) {
    if constexpr (PER_UNIT == 1) return plus_product(s, a, b);
    else return Type::add(s, (decltype(Type::load(nullptr)))a, (decltype(Type::load(nullptr)))b);
  }
};
#endif

}  // namespace
