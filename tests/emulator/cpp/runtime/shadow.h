// Who touched each address last: finds two threads that touch it with nothing that orders them.
//
// Ordered are: the accesses of one thread; those before a barrier and those after it; those of two
// lanes before and after a __syncwarp that named both. Shuffles, votes, matches and reductions of a
// warp order no memory, by CUDA's word. Blocks of a launch are never ordered, launches always.
// Atomics do not conflict with each other and order nothing: a lock or a flag does not protect
// plain accesses here, although with the right fences it does on a GPU. A volatile access is an
// atomic one, as in PTX, where it is a relaxed operation of system scope.
#pragma once

#include <cstdint>

#include "machine.h"

namespace emulator {

enum class Access { kRead, kWrite, kAtomic, kAtomicRead };

constexpr bool is_atomic(Access access) {
    return access == Access::kAtomic || access == Access::kAtomicRead;
}
constexpr bool only_reads(Access access) {
    return access == Access::kRead || access == Access::kAtomicRead;
}

struct Record {
    uint32_t serial;  // of the block; 0: none
    uint32_t clock;
    uint16_t thread;
    bool only_reads;
    uint32_t caller;  // relative to the module
};

// The last write covers all that came before it: whatever is ordered after that write is ordered
// after them too. Of the reads (and atomics) since, two by different warps are enough to convict
// every later write that is not ordered after all; two by one warp may let a lane of it escape.
struct Cell {
    Record write;
    Record reads[2];
    Record atomics[2];
    uint32_t by_bytes;  // the word's bytes are recorded one by one, in cells of their own
};

// A stretch of memory with its records: one cell a word, and one a byte for words that some access
// touched in part. Cells are mapped, not cleared: the pages that nothing touches cost nothing.
struct Space {
    uintptr_t base = 0;
    uintptr_t end = 0;
    uintptr_t origin = 0;  // of the cells: base, rounded down to a word
    Cell* words = nullptr;
    Cell* bytes = nullptr;
    bool shared = false;  // one block at a time lives there, and finds nothing written
};

void map_cells(Space& space);
void unmap_cells(Space& space);

[[noreturn]] void report_race(const Space& space, uintptr_t address, Access access,
                              const Record& other, Access other_access, uintptr_t caller);
[[noreturn]] void report_unwritten(uintptr_t address, uintptr_t caller);

class Shadow {
  public:
    Shadow(const Space& space, uintptr_t caller, uint32_t relative_caller, bool only_reads)
        : space_(space),
          caller_(caller),
          me_{machine.now.serial, machine.now.clock, static_cast<uint16_t>(machine.now.thread),
              only_reads, relative_caller} {}

    template <Access access>
    void check(uintptr_t address, uintptr_t size) {
        uintptr_t end = address + size;
        for (uintptr_t word = address & ~uintptr_t{3}; word < end; word += 4) {
            Cell& cell = space_.words[(word - space_.origin) / 4];
            bool whole = word >= address && word + 4 <= end;
            if (whole && !cell.by_bytes) {
                check_cell<access>(cell, word);
                continue;
            }
            if (!cell.by_bytes) split(cell, word);
            uintptr_t from = word < address ? address : word;
            uintptr_t to = word + 4 < end ? word + 4 : end;
            for (uintptr_t byte = from; byte < to; ++byte) {
                check_cell<access>(space_.bytes[byte - space_.origin], byte);
            }
        }
    }

  private:
    bool ordered(const Record& record) const {
        if (record.serial != me_.serial) {
            return space_.shared || record.serial < machine.now.first_serial;
        }
        if (record.thread == me_.thread) return true;
        if (record.thread / kWarp == me_.thread / kWarp) {
            return record.clock <= machine.known[me_.thread][record.thread % kWarp];
        }
        return record.clock <= machine.clock_at_barrier[record.thread];
    }

    void split(Cell& cell, uintptr_t word) {
        cell.by_bytes = 1;
        for (int i = 0; i < 4; ++i) space_.bytes[word - space_.origin + i] = cell;
    }

    template <Access access>
    void check_cell(Cell& cell, uintptr_t address) {
        if (!ordered(cell.write)) {
            report_race(space_, address, access, cell.write, Access::kWrite, caller_);
        }
        if (!is_atomic(access)) {
            for (const Record& record : cell.atomics) {
                if (!ordered(record) && !(record.only_reads && access == Access::kRead)) {
                    Access other = record.only_reads ? Access::kAtomicRead : Access::kAtomic;
                    report_race(space_, address, access, record, other, caller_);
                }
            }
        }
        if (!only_reads(access)) {
            for (const Record& record : cell.reads) {
                if (!ordered(record)) {
                    report_race(space_, address, access, record, Access::kRead, caller_);
                }
            }
        }
        if (access != Access::kWrite && space_.shared && cell.write.serial != me_.serial &&
            !written_by_atomic(cell.atomics[0]) && !written_by_atomic(cell.atomics[1])) {
            report_unwritten(address, caller_);
        }
        if (access == Access::kWrite) {
            cell.write = me_;
        } else {
            keep(access == Access::kRead ? cell.reads : cell.atomics);
        }
    }

    bool written_by_atomic(const Record& record) const {
        return record.serial == me_.serial && !record.only_reads;
    }

    void keep(Record* records) {
        if (ordered(records[0])) {
            records[0] = me_;
        } else if (ordered(records[1]) || same_warp(records[0], records[1]) ||
                   (records[1].only_reads && !me_.only_reads)) {
            records[1] = me_;
        }
    }

    static bool same_warp(const Record& a, const Record& b) {
        return a.serial == b.serial && a.thread / kWarp == b.thread / kWarp;
    }

    const Space& space_;
    uintptr_t caller_;
    Record me_;
};

}  // namespace emulator
