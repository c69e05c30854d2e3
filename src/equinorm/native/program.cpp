// Largest entries, cycles as recorded programs, and what Python calls.

#include <limits>

#include "passes.hpp"

namespace {

// Scale classes of every row or every column: each energy is multiplied by u^exponent, u = exp(p · z) of its class.
struct Factor {
  const std::int32_t* ids;
  double exponent;
  Size family;

  double of(const double* u, Size i) const { return raised(u[ids[i]]); }
  double raised(double value) const { return exponent == 1 ? value : exponent == -1 ? 1 / value : std::pow(value, exponent); }
};

// One side of a block.
struct Line {
  Size size, count;
  const Factor* factors;
  double* base;  // sums along it at the start of a cycle, without its own factors
};

// A matrix whose rows and columns scale, or a list of terms, one for each row, with several factors.
struct Block {
  Size tensor, first, pitch;  // which weight, its first entry, entries from one row to the next
  Line lines[2];              // rows, columns
};

// Where a family meets a block: through a factor of one of its lines.
struct Edge {
  Size block, line, factor;
};

struct Family {
  Size first, last;  // ids
  Size count;
  const Edge* edges;
  double step;  // by which log(out / into) is multiplied
};

struct Program {
  Size blocks, families;
  const Block* block;
  const Family* family;
  const Size* order;  // of families in a sweep
  Size p, ids, newton_steps;
  double longest_step;
};

template <class T, class A>
class Cycle {
 public:
  Cycle(const Program& program, const T* const* tensors, const double* weights, double* z, double* u, int threads)
      : program_(program), tensors_(tensors), weights_(weights), z_(z), u_(u), threads_(threads),
        shift_(program.families), has_moved_(program.families, true), is_live_(program.families), into_(program.ids),
        out_(program.ids) {}

  // Minimise over one scalar for each family, by Newton steps. Families with a channel without energy on one side stay.
  void level() {
    const Size n = program_.families;
    std::vector<double> shares(program_.blocks), logs(program_.blocks), exponents(program_.blocks * n), hessian(n * n), step(n);
    for (Size b = 0; b < program_.blocks; ++b) logs[b] = std::log(weights_[b] * read(program_.block[b]));
    std::fill(shift_.begin(), shift_.end(), 0.0);
    std::fill(has_moved_.begin(), has_moved_.end(), false);
    for (Size f = 0; f < n; ++f) is_live_[f] = has_energy(program_.family[f]);
    for (Size b = 0; b < program_.blocks; ++b)
      for (const Line& line : program_.block[b].lines)
        for (Size k = 0; k < line.count; ++k) {
          const Size family = line.factors[k].family;
          if (family >= 0 && is_live_[family]) exponents[b * n + family] += program_.p * line.factors[k].exponent;
        }
    for (Size number = 0; number < program_.newton_steps; ++number) newton(logs, exponents, shares, hessian, step);
    for (Size f = 0; f < n; ++f)
      for (Size id = program_.family[f].first; id < program_.family[f].last; ++id) move(id, shift_[f]);
  }

  // Coordinate steps z += log(out / into) · step, family by family.
  void sweep() {
    for (Size number = 0; number < program_.families; ++number) {
      const Family& family = program_.family[program_.order[number]];
      gather(family);
      for (Size id = family.first; id < family.last; ++id) {
        const double step = std::log(out_[id] / into_[id]) * family.step;
        if (std::isfinite(step)) move(id, step);  // channels without energy on one side stay
      }
      has_moved_[program_.order[number]] = true;
    }
  }

 private:
  // The energies into and out of the channels of a family.
  void gather(const Family& family) {
    std::fill(into_.begin() + family.first, into_.begin() + family.last, 0.0);
    std::fill(out_.begin() + family.first, out_.begin() + family.last, 0.0);
    for (Size e = 0; e < family.count; ++e) add(family.edges[e]);
  }

  // Has each channel of a family some on both sides?
  bool has_energy(const Family& family) {
    gather(family);
    for (Size id = family.first; id < family.last; ++id)
      if (!(into_[id] > 0 && out_[id] > 0)) return false;
    return true;
  }

  void move(Size id, double step) {
    z_[id] += step;
    u_[id] = std::exp(program_.p * z_[id]);
  }

