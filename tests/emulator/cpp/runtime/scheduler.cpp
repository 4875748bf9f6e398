// Runs a grid: block after block, the threads of each as fibers on stacks of their own.
//
// Every order is drawn from the seed: blocks, warps, lanes, who goes on after a meeting, and where
// a thread is interrupted (at atomics, volatile accesses and sleeps; nowhere else).

#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <numeric>

#include "machine.h"
#include "memory.h"

namespace emulator {

Machine machine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr uint64_t kIdleLimit = 100'000;  // for each thread that has not finished

// The ready threads. Each is in it at most once, so a ring of this size never overflows.
class ReadyQueue {
  public:
    void clear() { head_ = tail_ = 0; }
    bool empty() const { return head_ == tail_; }
    void push_back(unsigned thread) { ring_[tail_++ % kMaxThreads] = thread; }
    void push_front(unsigned thread) { ring_[--head_ % kMaxThreads] = thread; }
    unsigned pop() { return ring_[head_++ % kMaxThreads]; }

  private:
    unsigned ring_[kMaxThreads];
    unsigned head_ = 0, tail_ = 0;  // wrap around together: 2**32 is a multiple of the size
};

ReadyQueue ready;
void* launcher_stack_pointer;
char* stacks = nullptr;

// Saves the callee-saved registers on the stack, its pointer in *save, and goes on where `to` was
// saved. ucontext would make a system call at every switch, and cost twenty times as much.
extern "C" void emulator_swap(void** save, void* to);
asm(R"(
    .text
    .hidden emulator_swap
    .globl emulator_swap
    .type emulator_swap, @function
emulator_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_swap, .-emulator_swap
)");

[[noreturn]] void run_thread() {
    machine.kernel->invoke(machine.arguments);
    unsigned thread = machine.now.thread;
    machine.fibers[thread].state = State::kDone;
    machine.unfinished -= 1;
    machine.idle = 0;
    switch_from(thread);
    __builtin_unreachable();
}

void prepare(unsigned thread) {
    char* top = stacks + (thread + 1) * kStackBytes;
    void** sp = reinterpret_cast<void**>(top) - 2;  // aligned as after a call, once ret has popped
    *sp = reinterpret_cast<void*>(&run_thread);
    Fiber& fiber = machine.fibers[thread];
    fiber = Fiber{};
    fiber.stack_pointer = sp - 6;
    fiber.clock = 1;
}

void make_stacks() {
    void* memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks = static_cast<char*>(memory);
    machine.stacks_low = reinterpret_cast<uintptr_t>(stacks);
    machine.stacks_high = machine.stacks_low + kMaxThreads * kStackBytes;
    for (unsigned t = 0; t < kMaxThreads; ++t) {  // a stack that overflows must not hit the next
        mprotect(stacks + t * kStackBytes, static_cast<size_t>(getpagesize()), PROT_NONE);
    }
}

template <typename T>
void shuffle(T* begin, size_t count) {
    for (size_t i = count; i > 1; --i) std::swap(begin[i - 1], begin[machine.random.below(i)]);
}

void run_block() {
    ready.clear();
    begin_block_memory();
    std::memset(machine.known, 0, sizeof machine.known[0] * machine.threads);
    std::memset(machine.at_warp_op, 0, sizeof machine.at_warp_op);
    std::memset(machine.clock_at_barrier, 0, sizeof machine.clock_at_barrier);
    machine.unfinished = machine.threads;
    machine.at_barrier = 0;
    machine.idle = 0;
    unsigned warps[kMaxThreads / kWarp];
    unsigned warp_count = (machine.threads + kWarp - 1) / kWarp;
    std::iota(warps, warps + warp_count, 0u);
    shuffle(warps, warp_count);
    for (unsigned w = 0; w < warp_count; ++w) {
        unsigned lanes[kWarp];
        unsigned first = warps[w] * kWarp;
        unsigned count = std::min(kWarp, machine.threads - first);
        std::iota(lanes, lanes + count, first);
        for (unsigned i = 0; i < count; ++i) prepare(lanes[i]);
        release(lanes, count, false);
    }
    unsigned next = ready.pop();
    enter(next);
    emulator_swap(&launcher_stack_pointer, machine.fibers[next].stack_pointer);
    // Here again: no thread is ready, or one has failed.
    if (machine.fault.empty() && machine.unfinished) report_stuck();
}

}  // namespace

