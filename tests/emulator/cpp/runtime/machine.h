// The emulated GPU: one block at a time, its threads as fibers of the OS thread that launches.
//
// Not modelled: the memory model (every access is sequentially consistent, and takes effect at
// once), time, caches, blocks that run side by side. A block that waits for another one to do
// something therefore spins for ever, which is reported.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "api.h"

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned char kPoisonShared = 0xA5;

enum class State { kReady, kAtBarrier, kAtWarpOp, kDone };

struct Fiber {
    void* stack_pointer;
    State state;
    uint32_t clock;  // counts the synchronisations that this thread has taken part in
    // What it waits for.
    BarrierOp barrier;
    unsigned line;  // of the barrier
    WarpOp op;
    unsigned mask;
    Bits value;  // in: its operand; out: its result
    unsigned operand;
    int width;
    uintptr_t caller;
};

// Who runs, in a form that the checks of each access can read quickly.
struct Current {
    unsigned thread;
    uint32_t clock;
    uint32_t serial;        // of the block: unique in the process
    uint32_t first_serial;  // of the launch: what an earlier launch did is ordered before it
    uintptr_t stack_low, stack_high;
};

// xorshift64*: good enough to shuffle with, and ten times as fast as the standard's engines.
class Random {
  public:
    void seed(uint64_t seed) {
        state_ = (seed + 1) * 0x9e3779b97f4a7c15u | 1;
        for (int i = 0; i < 8; ++i) below(1);  // near seeds start alike
    }
    unsigned below(uint64_t bound) {  // bound ≤ 2**32
        state_ ^= state_ >> 12;
        state_ ^= state_ << 25;
        state_ ^= state_ >> 27;
        return static_cast<unsigned>((state_ * 0x2545f4914f6cdd1du >> 32) * bound >> 32);
    }

  private:
    uint64_t state_ = 1;
};

struct Machine {
    Current now;
    bool checked = true;
    const Kernel* kernel = nullptr;
    void** arguments = nullptr;
    Index grid, block, block_index;
    Index thread_index[kMaxThreads];
    unsigned threads = 0;
    unsigned unfinished = 0;
    unsigned at_barrier = 0;
    uint64_t idle = 0;  // operations since anything changed
    uintptr_t stacks_low = 0, stacks_high = 0;
    Random random;
    Fiber fibers[kMaxThreads];
    unsigned at_warp_op[kMaxThreads / kWarp];  // the lanes of each warp that wait for others
    // clock_at_barrier[t]: thread t's clock at the last barrier, which all threads have seen.
    uint32_t clock_at_barrier[kMaxThreads];
    // known[t][l]: the clock of lane l of t's warp that thread t is ordered after.
    uint32_t known[kMaxThreads][kWarp];
    std::string fault;
};

extern Machine machine;

// Ends the launch with a fault of the running thread. `caller` is where it happened, or 0.
[[noreturn]] void fail(const std::string& kind, const std::string& what, uintptr_t caller);

std::string show(Index index);
std::string show_thread(unsigned thread);
std::string show_caller(uintptr_t caller);  // replaced by a source line in Python
Index unflatten(uint64_t index, Index extent);

// Lets other threads run before the current one goes on, with a probability of 1 / one_in.
void maybe_preempt(unsigned one_in);
// Called after an operation that a waiting thread repeats: reports a wait without end.
void count_idle();

}  // namespace emulator
