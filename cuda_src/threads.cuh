// Threads by number, warps, and what stands for no row.

#pragma once

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;  // lanes of a warp

// The row of a lookup that found none.
constexpr long long MISSING = -1;

// Among all threads of the launch.
__device__ __forceinline__ long long thread_number() {
    return static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
}
