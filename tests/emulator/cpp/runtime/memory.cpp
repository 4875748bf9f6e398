// The arena of tensors, the registry of other memory, and shared memory's variables.

#include "memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

namespace emulator {

namespace {

constexpr unsigned char kPoisonGlobal = 0xFF;
constexpr uintptr_t kQuarantineBytes = uintptr_t{64} << 20;
constexpr size_t kDynamicSharedBytes = 227 * 1024;  // the most that sm_90 gives a block

void* map_memory(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::fprintf(stderr, "the emulator cannot reserve %zu bytes of address space\n", bytes);
        std::abort();
    }
    madvise(memory, bytes, MADV_DONTDUMP);
    return memory;
}

// A module's shared memory, and which of its variables each byte belongs to (0: none).
struct SharedMemory {
    Space space;
    std::vector<uint16_t> variable;
    std::vector<std::string> names{""};
};

std::map<uintptr_t, Space> regions;  // by their first address
std::unordered_map<const Module*, SharedMemory> shared_memories;
const Module* module = nullptr;
SharedMemory* shared = nullptr;
Space dynamic_shared;
alignas(1024) char dynamic_shared_memory[kDynamicSharedBytes];

const Space* find_region(uintptr_t address) {
    auto after = regions.upper_bound(address);
    if (after == regions.begin()) return nullptr;
    return &std::prev(after)->second;
}

const char* name_of(Access access) {
    static const char* const names[] = {"read", "write", "atomic access", "volatile read"};
    return names[static_cast<int>(access)];
}

std::string relative_to(uintptr_t address, uintptr_t size, uintptr_t begin, uintptr_t end) {
    std::string of = "an allocation of " + std::to_string(end - begin) + " bytes";
    if (address < begin) {
        return std::to_string(begin - address) + " bytes before the start of " + of;
    }
    if (address + size > end) {
        return std::to_string(address + size - end) + " bytes past the end of " + of;
    }
    return "at byte " + std::to_string(address - begin) + " of " + of;
}

std::string describe_shared(const SharedMemory& memory, uintptr_t address) {
    unsigned variable = memory.variable[address - memory.space.base];
    if (!variable) return "in a gap between shared variables";
    uintptr_t first = address;
    while (first > memory.space.base &&
           memory.variable[first - 1 - memory.space.base] == variable) {
        --first;
    }
    return "at byte " + std::to_string(address - first) + " of shared variable " +
           memory.names[variable];
}

std::string describe(uintptr_t address, uintptr_t size) {
    if (shared && address - shared->space.base < shared->variable.size()) {
        return describe_shared(*shared, address);
    }
    if (address - dynamic_shared.base < kDynamicSharedBytes) {
        return "at byte " + std::to_string(address - dynamic_shared.base) + " of the " +
               std::to_string(dynamic_shared.end - dynamic_shared.base) +
               " bytes of dynamic shared memory";
    }
    if (address - machine.stacks_low < machine.stacks_high - machine.stacks_low) {
        return "in another thread's local memory";
    }
    if (arena().contains(address)) {
        const Allocation* owner = arena().owner(address);
        if (!owner) return "outside every allocation";
        return relative_to(address, size, owner->begin, owner->end) +
               (owner->live ? "" : " that has been freed");
    }
    const Space* region = find_region(address);
    constexpr uintptr_t kNear = 4096;
    if (region && address < region->end + kNear) {
        return relative_to(address, size, region->base, region->end);
    }
    auto after = regions.upper_bound(address);
    if (after != regions.end() && address + kNear > after->first) {
        return relative_to(address, size, after->second.base, after->second.end);
    }
    char text[32];
    std::snprintf(text, sizeof text, "at 0x%llx", static_cast<unsigned long long>(address));
    return text + std::string(", outside every allocation");
}

[[noreturn]] void report_outside(Access access, uintptr_t address, uintptr_t size,
                                 uintptr_t caller) {
    fail("out of bounds",
         std::string(name_of(access)) + " of " + std::to_string(size) + " bytes, " +
             describe(address, size),
         caller);
}

}  // namespace

void map_cells(Space& space) {
    space.origin = space.base & ~uintptr_t{3};
    uintptr_t words = (space.end - space.origin + 3) / 4;
    space.words = static_cast<Cell*>(map_memory(words * sizeof(Cell)));
    space.bytes = static_cast<Cell*>(map_memory(words * 4 * sizeof(Cell)));
}

