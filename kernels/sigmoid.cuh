// The logistic function.
#pragma once

#include "common.cuh"

// σ(x) = 1/(1 + e^−x): where e^−x overflows, 0 is what it rounds to.
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
