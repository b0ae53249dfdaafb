// The CUDA solver of ConvDynamics: its weights made ready, its gradients put where they belong.
#include "conv.cuh"
#include "solve.cuh"

namespace nodeshape::cuda {

/// The ten parameters as tensors, in the order of ConvDynamics.state_dict().
template <class T>
struct ConvTensors {
  T* data[10];
};

template <class T>
__global__ void prepare_conv(const __grid_constant__ ConvTensors<const T> from,
                             const __grid_constant__ ConvWeights<T> to) {
  const int64_t width = to.padded_channels(), c = to.channels, filters = to.filter_elements();
  each_of_grid(filters, [&](int64_t at) {
    const int64_t o = at % width, i = at / width % width, tap = at / width / width;
    const bool real = o < c && i < c;
    for (int l = 0; l < 2; ++l) {
      const T* weight = from.data[4 * l + 2];
      const_cast<T*>(to.forward[l])[at] = real ? weight[(o * (c + 1) + i + 1) * 9 + tap] : T(0);
      const_cast<T*>(to.backward[l])[at] = real ? weight[(i * (c + 1) + o + 1) * 9 + 8 - tap] : T(0);
    }
  });
  each_of_grid(kBorderClasses * width, [&](int64_t at) {
    const int64_t o = at % width;
    const int border = int(at / width);
    for (int l = 0; l < 2; ++l) {
      T sum = 0;
      for (int tap = 0; tap < 9; ++tap)
        if (o < c && inside(tap, border)) sum += from.data[4 * l + 2][o * (c + 1) * 9 + tap];
      const_cast<T*>(to.time[l])[at] = sum;
    }
  });
  each_of_grid(width, [&](int64_t o) {
    for (int l = 0; l < 2; ++l) const_cast<T*>(to.bias[l])[o] = o < c ? from.data[4 * l + 3][o] : T(0);
    for (int n = 0; n < 3; ++n) {
      const_cast<T*>(to.gamma[n])[o] = o < c ? from.data[4 * n][o] : T(0);
      const_cast<T*>(to.beta[n])[o] = o < c ? from.data[4 * n + 1][o] : T(0);
    }
  });
}

/// The gradients of the ten parameters from the summed row `gradient`.
template <class T>
__global__ void finish_conv(const __grid_constant__ ConvWeights<T> w, T* row,
                            const __grid_constant__ ConvTensors<T> to) {
  const int64_t width = w.padded_channels(), c = w.channels;
  const ConvGradient<T> from(w, row);
  each_of_grid(c * (c + 1) * 9, [&](int64_t at) {
    const int64_t tap = at % 9, i = at / 9 % (c + 1), o = at / 9 / (c + 1);
    for (int l = 0; l < 2; ++l) {
      T sum = 0;
      if (i > 0)
        sum = from.filters[l][(tap * width + i - 1) * width + o];
      else  // the time
        for (int border = 0; border < kBorderClasses; ++border)
          if (inside(int(tap), border)) sum += from.timed_borders[l][border * width + o];
      to.data[4 * l + 2][at] = sum;
    }
  });
  each_of_grid(c, [&](int64_t o) {
    for (int l = 0; l < 2; ++l) {
      T sum = 0;
      for (int border = 0; border < kBorderClasses; ++border) sum += from.borders[l][border * width + o];
      to.data[4 * l + 3][o] = sum;
    }
    for (int n = 0; n < 3; ++n)
      for (int which = 0; which < 2; ++which) to.data[4 * n + which][o] = from.norms[(2 * n + which) * width + o];
  });
}

template <class T>
ConvWeights<T> prepare(const ConvModel& model, const Launch& on) {
  ConvWeights<T> w{model.channels, model.height, model.width, model.groups, {}, {}, {}, {}, {}, {}};
  const int64_t width = w.padded_channels(), filters = w.filter_elements();
  T* at = on.take<T>({4 * filters + (2 * (kBorderClasses + 1) + 6) * width});
  const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
  for (int l = 0; l < 2; ++l) {
    w.forward[l] = take(filters);
    w.backward[l] = take(filters);
  }
  for (int l = 0; l < 2; ++l) {
    w.bias[l] = take(width);
    w.time[l] = take(kBorderClasses * width);
  }
  for (int n = 0; n < 3; ++n) {
    w.gamma[n] = take(width);
    w.beta[n] = take(width);
  }
  ConvTensors<const T> tensors;
  for (int i = 0; i < 10; ++i) tensors.data[i] = static_cast<const T*>(model.parameters[i]);
  launch_over(filters, prepare_conv<T>, on, tensors, w);
  return w;
}

/// Elements that a team works on side by side: the tasks of a convolution.
template <class T>
int64_t work(const ConvWeights<T>& w) {
  return w.height * ((w.width + 3) / 4) * w.padded_channels() / 4;
}

template <class T>
void finish(const ConvWeights<T>& w, const T* row, const std::vector<T*>& gradients, const ConvModel&,
            const Launch& on) {
  ConvTensors<T> tensors;
  for (int i = 0; i < 10; ++i) tensors.data[i] = gradients[i];
  launch_over(9 * w.channels * (w.channels + 1), finish_conv<T>, on, w, const_cast<T*>(row), tensors);
}

template void forward(const ConvModel&, ForwardProblem<float>, const Launch&);
template void backward(const ConvModel&, BackwardProblem<float>, const std::vector<float*>&, const Launch&);
template void forward(const ConvModel&, ForwardProblem<double>, const Launch&);
template void backward(const ConvModel&, BackwardProblem<double>, const std::vector<double*>&, const Launch&);

}  // namespace nodeshape::cuda
