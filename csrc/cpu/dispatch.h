// Which kernel solves a program: one of its own, or that of its layers.
#pragma once

#include "isa.h"
#include "../solve_ops.h"

namespace nodeshape {

template <class T>
void dispatch_forward(const ProgramOwner& owner, const ForwardProblem<T>& problem, const Executor& executor) {
  const KernelsOf<T>& k = kernels().of<T>();
  if (owner.conv() != nullptr) return k.conv.forward(*owner.conv(), problem, executor);
  k.program.forward(owner.model(), problem, executor);
}

template <class T>
void dispatch_backward(const ProgramOwner& owner, const BackwardProblem<T>& problem, const Executor& executor) {
  const KernelsOf<T>& k = kernels().of<T>();
  if (owner.conv() != nullptr) return k.conv.backward(*owner.conv(), problem, executor);
  k.program.backward(owner.model(), problem, executor);
}

/// Elements of the tapes that the forward solve keeps instead of states, or 0.
template <class T>
int64_t tapes(const ProgramOwner& owner, const Common& common, int64_t samples, int64_t kept_per_step) {
  if (kept_per_step > 0 || common.store() != kStoreStages || owner.conv() != nullptr) return 0;
  return kernels().of<T>().program.tapes(owner.model(), samples, common.grid().total_steps(), kept_per_step == kTapes);
}

}  // namespace nodeshape
