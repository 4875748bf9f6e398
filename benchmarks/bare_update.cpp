// What memory allows: a loop that does nothing but AdamW's update of scattered rows, for the bounds
// in docs/performance.md. Linux; two threads; 10 GB of memory for the second part.
//
//     g++ -O3 -march=native -ffast-math -pthread benchmarks/bare_update.cpp -o bare && ./bare
//
// Rows ascend, each has one gradient, and gradients lie in random order. Weights are apart, both
// moments of a row side by side, as the CPU engine has them. Before each turn 512 MiB are written.
// With Zipf ids rows have many gradients, which are summed first, in the order of the batch.

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <utility>
#include <vector>

constexpr long HUGE_PAGE = 2 << 20;
constexpr int TURNS = 24, WARMUP = 4;

struct Memory {
    char* mapped;
    long bytes;
    float* data;  // at the start of a huge page, all of it written to

    Memory(long size, bool huge) : bytes(size + HUGE_PAGE) {
        mapped = static_cast<char*>(
            mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (mapped == MAP_FAILED) {
            std::perror("mmap");
            std::exit(1);
        }
        char* begin = mapped + (HUGE_PAGE - reinterpret_cast<long>(mapped) % HUGE_PAGE);
        madvise(begin, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
        data = reinterpret_cast<float*>(std::memset(begin, 1, size));
    }
    ~Memory() { munmap(mapped, bytes); }
};

inline void update_element(float& param, float& m, float& v, float grad) {
    m += .1f * (grad - m);
    v += .001f * (grad * grad - v);
    param -= 1e-3f * (m / (std::sqrt(v) + 1e-8f) + .01f * param);
}

using Batch = std::vector<std::pair<long, long>>;  // row, position of its gradient; rows ascend

template <int D>
struct Table {
    Memory weights, moments, grads;

    Table(long rows, long count, bool huge)
        : weights(rows * D * 4, huge), moments(rows * D * 8, huge), grads(count * D * 4, false) {}

    // Rows begin to end - 1 of the batch; lines of the row that comes `ahead` later are asked for.
    void update(const Batch& batch, long begin, long end, int ahead) {
        for (long i = begin; i < end; ++i) {
            const auto [row, position] = batch[i];
            const auto [next_row, next_position] = batch[std::min(i + ahead, end - 1)];
            float *param = weights.data + row * D, *m = moments.data + row * 2 * D, *v = m + D;
            const float* grad = grads.data + position * D;
            for (int column = 0; column < D; column += 16) {
                if (ahead) {
                    float* next_m = moments.data + next_row * 2 * D + column;
                    __builtin_prefetch(weights.data + next_row * D + column, 0, 2);
                    __builtin_prefetch(next_m, 0, 2);
                    if (D >= 16) __builtin_prefetch(next_m + D, 0, 2);
                    __builtin_prefetch(grads.data + next_position * D + column, 0, 2);
                }
                for (int k = column; k < std::min(column + 16, D); ++k)
                    update_element(param[k], m[k], v[k], grad[k]);
            }
        }
    }
};

// The same with all gradients of a row, which are neighbours in the batch: its last one is followed
// by the update.
template <int D>
void update_runs(Table<D>& table, const Batch& batch, long begin, long end, int ahead) {
    float sum[D] = {};
    for (long i = begin; i < end; ++i) {
        const auto [next_row, next_position] = batch[std::min(i + ahead, end - 1)];
        const bool is_new = ahead && i + ahead < end && batch[i + ahead - 1].first != next_row;
        const float* grad = table.grads.data + batch[i].second * D;
        for (int column = 0; column < D; column += 16) {
            if (ahead) __builtin_prefetch(table.grads.data + next_position * D + column, 0, 2);
            if (is_new) {
                float* next_m = table.moments.data + next_row * 2 * D + column;
                __builtin_prefetch(table.weights.data + next_row * D + column, 0, 2);
                __builtin_prefetch(next_m, 0, 2);
                __builtin_prefetch(next_m + D, 0, 2);
            }
            for (int k = column; k < column + 16; ++k) sum[k] += grad[k];
        }
        if (i + 1 < end && batch[i + 1].first == batch[i].first) continue;
        float* param = table.weights.data + batch[i].first * D;
        float *m = table.moments.data + batch[i].first * 2 * D, *v = m + D;
        for (int k = 0; k < D; ++k) {
            update_element(param[k], m[k], v[k], sum[k]);
            sum[k] = 0;
        }
    }
}

// Nanoseconds an entry of the batches that `draw` makes, which `update` takes from begin to end in
// each of two threads. The row in the middle, a hot one perhaps, is left to one of them.
template <typename Draw, typename Update>
double median_ns(Draw draw, Update update) {
    Memory others(512 << 20, false);
    std::vector<double> ns;
    for (int turn = 0; turn < TURNS; ++turn) {
        const Batch batch = draw();
        for (long i = 0; i < others.bytes / 4 - HUGE_PAGE / 4; i += 16) others.data[i] += 1;
        const long size = static_cast<long>(batch.size());
        long middle = size / 2;
        while (middle < size && batch[middle].first == batch[middle - 1].first) ++middle;
        const auto begin = std::chrono::steady_clock::now();
        std::thread helper([&] { update(batch, middle, size); });
        update(batch, 0, middle);
        helper.join();
        const auto taken = std::chrono::steady_clock::now() - begin;
        if (turn >= WARMUP)
            ns.push_back(std::chrono::duration<double, std::nano>(taken).count() / size);
    }
    std::nth_element(ns.begin(), ns.begin() + ns.size() / 2, ns.end());
    return ns[ns.size() / 2];
}

// Distinct rows.
template <int D>
double measure(long rows, long count, int ahead, bool huge) {
    Table<D> table(rows, count, huge);
    std::mt19937_64 random(1);
    const auto draw = [&] {
        Batch batch(count);
        for (long i = 0; i < count; ++i) batch[i] = {static_cast<long>(random() % rows), i};
        std::sort(batch.begin(), batch.end());
        const auto is_same = [](const auto& a, const auto& b) { return a.first == b.first; };
        batch.erase(std::unique(batch.begin(), batch.end(), is_same), batch.end());
        return batch;
    };
    return median_ns(draw, [&](const Batch& batch, long begin, long end) {
        table.update(batch, begin, end, ahead);
    });
}

// Zipf(1.2) ids, as benchmarks/cases.py draws them.
template <int D>
double measure_zipf(long rows, long count, int ahead) {
    Table<D> table(rows, count, true);
    std::mt19937_64 random(1);
    std::vector<double> shares(rows);
    double total = 0;
    for (long i = 0; i < rows; ++i) shares[i] = total += std::pow(i + 1., -1.2);
    std::vector<long> places(rows);
    std::iota(places.begin(), places.end(), 0);
    std::shuffle(places.begin(), places.end(), random);
    std::uniform_real_distribution<> uniform(0, total);
    const auto draw = [&] {
        Batch batch(count);
        for (long i = 0; i < count; ++i) {
            const auto rank = std::lower_bound(shares.begin(), shares.end(), uniform(random));
            batch[i] = {places[std::min(rank - shares.begin(), rows - 1)], i};
        }
        std::sort(batch.begin(), batch.end());
        return batch;
    };
    return median_ns(draw, [&](const Batch& batch, long begin, long end) {
        update_runs(table, batch, begin, end, ahead);
    });
}

template <int D>
void batches(long count) {
    for (int ahead : {16, 0}) {
        const double ns = measure<D>(1 << 20, count, ahead, true);
        std::printf("D %3d, %ld ids of 2^20 rows, %2d rows ahead: %5.1f ns a row, %4.1f a line\n",
                    D, count, ahead, ns, ns * 16 / D / 4);
    }
}

int main() {
    batches<64>(65'536);
    batches<128>(65'536);
    batches<16>(262'144);
    for (int ahead : {16, 0})
        std::printf("D  64, 262144 Zipf(1.2) ids of 2^20 rows, %2d gradients ahead: %.1f ms\n",
                    ahead, measure_zipf<64>(1 << 20, 262'144, ahead) * 262'144 / 1e6);
    for (bool huge : {false, true}) {
        const double small = measure<8>(10'000'000, 65'536, 16, huge);
        const double large = measure<8>(100'000'000, 65'536, 16, huge);
        std::printf("D 8, %s pages: %.0f ns a row of 10^7, %.0f of 10^8: %.1f times\n",
                    huge ? "huge" : "small", small, large, large / small);
    }
}
