// The fused update: every row that gradients name is summed, updated and stored in one pass.
//
//     exp_avg    += (1 - beta1) * (g - exp_avg)            g: the sum of the row's gradients
//     exp_avg_sq += (1 - beta2) * (g * g - exp_avg_sq)
//     denom       = sqrt(exp_avg_sq / (1 - beta2^t)) + eps
//     param      -= lr * (exp_avg / (1 - beta1^t) / denom + weight_decay * param)
//
// In: the group's gradients sorted by key (a row's number among all rows of the group's tables), so
// that a row's gradients form one *run*, in order of occurrence (group.cu makes keys, torch sorts).
//
// Who owns what. A block owns a *tile* of TILE sorted positions and the runs that begin there; it
// looks TILE keys ahead and back. 2^log_lanes neighbouring threads work on one run, each on VEC
// neighbouring columns at a time. Nothing is atomic, nothing is cleared beforehand, and no
// grid depends on data.
//
// Per row of width D, in fp32: 12 D bytes read and 12 D written for weights and moments, 4 D read
// per gradient; 16 bytes of key and position per gradient.
//
// Long runs. A run is summed in chunks of TILE gradients, counted from its start: a chunk in order
// of occurrence, then the chunks' sums in 32 interleaved streams, then the streams. So a row's
// sum depends on its own gradients alone, wherever the run lies. A run of one chunk is updated
// where it begins. Of a longer one, each chunk is summed by the tile in which the chunk begins,
// into a place of its own in `partials`: the first chunk of the only long run that may begin in
// tile b at 2 b + 1, a later chunk, of the only run that may have entered it, at 2 b. `finish` adds
// them up.
//
// Rows that may be behind, where UNTOUCHED is given (untouched.cuh). Whoever locates a row reads
// its last step, sets it to t + 1, and finds in the table's log what the row has missed; those that
// work on the row bring it up to date in registers, then update it. Per row 128 bytes of its rule
// are read, too, and 4 bytes read and written.

#include "adamw_math.cuh"
#include "elements.cuh"
#include "group.cuh"
#include "threads.cuh"
#ifdef UNTOUCHED
#include "untouched.cuh"
#endif

using Acc = Wide<PARAM>::type;

// Positions per block, threads per block, gradients per chunk: all one number, so that a thread
// holds one position, and chunk c of a run that begins in tile b begins in tile b + c.
constexpr int TILE = 128;
// Streams in which a long run's chunks are added up, and a warp's share of them: what is asked of
// memory at a time.
constexpr int STREAMS_OF_WARP = 8;
constexpr int STREAMS = STREAMS_OF_WARP * (TILE / WARP);

// As many blocks to a multiprocessor as hide the latency of scattered rows, and as the compiler can
// do without spilling: 32 warps on Ampere to Hopper (20 in double precision), 24 (16) where rows
// may be behind, 16 elsewhere.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
#ifdef UNTOUCHED
#define OCCUPANCY __launch_bounds__(TILE, sizeof(Acc) == 4 ? 6 : 4)
#else
#define OCCUPANCY __launch_bounds__(TILE, sizeof(Acc) == 4 ? 8 : 5)
#endif
#else
#define OCCUPANCY __launch_bounds__(TILE, 4)
#endif

// The gradients of a group in sorted order.
struct Sorted {
    const KEY* keys;         // [size], ascending
    const long long* order;  // [size]: position in order of occurrence; null if that is the same
    long long size;
    long long num_keys;  // keys from here on stand for dropped gradients
    const Piece* pieces;
    long long num_pieces;

    // Positions outside read as a key that no row has: -1 before, num_keys behind.
    __device__ __forceinline__ KEY key(long long p) const {
        if (p < 0) return -1;
        return p < size ? keys[p] : static_cast<KEY>(num_keys);
    }