void unmap_cells(Space& space) {
    uintptr_t words = (space.end - space.origin + 3) / 4;
    munmap(space.words, words * sizeof(Cell));
    munmap(space.bytes, words * 4 * sizeof(Cell));
}

void report_race(const Space& space, uintptr_t address, Access access, const Record& other,
                 Access other_access, uintptr_t caller) {
    std::string who = "thread " + show_thread(other.thread);
    if (other.serial != machine.now.serial) who += " of another block";
    fail("race",
         std::string(name_of(access)) + " " + describe(address, 1) + " and, unordered, a " +
             name_of(other_access) + " by " + who +
             show_caller(other.caller + reinterpret_cast<uintptr_t>(module->base)) +
             (space.shared ? ", in shared memory" : ", in global memory"),
         caller);
}

void report_unwritten(uintptr_t address, uintptr_t caller) {
    fail("uninitialised shared memory",
         "read " + describe(address, 1) + ", which no thread of this block has written", caller);
}

struct Arena::Impl {
    std::deque<Allocation> allocations;
    std::deque<Allocation*> quarantine;
    uintptr_t quarantined = 0;
    std::unordered_map<uintptr_t, std::vector<uintptr_t>> free;  // by their number of chunks
};

namespace {
// A chunk for each red zone beside those of the data, rounded up so that sizes recur.
uintptr_t chunks_for(uintptr_t size) {
    uintptr_t chunks = (size + kChunk - 1) / kChunk + 2;
    uintptr_t step = 1;
    while (step * 8 < chunks) step *= 2;
    return (chunks + step - 1) / step * step;
}
}  // namespace

Arena::Arena() : impl_(new Impl) {
    void* memory = map_memory(kBytes + kChunk);
    space_.base = (reinterpret_cast<uintptr_t>(memory) + kChunk - 1) / kChunk * kChunk;
    space_.end = space_.base + kBytes;
    map_cells(space_);
    owners_ = static_cast<Allocation**>(map_memory(kBytes / kChunk * sizeof(Allocation*)));
}

void* Arena::allocate(size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    uintptr_t chunks = chunks_for(size);
    uintptr_t first;
    auto& free = impl_->free[chunks];
    if (free.empty()) {
        if (next_ + chunks > kBytes / kChunk) throw std::bad_alloc();
        first = next_;
        next_ += chunks;
    } else {
        first = free.back();
        free.pop_back();
    }
    uintptr_t begin = space_.base + (first + 1) * kChunk;
    Allocation& allocation = impl_->allocations.emplace_back(Allocation{begin, begin + size, true});
    for (uintptr_t i = 0; i < chunks; ++i) owners_[first + i] = &allocation;
    std::memset(reinterpret_cast<void*>(begin - kChunk), kPoisonGlobal, kChunk);
    std::memset(reinterpret_cast<void*>(begin), kPoisonGlobal, size + kChunk / 2);
    return reinterpret_cast<void*>(begin);
}

void Arena::release(void* pointer) {
    if (!pointer) return;
    std::lock_guard<std::mutex> lock(mutex_);
    Allocation* allocation = owners_[(reinterpret_cast<uintptr_t>(pointer) - space_.base) / kChunk];
    allocation->live = false;
    std::memset(pointer, kPoisonGlobal, allocation->end - allocation->begin);
    impl_->quarantine.push_back(allocation);
    impl_->quarantined += allocation->end - allocation->begin + 2 * kChunk;
    while (impl_->quarantined > kQuarantineBytes) reuse_oldest();
}

void Arena::reuse_oldest() {
    Allocation* allocation = impl_->quarantine.front();
    impl_->quarantine.pop_front();
    uintptr_t size = allocation->end - allocation->begin;
    impl_->quarantined -= size + 2 * kChunk;
    impl_->free[chunks_for(size)].push_back((allocation->begin - space_.base) / kChunk - 1);
}

// Tensors may outlive every destructor.
static Arena& the_arena = *new Arena;

Arena& arena() { return the_arena; }

void begin_launch_memory(const Module* launched, size_t dynamic_shared_bytes) {
    module = launched;
    auto found = shared_memories.find(launched);
    shared = found == shared_memories.end() ? nullptr : &found->second;
    if (!dynamic_shared.words) {
        dynamic_shared.base = reinterpret_cast<uintptr_t>(dynamic_shared_memory);
        dynamic_shared.end = dynamic_shared.base + kDynamicSharedBytes;
        dynamic_shared.shared = true;
        map_cells(dynamic_shared);
    }
    dynamic_shared.end = dynamic_shared.base + dynamic_shared_bytes;
}