  // Adds the energy of each channel along one side of a block: from the last reading, if the other moved as a whole since.
  void add(const Edge& edge) {
    const Block& block = program_.block[edge.block];
    const Line &line = block.lines[edge.line], &other = block.lines[1 - edge.line];
    const Factor& own = line.factors[edge.factor];
    const double weight = weights_[edge.block] * std::abs(own.exponent);
    bool is_known = line.base != nullptr;
    double scale = 1;
    for (Size k = 0; k < other.count; ++k) {
      const Size family = other.factors[k].family;
      is_known = is_known && !has_moved_[family];
      scale *= is_known ? other.factors[k].raised(std::exp(program_.p * shift_[family])) : 1;
    }
    if (!is_known) {
      spread(other, edge.line ? rows_ : columns_);
      sums_[edge.line].resize(line.size);
      pass(block, edge.line == 0, edge.line == 1);
    }
    std::vector<double>& totals = own.exponent < 0 ? out_ : into_;
    for (Size i = 0; i < line.size; ++i) {
      const double energy = is_known ? scale * line.base[i] : static_cast<double>(sums_[edge.line][i]);
      totals[own.ids[i]] += weight * along(line, i) * energy;
    }
  }

  // Sums along both sides, which are kept; the whole energy.
  double read(const Block& block) {
    for (int side = 0; side < 2; ++side) {
      spread(block.lines[side], side ? columns_ : rows_);
      sums_[side].resize(block.lines[side].size);
    }
    pass(block, block.lines[0].base, block.lines[1].base);
    double total = 0;
    const int counted = block.lines[0].base ? 0 : 1;
    for (int side = 0; side < 2; ++side)
      for (Size i = 0; block.lines[side].base && i < block.lines[side].size; ++i) {
        block.lines[side].base[i] = static_cast<double>(sums_[side][i]);
        if (side == counted) total += block.lines[side].base[i] * along(block.lines[side], i);
      }
    return total;
  }

  void pass(const Block& block, bool with_rows, bool with_columns) {
    A *const row_sums = with_rows ? sums_[0].data() : nullptr, *const column_sums = with_columns ? sums_[1].data() : nullptr;
    sum<T, A>(static_cast<int>(program_.p), tensors_[block.tensor] + block.first, block.lines[0].size, block.lines[1].size,
              block.pitch, rows_.data(), columns_.data(), row_sums, column_sums, threads_);
  }

  double along(const Line& line, Size i) const {
    double product = 1;
    for (Size k = 0; k < line.count; ++k) product *= line.factors[k].of(u_, i);
    return product;
  }

  void spread(const Line& line, std::vector<A>& scales) const {
    scales.resize(line.size);
    for (Size i = 0; i < line.size; ++i) scales[i] = static_cast<A>(along(line, i));
  }

  // shift −= H⁻¹ g of log Σ exp(logs + exponents · shift).
  void newton(const std::vector<double>& logs, const std::vector<double>& exponents, std::vector<double>& shares,
              std::vector<double>& hessian, std::vector<double>& step) {
    const Size n = program_.families;
    for (Size b = 0; b < program_.blocks; ++b) {
      shares[b] = logs[b];
      for (Size f = 0; f < n; ++f) shares[b] += exponents[b * n + f] * shift_[f];
    }
    const double top = *std::max_element(shares.begin(), shares.end());
    double whole = 0, diagonal = 0;
    for (double& share : shares) whole += share = std::exp(share - top);
    std::fill(hessian.begin(), hessian.end(), 0.0);
    std::fill(step.begin(), step.end(), 0.0);
    for (Size b = 0; b < program_.blocks; ++b)
      for (Size f = 0; f < n; ++f) {
        const double exponent = exponents[b * n + f], share = shares[b] / whole * exponent;
        if (exponent == 0) continue;
        step[f] += share;
        diagonal += share * exponent / n;
        for (Size g = 0; g < n; ++g) hessian[f * n + g] += share * exponents[b * n + g];
      }
    for (Size f = 0; f < n; ++f) hessian[f * n + f] += 1e-10 * diagonal;
    solve(hessian, step, n);
    double longest = program_.longest_step;
    for (double value : step) longest = std::max(longest, std::abs(value));
    for (Size f = 0; f < n; ++f) {
      const double move = step[f] * (program_.longest_step / longest);
      if (std::isfinite(move)) shift_[f] -= move;
    }
  }

