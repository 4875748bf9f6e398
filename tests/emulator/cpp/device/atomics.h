// Atomics for the types that CUDA has them for, fences, and loads and stores with a cache hint.
#pragma once

namespace emulator {

template <typename T>
EMULATOR_INLINE T begin_atomic(const volatile T* address) {
    Bits bits = emulator_atomic_begin(address, sizeof(T));
    T value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T>
EMULATOR_INLINE void end_atomic(volatile T* address, T value) {
    Bits bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    emulator_atomic_end(address, sizeof(T), bits);
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, T, update)                          \
    EMULATOR_INLINE T name(T* address, T value) {                 \
        const T old = emulator::begin_atomic<T>(address);         \
        emulator::end_atomic<T>(address, static_cast<T>(update)); \
        return old;                                               \
    }
#define EMULATOR_ATOMIC_CAS(T)                                          \
    EMULATOR_INLINE T atomicCAS(T* address, T compare, T value) {       \
        const T old = emulator::begin_atomic<T>(address);               \
        emulator::end_atomic<T>(address, old == compare ? value : old); \
        return old;                                                     \
    }

EMULATOR_ATOMIC(atomicAdd, int, static_cast<unsigned>(old) + static_cast<unsigned>(value))
EMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicSub, int, static_cast<unsigned>(old) - static_cast<unsigned>(value))
EMULATOR_ATOMIC(atomicSub, unsigned, old - value)
EMULATOR_ATOMIC(atomicExch, int, value)
EMULATOR_ATOMIC(atomicExch, unsigned, value)
EMULATOR_ATOMIC(atomicExch, unsigned long long, value)
EMULATOR_ATOMIC(atomicExch, float, value)
EMULATOR_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMULATOR_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)

#define EMULATOR_ATOMIC_ORDER(T)                             \
    EMULATOR_ATOMIC(atomicMin, T, value < old ? value : old) \
    EMULATOR_ATOMIC(atomicMax, T, value > old ? value : old)
EMULATOR_ATOMIC_ORDER(int)
EMULATOR_ATOMIC_ORDER(unsigned)
EMULATOR_ATOMIC_ORDER(long long)
EMULATOR_ATOMIC_ORDER(unsigned long long)

#define EMULATOR_ATOMIC_BITS(T)               \
    EMULATOR_ATOMIC(atomicAnd, T, old& value) \
    EMULATOR_ATOMIC(atomicOr, T, old | value) \
    EMULATOR_ATOMIC(atomicXor, T, old ^ value)
EMULATOR_ATOMIC_BITS(int)
EMULATOR_ATOMIC_BITS(unsigned)
EMULATOR_ATOMIC_BITS(unsigned long long)

EMULATOR_ATOMIC_CAS(int)
EMULATOR_ATOMIC_CAS(unsigned)
EMULATOR_ATOMIC_CAS(unsigned long long)
EMULATOR_ATOMIC_CAS(unsigned short)

// Every access takes effect at once here; what a fence does to the compiler is all that is left.
EMULATOR_INLINE void __threadfence() { asm volatile("" ::: "memory"); }
EMULATOR_INLINE void __threadfence_block() { asm volatile("" ::: "memory"); }
EMULATOR_INLINE void __threadfence_system() { asm volatile("" ::: "memory"); }
EMULATOR_INLINE void __nanosleep(unsigned) { emulator_sleep(); }

// For global memory only; that __ldg's must not be written in the same launch goes unchecked.
#define EMULATOR_CACHED_LOAD(name)             \
    template <typename T>                      \
    EMULATOR_INLINE T name(const T* address) { \
        __builtin_assume(__isGlobal(address)); \
        return *address;                       \
    }
EMULATOR_CACHED_LOAD(__ldg)
EMULATOR_CACHED_LOAD(__ldca)
EMULATOR_CACHED_LOAD(__ldcg)
EMULATOR_CACHED_LOAD(__ldcs)
EMULATOR_CACHED_LOAD(__ldcv)
EMULATOR_CACHED_LOAD(__ldlu)

#define EMULATOR_CACHED_STORE(name)                  \
    template <typename T>                            \
    EMULATOR_INLINE void name(T* address, T value) { \
        *address = value;                            \
    }
EMULATOR_CACHED_STORE(__stcg)
EMULATOR_CACHED_STORE(__stcs)
EMULATOR_CACHED_STORE(__stwb)
EMULATOR_CACHED_STORE(__stwt)
