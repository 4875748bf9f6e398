// Rows that are behind, brought up to date outside of a step: read (gather_current), or in place
// (catch_up).
//
// A block takes THREADS >> log_lanes rows: a thread for each finds what the row has missed, then
// 2^log_lanes neighbouring threads share a row, each VEC neighbouring columns at a time. Per row of
// width D that is behind, in fp32: 12 D bytes read (4 D where only decay was missed), 128 bytes of
// its rule; 4 D or 12 D bytes written.

#include "elements.cuh"
#include "threads.cuh"
#include "untouched.cuh"

using Acc = Wide<PARAM>::type;
using Own = UNTOUCHED<Acc>;

constexpr int THREADS = 128;

struct Lagging {
    long long num_rows;  // that memory is held for
    Divisor block_rows;
    char* const* param;  // addresses of blocks
    char* const* exp_avg;
    char* const* exp_avg_sq;
    Missed missed;
};

struct Row {
    PARAM* param;  // null: there is no such row, or nothing to do with it
    Acc* exp_avg;
    Acc* exp_avg_sq;
    Own own;
};

// The step of a row's last update; if IN_PLACE it becomes t at once, so that whoever comes later
// with the same row finds it done.
template <bool IN_PLACE>
__device__ __forceinline__ int last_step(const Lagging& table, long long row) {
    int* last = row_number(table.missed.last_step, table.block_rows, row);
    return IN_PLACE ? atomicExch(last, static_cast<int>(table.missed.t)) : *last;
}

template <bool IN_PLACE>
__device__ __forceinline__ void locate(Row& my, const Lagging& table, long long row,
                                       long long dim) {
    my.param = nullptr;
    if (row < 0 || row >= table.num_rows) return;
    const long long param_bytes = dim * sizeof(PARAM), moment_bytes = dim * sizeof(Acc);
    const Divisor& block_rows = table.block_rows;
    my.own.of(table.missed, last_step<IN_PLACE>(table, row));
    if (IN_PLACE && my.own.is_behind == 0) return;
    my.param = reinterpret_cast<PARAM*>(row_address(table.param, block_rows, row, param_bytes));
    if (Own::MOVES) {
        my.exp_avg =
            reinterpret_cast<Acc*>(row_address(table.exp_avg, block_rows, row, moment_bytes));
        my.exp_avg_sq =
            reinterpret_cast<Acc*>(row_address(table.exp_avg_sq, block_rows, row, moment_bytes));
    }
}

// A thread's part: the row of the batch that it works on, with others, and its columns.
struct Part {
    long long item;
    const Row* row;  // null: there is none
    int first_column;
    int stride;
};

// All threads of the block call it together.
template <bool IN_PLACE>
__device__ __forceinline__ Part part(const Lagging& table, const long long* rows, long long size,
                                     long long dim, int log_lanes) {
    __shared__ Row rows_here[THREADS];
    const int thread = threadIdx.x, lanes = 1 << log_lanes, num_rows = THREADS >> log_lanes;
    const long long first = static_cast<long long>(blockIdx.x) * num_rows;
    if (thread < num_rows && first + thread < size)
        locate<IN_PLACE>(rows_here[thread], table, rows[first + thread], dim);
    __syncthreads();
    const int place = thread >> log_lanes;
    const long long item = first + place;
    return Part{item, item < size ? rows_here + place : nullptr, (thread & (lanes - 1)) * VEC,
                lanes * VEC};
}

// A row's elements from `column` on, brought up to date.
struct Current {
    Acc param[VEC];
    Acc exp_avg[VEC];
    Acc exp_avg_sq[VEC];

    __device__ __forceinline__ Current(const Row& row, int column) {
        load(param, row.param + column);
        if (Own::MOVES) {
            load(exp_avg, row.exp_avg + column);
            load(exp_avg_sq, row.exp_avg_sq + column);
        }
        row.own.make_up(param, exp_avg, exp_avg_sq);
    }
};

// values[i] = the row rows[i] as it would be had it missed nothing; zeros if there is no such row.
// Writes to no table.
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_current(Lagging table, const long long* rows, PARAM* values, long long size,
                   long long dim, int log_lanes) {
    const Part my = part<false>(table, rows, size, dim, log_lanes);
    if (!my.row) return;
    PARAM* target = values + my.item * dim;
#pragma unroll 1
    for (int column = my.first_column; column < dim; column += my.stride) {
        using Columns = Vec<PARAM, VEC>;
        auto* to = reinterpret_cast<Columns*>(global(target + column));
        if (!my.row->param) {
            *to = Columns{};
        } else if (my.row->own.is_behind != 0) {
            store(target + column, Current(*my.row, column).param);
        } else {  // bit for bit
            *to = *reinterpret_cast<const Columns*>(global(my.row->param + column));
        }
    }
}

// Brings the rows rows[i] up to date in place. A row that is named several times is served once, by
// whoever is the first to set its last step.
extern "C" __global__ void __launch_bounds__(THREADS)
    catch_up(Lagging table, const long long* rows, long long size, long long dim, int log_lanes) {
    const Part my = part<true>(table, rows, size, dim, log_lanes);
    if (!my.row || !my.row->param) return;
    const Row& row = *my.row;
#pragma unroll 1
    for (int column = my.first_column; column < dim; column += my.stride) {
        const Current now(row, column);
        store(row.param + column, now.param);
        if (Own::MOVES) {
            store(row.exp_avg + column, now.exp_avg);
            store(row.exp_avg_sq + column, now.exp_avg_sq);
        }
    }
}
