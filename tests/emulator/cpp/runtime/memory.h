// Which addresses a kernel may touch: the arena of torch's tensors, registered memory, shared
// memory, constants of its module and its own stack.
#pragma once

#include <cstdint>
#include <mutex>

#include "machine.h"
#include "shadow.h"

namespace emulator {

constexpr uintptr_t kChunk = 512;  // CUDA's allocator aligns tensors to this

struct Allocation {
    uintptr_t begin, end;
    bool live;
};

// Memory for tensors: each has a red zone of at least 512 bytes on both sides, starts filled with
// 0xFF (a NaN, or -1), and is filled so again when freed; freed memory is used again late.
class Arena {
  public:
    Arena();
    void* allocate(size_t size);
    void release(void* pointer);

    const Space& space() const { return space_; }
    bool contains(uintptr_t address) const { return address - space_.base < kBytes; }
    // The allocation whose memory or red zone holds the address, or null.
    const Allocation* owner(uintptr_t address) const {
        return owners_[(address - space_.base) / kChunk];
    }

  private:
    static constexpr uintptr_t kBytes = uintptr_t{2} << 30;  // of address space
    void reuse_oldest();

    std::mutex mutex_;
    Space space_;
    Allocation** owners_ = nullptr;
    uintptr_t next_ = 0;
    struct Impl;
    Impl* impl_;
};

Arena& arena();

void begin_launch_memory(const Module* module, size_t dynamic_shared);
void begin_block_memory();

// Checks an access of the running thread and records it. `caller` is where the kernel makes it.
template <Access access>
void touch(uintptr_t address, uintptr_t size, uintptr_t caller);

}  // namespace emulator
