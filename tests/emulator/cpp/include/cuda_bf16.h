// Stands in for CUDA's header of this name: the type, its pair, and conversions; no arithmetic.
#pragma once

#include "../device/sixteen_bits.h"

struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float value) : __x(emulator::float_to_bfloat16(value)) {}
    operator float() const { return emulator::bfloat16_to_float(__x); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

EMULATOR_INLINE __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    __nv_bfloat16 value;
    value.__x = bits;
    return value;
}
EMULATOR_INLINE unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.__x; }
EMULATOR_INLINE float __bfloat162float(__nv_bfloat16 value) { return value; }
EMULATOR_INLINE __nv_bfloat16 __float2bfloat16(float value) { return __nv_bfloat16(value); }
EMULATOR_INLINE __nv_bfloat16 __float2bfloat16_rn(float value) { return __nv_bfloat16(value); }
EMULATOR_INLINE __nv_bfloat16 __low2bfloat16(__nv_bfloat162 pair) { return pair.x; }
EMULATOR_INLINE __nv_bfloat16 __high2bfloat16(__nv_bfloat162 pair) { return pair.y; }
EMULATOR_INLINE float __low2float(__nv_bfloat162 pair) { return pair.x; }
EMULATOR_INLINE float __high2float(__nv_bfloat162 pair) { return pair.y; }
EMULATOR_INLINE __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return {x, y};
}
EMULATOR_INLINE __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__nv_bfloat16(x), __nv_bfloat16(y)};
}
EMULATOR_INLINE __nv_bfloat162 __float22bfloat162_rn(float2 v) {
    return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)};
}
EMULATOR_INLINE float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
