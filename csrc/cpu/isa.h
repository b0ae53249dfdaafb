// Which instruction set to run.
#pragma once

#include "kernels.h"
#include "program_kernels.h"

namespace nodeshape {

/// The widest instruction set of this machine, or the one NODESHAPE_ISA names; throws if the machine lacks that one.
const Kernels& kernels();
const ProgramKernels& program_kernels();
const AdaptiveKernels& adaptive_kernels();

}  // namespace nodeshape
