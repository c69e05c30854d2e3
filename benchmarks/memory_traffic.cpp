// One pass over a matrix of weights, its momentum and its gradient: any of SGD's update, scales and sums of squares.

#include <cstdint>
#include <vector>

namespace {

using Size = std::int64_t;

// m ← μ · (r · m · c) + g, w ← w − η · m; then w ← r · w · c; then squares of w to the sums of its row and its columns.
template <bool kUpdate, bool kPending, bool kScale, bool kSums>
void row(float* w, float* m, const float* g, Size columns, float r, const float* c, float* row_sum, float* column_sums) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (Size j = 0; j < columns; ++j) {
    float x = w[j];
    if (kUpdate) {
      const float velocity = 0.9f * (kPending ? m[j] * r * c[j] : m[j]) + g[j];
      m[j] = velocity;
      x -= 1e-6f * velocity;
    }
    if (kScale) x *= r * c[j];
    if (kUpdate || kScale) w[j] = x;
    if (kSums) sum += x * x;
    if (kSums) column_sums[j] += x * x;
  }
  *row_sum = sum;
}

template <bool kUpdate, bool kPending, bool kScale, bool kSums>
void pass(float* w, float* m, const float* g, Size rows, Size columns, const float* r, const float* c, float* row_sums,
          float* column_sums, int threads) {
  std::vector<float> partial(threads * columns);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (Size number = 0; number < threads; ++number) {
    float* const mine = partial.data() + number * columns;
    const Size first = rows * number / threads, last = rows * (number + 1) / threads;
    for (Size i = first; i < last; ++i)
      row<kUpdate, kPending, kScale, kSums>(w + i * columns, m + i * columns, g + i * columns, columns, r[i], c, row_sums + i,
                                            mine);
  }
  for (Size number = 0; kSums && number < threads; ++number)
    for (Size j = 0; j < columns; ++j) column_sums[j] += partial[number * columns + j];
}

}  // namespace

extern "C" void traffic(int update, int pending, int scaled, int sums, float* w, float* m, const float* g, Size rows, Size columns,
                        const float* r, const float* c, float* row_sums, float* column_sums, int threads) {
  const auto run = [&](auto function) { function(w, m, g, rows, columns, r, c, row_sums, column_sums, threads); };
  if (update && pending) return run(pass<true, true, false, true>);
  if (update) return sums ? run(pass<true, false, false, true>) : run(pass<true, false, false, false>);
  if (scaled) return sums ? run(pass<false, false, true, true>) : run(pass<false, false, true, false>);
  run(pass<false, false, false, true>);
}
