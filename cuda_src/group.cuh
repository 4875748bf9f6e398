// What the host tells the kernels about the tables and the gradients of one group: tables of one
// device, dtype, gradient dtype and width. The layouts are mirrored in engines/cuda/_group.py.

#pragma once

#include "adamw_math.cuh"
#include "blocks.cuh"

// The gradients of one lookup: rows [n], grad [n, D].
struct Piece {
    long long first_position;  // among the gradients of the group, in order of occurrence
    const long long* rows;
    const char* grad;
    long long row_stride;  // elements
    long long column_stride;
    long long table;
};

// A table, as far as its gradients are concerned. Rows of all tables are numbered through: `key`.
struct Rows {
    long long first_key;
    long long num_rows;
    const long long* row_count;  // if not null: how many of num_rows are in use
    long long* fault;            // [2]: whether a row was out of range, and which
    long long drop_missing;      // row -1 is dropped, not out of range
};

// A table, as far as its update is concerned.
struct Table {
    long long first_key;
    Divisor block_rows;
    char* const* param;  // addresses of blocks
    char* const* exp_avg;
    char* const* exp_avg_sq;
    long long* step;  // t
    const long long* fault;
    const void* lr_address;  // if not null: a scalar of lr_bytes bytes that takes the place of lr
    long long lr_bytes;
    double lr;
    double beta1;
    double beta2;
    double eps;
    double weight_decay;
    double grad_scale;
    double mean;
    double corrects_eps;  // not 0: eps is beside sqrt(v), without the correction of v's bias
};

// What the bias of moments makes of a table's settings in the n-th update. By logarithms 1 - beta^n
// keeps its digits where it is small; beta may be 0.
template <typename A>
__device__ __forceinline__ void correct_bias(Scalars<A>& s, const Table& table, double lr,
                                             double n) {
    const double correction1 = -expm1(n * log(table.beta1));
    const double root = sqrt(-expm1(n * log(table.beta2)));
    s.step_size = static_cast<A>(lr / correction1);
    s.inv_sqrt_correction2 = static_cast<A>(1.0 / root);
    s.eps = static_cast<A>(table.corrects_eps != 0 ? table.eps / root : table.eps);
}

// The learning rate, where it is kept.
__device__ __forceinline__ double learning_rate(const Table& table) {
    if (!table.lr_address) return table.lr;
    return table.lr_bytes == 8 ? *global(static_cast<const double*>(table.lr_address))
                               : *global(static_cast<const float*>(table.lr_address));
}

// Index of the last of `count` things, ascending by `begin`, that begins at or before `value`.
template <typename T>
__device__ __forceinline__ int last_at_most(const T* things, int count, long long T::* begin,
                                            long long value) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (things[middle].*begin <= value) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}
