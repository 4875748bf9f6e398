// Where threads meet: barriers, shuffles, votes, and what becomes of a meeting that some miss.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "machine.h"
#include "scheduler.h"

namespace emulator {

namespace {

const char* name_of(BarrierOp op) {
    static const char* const names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and",
                                        "__syncthreads_count"};
    return names[static_cast<int>(op)];
}

const char* name_of(WarpOp op) {
    static const char* const names[] = {
        "__syncwarp",        "__shfl_sync",       "__shfl_up_sync",    "__shfl_down_sync",
        "__shfl_xor_sync",   "__ballot_sync",     "__any_sync",        "__all_sync",
        "__match_any_sync",  "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
        "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync", "__reduce_or_sync",
        "__reduce_xor_sync"};
    return names[static_cast<int>(op)];
}

std::string hex(unsigned mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

std::string describe(const Fiber& fiber) {
    switch (fiber.state) {
        case State::kDone:
            return "has exited";
        case State::kAtBarrier:
            return std::string("waits at ") + name_of(fiber.barrier) + show_caller(fiber.caller);
        case State::kAtWarpOp:
            return std::string("waits at ") + name_of(fiber.op) + " with mask " + hex(fiber.mask) +
                   show_caller(fiber.caller);
        default:
            return "runs";
    }
}

// At __syncwarp: whatever a lane that came did before, the lanes that came are ordered after it.
void order_lanes(unsigned first, unsigned mask) {
    uint32_t joined[kWarp] = {};
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) continue;
        for (unsigned l = 0; l < kWarp; ++l) {
            joined[l] = std::max(joined[l], machine.known[first + lane][l]);
        }
        joined[lane] = std::max(joined[lane], machine.fibers[first + lane].clock);
    }
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) continue;
        std::memcpy(machine.known[first + lane], joined, sizeof joined);
        machine.fibers[first + lane].clock += 1;
    }
}

Bits reduce(WarpOp op, const Fiber* lanes, unsigned mask) {
    bool started = false;
    uint32_t total = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) continue;
        uint32_t value = static_cast<uint32_t>(lanes[lane].value);
        int32_t is = static_cast<int32_t>(value), was = static_cast<int32_t>(total);
        if (!started) {
            total = value;
            started = true;
        } else if (op == WarpOp::kReduceAdd) {
            total += value;
        } else if (op == WarpOp::kReduceMin) {
            total = static_cast<uint32_t>(std::min(is, was));
        } else if (op == WarpOp::kReduceMax) {
            total = static_cast<uint32_t>(std::max(is, was));
        } else if (op == WarpOp::kReduceUMin) {
            total = std::min(value, total);
        } else if (op == WarpOp::kReduceUMax) {
            total = std::max(value, total);
        } else if (op == WarpOp::kReduceAnd) {
            total &= value;
        } else if (op == WarpOp::kReduceOr) {
            total |= value;
        } else {
            total ^= value;
        }
    }
    return total;
}

// The lane that a shuffle reads, by the PTX manual's rules for shfl.sync.
unsigned shuffle_source(const Fiber& fiber, unsigned lane) {
    unsigned width = static_cast<unsigned>(fiber.width);
    unsigned segment = lane & ~(width - 1);
    unsigned last = segment | (width - 1);
    unsigned operand = fiber.operand & (kWarp - 1);
    switch (fiber.op) {
        case WarpOp::kShuffle:
            return segment | (operand & (width - 1));
        case WarpOp::kShuffleUp:
            return lane < segment + operand ? lane : lane - operand;
        case WarpOp::kShuffleDown:
            return lane + operand > last ? lane : lane + operand;
        default:
            return (lane ^ operand) > last ? lane : lane ^ operand;
    }
}

void complete(WarpOp op, unsigned first, unsigned mask) {
    Fiber* lanes = machine.fibers + first;
    Bits results[kWarp] = {};
    unsigned votes = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if ((mask >> lane & 1) && lanes[lane].value) votes |= 1u << lane;
    }
    Bits reduced = op >= WarpOp::kReduceAdd ? reduce(op, lanes, mask) : 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) continue;
        if (op >= WarpOp::kShuffle && op <= WarpOp::kShuffleXor) {
            unsigned source = shuffle_source(lanes[lane], lane);
            if (!(mask >> source & 1)) {
                enter(first + lane);
                fail("warp divergence",
                     std::string(name_of(op)) + " reads lane " + std::to_string(source) +
                         ", which its mask " + hex(mask) + " does not name",
                     lanes[lane].caller);
            }
            results[lane] = lanes[source].value;
        } else if (op == WarpOp::kBallot) {
            results[lane] = votes;
        } else if (op == WarpOp::kAny) {
            results[lane] = votes != 0;
        } else if (op == WarpOp::kAll) {
            results[lane] = votes == mask;
        } else if (op == WarpOp::kMatchAny) {
            for (unsigned l = 0; l < kWarp; ++l) {
                if ((mask >> l & 1) && lanes[l].value == lanes[lane].value) {
                    results[lane] |= Bits{1} << l;
                }
            }
        } else {
            results[lane] = reduced;
        }
    }
    // The others exchange values, and promise nothing about memory.
    if (op == WarpOp::kSyncWarp) order_lanes(first, mask);
    unsigned released[kWarp];
    size_t count = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
        if (!(mask >> lane & 1)) continue;
        lanes[lane].value = results[lane];
        released[count++] = first + lane;
    }
    machine.idle = 0;
    release(released, count, machine.random.below(2) != 0);
}

