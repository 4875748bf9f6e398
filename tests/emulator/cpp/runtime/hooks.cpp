// What g++ -fsanitize=thread,alignment,bounds,integer-divide-by-zero makes a kernel call.
//
// The kernels are linked without the sanitizers' own libraries, so the calls arrive here. Alignment
// is checked by the type that the kernel names (a float4 needs 16 bytes), before the optimizer
// splits or merges accesses; bounds are those of arrays whose size the compiler knows.

#include <cstring>
#include <string>

#include "memory.h"

using namespace emulator;

namespace {

constexpr unsigned kPreemptVolatile = 4;  // of so many volatile accesses, one lets others run

struct SourceLocation {
    const char* file;
    unsigned line, column;
};

struct TypeDescriptor {
    unsigned short kind, info;
    char name[1];
};

struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    unsigned char log_alignment, check_kind;
};

struct OutOfBounds {
    SourceLocation location;
    const TypeDescriptor *array, *index;
};

uintptr_t as_address(const volatile void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace

#define CALLER reinterpret_cast<uintptr_t>(__builtin_return_address(0))

#define HOOKS(size)                                                                          \
    void __tsan_read##size(void* p) { touch<Access::kRead>(as_address(p), size, CALLER); }   \
    void __tsan_write##size(void* p) { touch<Access::kWrite>(as_address(p), size, CALLER); } \
    void __tsan_volatile_read##size(void* p) {                                               \
        count_idle();                                                                        \
        maybe_preempt(kPreemptVolatile);                                                     \
        touch<Access::kAtomicRead>(as_address(p), size, CALLER);                             \
    }                                                                                        \
    void __tsan_volatile_write##size(void* p) {                                              \
        maybe_preempt(kPreemptVolatile);                                                     \
        touch<Access::kAtomic>(as_address(p), size, CALLER);                                 \
        machine.idle = 0;                                                                    \
    }

#pragma GCC visibility push(default)
extern "C" {

void __tsan_init() {}

HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

void __tsan_read_range(void* p, size_t size) {
    if (size) touch<Access::kRead>(as_address(p), size, CALLER);
}

void __tsan_write_range(void* p, size_t size) {
    if (size) touch<Access::kWrite>(as_address(p), size, CALLER);
}

void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t address) {
    unsigned alignment = 1u << data->log_alignment;
    fail("misaligned access",
         std::string("access of type ") + data->type->name +
             " at an address that is no multiple of " + std::to_string(alignment) + " bytes but " +
             std::to_string(address % alignment) + " bytes past one",
         CALLER);
}

void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
    fail("out of bounds",
         "index " + std::to_string(static_cast<long>(index)) + " of an array of type " +
             data->array->name,
         CALLER);
}

void __ubsan_handle_divrem_overflow(void*, uintptr_t, uintptr_t) {
    fail("division by zero", "integer division by zero, or of the smallest number by -1", CALLER);
}

Bits emulator_atomic_begin(const volatile void* address, unsigned size) {
    constexpr unsigned kPreempt = 4;
    maybe_preempt(kPreempt);
    if (machine.checked) {
        if (as_address(address) % size) {
            fail("misaligned access", "atomic access of " + std::to_string(size) + " bytes",
                 CALLER);
        }
        touch<Access::kAtomic>(as_address(address), size, CALLER);
    }
    Bits bits = 0;
    std::memcpy(&bits, const_cast<const void*>(address), size);
    return bits;
}

void emulator_atomic_end(volatile void* address, unsigned size, Bits bits) {
    constexpr unsigned kPreempt = 8;
    if (std::memcmp(const_cast<const void*>(address), &bits, size) == 0) {
        count_idle();
    } else {
        std::memcpy(const_cast<void*>(address), &bits, size);
        machine.idle = 0;
    }
    maybe_preempt(kPreempt);
}

void emulator_copy(void* to, const void* from, unsigned long size) {
    if (machine.checked && size) {
        touch<Access::kRead>(as_address(from), size, CALLER);
        touch<Access::kWrite>(as_address(to), size, CALLER);
    }
    std::memmove(to, from, size);
}

void emulator_fill(void* to, int value, unsigned long size) {
    if (machine.checked && size) touch<Access::kWrite>(as_address(to), size, CALLER);
    std::memset(to, value, size);
}
}
#pragma GCC visibility pop
