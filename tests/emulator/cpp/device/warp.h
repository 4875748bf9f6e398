// Barriers, shuffles, votes: every call is a meeting in the runtime, which checks who comes.
#pragma once

EMULATOR_INLINE void __syncthreads(unsigned line = __builtin_LINE()) {
    emulator_barrier(emulator::BarrierOp::kSync, 0, line);
}
EMULATOR_INLINE int __syncthreads_or(int value, unsigned line = __builtin_LINE()) {
    return emulator_barrier(emulator::BarrierOp::kOr, value, line);
}
EMULATOR_INLINE int __syncthreads_and(int value, unsigned line = __builtin_LINE()) {
    return emulator_barrier(emulator::BarrierOp::kAnd, value, line);
}
EMULATOR_INLINE int __syncthreads_count(int value, unsigned line = __builtin_LINE()) {
    return emulator_barrier(emulator::BarrierOp::kCount, value, line);
}
EMULATOR_INLINE void __syncwarp(unsigned mask = 0xffffffffu) {
    emulator_warp(emulator::WarpOp::kSyncWarp, mask, 0, 0, 32);
}
EMULATOR_INLINE unsigned __ballot_sync(unsigned mask, int predicate) {
    return static_cast<unsigned>(
        emulator_warp(emulator::WarpOp::kBallot, mask, predicate != 0, 0, 32));
}
EMULATOR_INLINE int __any_sync(unsigned mask, int predicate) {
    return static_cast<int>(emulator_warp(emulator::WarpOp::kAny, mask, predicate != 0, 0, 32));
}
EMULATOR_INLINE int __all_sync(unsigned mask, int predicate) {
    return static_cast<int>(emulator_warp(emulator::WarpOp::kAll, mask, predicate != 0, 0, 32));
}
__attribute__((
    error("its result depends on the compiler's schedule; name the lanes in a mask"))) unsigned
__activemask();

namespace emulator {

template <typename T>
EMULATOR_INLINE Bits to_bits(T value) {
    Bits bits = 0;
    __builtin_memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
EMULATOR_INLINE T from_bits(Bits bits) {
    T value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulator

#define EMULATOR_SHUFFLE(name, op, T, Operand)                                               \
    EMULATOR_INLINE T name(unsigned mask, T value, Operand operand, int width = 32) {        \
        return emulator::from_bits<T>(emulator_warp(emulator::WarpOp::op, mask,              \
                                                    emulator::to_bits(value),                \
                                                    static_cast<unsigned>(operand), width)); \
    }
#define EMULATOR_LANE_VALUES(T)                                                                 \
    EMULATOR_SHUFFLE(__shfl_sync, kShuffle, T, int)                                             \
    EMULATOR_SHUFFLE(__shfl_up_sync, kShuffleUp, T, unsigned)                                   \
    EMULATOR_SHUFFLE(__shfl_down_sync, kShuffleDown, T, unsigned)                               \
    EMULATOR_SHUFFLE(__shfl_xor_sync, kShuffleXor, T, int)                                      \
    EMULATOR_INLINE unsigned __match_any_sync(unsigned mask, T value) {                         \
        return static_cast<unsigned>(                                                           \
            emulator_warp(emulator::WarpOp::kMatchAny, mask, emulator::to_bits(value), 0, 32)); \
    }
EMULATOR_LANE_VALUES(int)
EMULATOR_LANE_VALUES(unsigned)
EMULATOR_LANE_VALUES(long)
EMULATOR_LANE_VALUES(unsigned long)
EMULATOR_LANE_VALUES(long long)
EMULATOR_LANE_VALUES(unsigned long long)
EMULATOR_LANE_VALUES(float)
EMULATOR_LANE_VALUES(double)

#define EMULATOR_REDUCE(name, op, T)                                                         \
    EMULATOR_INLINE T name(unsigned mask, T value) {                                         \
        return static_cast<T>(                                                               \
            emulator_warp(emulator::WarpOp::op, mask, static_cast<unsigned>(value), 0, 32)); \
    }
EMULATOR_REDUCE(__reduce_add_sync, kReduceAdd, int)
EMULATOR_REDUCE(__reduce_add_sync, kReduceAdd, unsigned)
EMULATOR_REDUCE(__reduce_min_sync, kReduceMin, int)
EMULATOR_REDUCE(__reduce_min_sync, kReduceUMin, unsigned)
EMULATOR_REDUCE(__reduce_max_sync, kReduceMax, int)
EMULATOR_REDUCE(__reduce_max_sync, kReduceUMax, unsigned)
EMULATOR_REDUCE(__reduce_and_sync, kReduceAnd, unsigned)
EMULATOR_REDUCE(__reduce_or_sync, kReduceOr, unsigned)
EMULATOR_REDUCE(__reduce_xor_sync, kReduceXor, unsigned)
