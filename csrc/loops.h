// The loops over a sample's elements of the device that is compiled for, in which all else is written.
#pragma once

#if defined(__CUDACC__) || defined(NODESHAPE_CUDA_ON_HOST)
#include "cuda/block.cuh"
#else
#include "cpu/simd.h"
#endif
