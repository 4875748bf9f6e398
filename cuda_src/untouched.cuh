// What the steps that a row missed have done to it; _types.py has the formulas (Missed).
//
// UNTOUCHED, written by the host per compilation, names the struct of this file that tells what is
// a row's own: Decay, Dense or Replay. One thread makes it (`of`), in double precision; all that
// work on the row use it, in the type of the update.

#pragma once

#include "adamw_math.cuh"
#include "blocks.cuh"
#include "elements.cuh"

constexpr int RULE_NODES = 6;
constexpr int RULE_CHUNK = 256;  // entries that share a factor
constexpr int RULE_WIDTH = 16;
constexpr int STEP_WIDTH = 6;

// A table's log, and where its rows' own numbers are; mirrored in engines/cuda/_group.py.
struct Missed {
    char* const* last_step;  // addresses of blocks of int; null: no row is ever behind
    char* const* row_step;   // the same; null: rows have no count of their own
    const double* rules;
    const double* factors;
    const double* steps;
    long long t;
    long long first;
    long long window;
};

// An int of a row: its last step, or its count.
__device__ __forceinline__ int* row_number(char* const* blocks, const Divisor& block_rows,
                                           long long row) {
    return global(reinterpret_cast<int*>(row_address(blocks, block_rows, row, sizeof(int))));
}

__device__ __forceinline__ const double* rule_of(const Missed& missed, long long s) {
    return global(missed.rules) + (s - missed.first) * RULE_WIDTH;
}

__device__ __forceinline__ const double* factors_of(const Missed& missed, long long s) {
    return global(missed.factors) + (s - missed.first) / RULE_CHUNK * 2;
}

// Two decays one after the other, each less than 0 by what it takes: (1 + a) (1 + b) - 1.
__device__ __forceinline__ double combined(double a, double b) { return a + b + a * b; }

template <typename A>
struct Limits;
template <>
struct Limits<float> {
    static constexpr float LEAST = 1.17549435e-38f;  // normal number
    static constexpr float LARGEST = 1e30f;          // above every finite root, far below infinity
};
template <>
struct Limits<double> {
    static constexpr double LEAST = 2.2250738585072014e-308;
    static constexpr double LARGEST = 1e200;
};

// A first moment that has decayed: what is no normal number any more takes part in nothing.
template <typename A>
__device__ __forceinline__ A normal_or_zero(A x) {
    return x < Limits<A>::LEAST && x > -Limits<A>::LEAST ? A{0} : x;
}

// Decay alone. A row may have a bias correction of its own, too.
template <typename A>
struct Decay {
    static constexpr bool MOVES = false;     // moments matter
    static constexpr bool MAY_COUNT = true;  // bias may be corrected by the row's number of updates

    A decay;
    A is_behind;  // not 0
    A is_counted;
    A step_size;
    A inv_sqrt_correction2;
    A eps;

    __device__ __forceinline__ void of(const Missed& missed, long long s) {
        is_behind = s < missed.t;
        is_counted = 0;
        if (is_behind == 0) return;
        decay = static_cast<A>(combined(*rule_of(missed, s), *factors_of(missed, s)));
    }

    // By the row's own number of updates.
    __device__ __forceinline__ void count(const Scalars<A>& s) {
        is_counted = 1;
        step_size = s.step_size;
        inv_sqrt_correction2 = s.inv_sqrt_correction2;
        eps = s.eps;
    }

    __device__ __forceinline__ void adapt(Scalars<A>& s) const {
        if (is_counted == 0) return;
        s.step_size = step_size;
        s.inv_sqrt_correction2 = inv_sqrt_correction2;
        s.eps = eps;
    }

    template <int N>
    __device__ __forceinline__ void make_up(A (&param)[N], A (&)[N], A (&)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) param[k] += decay * param[k];
    }
};

// Decay and momentum, by the rule of the row's entry.
template <typename A>
struct alignas(16) Dense {
    static constexpr bool MOVES = true;
    static constexpr bool MAY_COUNT = false;

    A decay;
    A beta1_power;
    A beta2_power;
    A weight;  // W (1 + f)
    A c;
    A d[RULE_NODES - 1];
    A e[RULE_NODES - 1];
    A is_behind;  // not 0

