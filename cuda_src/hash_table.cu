// The hash index from ids to rows: open addressing with linear probing over entries (id, row).
//
// A row below 0 marks an entry that holds no id: FREE, DELETED (searches go on behind it), or,
// while ids are being inserted, the claim of the batch position that will fill it. Ids are mixed by
// the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", 2014), so sequential ids and ids that agree in their low bits spread like random
// ones.
//
// While ids are looked for, an entry's row word changes by compare-and-swap alone; its id is
// written by a later launch, or by one that reads no ids. So no thread ever waits for another:
// whoever meets a claim finds the claimant's id in the batch itself.

#include "blocks.cuh"
#include "elements.cuh"
#include "random.cuh"
#include "threads.cuh"

constexpr long long FREE = -1;
constexpr long long DELETED = -2;

struct alignas(16) Entry {
    long long id;
    long long row;
};

// Places in an index's counters.
constexpr int NUM_NUMBERED = 0;  // rows numbered so far: the next fresh row
constexpr int NUM_FREE = 1;      // rows in the free list
constexpr int TICKETS = 2;       // rows taken in this batch

// A claim of batch position i, and back: below everything else that marks entries.
__device__ __forceinline__ long long claim_of(long long i) { return -(i + 16); }
__device__ __forceinline__ long long claimant(long long claim) { return -claim - 16; }

// The entry at which the search for an id begins. It grows with the mixed id, in an index of any
// capacity (Lemire, "Fast random integer generation in an interval", 2019), so an index is copied
// into a larger one from begin to end.
__device__ __forceinline__ long long home(long long id, long long capacity) {
    unsigned long long z = static_cast<unsigned long long>(id);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z = z ^ (z >> 31);
    return static_cast<long long>(__umul64hi(z, static_cast<unsigned long long>(capacity)));
}

__device__ __forceinline__ long long after(long long place, long long capacity) {
    return place + 1 == capacity ? 0 : place + 1;
}

__device__ __forceinline__ long long compare_and_swap(long long* word, long long expected,
                                                      long long desired) {
    return static_cast<long long>(atomicCAS(reinterpret_cast<unsigned long long*>(word),
                                            static_cast<unsigned long long>(expected),
                                            static_cast<unsigned long long>(desired)));
}

// rows[i] = the row of ids[i], or MISSING. One thread per id; an id and its row are one access.
extern "C" __global__ void find(const Entry* entries, long long capacity, const long long* ids,
                                long long* rows, long long size) {
    const long long i = thread_number();
    if (i >= size) return;
    const long long id = ids[i];
    long long place = home(id, capacity);
    Entry entry = entries[place];
    while (entry.row != FREE && (entry.id != id || entry.row == DELETED)) {
        place = after(place, capacity);
        entry = entries[place];
    }
    rows[i] = entry.row == FREE ? MISSING : entry.row;
}

// Puts an id that is not there yet, with its row. Ids are not read meanwhile.
__device__ __forceinline__ void put(Entry* entries, long long capacity, Entry entry) {
    long long place = home(entry.id, capacity);
    while (compare_and_swap(&entries[place].row, FREE, entry.row) != FREE)
        place = after(place, capacity);
    entries[place].id = entry.id;
}

// Puts distinct ids that are not there yet, with their rows. One thread per id.
extern "C" __global__ void insert(Entry* entries, long long capacity, const long long* ids,
                                  const long long* rows, long long size) {
    const long long i = thread_number();
    if (i < size) put(entries, capacity, Entry{ids[i], rows[i]});
}

// Puts all ids of one index, with their rows, into another that is empty. One thread per entry.
extern "C" __global__ void rehash(const Entry* from, long long from_capacity, Entry* entries,
                                  long long capacity) {
    const long long i = thread_number();
    if (i < from_capacity && from[i].row >= 0) put(entries, capacity, from[i]);
}

// Takes ids out and puts their rows on the free list, which has room for them; they are counted by
// whoever launched this. rows[i]: the row that ids[i] had; MISSING if it had none, or if another of
// its occurrences was first. One thread per id.
extern "C" __global__ void remove_ids(Entry* entries, long long capacity, const long long* ids,
                                      long long* rows, long long size, long long* counters,
                                      long long* free_rows) {
    const long long i = thread_number();
    if (i >= size) return;
    const long long id = ids[i];
    long long row;
    for (long long place = home(id, capacity);; place = after(place, capacity)) {
        // Volatile: another thread may be taking the id out at this moment.
        row = *const_cast<volatile long long*>(&entries[place].row);
        if (row == FREE) break;
        if (row == DELETED || entries[place].id != id) continue;
        if (compare_and_swap(&entries[place].row, row, DELETED) != row) row = FREE;
        break;
    }
    rows[i] = row == FREE ? MISSING : row;
    if (row == FREE) return;
    const long long ticket = static_cast<long long>(
        atomicAdd(reinterpret_cast<unsigned long long*>(&counters[TICKETS]), 1ull));
    free_rows[counters[NUM_FREE] + ticket] = row;
}