    // First position of the run of `key`, which is at or before `end`.
    __device__ long long run_begin(KEY key, long long end) const {
        long long low = 0, high = end;
        while (low < high) {
            const long long middle = (low + high) / 2;
            if (keys[middle] < key) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    // Behind the last position of the run of `key` that `begin` is in. All threads of the block
    // look at once, each at the end of its share of what is left.
    __device__ long long run_end(KEY key, long long begin) const {
        long long low = begin, high = size;  // low is in the run, high is not
        while (high - low > 1) {
            const long long share = (high - low + TILE - 1) / TILE;
            const long long p = low + (threadIdx.x + 1) * share;
            const int in_run = __syncthreads_count(p < high && keys[p] == key);
            low += in_run * share;
            high = min(high, low + share);
        }
        return high;
    }
};

// Where a gradient is.
struct Grad {
    const GRAD* address;
#if VEC == 1
    long long stride;  // between its elements; wider accesses are for neighbours only
#endif

    __device__ __forceinline__ void locate(const Sorted& sorted, long long p) {
        const long long i = sorted.order ? sorted.order[p] : p;
        const Piece& piece = sorted.pieces[last_at_most(
            sorted.pieces, static_cast<int>(sorted.num_pieces), &Piece::first_position, i)];
        address = reinterpret_cast<const GRAD*>(piece.grad) +
                  (i - piece.first_position) * piece.row_stride;
#if VEC == 1
        stride = piece.column_stride;
#endif
    }

    __device__ __forceinline__ void load_at(Acc (&x)[VEC], int column) const {
#if VEC == 1
        load(x, address + column * stride);
#else
        load(x, address + column);
#endif
    }
};

// A sum of many terms, right to about the last bit whatever their number: `lost` is what rounding
// took from `value` so far (Kahan, "Further remarks on reducing truncation errors", 1965).
struct Sum {
    Acc value[VEC] = {};
    Acc lost[VEC] = {};

    __device__ __forceinline__ void add(const Acc (&x)[VEC]) {
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            const Acc term = x[k] - lost[k];
            const Acc next = value[k] + term;
            lost[k] = (next - value[k]) - term;
            value[k] = next;
        }
    }
};

// The sum of gradients' elements from `column` on, added in order. Four are asked for at a time,
// since an addition waits for memory, not for the adder.
__device__ __forceinline__ Sum sum_chunk(const Grad* grads, int count, int column) {
    Sum sum;
    grads[0].load_at(sum.value, column);
#pragma unroll 1
    for (int i = 1; i < count; i += 4) {
        Acc x[4][VEC];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (i + k < count) grads[i + k].load_at(x[k], column);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (i + k < count) sum.add(x[k]);
        }
    }
    return sum;
}

// ------------------------------------------------------------------ what becomes of a sum

// An update of the row. `Row` is what a run's owner looks up once for all its columns; `Held` is
// how those that work on the columns have it.
struct Updating {
    static constexpr bool LOCATES_ONCE = false;  // locate() may be called once a run only

    const Table* tables;
    long long num_tables;
    const Scalars<Acc>* scalars;
    long long dim;

    struct Row {
        PARAM* param;
        Acc* exp_avg;
        Acc* exp_avg_sq;
        const Scalars<Acc>* scalars;
    };
    using Held = Row;

    struct Before {
        Acc param[VEC];
        Acc exp_avg[VEC];
        Acc exp_avg_sq[VEC];
    };

    __device__ __forceinline__ int table_of(KEY key) const {
        return last_at_most(tables, static_cast<int>(num_tables), &Table::first_key, key);
    }

    __device__ __forceinline__ Row locate(KEY key, long long) const {
        return row_of(key, table_of(key));
    }

    __device__ __forceinline__ Row row_of(KEY key, int number) const {
        const Table& table = tables[number];
        const long long row = key - table.first_key;
        const long long param_bytes = dim * sizeof(PARAM), moment_bytes = dim * sizeof(Acc);
        return Row{
            reinterpret_cast<PARAM*>(row_address(table.param, table.block_rows, row, param_bytes)),
            reinterpret_cast<Acc*>(row_address(table.exp_avg, table.block_rows, row, moment_bytes)),
            reinterpret_cast<Acc*>(
                row_address(table.exp_avg_sq, table.block_rows, row, moment_bytes)),
            scalars + number,
        };
    }

