// Passes over a matrix as it lies in memory: sums of |w|^p along its sides, and products with a scale for each row and column.
//
// A matrix has `rows` rows of `columns` entries; each row starts `pitch` entries behind the one before. Rows are cut into
// chunks by the shape alone, and partial sums are joined in order: results do not depend on the number of threads.
//
// Two things decide the speed. Loads go to vectors of 32 bytes, several sums at a time, since one sum waits for itself. And
// long rows are taken eight together, so that the column scales are not read again from the second cache for each of them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using Size = std::int64_t;

constexpr Size kChunk = 1 << 15;        // entries of a chunk, about
constexpr Size kColumnChunk = 1 << 18;  // at most, where each has column sums of its own, …
constexpr Size kChunks = 64;            // … and how many chunks there are then
constexpr Size kLong = 2048;            // entries from which on rows are taken together

// Rows of a chunk.
inline Size chunk_of(Size entries, Size columns) { return std::max<Size>(8, entries / std::max<Size>(1, columns) / 8 * 8); }

// What runs a function on so many threads: GOMP_parallel of the OpenMP that the process has loaded, so that PyTorch's threads
// are used and nothing has to be linked; null for one thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel run_parallel = nullptr;

// Calls work(0), …, work(chunks - 1), in any order.
template <class F>
void for_each_chunk(Size chunks, int threads, const F& work) {
  struct Shared {
    const F& work;
    const Size chunks;
    std::atomic<Size> next;
  } shared{work, chunks, {0}};
  const auto take = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (Size number; (number = all.next.fetch_add(1)) < all.chunks;) all.work(number);
  };
  const Size needed = std::min<Size>(threads, chunks);
  needed > 1 && run_parallel ? run_parallel(take, &shared, static_cast<unsigned>(needed), 0) : take(&shared);
}

struct BFloat16 {
  std::uint16_t bits;
};

template <class A>
constexpr int kLanes = 32 / sizeof(A);

template <class A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};

template <class A>
using Vector = typename VectorOf<A, kLanes<A>>::type;

// ---------------------------------------------------------------------------------------------------- entries and vectors

// An entry of a tensor, and as many of them as a vector of A holds.
template <class T>
struct Entry {
  template <class A>
  static A get(const T* p) {
    return static_cast<A>(*p);
  }
  template <class A>
  static void put(T* p, A value) {
    *p = static_cast<T>(value);
  }
  template <class A>
  static Vector<A> load(const T* p) {
    typename VectorOf<T, kLanes<A>>::type v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Vector<A>);
  }
  template <class A>
  static void store(T* p, Vector<A> v) {
    const auto out = __builtin_convertvector(v, typename VectorOf<T, kLanes<A>>::type);
    std::memcpy(p, &out, sizeof out);
  }
};

template <>
struct Entry<BFloat16> {
  template <class A>
  static A get(const BFloat16* p) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<A>(value);
  }
  static void put(BFloat16* p, float value) {  // to the nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    p->bits = static_cast<std::uint16_t>(value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  template <class A>
  static Vector<A> load(const BFloat16* p) {
    typename VectorOf<std::uint16_t, kLanes<A>>::type half;
    std::memcpy(&half, p, sizeof half);
    const auto bits = __builtin_convertvector(half, typename VectorOf<std::uint32_t, kLanes<A>>::type) << 16;
    typename VectorOf<float, kLanes<A>>::type v;
    std::memcpy(&v, &bits, sizeof v);
    return __builtin_convertvector(v, Vector<A>);
  }
  template <class A>
  static void store(BFloat16* p, Vector<A> v) {
    const auto narrow = __builtin_convertvector(v, typename VectorOf<float, kLanes<A>>::type);
    typename VectorOf<std::uint32_t, kLanes<A>>::type bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    bits = narrow != narrow ? bits - bits + 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const auto half = __builtin_convertvector(bits, typename VectorOf<std::uint16_t, kLanes<A>>::type);
    std::memcpy(p, &half, sizeof half);
  }
};

template <class A>
Vector<A> load(const A* p) {
  return Entry<A>::template load<A>(p);
}