    __device__ __forceinline__ void of(const Missed& missed, long long s) {
        is_behind = s < missed.t;
        if (is_behind == 0) return;
        double rule[RULE_WIDTH / 2][2], factors[2];
#pragma unroll
        for (int k = 0; k < RULE_WIDTH / 2; ++k) load(rule[k], rule_of(missed, s) + 2 * k);
        load(factors, factors_of(missed, s));
        const auto column = [&](int k) { return rule[k / 2][k % 2]; };
        decay = static_cast<A>(combined(column(0), factors[0]));
        beta1_power = static_cast<A>(column(1));
        beta2_power = static_cast<A>(column(2) * factors[1]);
        weight = static_cast<A>(column(3) * (1.0 + factors[0]));
        c = static_cast<A>(column(4));
#pragma unroll
        for (int k = 0; k < RULE_NODES - 1; ++k) {
            d[k] = static_cast<A>(column(5 + k));
            e[k] = static_cast<A>(column(5 + RULE_NODES - 1 + k));
        }
    }

    __device__ __forceinline__ void count(const Scalars<A>&) {}
    __device__ __forceinline__ void adapt(Scalars<A>&) const {}

    // S(root of exp_avg_sq): what the row has moved by for each unit of exp_avg.
    __device__ __forceinline__ A motion(A root) const {
        // An infinite root would make u a NaN; so it moves the row by next to nothing.
        const A r = root > Limits<A>::LARGEST ? Limits<A>::LARGEST : root;
        const A inverse = 1 / (c + r), u = r * inverse;
        A behind = 1, here = 1 + d[RULE_NODES - 2] * u;  // D_6, D_5
#pragma unroll
        for (int k = RULE_NODES - 3; k >= 0; --k) {
            const A before = (1 + d[k] * u) * here - e[k + 1] * u * u * behind;
            behind = here;
            here = before;
        }
        const A last = e[0] * u * behind;  // here is D_1, behind is D_2
        return weight * inverse * ((here - last) / (here - last * u));
    }

    template <int N>
    __device__ __forceinline__ void make_up(A (&param)[N], A (&exp_avg)[N],
                                            A (&exp_avg_sq)[N]) const {
#pragma unroll
        for (int k = 0; k < N; ++k) {
            param[k] += decay * param[k] - exp_avg[k] * motion(square_root(exp_avg_sq[k]));
            exp_avg[k] = normal_or_zero(exp_avg[k] * beta1_power);
            exp_avg_sq[k] *= beta2_power;
        }
    }
};

// Decay and momentum, step by step as long as there is momentum.
template <typename A>
struct Replay {
    static constexpr bool MOVES = true;
    static constexpr bool MAY_COUNT = false;

    const double* steps;  // the first that the row missed
    A decay;              // of the steps behind the window: 0, and
    A beta2_power;        // 1, where there are none
    int num_steps;        // within the window
    int is_behind;
    int is_long;  // there are steps behind the window

    __device__ __forceinline__ void of(const Missed& missed, long long s) {
        is_behind = s < missed.t;
        if (!is_behind) return;
        steps = global(missed.steps) + (s - missed.first) * STEP_WIDTH;
        const long long count = missed.t - s;
        num_steps = static_cast<int>(min(count, missed.window));
        is_long = count > missed.window;
        double lost = 0.0, power = 1.0;
#pragma unroll 1
        for (long long j = num_steps; j < count; ++j) {
            lost = combined(lost, -steps[j * STEP_WIDTH]);
            power *= steps[j * STEP_WIDTH + 5];
        }
        decay = static_cast<A>(lost);
        beta2_power = static_cast<A>(power);
    }

    __device__ __forceinline__ void count(const Scalars<A>&) {}
    __device__ __forceinline__ void adapt(Scalars<A>&) const {}

    template <int N>
    __device__ __forceinline__ void make_up(A (&param)[N], A (&exp_avg)[N],
                                            A (&exp_avg_sq)[N]) const {
#pragma unroll 1
        for (int j = 0; j < num_steps; ++j) {
            const double* step = global(steps) + j * STEP_WIDTH;
            const A decay_now = static_cast<A>(step[0]), step_size = static_cast<A>(step[1]);
            const A inv_sqrt_correction2 = static_cast<A>(step[2]), eps = static_cast<A>(step[3]);
            const A beta1 = static_cast<A>(step[4]), beta2 = static_cast<A>(step[5]);
#pragma unroll
            for (int k = 0; k < N; ++k) {
                exp_avg[k] *= beta1;
                exp_avg_sq[k] *= beta2;
                const A denom = square_root(exp_avg_sq[k]) * inv_sqrt_correction2 + eps;
                param[k] -= step_size * exp_avg[k] / denom + decay_now * param[k];
            }
        }
#pragma unroll
        for (int k = 0; k < N; ++k) {
            param[k] += decay * param[k];
            exp_avg_sq[k] *= beta2_power;
            exp_avg[k] = is_long ? A{0} : normal_or_zero(exp_avg[k]);
        }
    }
};
