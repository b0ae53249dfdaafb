// Which instruction set to run.
#pragma once

#include "kernels.h"

namespace nodeshape {

/// Elements of a sample that the kernels can count; they take less than 2^20 bytes of working memory for each.
inline constexpr int64_t kLargestSample = int64_t(1) << 36;

/// The widest instruction set of this machine, or the one NODESHAPE_ISA names; throws if the machine lacks that one.
const Kernels& kernels();

}  // namespace nodeshape