template <int P, class V>
inline V power(V x) {
  return P == 2 ? x * x : x < 0 ? -x : x;
}

template <class A>
inline A total(Vector<A> v) {
  A sum = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) sum += v[lane];
  return sum;
}

// ----------------------------------------------------------------------------------------------------------------------- sums

// K rows at a time, U vectors of each: row_sums[k] = Σ_j |w_kj|^P c_j, column_sums[j] += Σ_k |w_kj|^P r_k.
template <class T, class A, int P, bool kRows, bool kColumns, int K, int U>
inline void sum_rows(const T* w, Size pitch, Size columns, const A* r, const A* c, A* row_sums, A* column_sums) {
  constexpr int L = kLanes<A>;
  Vector<A> sums[K * U] = {};
  A rest[K] = {};
  Size j = 0;
  for (; j + U * L <= columns; j += U * L) {
    for (int u = 0; u < U; ++u) {
      Vector<A> column = kColumns ? load(column_sums + j + u * L) : Vector<A>{};
      const Vector<A> scale = kRows ? load(c + j + u * L) : Vector<A>{};
      for (int k = 0; k < K; ++k) {
        const Vector<A> energy = power<P>(Entry<T>::template load<A>(w + k * pitch + j + u * L));
        if (kRows) sums[k * U + u] += energy * scale;
        if (kColumns) column += energy * r[k];
      }
      if (kColumns) Entry<A>::template store<A>(column_sums + j + u * L, column);
    }
  }
  for (; j < columns; ++j) {
    for (int k = 0; k < K; ++k) {
      const A energy = power<P>(Entry<T>::template get<A>(w + k * pitch + j));
      if (kRows) rest[k] += energy * c[j];
      if (kColumns) column_sums[j] += energy * r[k];
    }
  }
  if (!kRows) return;
  for (int k = 0; k < K; ++k) {
    for (int u = 1; u < U; ++u) sums[k * U] += sums[k * U + u];
    row_sums[k] = total<A>(sums[k * U]) + rest[k];
  }
}

template <class T, class A, int P, bool kRows, bool kColumns>
void sum_sides(const T* w, Size rows, Size columns, Size pitch, const A* r, const A* c, A* row_sums, A* column_sums,
               int threads) {
  constexpr int kTogether = 8;
  const Size entries = kColumns ? std::max(kChunk, std::min(kColumnChunk, rows * columns / 8)) : kChunk;
  Size chunk = chunk_of(entries, columns);
  if (kColumns) chunk = std::max(chunk, ((rows + kChunks - 1) / kChunks + 7) / 8 * 8);
  const Size chunks = (rows + chunk - 1) / chunk;
  std::vector<A> partial(kColumns ? chunks * columns : 0);
  for_each_chunk(chunks, threads, [&](Size number) {
    A* const mine = kColumns ? partial.data() + number * columns : nullptr;
    const Size last = std::min(rows, (number + 1) * chunk);
    Size i = number * chunk;
    for (; columns >= kLong && i + kTogether <= last; i += kTogether)
      sum_rows<T, A, P, kRows, kColumns, kTogether, 1>(w + i * pitch, pitch, columns, r + i, c, row_sums + i, mine);
    for (; i < last; ++i)
      sum_rows<T, A, P, kRows, kColumns, 1, 4>(w + i * pitch, pitch, columns, r + i, c, row_sums + i, mine);
  });
  if (!kColumns) return;
  std::vector<double> sums(columns);
  for (Size number = 0; number < chunks; ++number)
    for (Size j = 0; j < columns; ++j) sums[j] += partial[number * columns + j];
  for (Size j = 0; j < columns; ++j) column_sums[j] = static_cast<A>(sums[j]);
}

template <class T, class A>
void sum(int p, const T* w, Size rows, Size columns, Size pitch, const A* r, const A* c, A* row_sums, A* column_sums,
         int threads) {
  const auto squares = !column_sums ? sum_sides<T, A, 2, true, false>
                       : !row_sums  ? sum_sides<T, A, 2, false, true>
                                    : sum_sides<T, A, 2, true, true>;
  const auto magnitudes = !column_sums ? sum_sides<T, A, 1, true, false>
                          : !row_sums  ? sum_sides<T, A, 1, false, true>
                                       : sum_sides<T, A, 1, true, true>;
  (p == 2 ? squares : magnitudes)(w, rows, columns, pitch, r, c, row_sums, column_sums, threads);
}