    // Asked for before the gradients are, so that all of a row's memory is on its way at once.
    __device__ __forceinline__ Before before(const Row& row, int column) const {
        Before x;
        load(x.param, row.param + column);
        load(x.exp_avg, row.exp_avg + column);
        load(x.exp_avg_sq, row.exp_avg_sq + column);
        return x;
    }

    __device__ __forceinline__ void operator()(const Row& row, int column, Before x,
                                               const Acc (&sum)[VEC], long long count) const {
        const Scalars<Acc> s = *global(row.scalars);
        update(row, column, x, sum, count, s);
    }

    __device__ __forceinline__ void update(const Row& row, int column, Before x,
                                           const Acc (&sum)[VEC], long long count,
                                           const Scalars<Acc>& s) const {
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            Acc grad = sum[k] * s.grad_scale;
            if (s.mean != 0) grad /= static_cast<Acc>(count);
            adamw(x.param[k], x.exp_avg[k], x.exp_avg_sq[k], grad, s);
        }
        store(row.exp_avg + column, x.exp_avg);
        store(row.exp_avg_sq + column, x.exp_avg_sq);
        store(row.param + column, x.param);
    }
};

#ifdef UNTOUCHED
// An update of a row that may be behind: it is brought up to date first. Whoever locates the row
// counts the update.
struct CatchingUp {
    static constexpr bool LOCATES_ONCE = true;

    Updating updating;
    const Missed* missed;  // of each table

    struct Row {
        Updating::Row in_table;
        UNTOUCHED<Acc> own;
    };
    using Held = const Row&;
    using Before = Updating::Before;

    __device__ __forceinline__ Row locate(KEY key, long long) const {
        const int number = updating.table_of(key);
        const Table& table = updating.tables[number];
        const Missed& of_table = missed[number];
        const long long row = key - table.first_key;
        Row found;
        found.in_table = updating.row_of(key, number);
        found.own.of(of_table, last_step(of_table, table, row));
        if (UNTOUCHED<Acc>::MAY_COUNT && of_table.row_step) {
            Scalars<Acc> s;
            const int n = ++*row_number(of_table.row_step, table.block_rows, row);
            correct_bias(s, table, learning_rate(table), n);
            found.own.count(s);
        }
        return found;
    }

    // Of a row, which is set to this step.
    __device__ __forceinline__ long long last_step(const Missed& of_table, const Table& table,
                                                   long long row) const {
        if (!of_table.last_step) return of_table.t;
        int* last = row_number(of_table.last_step, table.block_rows, row);
        const long long s = *last;
        *last = static_cast<int>(of_table.t + 1);
        return s;
    }

    __device__ __forceinline__ Before before(const Row& row, int column) const {
        return updating.before(row.in_table, column);
    }

    __device__ __forceinline__ void operator()(const Row& row, int column, Before x,
                                               const Acc (&sum)[VEC], long long count) const {
        if (row.own.is_behind != 0) row.own.make_up(x.param, x.exp_avg, x.exp_avg_sq);
        Scalars<Acc> s = *global(row.in_table.scalars);
        row.own.adapt(s);
        updating.update(row.in_table, column, x, sum, count, s);
    }
};
#endif

// A row of `values` [U, D]: the sums themselves, for HashTable.grad().
struct Coalescing {
    static constexpr bool LOCATES_ONCE = false;

    GRAD* values;
    const long long* ranks;  // [size]: how many runs begin at or before a position, less one
    long long dim;
    double scale;
    long long mean;

    using Row = GRAD*;
    using Held = Row;
    struct Before {};

