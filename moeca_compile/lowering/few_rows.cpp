// Products of few rows with weights [O, I] as they lie in memory, nothing packed.
#include <immintrin.h>
#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t LANES = 8;    // floats a vector
constexpr int64_t COLUMNS = 4;  // outputs a tile: their sums leave it as one vector of four
constexpr int64_t TASK = 64;    // outputs a thread takes at once
constexpr int64_t LINE = 16;    // floats that are written to memory at once
constexpr int64_t NEAR = 24 << 10;  // bytes of weights that stay in the first cache
constexpr int64_t BLOCK = 96 << 10;  // bytes of rows that stay in the second one

__m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

__m256i tail_mask(int64_t rest) {
  const __m256i number = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rest)), number);
}

struct Product {
  const float* rows;
  const float* weight;
  const float* bias;
  float* out;
  int64_t row_stride, weight_stride, out_stride, inputs, outputs;

  template <int R, int C>
  void tile(int64_t r, int64_t o) const {
    const float* x = rows + r * row_stride;
    const float* w = weight + o * weight_stride;
    __m256 sum[R][C];
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++) sum[i][j] = _mm256_setzero_ps();
    int64_t k = 0;
    for (; k + LANES <= inputs; k += LANES) {
      __m256 a[R];
      for (int i = 0; i < R; i++) a[i] = _mm256_loadu_ps(x + i * row_stride + k);
      for (int j = 0; j < C; j++) {
        const __m256 b = _mm256_loadu_ps(w + j * weight_stride + k);
        for (int i = 0; i < R; i++) sum[i][j] = _mm256_fmadd_ps(a[i], b, sum[i][j]);
      }
    }
    if (k < inputs) {
      const __m256i mask = tail_mask(inputs - k);
      for (int j = 0; j < C; j++) {
        const __m256 b = _mm256_maskload_ps(w + j * weight_stride + k, mask);
        for (int i = 0; i < R; i++) {
          const __m256 a = _mm256_maskload_ps(x + i * row_stride + k, mask);
          sum[i][j] = _mm256_fmadd_ps(a, b, sum[i][j]);
        }
      }
    }
    for (int i = 0; i < R; i++) {
      float* to = out + (r + i) * out_stride + o;
      if constexpr (C == COLUMNS) {
        __m128 s = sums(sum[i][0], sum[i][1], sum[i][2], sum[i][3]);
        if (bias) s = _mm_add_ps(s, _mm_loadu_ps(bias + o));
        _mm_storeu_ps(to, s);
      } else {
        const __m256 zero = _mm256_setzero_ps();
        const float s = _mm_cvtss_f32(sums(sum[i][0], zero, zero, zero));
        *to = bias ? s + bias[o] : s;
      }
    }
  }

  template <int R>
  void across(int64_t r, int64_t o, int64_t end) const {
    for (; o + COLUMNS <= end; o += COLUMNS) tile<R, COLUMNS>(r, o);
    for (; o < end; o++) tile<R, 1>(r, o);
  }

  // Outputs [first, last) of rows [r, stop).
  void columns(int64_t r, int64_t stop, int64_t first, int64_t last) const {
    const int64_t wide = std::clamp<int64_t>(NEAR / (4 * inputs) / COLUMNS * COLUMNS, COLUMNS, LINE);
    const int64_t tiles = (stop - r + 2) / 3;
    for (int64_t o = first; o < last; o += wide) {
      const int64_t end = std::min(o + wide, last);
      // The next weights come from memory while these are used.
      const char* ahead = reinterpret_cast<const char*>(weight + end * weight_stride);
      const char* enough = reinterpret_cast<const char*>(weight + std::min(end + wide, outputs) * weight_stride);
      const int64_t step = ((enough - ahead) / tiles + 63) / 64 * 64;
      for (int64_t i = r; i < stop;) {
        for (const char* to = std::min(ahead + step, enough); ahead < to; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T0);
        const int64_t left = stop - i;
        // Four rows are two and two: a tile of one row costs almost as much as one of two.
        if (left == 1) across<1>(i, o, end), i += 1;
        else if (left == 2 || left == 4) across<2>(i, o, end), i += 2;
        else across<3>(i, o, end), i += 3;
      }
    }
  }
};

}  // namespace

extern "C" void few_rows(
    const float* rows, int64_t row_stride, const int64_t* ends, int64_t groups,
    const float* const* weights, int64_t weight_stride, const float* const* biases,
    float* out, int64_t inputs, int64_t outputs, int64_t threads) {
  const int64_t pieces = (outputs + TASK - 1) / TASK;
  const int64_t block = std::max<int64_t>(24, BLOCK / (4 * inputs) / 12 * 12);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < groups * pieces; task++) {
    const int64_t group = task / pieces, first = task % pieces * TASK, stop = ends[group];
    const Product product{rows, weights[group], biases ? biases[group] : nullptr, out,
                          row_stride, weight_stride, outputs, inputs, outputs};
    for (int64_t r = group ? ends[group - 1] : 0; r < stop; r += block)
      product.columns(r, std::min(r + block, stop), first, std::min(first + TASK, outputs));
  }
}
