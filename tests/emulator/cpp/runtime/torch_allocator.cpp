// Lets torch take the memory of new CPU tensors from the arena, and gives its allocator back.

#include <c10/core/CPUAllocator.h>

#include "memory.h"

namespace {

void release(void* pointer) { emulator::arena().release(pointer); }

class ArenaAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t size) override {
        void* data = size ? emulator::arena().allocate(size) : nullptr;
        return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &release; }
    void copy_data(void* to, const void* from, size_t size) const override {
        default_copy_data(to, from, size);
    }
};

ArenaAllocator allocator;  // tensors that outlive the emulation still call it
c10::Allocator* replaced = nullptr;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Returns whether it was torch's own until now.
bool emulator_install_allocator() {
    if (replaced) return false;
    replaced = c10::GetCPUAllocator();
    c10::SetCPUAllocator(&allocator);
    return true;
}

void emulator_remove_allocator() {
    if (!replaced) return;
    c10::SetCPUAllocator(replaced);
    replaced = nullptr;
}
}
#pragma GCC visibility pop