// ------------------------------------------------------------------------------------------------------------------- products

// w ← r · w · c; with a part of it that moves otherwise: w ← r · (w − part) · c + r' · part · c', part ← r' · part · c'.
template <class T, class A, bool kPart, int K>
inline void scale_rows(T* w, T* part, Size columns, const A* r, const A* c, const A* part_r, const A* part_c) {
  constexpr int L = kLanes<A>;
  Size j = 0;
  for (; j + L <= columns; j += L) {
    const Vector<A> column = load(c + j), part_column = kPart ? load(part_c + j) : Vector<A>{};
    for (int k = 0; k < K; ++k) {
      const Size at = k * columns + j;
      Vector<A> x = Entry<T>::template load<A>(w + at);
      if (kPart) {
        const Vector<A> y = Entry<T>::template load<A>(part + at), moved = y * part_r[k] * part_column;
        x = (x - y) * r[k] * column + moved;
        Entry<T>::template store<A>(part + at, moved);
      } else {
        x = x * r[k] * column;
      }
      Entry<T>::template store<A>(w + at, x);
    }
  }
  for (; j < columns; ++j) {
    for (int k = 0; k < K; ++k) {
      const Size at = k * columns + j;
      A x = Entry<T>::template get<A>(w + at);
      if (kPart) {
        const A y = Entry<T>::template get<A>(part + at), moved = y * part_r[k] * part_c[j];
        x = (x - y) * r[k] * c[j] + moved;
        Entry<T>::put(part + at, moved);
      } else {
        x = x * r[k] * c[j];
      }
      Entry<T>::put(w + at, x);
    }
  }
}

// A tensor that moves, perhaps with a part that moves otherwise, and the scales of rows and columns of both.
template <class T, class A>
struct Move {
  T *tensor, *part;
  Size rows, columns;
  const A *r, *c, *part_r, *part_c;
};

template <class T, class A, bool kPart>
void scale(const Move<T, A>& move, int threads) {
  constexpr int kTogether = kPart ? 2 : 4;
  const Size columns = move.columns, chunk = chunk_of(kChunk, columns), chunks = (move.rows + chunk - 1) / chunk;
  for_each_chunk(chunks, threads, [&](Size number) {
    const Size last = std::min(move.rows, (number + 1) * chunk);
    Size i = number * chunk;
    const auto at = [&](auto rows) {
      T* const part = kPart ? move.part + i * columns : nullptr;
      scale_rows<T, A, kPart, decltype(rows)::value>(move.tensor + i * columns, part, columns, move.r + i, move.c,
                                                     kPart ? move.part_r + i : nullptr, move.part_c);
      i += rows;
    };
    while (columns >= kLong && i + kTogether <= last) at(std::integral_constant<int, kTogether>{});
    while (i < last) at(std::integral_constant<int, 1>{});
  });
}

// part ← keep · part + add · w
template <class T, class A>
void follow(T* part, const T* w, Size entries, double keep, double add, int threads) {
  const A k = static_cast<A>(keep), a = static_cast<A>(add);
  const Size chunks = (entries + kChunk - 1) / kChunk;
  for_each_chunk(chunks, threads, [&](Size number) {
    const Size last = std::min(entries, (number + 1) * kChunk);
    Size i = number * kChunk;
    for (; i + kLanes<A> <= last; i += kLanes<A>) {
      const Vector<A> x = Entry<T>::template load<A>(part + i), y = Entry<T>::template load<A>(w + i);
      Entry<T>::template store<A>(part + i, k * x + a * y);
    }
    for (; i < last; ++i)
      Entry<T>::put(part + i, k * Entry<T>::template get<A>(part + i) + a * Entry<T>::template get<A>(w + i));
  });
}

}  // namespace