// Finds the row of each id, or gives an absent one a row and an entry; duplicates agree on one.
//
// One thread per id. Of an absent id's occurrences one claims an entry and takes a row, from the
// free list as long as there are any, else a fresh one.
//
// rows[i]: the row, if it is known or i is the claimant; else the claim that i met.
// places[i]: the claimed entry if i is the claimant, else -1.
extern "C" __global__ void find_or_claim(Entry* entries, long long capacity, const long long* ids,
                                         long long* rows, long long* places, long long size,
                                         long long* counters, const long long* free_rows) {
    const long long i = thread_number();
    if (i >= size) return;
    const long long id = ids[i];
    long long place = home(id, capacity), claimed = -1, row;
    for (;; place = after(place, capacity)) {
        // Volatile: another thread may be claiming the entry at this moment.
        row = *const_cast<volatile long long*>(&entries[place].row);
        if (row == FREE) {
            row = compare_and_swap(&entries[place].row, FREE, claim_of(i));
            if (row == FREE) {
                claimed = place;
                break;
            }
        }
        if (row != DELETED && (row >= 0 ? entries[place].id : ids[claimant(row)]) == id) break;
    }
    if (claimed >= 0) {
        const long long ticket = static_cast<long long>(
            atomicAdd(reinterpret_cast<unsigned long long*>(&counters[TICKETS]), 1ull));
        const long long num_free = counters[NUM_FREE];
        row = ticket < num_free ? free_rows[num_free - 1 - ticket]
                                : counters[NUM_NUMBERED] + ticket - num_free;
    }
    rows[i] = row;
    places[i] = claimed;
}

// Carries out what find_or_claim decided: fills entries, notes which id a row belongs to, draws the
// new rows' values, tells the other occurrences of a new id its row, and counts. A new row's last
// step becomes `now`, where there are last steps.
//
// A warp takes 32 ids, one a lane, then draws the new rows among them one by one, together. Rows of
// claimants are read here and written nowhere, so reading one for a duplicate is no race.
extern "C" __global__ void settle(Entry* entries, const long long* ids, long long* rows,
                                  const long long* places, long long size, long long* counters,
                                  char* const* id_blocks, char* const* blocks, Divisor block_rows,
                                  long long dim, Plan plan, char* const* last_step_blocks,
                                  int now) {
    const long long i = thread_number();
    const bool is_claimant = i < size && places[i] >= 0;
    long long id = 0, row = MISSING;
    if (i < size) {
        id = ids[i];
        row = rows[i];
        if (is_claimant) {
            entries[places[i]] = Entry{id, row};
            *global(reinterpret_cast<long long*>(
                row_address(id_blocks, block_rows, row, sizeof(long long)))) = id;
            if (last_step_blocks) {
                *global(reinterpret_cast<int*>(
                    row_address(last_step_blocks, block_rows, row, sizeof(int)))) = now;
            }
        } else if (row < 0) {
            rows[i] = rows[claimant(row)];
        }
    }
    if (i == 0) {
        const long long taken = counters[TICKETS];
        const long long reused = min(taken, counters[NUM_FREE]);
        counters[NUM_FREE] -= reused;
        counters[NUM_NUMBERED] += taken - reused;
        counters[TICKETS] = 0;
    }
    const int lane = threadIdx.x % WARP;
    for (unsigned waiting = __ballot_sync(ALL, is_claimant); waiting; waiting &= waiting - 1) {
        const int next = __ffs(waiting) - 1;
        const long long new_id = __shfl_sync(ALL, id, next);
        const long long new_row = __shfl_sync(ALL, row, next);
        auto* target =
            reinterpret_cast<PARAM*>(row_address(blocks, block_rows, new_row, dim * sizeof(PARAM)));
        init_row(target, new_id, static_cast<int>(dim), plan, lane, WARP);
    }
}

// Fills rows [size] with the initial values of ids [size]. A warp per row.
extern "C" __global__ void init_rows(char* const* blocks, Divisor block_rows, long long dim,
                                     const long long* rows, const long long* ids, long long size,
                                     Plan plan) {
    const long long i = thread_number() / WARP;
    if (i >= size) return;
    auto* target =
        reinterpret_cast<PARAM*>(row_address(blocks, block_rows, rows[i], dim * sizeof(PARAM)));
    init_row(target, ids[i], static_cast<int>(dim), plan, threadIdx.x % WARP, WARP);
}
