// The solves as custom ops of onnxruntime, which register_custom_ops_library adds to a session, of domain "nodeshape":
//
//     ConvSolve(y0, t, weights...)     attributes: steps, theta, tolerance, max_iterations
//     MlpSolve(y0, t, weights...)                  the same and activation
//     ProgramSolve(y0, t, program, constants, tableau, weights...)     steps, tolerance, max_iterations
//         -> ys, evaluations, residual
//
// Arguments and results are those of the ops for torch (nodeshape/_ode/fused.py, program_op.py), without what a
// gradient needs: y0, weights and ys are float or double; t, constants, tableau and residual double; program and
// evaluations int64. A sample that fails makes the run fail.
#include <onnxruntime_c_api.h>

#include <memory>
#include <vector>

#include "pool.h"
#include "../cpu/isa.h"
#include "../program_ops.h"

namespace nodeshape {

int interruption = 0;  // signals end no solve here

namespace {

/// The oldest with all that is called below; as onnxruntime 1.17.
constexpr uint32_t kApiVersion = 17;
static_assert(ORT_API_VERSION >= kApiVersion, "the headers are of an onnxruntime before 1.17");

enum class Op { conv, mlp, program };

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
  Node(const OrtApi& api, const OrtKernelInfo* info, Op op) : api(api), pool(api) {
    size_t count = 0;
    check(api, api.KernelInfoGetAttributeArray_int64(info, "steps", nullptr, &count));
    steps.resize(count);
    check(api, api.KernelInfoGetAttributeArray_int64(info, "steps", steps.data(), &count));
    check(api, api.KernelInfoGetAttribute_int64(info, "max_iterations", &max_iterations));
    check(api, api.KernelInfoGetAttribute_float(info, "tolerance", &tolerance));
    if (op != Op::program) check(api, api.KernelInfoGetAttribute_float(info, "theta", &theta));
    if (op == Op::mlp) check(api, api.KernelInfoGetAttribute_int64(info, "activation", &activation));
  }

  const OrtApi& api;
  std::vector<int64_t> steps;
  int64_t max_iterations = 0, activation = 0;
  float tolerance = 0, theta = 0;
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

  const Tensor& operator[](size_t i) const { return inputs_.at(i); }
  std::vector<Tensor> from(size_t i) const { return {inputs_.begin() + int64_t(i), inputs_.end()}; }

  /// Solves with a kernel, which takes the model.
  template <class T, class Model>
  void solve(const Common& common, const Model& model, ForwardKernel<Model, T> kernel) {
    const Tensor& y0 = inputs_[0];
    const Grid grid = common.grid();
    const int64_t samples = y0.size(0);
    Sizes sizes = y0.sizes();
    sizes.insert(sizes.begin(), grid.count);
    T* const ys = output<T>(0, sizes);
    int64_t* const evaluations = output<int64_t>(1, {samples});
    double* const residual = output<double>(2, {samples});
    std::vector<Failure> failures(static_cast<size_t>(samples));
    kernel(model,
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

const KernelsOf<float>& kernels_of(float) { return kernels().float32; }
const KernelsOf<double>& kernels_of(double) { return kernels().float64; }
const ProgramKernelsOf<float>& program_kernels_of(float) { return program_kernels().float32; }
const ProgramKernelsOf<double>& program_kernels_of(double) { return program_kernels().float64; }

template <Op op, class T>
void compute(Node& node, OrtKernelContext* context) {
  Call call(node, context);
  if constexpr (op == Op::program) {
    const Common common =
        common_of("ProgramSolve", call[1], node.steps, call[4], node.tolerance, node.max_iterations, kNone, 0, 1.0);
    common.check_arguments(call[0], kLargestProgramSample);
    const ProgramOwner owner(common, call[0], {call.from(5), call[2], call[3], call[4]});
    call.solve<T>(common, owner.model(), program_kernels_of(T()).forward);
  } else {
    const Common common{op == Op::conv ? "ConvSolve" : "MlpSolve",
                        times_of(call[1]),
                        node.steps,
                        node.theta,
                        node.tolerance,
                        node.max_iterations,
                        kNone,
                        0,
                        1.0};
    common.check_arguments(call[0], kLargestSample);
    Owner<std::conditional_t<op == Op::conv, ConvModel, MlpModel>> owner;
    if constexpr (op == Op::conv) {
      conv_model(common.op, call[0], call.from(2), owner);
      call.solve<T>(common, owner.model, kernels_of(T()).conv_forward);
    } else {
      mlp_model(common.op, call[0], call.from(2), node.activation, owner);
      call.solve<T>(common, owner.model, kernels_of(T()).mlp_forward);
    }
  }
}

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
template <Op op, class T>
OrtCustomOp definition() {
  constexpr size_t kGiven = op == Op::program ? 5 : 2;  // inputs before the weights
  OrtCustomOp x{};
  x.version = kApiVersion;
  x.GetName = [](const OrtCustomOp*) {
    return op == Op::conv ? "ConvSolve" : op == Op::mlp ? "MlpSolve" : "ProgramSolve";
  };
  x.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  x.GetInputTypeCount = [](const OrtCustomOp*) { return kGiven + 1; };
  x.GetInputType = [](const OrtCustomOp*, size_t i) {
    if (op == Op::program && i == 2) return kType<int64_t>;
    return i == 0 || i == kGiven ? kType<T> : kType<double>;
  };
  x.GetInputCharacteristic = [](const OrtCustomOp*, size_t i) {
    return i == kGiven ? INPUT_OUTPUT_VARIADIC : INPUT_OUTPUT_REQUIRED;
  };
  x.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  x.GetVariadicInputMinArity = [](const OrtCustomOp*) { return op == Op::program ? 0 : 1; };
  x.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  x.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(3); };
  x.GetOutputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? kType<T> : i == 1 ? kType<int64_t> : kType<double>;
  };
  x.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  x.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  x.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  x.CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
    return guarded(*api, [&] { *kernel = new Node(*api, info, op); });
  };
  x.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
    Node& node = *static_cast<Node*>(kernel);
    return guarded(node.api, [&] { compute<op, T>(node, context); });
  };
  x.KernelDestroy = [](void* kernel) { delete static_cast<Node*>(kernel); };
  return x;
}

/// Sessions keep the domain, and nobody says when the last is gone.
OrtCustomOpDomain* domain(const OrtApi& api) {
  static OrtCustomOpDomain* const one = [&] {
    static const OrtCustomOp ops[] = {definition<Op::conv, float>(),    definition<Op::conv, double>(),
                                      definition<Op::mlp, float>(),     definition<Op::mlp, double>(),
                                      definition<Op::program, float>(), definition<Op::program, double>()};
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
