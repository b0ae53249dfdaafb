// The CUDA solver of MLPDynamics: its weights made ready, its gradients put where they belong.
#include "mlp.cuh"
#include "solve.cuh"

namespace nodeshape::cuda {

template <class T>
__global__ void transpose(int64_t in, int64_t out, int64_t columns, const T* weight, T* transposed) {
  each_of_grid(in * out, [=](int64_t at) { transposed[at] = weight[at % out * columns + at / out]; });
}

template <class T>
MlpWeights<T> prepare(const MlpModel& model, const Launch& on) {
  using Layer = typename MlpWeights<T>::Layer;
  MlpWeights<T> w{model.dim, model.layers, 0, 0, model.activation, nullptr};
  Upload layers;
  for (int64_t l = 0; l < model.layers; ++l) {
    const int64_t in = model.in(l), out = model.widths[l], columns = model.columns(l);
    const T* weight = static_cast<const T*>(model.parameters[2 * l]);
    T* forward = on.take<T>({in, out});
    launch_over(in * out, transpose<T>, on, in, out, columns, weight, forward);
    const Layer layer{in,           out,    columns, w.units,
                      w.parameters, weight, forward, static_cast<const T*>(model.parameters[2 * l + 1])};
    layers.add_all(layer);
    w.units += out;
    w.parameters += out * (columns + 1);
  }
  w.layers = static_cast<const Layer*>(layers.to_device(on));
  return w;
}

/// Elements that a team works on side by side: the products of an average layer, so many to a thread.
template <class T>
int64_t work(const MlpWeights<T>& w) {
  constexpr int64_t kProductsPerThread = 16;
  return w.parameters / w.count / kProductsPerThread;
}

template <class T>
void finish(const MlpWeights<T>& w, const T* row, const std::vector<T*>& gradients, const MlpModel& model,
            const Launch& on) {
  for (int64_t l = 0; l < w.count; ++l) {
    const int64_t out = model.widths[l], weights = out * model.columns(l);
    for (const auto& [to, count] : {std::pair(gradients[2 * l], weights), std::pair(gradients[2 * l + 1], out)}) {
      check(cudaMemcpyAsync(to, row, count * sizeof(T), cudaMemcpyDeviceToDevice, on.stream));
      row += count;
    }
  }
}

template void forward(const MlpModel&, ForwardProblem<float>, const Launch&);
template void backward(const MlpModel&, BackwardProblem<float>, const std::vector<float*>&, const Launch&);
template void forward(const MlpModel&, ForwardProblem<double>, const Launch&);
template void backward(const MlpModel&, BackwardProblem<double>, const std::vector<double*>&, const Launch&);

}  // namespace nodeshape::cuda
