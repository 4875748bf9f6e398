// Bookkeeping of a step, once per group of tables: keys to sort gradients by, each table's t and
// the scalars that follow from it.

#include "adamw_math.cuh"
#include "group.cuh"
#include "threads.cuh"

// ------------------------------------------------------------------ descriptors under capture

// A captured graph replays what its launches got by value, whatever became of host memory since.
constexpr int WORDS = 496;  // with the other arguments below the 4,096 bytes that every GPU takes
struct Words {
    long long word[WORDS];
};

// target[0:count] = words; one block.
extern "C" __global__ void store_words(Words words, long long* target, long long count) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) target[i] = words.word[i];
}

// ------------------------------------------------------------------ keys

// keys[i] of the gradient at position i: its table's first key plus its row. A gradient that is
// dropped gets `num_keys`, which sorts behind all rows. One thread per gradient; reads 8 bytes of
// row number, writes the key.
template <typename KEY>
__device__ void make_keys(const Piece* pieces, long long num_pieces, const Rows* tables, KEY* keys,
                          long long size, long long num_keys) {
    const long long i = thread_number();
    if (i >= size) return;
    const Piece& piece =
        pieces[last_at_most(pieces, static_cast<int>(num_pieces), &Piece::first_position, i)];
    const Rows& table = tables[piece.table];
    const long long row = global(piece.rows)[i - piece.first_position];
    // Keys have room for num_rows only, though a captured step may find more in use by now.
    const long long num_rows =
        table.row_count ? min(*global(table.row_count), table.num_rows) : table.num_rows;
    KEY key = static_cast<KEY>(num_keys);
    if (row >= 0 && row < num_rows) {
        key = static_cast<KEY>(table.first_key + row);
    } else if (row != MISSING || !table.drop_missing) {
        // The first to get here says which row it was.
        long long* fault = global(table.fault);
        if (atomicExch(reinterpret_cast<unsigned long long*>(fault), 1ull) == 0) fault[1] = row;
    }
    keys[i] = key;
}

extern "C" __global__ void make_keys_32(const Piece* pieces, long long num_pieces,
                                        const Rows* tables, int* keys, long long size,
                                        long long num_keys) {
    make_keys(pieces, num_pieces, tables, keys, size, num_keys);
}

extern "C" __global__ void make_keys_64(const Piece* pieces, long long num_pieces,
                                        const Rows* tables, long long* keys, long long size,
                                        long long num_keys) {
    make_keys(pieces, num_pieces, tables, keys, size, num_keys);
}

// ------------------------------------------------------------------ t and scalars

// Counts a table's update and computes its scalars in double precision; copies what its gradients'
// rows were found to be, for the host to read later. One thread per table.
template <typename A>
__device__ void advance(const Table* tables, long long num_tables, Scalars<A>* scalars,
                        long long* faults) {
    const long long i = thread_number();
    if (i >= num_tables) return;
    const Table& table = tables[i];
    const double t = static_cast<double>(++*global(table.step));
    const double lr = learning_rate(table);
    Scalars<A> s;
    s.one_minus_beta1 = static_cast<A>(1.0 - table.beta1);
    s.one_minus_beta2 = static_cast<A>(1.0 - table.beta2);
    correct_bias(s, table, lr, t);
    s.decay = static_cast<A>(lr * table.weight_decay);
    s.grad_scale = static_cast<A>(table.grad_scale);
    s.mean = static_cast<A>(table.mean);
    scalars[i] = s;
    faults[2 * i] = global(table.fault)[0];
    faults[2 * i + 1] = global(table.fault)[1];
}

extern "C" __global__ void advance_float(const Table* tables, long long num_tables,
                                         Scalars<float>* scalars, long long* faults) {
    advance(tables, num_tables, scalars, faults);
}

extern "C" __global__ void advance_double(const Table* tables, long long num_tables,
                                          Scalars<double>* scalars, long long* faults) {
    advance(tables, num_tables, scalars, faults);
}
