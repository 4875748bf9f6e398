// What NVRTC knows without a header, for g++: compiled before the first line of every kernel
// source.
//
// Left out on purpose: __activemask, whose result depends on how the compiler schedules lanes.
#pragma once

#include "../runtime/api.h"

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 9
#define __CUDA_ARCH__ 800

// __global__, __launch_bounds__ and __shared__ are read by _build.py first, and defined after that.
#define __device__
#define __host__
#define __constant__ const
#define __grid_constant__
#define __restrict__ __restrict
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

#define EMULATOR_INLINE static inline __attribute__((always_inline))

using size_t = decltype(sizeof(0));
using ptrdiff_t = decltype(static_cast<char*>(nullptr) - static_cast<char*>(nullptr));

static const int warpSize = 32;

#define EMULATOR_TEXT_OF(condition) #condition
#define assert(condition)  \
    ((condition) ? (void)0 \
                 : emulator_stop("assertion", "assert(" EMULATOR_TEXT_OF(condition) ") failed"))
// The compiler may rely on it, so it had better hold.
#define __builtin_assume(condition) \
    ((condition) ? (void)0          \
                 : emulator_stop("assumption", EMULATOR_TEXT_OF(condition) " does not hold"))
EMULATOR_INLINE void __trap() { emulator_stop("trap", "the kernel calls __trap()"); }

EMULATOR_INLINE bool __isGlobal(const void* pointer) { return emulator_is_global(pointer); }
EMULATOR_INLINE bool __isShared(const void* pointer) { return emulator_is_shared(pointer); }

extern "C" int printf(const char* format, ...);

// Plain memcpy and memset would escape the checks.
EMULATOR_INLINE void* memcpy(void* to, const void* from, size_t size) {
    emulator_copy(to, from, size);
    return to;
}
EMULATOR_INLINE void* memset(void* to, int value, size_t size) {
    emulator_fill(to, value, size);
    return to;
}

#include "vector_types.h"
// Above: the types of the indices.
#define threadIdx (emulator::to_uint3(emulator_thread_index()))
#define blockIdx (emulator::to_uint3(emulator_block_index()))
#define blockDim (emulator::to_dim3(emulator_block_dim()))
#define gridDim (emulator::to_dim3(emulator_grid_dim()))

#include "atomics.h"
#include "kernel_table.h"
#include "math.h"
#include "warp.h"