    __device__ __forceinline__ Row locate(KEY, long long p) const {
        return values + ranks[p] * dim;
    }
    __device__ __forceinline__ Before before(Row, int) const { return Before{}; }
    __device__ __forceinline__ void operator()(Row row, int column, Before, const Acc (&sum)[VEC],
                                               long long count) const {
        Acc x[VEC];
#pragma unroll
        for (int k = 0; k < VEC; ++k) {
            x[k] = sum[k] * static_cast<Acc>(scale);
            if (mean) x[k] /= static_cast<Acc>(count);
        }
        store(row + column, x);
    }
};

// ------------------------------------------------------------------ tiles

// Sums the runs and chunks of this block's tile; `sink` gets the sums of whole runs.
//
// partials [2 * tiles, dim]; long_begin [tiles] becomes the place in the tile at which a long run
// begins, or -1.
template <typename Sink>
__device__ __forceinline__ void walk_tile(const Sorted& sorted, const Sink& sink, int log_lanes,
                                          int dim, Acc* partials, int* long_begin) {
    __shared__ KEY keys[3 * TILE];    // those of the tile before, of this one and the one behind
    __shared__ Grad grads[2 * TILE];  // of this tile, and of its last run behind it
    __shared__ typename Sink::Row rows[TILE];
    __shared__ int begins[TILE + 1];  // of the runs that begin here, as places in the tile
    __shared__ int begins_in_warp[TILE / WARP];
    __shared__ int before_tile;  // how far before the tile the run began that enters it
    const int thread = threadIdx.x;
    const long long tile = blockIdx.x, first = tile * TILE;

    keys[thread] = sorted.key(first - TILE + thread);
    keys[TILE + thread] = sorted.key(first + thread);
    keys[2 * TILE + thread] = sorted.key(first + TILE + thread);
    __syncthreads();

    // Runs that begin here, dropped gradients counting as one, are numbered in order.
    const KEY num_keys = static_cast<KEY>(sorted.num_keys);
    const KEY key = keys[TILE + thread], last_key = keys[2 * TILE - 1];
    const bool is_begin = key != keys[TILE + thread - 1];
    const unsigned begin_lanes = __ballot_sync(ALL, is_begin);
    if (thread % WARP == 0) begins_in_warp[thread / WARP] = __popc(begin_lanes);

    // Where did the run begin that enters the tile? Only one of these threads finds it.
    const KEY entering = keys[TILE];
    const bool enters = entering == keys[TILE - 1] && entering < num_keys;
    if (enters) {
        if (thread > 0 && keys[thread] == entering && keys[thread - 1] != entering) {
            before_tile = TILE - thread;
        } else if (thread == 0 && keys[0] == entering) {
            // Only its distance in chunks matters, and that is small again after the remainder.
            const long long distance = first - sorted.run_begin(entering, first - TILE);
            before_tile = TILE + static_cast<int>(distance % TILE);
        }
    }

    if (key < num_keys) grads[thread].locate(sorted, first + thread);
    const bool continues = keys[2 * TILE + thread] == last_key;
    if (continues && last_key < num_keys) {
        grads[TILE + thread].locate(sorted, first + TILE + thread);
    }
    const int behind = __syncthreads_count(continues);

    int num_runs = 0, number = __popc(begin_lanes & ((1u << thread % WARP) - 1));
#pragma unroll
    for (int warp = 0; warp < TILE / WARP; ++warp) {
        if (warp < thread / WARP) number += begins_in_warp[warp];
        num_runs += begins_in_warp[warp];
    }
    if (is_begin) {
        begins[number] = thread;
        // The row of a run longer than TILE is for `finish` to locate, where once is enough.
        const bool is_left = Sink::LOCATES_ONCE && keys[2 * TILE + thread] == key;
        if (key < num_keys && !is_left) rows[number] = sink.locate(key, first + thread);
    }
    if (thread == 0) {
        begins[num_runs] = TILE + behind;  // the last run's end
        // A run as long as this is the last of its tile.
        const bool is_long = num_runs > 0 && last_key < num_keys;
        if (!is_long) long_begin[tile] = -1;
    }
    __syncthreads();

    // A chunk of the entering run begins here if the run goes on to a multiple of TILE.
    const int chunk = enters ? (TILE - before_tile % TILE) % TILE : TILE;
    const bool has_chunk = enters && keys[TILE + chunk] == entering;
    const int num_items = num_runs + (has_chunk ? 1 : 0);
    const int lanes = 1 << log_lanes, lane = thread & (lanes - 1);
#pragma unroll 1
    for (int item = thread >> log_lanes; item < num_items; item += TILE >> log_lanes) {
        const bool is_chunk = item == num_runs;
        const int begin = is_chunk ? chunk : begins[item];
        if (keys[TILE + begin] >= num_keys) continue;
        const int length = begins[is_chunk ? 0 : item + 1] - begin;
        const bool is_long = length > TILE;
        if (item == num_runs - 1 && lane == 0) long_begin[tile] = is_long ? begin : -1;
        if (is_chunk || is_long) {
            Acc* partial = partials + (2 * tile + (is_chunk ? 0 : 1)) * dim;
#pragma unroll 1
            for (int column = lane * VEC; column < dim; column += lanes * VEC) {
                store(partial + column, sum_chunk(grads + begin, min(length, TILE), column).value);
            }
        } else {
            const typename Sink::Held row = rows[item];
#pragma unroll 1
            for (int column = lane * VEC; column < dim; column += lanes * VEC) {
                const typename Sink::Before before = sink.before(row, column);
                const Sum sum = sum_chunk(grads + begin, length, column);
                sink(row, column, before, sum.value, length);
            }
        }
    }
}

