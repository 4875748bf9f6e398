// What compiled kernels call, and how they describe themselves.
//
// Both sides include this file: the runtime (compiled once, not instrumented) and, through
// device/builtins.h, every kernel. Kernels are compiled without the host's headers, as under NVRTC,
// so nothing here may include one or define a name that a kernel might define too.
#pragma once

namespace emulator {

using Bits = unsigned long long;

enum class WarpOp : int {
    kSyncWarp,
    kShuffle,
    kShuffleUp,
    kShuffleDown,
    kShuffleXor,
    kBallot,
    kAny,
    kAll,
    kMatchAny,
    kReduceAdd,
    kReduceMin,
    kReduceMax,
    kReduceUMin,
    kReduceUMax,
    kReduceAnd,
    kReduceOr,
    kReduceXor,
};

enum class BarrierOp : int { kSync, kOr, kAnd, kCount };

struct Index {
    unsigned x, y, z;
};

struct Parameter {
    unsigned size;
    char kind;  // p: pointer, f: floating point, i: integer, bool or enum, s: struct
};

struct Kernel {
    const char* name;
    void (*invoke)(void** arguments);
    const Parameter* parameters;
    unsigned parameter_count;
    unsigned max_threads;  // of __launch_bounds__
};

// Where the linker put a module: [base, end) in all, [shared, end) its __shared__ variables.
struct Module {
    const char* base;
    const char* shared;
    const char* end;
    const Kernel* kernels;
    unsigned kernel_count;
};

}  // namespace emulator

#pragma GCC visibility push(default)
extern "C" {
// An index is constant for as long as a thread runs, so the compiler may call once and keep it.
__attribute__((const)) emulator::Index emulator_thread_index();
__attribute__((const)) emulator::Index emulator_block_index();
__attribute__((const)) emulator::Index emulator_block_dim();
__attribute__((const)) emulator::Index emulator_grid_dim();

// `line` tells barriers apart: unlike its address, it survives what the compiler copies or merges.
int emulator_barrier(emulator::BarrierOp op, int value, unsigned line);
emulator::Bits emulator_warp(emulator::WarpOp op, unsigned mask, emulator::Bits value,
                             unsigned operand, int width);
// A read-modify-write: begin checks, may let other threads run, and returns the memory's bits; no
// other thread runs from there to end, which stores.
emulator::Bits emulator_atomic_begin(const volatile void* address, unsigned size);
void emulator_atomic_end(volatile void* address, unsigned size, emulator::Bits bits);
void emulator_sleep();
void emulator_copy(void* to, const void* from, unsigned long size);
void emulator_fill(void* to, int value, unsigned long size);
void* emulator_dynamic_shared();
int emulator_is_global(const void* address);
int emulator_is_shared(const void* address);
[[noreturn]] void emulator_stop(const char* kind, const char* what);
}
#pragma GCC visibility pop
