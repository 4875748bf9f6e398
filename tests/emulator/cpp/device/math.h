// Arithmetic intrinsics, by the compiler's own builtins (which fall back to libm).
//
// Approximate functions (__expf, __fdividef, rsqrtf) are exact here up to rounding, and nothing is
// contracted to an FMA or flushed to zero: results differ from a GPU's in the last bits.
#pragma once

#define EMULATOR_UNARY(name)                                                  \
    EMULATOR_INLINE float name##f(float x) { return __builtin_##name##f(x); } \
    EMULATOR_INLINE float name(float x) { return __builtin_##name##f(x); }    \
    EMULATOR_INLINE double name(double x) { return __builtin_##name(x); }
EMULATOR_UNARY(sqrt)
EMULATOR_UNARY(exp)
EMULATOR_UNARY(exp2)
EMULATOR_UNARY(expm1)
EMULATOR_UNARY(log)
EMULATOR_UNARY(log2)
EMULATOR_UNARY(log1p)
EMULATOR_UNARY(sin)
EMULATOR_UNARY(cos)
EMULATOR_UNARY(fabs)
EMULATOR_UNARY(floor)
EMULATOR_UNARY(ceil)
EMULATOR_UNARY(trunc)
EMULATOR_UNARY(round)
EMULATOR_UNARY(rint)

#define EMULATOR_BINARY(name)                                                             \
    EMULATOR_INLINE float name##f(float x, float y) { return __builtin_##name##f(x, y); } \
    EMULATOR_INLINE float name(float x, float y) { return __builtin_##name##f(x, y); }    \
    EMULATOR_INLINE double name(double x, double y) { return __builtin_##name(x, y); }
EMULATOR_BINARY(pow)
EMULATOR_BINARY(fmin)
EMULATOR_BINARY(fmax)
EMULATOR_BINARY(fmod)
EMULATOR_BINARY(copysign)
EMULATOR_BINARY(nextafter)
EMULATOR_INLINE double pow(double x, int y) { return __builtin_pow(x, y); }
EMULATOR_INLINE float ldexpf(float x, int e) { return __builtin_ldexpf(x, e); }
EMULATOR_INLINE float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
EMULATOR_INLINE double ldexp(double x, int e) { return __builtin_ldexp(x, e); }
EMULATOR_INLINE float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
EMULATOR_INLINE float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
EMULATOR_INLINE double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
EMULATOR_INLINE float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
EMULATOR_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
EMULATOR_INLINE double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }

EMULATOR_INLINE int abs(int x) { return x < 0 ? -x : x; }
EMULATOR_INLINE long abs(long x) { return x < 0 ? -x : x; }
EMULATOR_INLINE long long abs(long long x) { return x < 0 ? -x : x; }
EMULATOR_INLINE long long llabs(long long x) { return x < 0 ? -x : x; }
EMULATOR_INLINE float abs(float x) { return __builtin_fabsf(x); }
EMULATOR_INLINE double abs(double x) { return __builtin_fabs(x); }

#define EMULATOR_CLASSIFY(name, builtin)                           \
    EMULATOR_INLINE bool name(float x) { return builtin(x) != 0; } \
    EMULATOR_INLINE bool name(double x) { return builtin(x) != 0; }
EMULATOR_CLASSIFY(isfinite, __builtin_isfinite)
EMULATOR_CLASSIFY(isnan, __builtin_isnan)
EMULATOR_CLASSIFY(isinf, __builtin_isinf)
EMULATOR_CLASSIFY(signbit, __builtin_signbit)

// min and max of every pair of types that CUDA has an overload for.
#define EMULATOR_MIN_MAX(R, A, B)     \
    EMULATOR_INLINE R min(A a, B b) { \
        const R x = a, y = b;         \
        return y < x ? y : x;         \
    }                                 \
    EMULATOR_INLINE R max(A a, B b) { \
        const R x = a, y = b;         \
        return x < y ? y : x;         \
    }
#define EMULATOR_MIN_MAX_INTEGERS(S, U) \
    EMULATOR_MIN_MAX(S, S, S)           \
    EMULATOR_MIN_MAX(U, U, U)           \
    EMULATOR_MIN_MAX(U, S, U)           \
    EMULATOR_MIN_MAX(U, U, S)
EMULATOR_MIN_MAX_INTEGERS(int, unsigned)
EMULATOR_MIN_MAX_INTEGERS(long, unsigned long)
EMULATOR_MIN_MAX_INTEGERS(long long, unsigned long long)
// A NaN loses against a number, as in fmin and fmax.
EMULATOR_INLINE float min(float a, float b) { return __builtin_fminf(a, b); }
EMULATOR_INLINE float max(float a, float b) { return __builtin_fmaxf(a, b); }
EMULATOR_INLINE double min(double a, double b) { return __builtin_fmin(a, b); }
EMULATOR_INLINE double max(double a, double b) { return __builtin_fmax(a, b); }
EMULATOR_INLINE double min(float a, double b) { return __builtin_fmin(a, b); }
EMULATOR_INLINE double max(float a, double b) { return __builtin_fmax(a, b); }
EMULATOR_INLINE double min(double a, float b) { return __builtin_fmin(a, b); }
EMULATOR_INLINE double max(double a, float b) { return __builtin_fmax(a, b); }

// Round to nearest is what the processor does; with -ffp-contract=off nothing is fused.
EMULATOR_INLINE float __fadd_rn(float x, float y) { return x + y; }
EMULATOR_INLINE float __fsub_rn(float x, float y) { return x - y; }
EMULATOR_INLINE float __fmul_rn(float x, float y) { return x * y; }
EMULATOR_INLINE float __fdiv_rn(float x, float y) { return x / y; }
EMULATOR_INLINE float __frcp_rn(float x) { return 1.0f / x; }
EMULATOR_INLINE float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
EMULATOR_INLINE float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
EMULATOR_INLINE double __dadd_rn(double x, double y) { return x + y; }
EMULATOR_INLINE double __dsub_rn(double x, double y) { return x - y; }
EMULATOR_INLINE double __dmul_rn(double x, double y) { return x * y; }
EMULATOR_INLINE double __ddiv_rn(double x, double y) { return x / y; }
EMULATOR_INLINE double __drcp_rn(double x) { return 1.0 / x; }
EMULATOR_INLINE double __dsqrt_rn(double x) { return __builtin_sqrt(x); }
EMULATOR_INLINE double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }
EMULATOR_INLINE float __fdividef(float x, float y) { return x / y; }
EMULATOR_INLINE float __expf(float x) { return __builtin_expf(x); }
EMULATOR_INLINE float __logf(float x) { return __builtin_logf(x); }
EMULATOR_INLINE float __powf(float x, float y) { return __builtin_powf(x, y); }
EMULATOR_INLINE float __sinf(float x) { return __builtin_sinf(x); }
EMULATOR_INLINE float __cosf(float x) { return __builtin_cosf(x); }
EMULATOR_INLINE void sincosf(float x, float* s, float* c) {
    *s = __builtin_sinf(x);
    *c = __builtin_cosf(x);
}
EMULATOR_INLINE void sincos(double x, double* s, double* c) {
    *s = __builtin_sin(x);
    *c = __builtin_cos(x);
}
EMULATOR_INLINE float __saturatef(float x) { return __builtin_fminf(__builtin_fmaxf(x, 0), 1); }

EMULATOR_INLINE float __double2float_rn(double x) { return static_cast<float>(x); }
EMULATOR_INLINE float __int2float_rn(int x) { return static_cast<float>(x); }
EMULATOR_INLINE float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
EMULATOR_INLINE float __ll2float_rn(long long x) { return static_cast<float>(x); }
EMULATOR_INLINE float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
EMULATOR_INLINE double __int2double_rn(int x) { return x; }
EMULATOR_INLINE double __uint2double_rn(unsigned x) { return x; }
EMULATOR_INLINE double __ll2double_rn(long long x) { return static_cast<double>(x); }
EMULATOR_INLINE double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }

#define EMULATOR_BIT_CAST(name, To, From)        \
    EMULATOR_INLINE To name(From from) {         \
        To to;                                   \
        __builtin_memcpy(&to, &from, sizeof to); \
        return to;                               \
    }
EMULATOR_BIT_CAST(__float_as_int, int, float)
EMULATOR_BIT_CAST(__float_as_uint, unsigned, float)
EMULATOR_BIT_CAST(__int_as_float, float, int)
EMULATOR_BIT_CAST(__uint_as_float, float, unsigned)
EMULATOR_BIT_CAST(__double_as_longlong, long long, double)
EMULATOR_BIT_CAST(__longlong_as_double, double, long long)

EMULATOR_INLINE int __popc(unsigned x) { return __builtin_popcount(x); }
EMULATOR_INLINE int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
EMULATOR_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMULATOR_INLINE int __ffsll(long long x) { return __builtin_ffsll(x); }
EMULATOR_INLINE int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
EMULATOR_INLINE int __clzll(long long x) {
    return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
EMULATOR_INLINE unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
EMULATOR_INLINE unsigned long long __brevll(unsigned long long x) {
    return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
           __brev(static_cast<unsigned>(x >> 32));
}
EMULATOR_INLINE unsigned __umulhi(unsigned x, unsigned y) {
    return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
EMULATOR_INLINE int __mulhi(int x, int y) {
    return static_cast<int>(static_cast<long long>(x) * y >> 32);
}
EMULATOR_INLINE unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
EMULATOR_INLINE long long __mul64hi(long long x, long long y) {
    return static_cast<long long>(static_cast<__int128>(x) * y >> 64);
}
EMULATOR_INLINE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
    return shift & 31 ? hi << (shift & 31) | lo >> (32 - (shift & 31)) : hi;
}
EMULATOR_INLINE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
    return shift & 31 ? lo >> (shift & 31) | hi << (32 - (shift & 31)) : lo;
}
