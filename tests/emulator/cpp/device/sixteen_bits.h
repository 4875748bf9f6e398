// Conversions between float and the two 16-bit formats, rounding to nearest, ties to even.
#pragma once

namespace emulator {

EMULATOR_INLINE float half_to_float(unsigned short half) {
    const unsigned sign = static_cast<unsigned>(half & 0x8000) << 16;
    const unsigned exponent = half >> 10 & 31;
    const unsigned mantissa = half & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

EMULATOR_INLINE unsigned short float_to_half(float value) {
    const unsigned bits = __float_as_uint(value);
    const unsigned sign = bits >> 16 & 0x8000u;
    const unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;  // CUDA's only NaN
    if (magnitude >= 0x477ff000u) return static_cast<unsigned short>(sign | 0x7c00u);  // ≥ 65520
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 shifts the bits into place, rounded
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return static_cast<unsigned short>(sign | (__float_as_uint(shifted) - 0x3f000000u));
    }
    const unsigned rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return static_cast<unsigned short>(sign | (rounded - 0x38000000u) >> 13);
}

EMULATOR_INLINE float bfloat16_to_float(unsigned short bits) {
    return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

EMULATOR_INLINE unsigned short float_to_bfloat16(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // CUDA's only NaN
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace emulator