void begin_block_memory() {
    if (shared) {
        std::memset(reinterpret_cast<void*>(shared->space.base), kPoisonShared,
                    shared->space.end - shared->space.base);
    }
    std::memset(dynamic_shared_memory, kPoisonShared, dynamic_shared.end - dynamic_shared.base);
}

template <Access access>
void touch(uintptr_t address, uintptr_t size, uintptr_t caller) {
    const Current& now = machine.now;
    if (address - now.stack_low < now.stack_high - now.stack_low) return;
    uintptr_t base = reinterpret_cast<uintptr_t>(module->base);
    const Space* space = nullptr;
    Arena& tensors = arena();
    if (tensors.contains(address)) {
        const Allocation* owner = tensors.owner(address);
        if (!owner || !owner->live || address < owner->begin || address + size > owner->end) {
            report_outside(access, address, size, caller);
        }
        space = &tensors.space();
    } else if (shared && address - shared->space.base < shared->variable.size()) {
        const uint16_t* variable = &shared->variable[address - shared->space.base];
        if (address + size > shared->space.end || !*variable || *variable != variable[size - 1]) {
            report_outside(access, address, size, caller);
        }
        space = &shared->space;
    } else if (address - dynamic_shared.base < kDynamicSharedBytes) {
        if (address + size > dynamic_shared.end) report_outside(access, address, size, caller);
        space = &dynamic_shared;
    } else if (address - base < static_cast<uintptr_t>(module->shared - module->base)) {
        if (only_reads(access)) return;  // a constant
        fail("out of bounds", "write to a constant or to a variable of the module", caller);
    } else {
        space = find_region(address);
        if (!space || address + size > space->end) report_outside(access, address, size, caller);
    }
    Shadow(*space, caller, static_cast<uint32_t>(caller - base), only_reads(access))
        .check<access>(address, size);
}

template void touch<Access::kRead>(uintptr_t, uintptr_t, uintptr_t);
template void touch<Access::kWrite>(uintptr_t, uintptr_t, uintptr_t);
template void touch<Access::kAtomic>(uintptr_t, uintptr_t, uintptr_t);
template void touch<Access::kAtomicRead>(uintptr_t, uintptr_t, uintptr_t);

}  // namespace emulator

using namespace emulator;

#pragma GCC visibility push(default)
extern "C" {

void* emulator_dynamic_shared() { return dynamic_shared_memory; }

int emulator_is_shared(const void* pointer) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    return (shared && address - shared->space.base < shared->variable.size()) ||
           address - dynamic_shared.base < kDynamicSharedBytes;
}

int emulator_is_global(const void* pointer) {
    uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    return !emulator_is_shared(pointer) &&
           address - machine.stacks_low >= machine.stacks_high - machine.stacks_low;
}

// Makes memory that was not allocated in the arena known to the checks.
void emulator_register(uintptr_t begin, uintptr_t size) {
    for (auto it = regions.begin(); it != regions.end();) {
        bool overlaps = it->second.base < begin + size && begin < it->second.end;
        if (overlaps) unmap_cells(it->second);
        it = overlaps ? regions.erase(it) : std::next(it);
    }
    Space space;
    space.base = begin;
    space.end = begin + size;
    map_cells(space);
    regions.emplace(begin, space);
}

void emulator_unregister_all() {
    for (auto& [begin, space] : regions) unmap_cells(space);
    regions.clear();
}

int emulator_in_arena(uintptr_t address) { return arena().contains(address); }

// Names the bytes [offset, offset + size) of a module's shared memory.
void emulator_add_shared(const Module* launched, const char* name, uintptr_t offset,
                         uintptr_t size) {
    SharedMemory& memory = shared_memories[launched];
    if (!memory.space.words) {
        memory.space.base = reinterpret_cast<uintptr_t>(launched->shared);
        memory.space.end = reinterpret_cast<uintptr_t>(launched->end);
        memory.space.shared = true;
        memory.variable.resize(memory.space.end - memory.space.base);
        map_cells(memory.space);
    }
    memory.names.push_back(name);
    uintptr_t first = reinterpret_cast<uintptr_t>(launched->base) + offset - memory.space.base;
    std::fill_n(memory.variable.begin() + static_cast<long>(first), size,
                static_cast<uint16_t>(memory.names.size() - 1));
}
}
#pragma GCC visibility pop