void open_barrier(BarrierOp op) {
    unsigned nonzero = 0;
    for (unsigned t = 0; t < machine.threads; ++t) nonzero += machine.fibers[t].value != 0;
    Bits result = op == BarrierOp::kOr    ? nonzero != 0
                  : op == BarrierOp::kAnd ? nonzero == machine.threads
                                          : nonzero;
    unsigned released[kMaxThreads];
    std::iota(released, released + machine.threads, 0u);
    for (unsigned t = 0; t < machine.threads; ++t) {
        machine.clock_at_barrier[t] = machine.fibers[t].clock++;
        machine.fibers[t].value = result;
    }
    for (unsigned t = 0; t < machine.threads; ++t) {
        std::memcpy(machine.known[t], machine.clock_at_barrier + t / kWarp * kWarp,
                    sizeof machine.known[t]);
    }
    machine.at_barrier = 0;
    machine.idle = 0;
    release(released, machine.threads, false);
}

}  // namespace

void report_stuck() {
    std::vector<std::pair<std::string, std::vector<unsigned>>> groups;
    bool in_warp = false;
    for (unsigned t = 0; t < machine.threads; ++t) {
        in_warp |= machine.fibers[t].state == State::kAtWarpOp;
        std::string what = describe(machine.fibers[t]);
        auto same = std::find_if(groups.begin(), groups.end(),
                                 [&](const auto& group) { return group.first == what; });
        if (same == groups.end()) same = groups.insert(groups.end(), {what, {}});
        same->second.push_back(t);
    }
    std::string text;
    for (const auto& [what, threads] : groups) {
        text += text.empty() ? "" : "; ";
        text += "thread " + show_thread(threads[0]);
        if (threads.size() > 1) {
            text += " and " + std::to_string(threads.size() - 1) + " more (the last is " +
                    show_thread(threads.back()) + ")";
        }
        text += " " + what;
    }
    set_fault(in_warp ? "warp divergence" : "barrier divergence", text);
}

}  // namespace emulator

using namespace emulator;

#pragma GCC visibility push(default)
extern "C" {

int emulator_barrier(BarrierOp op, int value, unsigned line) {
    Fiber& me = machine.fibers[machine.now.thread];
    me.barrier = op;
    me.line = line;
    me.value = value != 0;
    me.caller = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    for (unsigned t = 0; machine.at_barrier && t < machine.threads; ++t) {
        const Fiber& other = machine.fibers[t];
        if (other.state != State::kAtBarrier) continue;
        if (other.barrier != op || other.line != line) {
            fail("barrier divergence",
                 std::string("calls ") + name_of(op) + " while thread " + show_thread(t) + " " +
                     describe(other),
                 me.caller);
        }
        break;  // those that wait already agree with each other
    }
    me.state = State::kAtBarrier;
    if (++machine.at_barrier == machine.threads) open_barrier(op);
    switch_from(machine.now.thread);
    return static_cast<int>(me.value);
}

Bits emulator_warp(WarpOp op, unsigned mask, Bits value, unsigned operand, int width) {
    unsigned thread = machine.now.thread;
    unsigned first = thread / kWarp * kWarp;
    unsigned lane = thread - first;
    Fiber& me = machine.fibers[thread];
    me.op = op;
    me.mask = mask;
    me.value = value;
    me.operand = operand;
    me.width = width;
    me.caller = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    if (!(mask >> lane & 1)) {
        fail("warp divergence",
             std::string(name_of(op)) + ": mask " + hex(mask) + " does not name its own lane " +
                 std::to_string(lane),
             me.caller);
    }
    if (width < 1 || width > 32 || (width & (width - 1))) {
        fail("warp divergence",
             "width must be a power of two up to 32, got " + std::to_string(width), me.caller);
    }
    me.state = State::kAtWarpOp;
    unsigned& waiting = machine.at_warp_op[thread / kWarp];
    // Lanes that wait with one mask agree already, so one of them is enough to compare with.
    for (unsigned rest = waiting; rest;) {
        unsigned l = static_cast<unsigned>(__builtin_ctz(rest));
        const Fiber& other = machine.fibers[first + l];
        bool meet = (mask >> l & 1) || (other.mask >> lane & 1);
        if (meet && (other.op != op || other.mask != mask)) {
            fail("warp divergence",
                 std::string("calls ") + name_of(op) + " with mask " + hex(mask) +
                     " while thread " + show_thread(first + l) + " " + describe(other),
                 me.caller);
        }
        rest &= ~other.mask;
    }
    waiting |= 1u << lane;
    if (!(mask & ~waiting)) {
        waiting &= ~mask;
        complete(op, first, mask);
    }
    switch_from(thread);
    return me.value;
}
}
#pragma GCC visibility pop