  // x ← H⁻¹ x for a positive definite H, which is overwritten by its Cholesky factor.
  static void solve(std::vector<double>& h, std::vector<double>& x, Size n) {
    for (Size i = 0; i < n; ++i)
      for (Size j = 0; j <= i; ++j) {
        double sum = h[i * n + j];
        for (Size k = 0; k < j; ++k) sum -= h[i * n + k] * h[j * n + k];
        h[i * n + j] = i == j ? std::sqrt(sum) : sum / h[j * n + j];
      }
    for (Size i = 0; i < n; ++i) {
      for (Size k = 0; k < i; ++k) x[i] -= h[i * n + k] * x[k];
      x[i] /= h[i * n + i];
    }
    for (Size i = n - 1; i >= 0; --i) {
      for (Size k = i + 1; k < n; ++k) x[i] -= h[k * n + i] * x[k];
      x[i] /= h[i * n + i];
    }
  }

  const Program& program_;
  const T* const* tensors_;
  const double* weights_;
  double *z_, *u_;
  int threads_;
  std::vector<double> shift_;    // of each family in the last leveling, …
  std::vector<bool> has_moved_;  // … and whether its channels have moved by themselves since
  std::vector<bool> is_live_;    // does the last leveling move it?
  std::vector<double> into_, out_;
  std::vector<A> rows_, columns_, sums_[2];
};

// out_j = max_i |w_ij|. Magnitudes are ordered as their bits are, NaN above all, so that NaN is not lost.
template <class T>
void largest(const T* w, Size rows, Size columns, T* out, int threads) {
  using Bits = std::conditional_t<sizeof(T) == 2, std::int16_t, std::conditional_t<sizeof(T) == 4, std::int32_t, Size>>;
  typedef Bits Memory __attribute__((may_alias));
  constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();
  constexpr int kTogether = 4;
  const Size chunk = chunk_of(kColumnChunk, columns), chunks = (rows + chunk - 1) / chunk;
  std::vector<Bits> partial(chunks * columns);
  for_each_chunk(chunks, threads, [&](Size number) {
    Bits* const best = partial.data() + number * columns;
    const Size last = std::min(rows, (number + 1) * chunk);
    for (Size i = number * chunk; i < last; i += kTogether) {
      const Memory* row[kTogether];
      for (Size k = 0; k < kTogether; ++k) row[k] = reinterpret_cast<const Memory*>(w) + std::min(i + k, last - 1) * columns;
      for (Size j = 0; j < columns; ++j)
        for (int k = 0; k < kTogether; ++k) best[j] = std::max<Bits>(best[j], row[k][j] & kMagnitude);
    }
  });
  for (Size number = 1; number < chunks; ++number)
    for (Size j = 0; j < columns; ++j) partial[j] = std::max(partial[j], partial[number * columns + j]);
  std::memcpy(out, partial.data(), columns * sizeof(T));
}

}  // namespace

// Type and Sum, of the entries and of sums and scales, are defined on the compiler's command line.
extern "C" {

void equinorm_use_threads(Parallel parallel) { run_parallel = parallel; }

void equinorm_sum(int p, const Type* w, Size rows, Size columns, Size pitch, const Sum* r, const Sum* c, Sum* row_sums,
                  Sum* column_sums, int threads) {
  sum<Type, Sum>(p, w, rows, columns, pitch, r, c, row_sums, column_sums, threads);
}

void equinorm_largest(const Type* w, Size rows, Size columns, Type* out, int threads) {
  largest<Type>(w, rows, columns, out, threads);
}

void equinorm_cycle(const Program* program, const Type* const* tensors, const double* weights, double* z, double* u, int cycles,
                    int levels, int threads) {
  Cycle<Type, Sum> cycle(*program, tensors, weights, z, u, threads);
  for (int number = 0; number < cycles; ++number) {
    if (levels) cycle.level();
    cycle.sweep();
  }
}

void equinorm_scale(const Move<Type, Sum>* moves, Size count, int threads) {
  for (const auto* move = moves; move != moves + count; ++move)
    move->part ? scale<Type, Sum, true>(*move, threads) : scale<Type, Sum, false>(*move, threads);
}

void equinorm_follow(Type* part, const Type* w, Size entries, double keep, double add, int threads) {
  follow<Type, Sum>(part, w, entries, keep, add, threads);
}
}
