// Element types of tables and gradients, how they widen to the type of the update and narrow back,
// and loads and stores of several neighbours at once.
//
// Written by the host, per compilation: PARAM and GRAD name types of this file (float, double,
// Float16, BFloat16); VEC elements of a row move together.

#pragma once

#include "memory.cuh"

#ifdef USES_HALF
#include <cuda_fp16.h>
#endif

// Storage alone: arithmetic is in float.
struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

// The type that a table's update and its moments have.
template <typename T>
struct Wide {
    using type = float;
};
template <>
struct Wide<double> {
    using type = double;
};

template <typename A>
__device__ __forceinline__ A widen(float x) {
    return x;
}
template <typename A>
__device__ __forceinline__ A widen(double x) {
    return static_cast<A>(x);
}

template <typename T>
struct Narrow;
template <>
struct Narrow<float> {
    static __device__ __forceinline__ float of(float x) { return x; }
};
template <>
struct Narrow<double> {
    static __device__ __forceinline__ double of(double x) { return x; }
};

#ifdef USES_HALF
template <typename A>
__device__ __forceinline__ A widen(Float16 x) {
    return __half2float(__ushort_as_half(x.bits));
}
template <>
struct Narrow<Float16> {
    static __device__ __forceinline__ Float16 of(float x) {
        return Float16{__half_as_ushort(__float2half_rn(x))};
    }
};
#endif

// bfloat16 is the upper half of a float; not every CuPy finds the header that would say so.
template <typename A>
__device__ __forceinline__ A widen(BFloat16 x) {
    return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
template <>
struct Narrow<BFloat16> {
    // To nearest, ties to even; NaN stays NaN.
    static __device__ __forceinline__ BFloat16 of(float x) {
        const unsigned bits = __float_as_uint(x);
        const unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        return BFloat16{static_cast<unsigned short>((x == x ? rounded : bits | 0x400000u) >> 16)};
    }
};

// N neighbours, aligned so that they move as one access of up to 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
    T x[N];
};

template <typename A, int N, typename T>
__device__ __forceinline__ void load(A (&x)[N], const T* address) {
    const auto v = *reinterpret_cast<const Vec<T, N>*>(global(address));
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = widen<A>(v.x[k]);
}

template <typename A, int N, typename T>
__device__ __forceinline__ void store(T* address, const A (&x)[N]) {
    Vec<T, N> v;
#pragma unroll
    for (int k = 0; k < N; ++k) v.x[k] = Narrow<T>::of(x[k]);
    *reinterpret_cast<Vec<T, N>*>(global(address)) = v;
}