void set_fault(const std::string& kind, const std::string& what) {
    machine.fault = kind + ": kernel " + machine.kernel->name + ", block " +
                    show(machine.block_index) + ", " + what;
}

void enter(unsigned thread) {
    Current& now = machine.now;
    now.thread = thread;
    now.clock = machine.fibers[thread].clock;
    now.stack_low = machine.stacks_low + thread * kStackBytes;
    now.stack_high = now.stack_low + kStackBytes;
}

void switch_from(unsigned thread) {
    void** save = &machine.fibers[thread].stack_pointer;
    if (ready.empty()) {
        emulator_swap(save, launcher_stack_pointer);
        return;
    }
    unsigned next = ready.pop();
    enter(next);
    if (next == thread) return;
    emulator_swap(save, machine.fibers[next].stack_pointer);
}

void release(unsigned* threads, size_t count, bool front) {
    shuffle(threads, count);
    for (size_t i = 0; i < count; ++i) {
        machine.fibers[threads[i]].state = State::kReady;
        if (front) {
            ready.push_front(threads[i]);
        } else {
            ready.push_back(threads[i]);
        }
    }
}

std::string show(Index index) {
    return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
           std::to_string(index.z) + ")";
}

std::string show_thread(unsigned thread) { return show(machine.thread_index[thread]); }

std::string show_caller(uintptr_t caller) {
    return caller ? " [@" + std::to_string(caller) + "]" : "";
}

Index unflatten(uint64_t index, Index extent) {
    return {static_cast<unsigned>(index % extent.x),
            static_cast<unsigned>(index / extent.x % extent.y),
            static_cast<unsigned>(index / extent.x / extent.y)};
}

void fail(const std::string& kind, const std::string& what, uintptr_t caller) {
    set_fault(kind,
              "thread " + show_thread(machine.now.thread) + ": " + what + show_caller(caller));
    void* abandoned;
    // The fibers of this block are dropped where they stand; kernels own nothing to release.
    emulator_swap(&abandoned, launcher_stack_pointer);
    __builtin_unreachable();
}

void maybe_preempt(unsigned one_in) {
    if (ready.empty() || machine.random.below(one_in)) return;
    ready.push_back(machine.now.thread);
    switch_from(machine.now.thread);
}

void count_idle() {
    if (++machine.idle > kIdleLimit * machine.unfinished) {
        fail("endless wait",
             "it repeats an operation that changes nothing, and no other thread " +
                 std::string("of the block changes anything either"),
             0);
    }
}

}  // namespace emulator

using namespace emulator;

#pragma GCC visibility push(default)
extern "C" {

Index emulator_thread_index() { return machine.thread_index[machine.now.thread]; }
Index emulator_block_index() { return machine.block_index; }
Index emulator_block_dim() { return machine.block; }
Index emulator_grid_dim() { return machine.grid; }

void emulator_sleep() {
    count_idle();
    maybe_preempt(1);
}

void emulator_stop(const char* kind, const char* what) {
    fail(kind, what, reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

// Runs a grid. Returns null, or what went wrong; the text lives until the next launch.
const char* emulator_launch(const Module* module, const Kernel* kernel, const unsigned* grid,
                            const unsigned* block, void** arguments, size_t dynamic_shared,
                            uint64_t seed, int checked) {
    if (!stacks) make_stacks();
    machine.kernel = kernel;
    machine.arguments = arguments;
    machine.grid = {grid[0], grid[1], grid[2]};
    machine.block = {block[0], block[1], block[2]};
    machine.threads = block[0] * block[1] * block[2];
    for (unsigned t = 0; t < machine.threads; ++t) {
        machine.thread_index[t] = unflatten(t, machine.block);
    }
    machine.checked = checked;
    machine.fault.clear();
    machine.random.seed(seed);
    machine.now.first_serial = machine.now.serial + 1;
    begin_launch_memory(module, dynamic_shared);

    std::vector<uint64_t> order(uint64_t{grid[0]} * grid[1] * grid[2]);
    std::iota(order.begin(), order.end(), uint64_t{0});
    shuffle(order.data(), order.size());
    for (uint64_t index : order) {
        machine.block_index = unflatten(index, machine.grid);
        machine.now.serial += 1;
        run_block();
        if (!machine.fault.empty()) break;
    }
    return machine.fault.empty() ? nullptr : machine.fault.c_str();
}
}
#pragma GCC visibility pop
