// The ops on CUDA.
//
// Nothing here waits for the device. A sample that fails gives NaN from there on, and leaves a report in host memory
// that the next op to run finds and raises (raise_failures() does nothing else).
#include "device.h"

namespace nodeshape {
namespace {

void raise_failures() { reports.raise(); }

struct Cuda {
  /// Kernels count the elements of a map in int.
  static constexpr int64_t kLargestSample = std::numeric_limits<int>::max();

  static void check(const Common& common, const Tensor& y0) {
    NODESHAPE_CHECK(Device::has(y0), common.op, "y0 must be on a CUDA device");
    reports.raise();
  }

  template <class Model>
  static SolveResult solve(const Common& common, const Owner<Model>& owner, const Tensor& y0) {
    return y0.scalar_type() == ScalarType::Float ? run<float>(common, owner.model, stored_sizes(common, y0), y0)
                                                 : run<double>(common, owner.model, stored_sizes(common, y0), y0);
  }

  template <class Model>
  static GradientResult solve_backward(const Common& common, const Owner<Model>& owner, const Tensor& y0,
                                       const BackwardArguments& arguments) {
    check_backward(common, y0, arguments);
    return y0.scalar_type() == ScalarType::Float
               ? run_backward<float>(common, owner.model, owner.tensors, y0, arguments)
               : run_backward<double>(common, owner.model, owner.tensors, y0, arguments);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(nodeshape, m) { m.def("raise_failures() -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(nodeshape, CompositeExplicitAutograd, m) {
  m.impl("raise_failures", TORCH_BOX(&raise_failures));
}

STABLE_TORCH_LIBRARY_IMPL(nodeshape, NODESHAPE_DISPATCH_KEY, m) { NODESHAPE_REGISTER_OPS(m, Cuda); }

}  // namespace nodeshape
