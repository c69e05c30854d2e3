// Cycles of Algorithm 1 as recorded programs, and what Python calls.

#include "passes.hpp"

namespace {

// u^exponent of a scale class for every row or column.
struct Factor {
  const std::int32_t* ids;
  double exponent;

  double of(const double* u, Size i) const {
    const double value = u[ids[i]];
    return exponent == 1 ? value : exponent == -1 ? 1 / value : std::pow(value, exponent);
  }
};

// Where a family of scale classes meets a block of a weight.
struct Edge {
  Size tensor, first, rows, columns, pitch;  // the block: which weight, its first entry, its shape
  Size is_row, is_out, block;                // is the family along the rows? is its exponent negative? number of the block
  Size count;                                // of factors along that side, …
  const Factor* along;                       // … of which the first is the family's own
  Factor across;                             // along the other side; no ids where nothing moves it
};

struct Family {
  Size first, last;  // ids
  Size count;
  const Edge* edges;
  double step;  // 1 / (2 · p · stiffness)
};

struct Program {
  Size count;
  const Family* families;  // in the order of the sweep
  Size p, ids;
};

// Energies along one side of a block: Σ |w|^p times the factors across.
template <class T, class A>
void energies(const Edge& edge, int p, const T* const* tensors, const double* u, std::vector<A>& scales, std::vector<A>& sums,
              int threads) {
  const Size across = edge.is_row ? edge.columns : edge.rows;
  sums.resize(edge.is_row ? edge.rows : edge.columns);
  scales.assign(across, 1);
  if (edge.across.ids)
    for (Size j = 0; j < across; ++j) scales[j] = static_cast<A>(edge.across.of(u, j));
  sum<T, A>(p, tensors[edge.tensor] + edge.first, edge.rows, edge.columns, edge.pitch, edge.is_row ? nullptr : scales.data(),
            edge.is_row ? scales.data() : nullptr, edge.is_row ? sums.data() : nullptr, edge.is_row ? nullptr : sums.data(),
            threads);
}

// One sweep of coordinate steps z += log(out / into) / (2 · p · stiffness), family by family; u = exp(p · z) follows.
template <class T, class A>
void sweep(const Program& program, const T* const* tensors, const double* weights, double* z, double* u, int threads) {
  std::vector<double> into(program.ids), out(program.ids);
  std::vector<A> scales, sums;
  const int p = static_cast<int>(program.p);
  for (const Family* family = program.families; family != program.families + program.count; ++family) {
    std::fill(into.begin() + family->first, into.begin() + family->last, 0.0);
    std::fill(out.begin() + family->first, out.begin() + family->last, 0.0);
    for (const Edge* edge = family->edges; edge != family->edges + family->count; ++edge) {
      energies<T, A>(*edge, p, tensors, u, scales, sums, threads);
      std::vector<double>& totals = edge->is_out ? out : into;
      const double weight = weights[edge->block] * std::abs(edge->along->exponent);
      for (Size i = 0; i < static_cast<Size>(sums.size()); ++i) {
        double energy = weight * static_cast<double>(sums[i]);
        for (Size k = 0; k < edge->count; ++k) energy *= edge->along[k].of(u, i);
        totals[edge->along->ids[i]] += energy;
      }
    }
    for (Size id = family->first; id < family->last; ++id) {
      const double step = std::log(out[id] / into[id]) * family->step;
      if (std::isfinite(step)) u[id] = std::exp(p * (z[id] += step));  // channels without energy on one side stay
    }
  }
}

}  // namespace

// Type and Sum, of the entries and of sums and scales, are defined on the compiler's command line.
extern "C" {

void equinorm_sum(int p, const Type* w, Size rows, Size columns, Size pitch, const Sum* r, const Sum* c, Sum* row_sums,
                  Sum* column_sums, int threads) {
  sum<Type, Sum>(p, w, rows, columns, pitch, r, c, row_sums, column_sums, threads);
}

void equinorm_sweep(const Program* program, const Type* const* tensors, const double* weights, double* z, double* u, int threads) {
  sweep<Type, Sum>(*program, tensors, weights, z, u, threads);
}

// The whole energy of the block of each edge.
void equinorm_totals(const Edge* edges, Size count, int p, const Type* const* tensors, const double* u, double* totals, int threads) {
  std::vector<Sum> scales, sums;
  for (Size number = 0; number < count; ++number) {
    const Edge& edge = edges[number];
    energies<Type, Sum>(edge, p, tensors, u, scales, sums, threads);
    double total = 0;
    for (Size i = 0; i < static_cast<Size>(sums.size()); ++i) {
      double energy = static_cast<double>(sums[i]);
      for (Size k = 0; k < edge.count; ++k) energy *= edge.along[k].of(u, i);
      total += energy;
    }
    totals[edge.block] = total;
  }
}

void equinorm_scale(const Move<Type, Sum>* moves, Size count, int threads) {
  for (const auto* move = moves; move != moves + count; ++move) (move->part ? scale<Type, Sum, true> : scale<Type, Sum, false>)(*move, threads);
}

void equinorm_follow(Type* part, const Type* w, Size entries, double keep, double add, int threads) {
  follow<Type, Sum>(part, w, entries, keep, add, threads);
}
}