// The row of a run, for all threads of the block, which call it together. A barrier must come
// before the row is read, and another behind it, before the next is located: `finish` has both.
template <typename Sink>
__device__ __forceinline__ typename Sink::Held locate_together(const Sink& sink, KEY key,
                                                               long long p) {
    if constexpr (Sink::LOCATES_ONCE) {
        __shared__ typename Sink::Row row;
        if (threadIdx.x == 0) row = sink.locate(key, p);
        return row;
    } else {
        return sink.locate(key, p);
    }
}

// Adds up the chunks of the long runs that begin in TILE / WARP tiles, one run after another: chunk
// c is of stream c % STREAMS, and each warp has STREAMS_OF_WARP of them.
template <typename Sink>
__device__ __forceinline__ void finish_tiles(const Sorted& sorted, const Sink& sink, int dim,
                                             const Acc* partials, const int* long_begin) {
    __shared__ Vec<Acc, VEC> sums_of_warps[TILE / WARP][WARP];
    const int thread = threadIdx.x, warp = thread / WARP, lane = thread % WARP;
#pragma unroll 1
    for (int i = 0; i < TILE / WARP; ++i) {
        const long long tile = static_cast<long long>(blockIdx.x) * (TILE / WARP) + i;
        if (tile * TILE >= sorted.size) return;
        if (long_begin[tile] < 0) continue;
        const long long begin = tile * TILE + long_begin[tile];
        const KEY key = sorted.keys[begin];
        const long long length = sorted.run_end(key, begin) - begin;
        const int num_chunks = static_cast<int>((length + TILE - 1) / TILE);
        const typename Sink::Held row = locate_together(sink, key, begin);
#pragma unroll 1
        for (int first = 0; first < dim; first += WARP * VEC) {
            const int column = first + lane * VEC;
            if (column < dim) {
                Sum sums[STREAMS_OF_WARP];
#pragma unroll 1
                for (int c = warp * STREAMS_OF_WARP; c < num_chunks; c += STREAMS) {
#pragma unroll
                    for (int k = 0; k < STREAMS_OF_WARP; ++k) {
                        if (c + k >= num_chunks) continue;
                        Acc x[VEC];
                        const long long place = c + k == 0 ? 2 * tile + 1 : 2 * (tile + c + k);
                        load(x, partials + place * dim + column);
                        sums[k].add(x);
                    }
                }
#pragma unroll
                for (int width = STREAMS_OF_WARP / 2; width > 0; width /= 2) {
#pragma unroll
                    for (int k = 0; k < width; ++k) sums[k].add(sums[k + width].value);
                }
#pragma unroll
                for (int k = 0; k < VEC; ++k) sums_of_warps[warp][lane].x[k] = sums[0].value[k];
            }
            __syncthreads();
            if (warp == 0 && column < dim) {
                const typename Sink::Before before = sink.before(row, column);
                Sum total;
#pragma unroll
                for (int w = 0; w < TILE / WARP; ++w) total.add(sums_of_warps[w][lane].x);
                sink(row, column, before, total.value, length);
            }
            __syncthreads();  // the sums are read before the next ones are written
        }
    }
}

