// Rows in blocks: row r of a slot is row r % block_rows of block r / block_rows.

#pragma once

#include "memory.cuh"

// Division by a number that stays, without a division. With 2^(shift-1) < divisor <= 2^shift and
// magic = ceil(2^(63+shift) / divisor), n / divisor = floor(n * magic / 2^(63+shift)) for every n
// below 2^63 (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994,
// theorem 4.2).
struct Divisor {
    long long divisor;
    unsigned long long magic;
    long long shift;
};

__device__ __forceinline__ long long divide(long long n, const Divisor& by) {
    return static_cast<long long>(__umul64hi(2ull * n, by.magic) >> by.shift);
}

// The address of a row of `row_bytes` bytes.
__device__ __forceinline__ char* row_address(char* const* blocks, const Divisor& block_rows,
                                             long long row, long long row_bytes) {
    const long long block = divide(row, block_rows);
    return global(blocks)[block] + (row - block * block_rows.divisor) * row_bytes;
}
