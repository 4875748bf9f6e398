// Moving rows in and out of a slot's blocks. Rows are bytes here: UNIT is the widest integer type
// whose size divides a row's and that the addresses are aligned to.
//
// 2^log_lanes neighbouring threads share a row, each taking every 2^log_lanes-th unit.

#include "blocks.cuh"
#include "threads.cuh"

using Unit = UNIT;

// A thread's part of a row.
struct Share {
    long long item;  // which row of the batch
    long long first;
    long long stride;
};

__device__ __forceinline__ Share share(int log_lanes) {
    const long long i = thread_number(), lanes = 1ll << log_lanes;
    return Share{i >> log_lanes, i & (lanes - 1), lanes};
}

// values[i] = the slot's row rows[i]; zeros if that is MISSING, or beyond the num_rows that the
// slot had when the launch was captured into a graph.
extern "C" __global__ void gather(char* const* blocks, Divisor block_rows, long long row_units,
                                  const long long* rows, long long num_rows, Unit* values,
                                  long long size, int log_lanes) {
    const Share my = share(log_lanes);
    if (my.item >= size) return;
    const long long row = rows[my.item];
    Unit* target = values + my.item * row_units;
    if (row < 0 || row >= num_rows) {
#pragma unroll 1
        for (long long k = my.first; k < row_units; k += my.stride) global(target)[k] = Unit{};
        return;
    }
    const auto* source = reinterpret_cast<const Unit*>(
        row_address(blocks, block_rows, row, row_units * sizeof(Unit)));
#pragma unroll 1
    for (long long k = my.first; k < row_units; k += my.stride)
        global(target)[k] = global(source)[k];
}

// The slot's row rows[i] = values[order[i]], unless that is MISSING or beyond the slot; `rows`
// ascends, and of a row that is named several times the last value stays.
extern "C" __global__ void scatter(char* const* blocks, Divisor block_rows, long long row_units,
                                   const long long* rows, const long long* order,
                                   long long num_rows, const Unit* values, long long size,
                                   int log_lanes) {
    const Share my = share(log_lanes);
    if (my.item >= size) return;
    const long long row = rows[my.item];
    if (row < 0 || row >= num_rows) return;
    if (my.item + 1 < size && rows[my.item + 1] == row) return;
    auto* target =
        reinterpret_cast<Unit*>(row_address(blocks, block_rows, row, row_units * sizeof(Unit)));
    const Unit* source = values + order[my.item] * row_units;
#pragma unroll 1
    for (long long k = my.first; k < row_units; k += my.stride)
        global(target)[k] = global(source)[k];
}