// ------------------------------------------------------------------ kernels

#define SORTED_ARGS                                                              \
    const KEY *keys, const long long *order, long long size, long long num_keys, \
        const Piece *pieces, long long num_pieces
#define SORTED \
    Sorted { keys, order, size, num_keys, pieces, num_pieces }

#ifdef UNTOUCHED

// As below, of rows that may be behind.
extern "C" __global__ void OCCUPANCY update(SORTED_ARGS, const Table* tables, long long num_tables,
                                            const Scalars<Acc>* scalars, const Missed* missed,
                                            long long dim, int log_lanes, Acc* partials,
                                            int* long_begin) {
    walk_tile(SORTED, CatchingUp{{tables, num_tables, scalars, dim}, missed}, log_lanes,
              static_cast<int>(dim), partials, long_begin);
}

extern "C" __global__ void __launch_bounds__(TILE, 4)
    finish(SORTED_ARGS, const Table* tables, long long num_tables, const Scalars<Acc>* scalars,
           const Missed* missed, long long dim, const Acc* partials, const int* long_begin) {
    finish_tiles(SORTED, CatchingUp{{tables, num_tables, scalars, dim}, missed},
                 static_cast<int>(dim), partials, long_begin);
}

#else

// Updates the rows of short runs, sums the chunks of long ones.
// Grid: one block of TILE threads per tile.
extern "C" __global__ void OCCUPANCY update(SORTED_ARGS, const Table* tables, long long num_tables,
                                            const Scalars<Acc>* scalars, long long dim,
                                            int log_lanes, Acc* partials, int* long_begin) {
    walk_tile(SORTED, Updating{tables, num_tables, scalars, dim}, log_lanes, static_cast<int>(dim),
              partials, long_begin);
}

// Updates the rows of long runs. Grid: one block of TILE threads per TILE / WARP tiles.
extern "C" __global__ void __launch_bounds__(TILE, 4)
    finish(SORTED_ARGS, const Table* tables, long long num_tables, const Scalars<Acc>* scalars,
           long long dim, const Acc* partials, const int* long_begin) {
    finish_tiles(SORTED, Updating{tables, num_tables, scalars, dim}, static_cast<int>(dim),
                 partials, long_begin);
}

// As `update` and `finish`, with the sums for a result.
extern "C" __global__ void OCCUPANCY coalesce(SORTED_ARGS, GRAD* values, const long long* ranks,
                                              double scale, long long mean, long long dim,
                                              int log_lanes, Acc* partials, int* long_begin) {
    walk_tile(SORTED, Coalescing{values, ranks, dim, scale, mean}, log_lanes, static_cast<int>(dim),
              partials, long_begin);
}

extern "C" __global__ void __launch_bounds__(TILE, 4)
    coalesce_finish(SORTED_ARGS, GRAD* values, const long long* ranks, double scale, long long mean,
                    long long dim, const Acc* partials, const int* long_begin) {
    finish_tiles(SORTED, Coalescing{values, ranks, dim, scale, mean}, static_cast<int>(dim),
                 partials, long_begin);
}

#endif
