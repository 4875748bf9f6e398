// CUDA's vector types with CUDA's alignment, which the alignment check goes by, and dim3.
#pragma once

// Four of eight bytes align to 16, the widest access that there is.
#define EMULATOR_VECTORS(name, T)                                                 \
    struct name##1 { T x; };                                                      \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
    struct name##3 { T x, y, z; };                                                \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
    EMULATOR_INLINE name##1 make_##name##1(T x) { return {x}; }                   \
    EMULATOR_INLINE name##2 make_##name##2(T x, T y) { return {x, y}; }           \
    EMULATOR_INLINE name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }   \
    EMULATOR_INLINE name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

EMULATOR_VECTORS(char, signed char)
EMULATOR_VECTORS(uchar, unsigned char)
EMULATOR_VECTORS(short, short)
EMULATOR_VECTORS(ushort, unsigned short)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(uint, unsigned)
EMULATOR_VECTORS(long, long)
EMULATOR_VECTORS(ulong, unsigned long)
EMULATOR_VECTORS(longlong, long long)
EMULATOR_VECTORS(ulonglong, unsigned long long)
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(double, double)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {
EMULATOR_INLINE uint3 to_uint3(Index index) { return {index.x, index.y, index.z}; }
EMULATOR_INLINE dim3 to_dim3(Index index) { return {index.x, index.y, index.z}; }
}  // namespace emulator
