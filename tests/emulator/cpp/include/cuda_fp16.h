// Stands in for CUDA's header of this name: the type, its pair, and conversions; no arithmetic.
#pragma once

#include "../device/sixteen_bits.h"

struct __half {
    unsigned short __x;
    __half() = default;
    __half(float value) : __x(emulator::float_to_half(value)) {}
    operator float() const { return emulator::half_to_float(__x); }
};
struct alignas(4) __half2 {
    __half x, y;
};
using half = __half;
using half2 = __half2;

EMULATOR_INLINE __half __ushort_as_half(unsigned short bits) {
    __half value;
    value.__x = bits;
    return value;
}
EMULATOR_INLINE unsigned short __half_as_ushort(__half value) { return value.__x; }
EMULATOR_INLINE float __half2float(__half value) { return value; }
EMULATOR_INLINE __half __float2half(float value) { return __half(value); }
EMULATOR_INLINE __half __float2half_rn(float value) { return __half(value); }
EMULATOR_INLINE __half __low2half(__half2 pair) { return pair.x; }
EMULATOR_INLINE __half __high2half(__half2 pair) { return pair.y; }
EMULATOR_INLINE float __low2float(__half2 pair) { return pair.x; }
EMULATOR_INLINE float __high2float(__half2 pair) { return pair.y; }
EMULATOR_INLINE __half2 __halves2half2(__half x, __half y) { return {x, y}; }
EMULATOR_INLINE __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
EMULATOR_INLINE __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
EMULATOR_INLINE float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
