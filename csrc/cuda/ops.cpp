// The ops on CUDA.
//
// Nothing here waits for the device. A sample that fails gives NaN from there on, and leaves a report in host memory
// that the next op to run finds and raises (raise_failures() does nothing else).
#include "device.h"

namespace nodeshape {
namespace {

void raise_failures() { reports.raise(); }

struct Cuda {
  /// Kernels count the elements of a sample in int.
  static constexpr int64_t kLargestSample = std::numeric_limits<int>::max();

  static void check(const Common& common, const char*, const Tensor& y0) {
    NODESHAPE_CHECK(Device::has(y0), common.op, "y0 must be on a CUDA device");
    reports.raise();
  }

  template <class T>
  static SolveResult run(const Common& common, const ProgramOwner& owner, const Tensor& y0,
                         int64_t /*kept_per_step, which the shape of `stages` follows from*/) {
    const Sizes stored = owner.stored(common, y0);
    return owner.conv() != nullptr ? nodeshape::run<T>(common, *owner.conv(), stored, y0)
                                   : nodeshape::run<T>(common, owner.model(), stored, y0);
  }

  template <class T>
  static GradientResult run_backward(const Common& common, const ProgramOwner& owner, const Tensor& y0,
                                     const BackwardArguments& arguments, int64_t) {
    owner.check_backward(common, y0, arguments, owner.stored(common, y0));
    return owner.conv() != nullptr ? nodeshape::run_backward<T>(common, *owner.conv(), owner.tensors(), y0, arguments)
                                   : nodeshape::run_backward<T>(common, owner.model(), owner.tensors(), y0, arguments);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nodeshape, m) { m.def("raise_failures() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CompositeExplicitAutograd, m) {
  m.impl("raise_failures", TORCH_BOX(&raise_failures));
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, NODESHAPE_DISPATCH_KEY, m) {
  m.impl("solve", TORCH_BOX(&solve<Cuda>));
  m.impl("solve_backward", TORCH_BOX(&solve_backward<Cuda>));
}

}  // namespace nodeshape
