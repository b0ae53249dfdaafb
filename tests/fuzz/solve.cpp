// Any bytes as the arguments of a solve: a program, its weights, tableau, times, steps. Whatever the checks let through
// runs forwards and backwards, in arrays of exactly the sizes that the op would give it; libFuzzer looks for paths
// through the checks and kernels, AddressSanitizer and UndefinedBehaviorSanitizer for accesses that are not theirs.
// tests/fuzz/run.sh builds and runs it; tests/fuzz/seeds.py writes programs to begin with.
//
// The bytes are numbers: one byte is -120 to 127, -128 is followed by eight bytes of an int64 or a double. They come in
// the order in which this file reads them.
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "../../csrc/cpu/dispatch.h"

namespace nodeshape {
int interruption = 0;
}

namespace {

using namespace nodeshape;

class Numbers {
 public:
  Numbers(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

  int64_t integer() {
    const int byte = next_ < end_ ? int8_t(*next_++) : 0;
    return byte == -128 ? wide<int64_t>() : byte;
  }
  double real() {
    const int byte = next_ < end_ ? int8_t(*next_++) : 0;
    return byte == -128 ? wide<double>() : double(byte);
  }
  /// Below `end`.
  int64_t choice(int64_t end) {
    const int64_t x = integer() % end;
    return x < 0 ? x + end : x;
  }

 private:
  template <class X>
  X wide() {
    X x{};
    const size_t there = std::min(sizeof x, size_t(end_ - next_));
    std::memcpy(&x, next_, there);
    next_ += there;
    return x;
  }

  const uint8_t* next_;
  const uint8_t* const end_;
};

/// A tensor and what it refers to.
template <class X>
struct Owned {
  Owned(Sizes sizes, ScalarType type) : count(0), tensor(sizes, type, nullptr) {
    int64_t elements = 1;
    for (int64_t size : sizes) elements *= size;
    count = elements;
    data = std::unique_ptr<X[]>(new X[size_t(elements)]());
    tensor = Tensor(std::move(sizes), type, data.get());
  }
  int64_t count;
  std::unique_ptr<X[]> data;
  Tensor tensor;
};

constexpr int64_t kMostElements = 1 << 12, kMostWork = 1 << 16;

template <class T>
constexpr ScalarType kType = sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double;

void serial(int64_t tasks, void (*task)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < tasks; ++i) task(i, context);
}

/// Values that neither vanish nor grow in a few steps.
template <class T>
void fill(T* x, int64_t count, int64_t seed) {
  for (int64_t i = 0; i < count; ++i) x[i] = T(0.1) * T(std::sin(double(i * 7 + seed)));
}

template <class T>
void solve(Numbers& numbers) {
  const int64_t adjoint = numbers.integer(), kept_per_step = numbers.integer(), checkpoint_every = numbers.integer(),
                iterations = numbers.integer();
  const double tolerance = numbers.real(), drift = numbers.real();

  Owned<double> t({numbers.choice(5)}, ScalarType::Double);
  for (int64_t i = 0; i < t.count; ++i) t.data[size_t(i)] = numbers.real();
  std::vector<int64_t> steps(static_cast<size_t>(numbers.choice(5)));
  int64_t total = 0;
  for (int64_t& count : steps) {
    count = numbers.integer();
    total += count > 0 && count < 1000 ? count : 1000;
  }
  Sizes shape(static_cast<size_t>(numbers.choice(6)));
  int64_t elements = 1;
  for (int64_t& size : shape) {
    size = numbers.integer();
    if (size < 0 || size > kMostElements || (elements *= std::max<int64_t>(size, 1)) > kMostElements) return;
  }
  Owned<T> y0(shape, kType<T>);
  fill(y0.data.get(), y0.count, 1);

  const int64_t stages = 1 + numbers.choice(18);
  Owned<double> tableau({stages + 2, stages}, ScalarType::Double);
  for (int64_t i = 0; i < tableau.count; ++i) tableau.data[size_t(i)] = numbers.real();

  std::vector<Owned<T>> weights;
  std::vector<Tensor> given;
  const int64_t weight_count = numbers.choice(24);
  weights.reserve(size_t(weight_count));
  int64_t parameters = 0;
  for (int64_t k = 0; k < weight_count; ++k) {
    const int64_t size = numbers.integer();
    if (size < 0 || size > kMostElements || (parameters += size) > kMostElements) return;
    weights.emplace_back(Sizes{size}, kType<T>);
    fill(weights.back().data.get(), size, k);
    given.push_back(weights.back().tensor);
  }
  Owned<double> constants({numbers.choice(100)}, ScalarType::Double);
  for (int64_t i = 0; i < constants.count; ++i) constants.data[size_t(i)] = numbers.real();
  Owned<int64_t> code({numbers.choice(1200)}, ScalarType::Long);
  for (int64_t i = 0; i < code.count; ++i) code.data[size_t(i)] = numbers.integer();

  const Common common =
      common_of("solve", t.tensor, steps, tableau.tensor, tolerance, iterations, adjoint, checkpoint_every, drift);
  common.check_arguments(y0.tensor, kLargestSample);
  const ProgramOwner owner(common, y0.tensor, {given, code.tensor, constants.tensor, tableau.tensor}, kept_per_step);
  const Program& program = owner.model().program;
  const int64_t samples = y0.tensor.size(0);
  if (std::max({program.kept, program.brief, program.cotangents, program.scratch}) > kMostElements ||
      double(total) * double(iterations > 20 ? 20 : iterations) * double(samples) * program.operations >
          double(kMostWork))
    return;
  if (iterations > 1000) return;

  const Grid grid = common.grid();
  const Executor executor{1, serial};
  const int64_t taped = tapes<T>(owner, common, samples, kept_per_step);
  int64_t rows = 1;
  if (taped > kMostElements * 64) return;
  for (int64_t size : taped > 0 ? Sizes{taped} : owner.stored(common, y0.tensor)) {
    if (size > kMostElements * 64 || (rows *= size) > kMostElements * 64) return;
  }
  Owned<T> ys({grid.count * y0.count}, kType<T>), stored({rows}, kType<T>), grad_y0({y0.count}, kType<T>);
  Owned<int64_t> evaluations({samples}, ScalarType::Long);
  Owned<double> residual({samples}, ScalarType::Double), grad_t({grid.count}, ScalarType::Double);
  std::vector<Failure> failures(static_cast<size_t>(samples));
  const int64_t store = taped > 0 ? kStoreTapes : common.store();
  dispatch_forward<T>(owner,
                      {grid, common.stage(), samples, store, y0.data.get(), ys.data.get(), stored.data.get(),
                       evaluations.data.get(), residual.data.get(), failures.data()},
                      executor);
  check_failures(first_failures(failures.data(), samples, false), samples, common.tolerance, common.drift_tolerance);
  if (common.adjoint == kNone) return;

  const Adjoint mode = common.adjoint == kDiscrete     ? Adjoint::discrete
                       : common.adjoint == kReversible ? Adjoint::reversible
                                                       : Adjoint::continuous;
  Owned<T> grad_ys({grid.count * y0.count}, kType<T>), grad_parameters({program.parameters()}, kType<T>);
  fill(grad_ys.data.get(), grad_ys.count, 3);
  dispatch_backward<T>(owner,
                       {grid, common.stage(), samples, mode, store, common.drift_tolerance, grad_ys.data.get(),
                        ys.data.get(), stored.data.get(), grad_y0.data.get(), grad_t.data.get(),
                        grad_parameters.data.get(), evaluations.data.get(), failures.data()},
                       executor);
  check_failures(first_failures(failures.data(), samples, true), samples, common.tolerance, common.drift_tolerance);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Numbers numbers(data, size);
  try {
    if (numbers.choice(2) == 0)
      solve<float>(numbers);
    else
      solve<double>(numbers);
  } catch (const std::runtime_error&) {  // what an op tells
  }
  return 0;
}
