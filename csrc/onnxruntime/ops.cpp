// The solve as a custom op of onnxruntime, which register_custom_ops_library adds to a session, of domain "nodeshape":
//
//     Solve(y0, t, program, constants, tableau, weights...)     attributes: steps, tolerance, max_iterations
//         -> ys, evaluations, residual
//
// Arguments and results are those of the op for torch (nodeshape/_ode/program_op.py), without what a gradient needs:
// y0, weights and ys are float or double; t, constants, tableau and residual double; program and evaluations int64. A
// sample that fails makes the run fail.
#include <onnxruntime_c_api.h>

#include <memory>
#include <vector>

#include "pool.h"
#include "../cpu/dispatch.h"

namespace nodeshape {

int interruption = 0;  // signals end no solve here

namespace {

/// The oldest with all that is called below; as onnxruntime 1.17.
constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers are of an onnxruntime before 1.17");

template <class T>
constexpr ONNXTensorElementDataType kType;
template <>
constexpr ONNXTensorElementDataType kType<float> = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
template <>
constexpr ONNXTensorElementDataType kType<double> = ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
template <>
constexpr ONNXTensorElementDataType kType<int64_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

/// What a node says, and its session's threads.
struct Node {
  Node(const OrtApi& api, const OrtKernelInfo* info) : api(api), pool(api) {
    size_t count = 0;
    check(api, api.KernelInfoGetAttributeArray_int64(info, "steps", nullptr, &count));
    steps.resize(count);
    check(api, api.KernelInfoGetAttributeArray_int64(info, "steps", steps.data(), &count));
    check(api, api.KernelInfoGetAttribute_int64(info, "max_iterations", &max_iterations));
    check(api, api.KernelInfoGetAttribute_float(info, "tolerance", &tolerance));
  }

  const OrtApi& api;
  std::vector<int64_t> steps;
  int64_t max_iterations = 0;
  float tolerance = 0;
  Pool pool;
};

/// One run of a node.
class Call {
 public:
  Call(Node& node, OrtKernelContext* context) : node_(node), context_(context) {
    size_t count;
    check(api(), api().KernelContext_GetInputCount(context, &count));
    for (size_t i = 0; i < count; ++i) inputs_.push_back(input(i));
  }

  template <class T>
  void solve() {
    const Tensor& y0 = inputs_.at(0);
    const Common common = common_of("Solve", inputs_.at(1), node_.steps, inputs_.at(4), node_.tolerance,
                                    node_.max_iterations, kNone, 0, 1.0);
    common.check_arguments(y0, kLargestSample);
    const ProgramOwner owner(common, y0, {{inputs_.begin() + 5, inputs_.end()}, inputs_[2], inputs_[3], inputs_[4]},
                             kKernelsChoose);
    const Grid grid = common.grid();
    const int64_t samples = y0.size(0);
    Sizes sizes = y0.sizes();
    sizes.insert(sizes.begin(), grid.count);
    T* const ys = output<T>(0, sizes);
    int64_t* const evaluations = output<int64_t>(1, {samples});
    double* const residual = output<double>(2, {samples});
    std::vector<Failure> failures(static_cast<size_t>(samples));
    dispatch_forward<T>(owner,
                        {grid, common.stage(), samples, common.store(), data<T>(y0), ys, nullptr, evaluations, residual,
                         failures.data()},
                        node_.pool.executor(context_));
    check_failures(first_failures(failures.data(), samples, false), samples, common.tolerance, common.drift_tolerance);
  }

 private:
  const OrtApi& api() const { return node_.api; }

  Tensor input(size_t i) const {
    const OrtValue* value;
    check(api(), api().KernelContext_GetInput(context_, i, &value));
    OrtTensorTypeAndShapeInfo* info;
    check(api(), api().GetTensorTypeAndShape(value, &info));
    const auto release = [this](OrtTensorTypeAndShapeInfo* info) { api().ReleaseTensorTypeAndShapeInfo(info); };
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(release)> owned(info, release);
    ONNXTensorElementDataType type;
    check(api(), api().GetTensorElementType(info, &type));
    size_t dims;
    check(api(), api().GetDimensionsCount(info, &dims));
    Sizes sizes(dims);
    check(api(), api().GetDimensions(info, sizes.data(), dims));
    void* elements;
    check(api(), api().GetTensorMutableData(const_cast<OrtValue*>(value), &elements));
    return {std::move(sizes),
            type == kType<float>     ? ScalarType::Float
            : type == kType<double>  ? ScalarType::Double
            : type == kType<int64_t> ? ScalarType::Long
                                     : ScalarType::other,
            elements};
  }

  template <class T>
  T* output(size_t i, const Sizes& sizes) const {
    OrtValue* value;
    check(api(), api().KernelContext_GetOutput(context_, i, sizes.data(), sizes.size(), &value));
    void* elements;
    check(api(), api().GetTensorMutableData(value, &elements));
    return static_cast<T*>(elements);
  }

  Node& node_;
  OrtKernelContext* const context_;
  std::vector<Tensor> inputs_;
};

/// Runs body() for onnxruntime, which takes no exceptions.
template <class Body>
OrtStatus* guarded(const OrtApi& api, Body&& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "MemoryError: there is not enough memory for the solve");
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  }
}

/// An op for states of type T.
template <class T>
OrtCustomOp definition() {
  constexpr size_t kGiven = 5;  // inputs before the weights
  OrtCustomOp x{};
  x.version = kApiVersion;
  x.GetName = [](const OrtCustomOp*) { return "Solve"; };
  x.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  x.GetInputTypeCount = [](const OrtCustomOp*) { return kGiven + 1; };
  x.GetInputType = [](const OrtCustomOp*, size_t i) {
    if (i == 2) return kType<int64_t>;
    return i == 0 || i == kGiven ? kType<T> : kType<double>;
  };
  x.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == kGiven ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  };
  x.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  x.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  x.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  x.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(3); };
  x.GetOutputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? kType<T> : i == 1 ? kType<int64_t> : kType<double>;
  };
  x.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  x.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  x.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  x.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    return guarded(*api, [&] { *kernel = new Node(*api, info); });
  };
  x.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    Node& node = *static_cast<Node*>(kernel);
    return guarded(node.api, [&] { Call(node, context).solve<T>(); });
  };
  x.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  return x;
}

/// Sessions keep the domain, and nobody says when the last is gone.
OrtCustomOpDomain* domain(const OrtApi& api) {
  static OrtCustomOpDomain* const one = [&] {
    static const OrtCustomOp ops[] = {definition<float>(), definition<double>()};
    OrtCustomOpDomain* made;
    check(api, api.CreateCustomOpDomain("nodeshape", &made));
    for (const OrtCustomOp& x : ops) check(api, api.CustomOpDomain_Add(made, &x));
    return made;
  }();
  return one;
}

}  // namespace
}  // namespace nodeshape

extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options,
                                                                                            const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(nodeshape::kApiVersion);
  if (api == nullptr)
    return base->GetApi(1)->CreateStatus(ORT_FAIL, "nodeshape's ops need onnxruntime 1.17 or newer: upgrade it");
  return nodeshape::guarded(*api, [&] {
    nodeshape::kernels();  // throws where NODESHAPE_ISA asks for what is not there
    nodeshape::check(*api, api->AddCustomOpDomain(options, nodeshape::domain(*api)));
  });
}
