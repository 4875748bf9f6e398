// For each detector a kernel that is right, and wrong where `broken` (or `shift`) says so.

struct Descriptor {
    unsigned long long address;
    int count;
};

extern "C" __global__ void write_shifted(float* x, int shift) {
    x[static_cast<int>(threadIdx.x) + shift] = 1.0f;
}

extern "C" __global__ void read_shifted(const unsigned short* x, int* y, int shift) {
    y[threadIdx.x] = x[static_cast<int>(threadIdx.x) + shift];
}

extern "C" __global__ void write_at_address(const Descriptor to) {
    float* x = reinterpret_cast<float*>(to.address);
    if (static_cast<int>(threadIdx.x) < to.count) x[threadIdx.x] = 2.0f;
}

extern "C" __global__ void copy_out_of_bounds(float* x, const float* y, int count) {
    if (threadIdx.x == 5) memcpy(x, y, count * sizeof(float));
}

extern "C" __global__ void load_vector(const float* x, float* y, int shift) {
    const float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + shift);
    y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

extern "C" __global__ void store_vector(float* x, int shift) {
    *reinterpret_cast<float2*>(x + 2 * threadIdx.x + shift) = make_float2(1.0f, 2.0f);
}

extern "C" __global__ void atomic_unaligned(char* x, int shift) {
    atomicAdd(reinterpret_cast<unsigned*>(x + shift), 1u);
}

extern "C" __global__ void index_shared(int* y, int shift) {
    __shared__ int before[32];
    __shared__ int behind[32];
    before[threadIdx.x] = behind[threadIdx.x] = threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = before[threadIdx.x + shift] + behind[threadIdx.x];
}

extern "C" __global__ void reverse_block(int* y, bool broken) {
    __shared__ int tile[128];
    tile[threadIdx.x] = threadIdx.x;
    if (!broken) __syncthreads();
    y[threadIdx.x] = tile[127 - threadIdx.x];
}

// The second barrier is the one that is forgotten more often: the tile is used again.
extern "C" __global__ void reuse_tile(int* y, bool broken) {
    __shared__ int tile[64];
    int total = 0;
    for (int round = 0; round < 3; ++round) {
        tile[threadIdx.x] = round + threadIdx.x;
        __syncthreads();
        total += tile[63 - threadIdx.x];
        if (!broken) __syncthreads();
    }
    y[threadIdx.x] = total;
}

extern "C" __global__ void reverse_warp(int* y, bool broken) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;
    if (!broken) __syncwarp();
    y[threadIdx.x] = tile[31 - threadIdx.x];
}

// Each half of the warp meets among itself; reading from the other half takes a meeting of all.
extern "C" __global__ void exchange_halves(int* y, bool broken) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;
    const unsigned half = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
    __syncwarp(broken ? half : 0xffffffffu);
    y[threadIdx.x] = tile[threadIdx.x ^ 16];
}

// Every one of these is a meeting of the lanes, and none stands for a barrier.
extern "C" __global__ void meet_by_warp_op(int* y, int op, bool broken) {
    __shared__ int tile[32];
    const unsigned all = 0xffffffffu;
    const int t = threadIdx.x;
    int got = 0;
    tile[t] = t;
    if (op == 0) got = __shfl_xor_sync(all, t, 1);
    if (op == 1) got = __shfl_sync(all, t, 7);
    if (op == 2) got = __ballot_sync(all, t & 1);
    if (op == 3) got = __any_sync(all, t == 5);
    if (op == 4) got = __all_sync(all, t < 5);
    if (op == 5) got = __match_any_sync(all, t);
    if (op == 6) got = __reduce_add_sync(all, t);
    if (!broken) __syncwarp();
    y[t] = tile[(t + 1) % 32];
    y[32 + t] = got;
}

extern "C" __global__ void write_from_each_block(int* y, bool broken) {
    if (threadIdx.x == 3) y[broken ? 0 : blockIdx.x] = 7;
}

extern "C" __global__ void read_what_other_block_writes(int* y, bool broken) {
    const int from = broken ? 1 - blockIdx.x : blockIdx.x;
    const int value = y[32 * from + threadIdx.x];
    y[32 * blockIdx.x + threadIdx.x] = value + 1;
}

// Without the fault, neighbours write to the two halves, or four quarters, of one word.
extern "C" __global__ void write_bytes(unsigned char* bytes, unsigned short* shorts, bool broken) {
    bytes[threadIdx.x / (broken ? 2 : 1)] = 1;
    shorts[threadIdx.x] = threadIdx.x;
}

extern "C" __global__ void count_by_all(int* y, bool broken) {
    if (broken && threadIdx.x == 40) {
        y[0] += 1;
    } else {
        atomicAdd(y, 1);
    }
}

extern "C" __global__ void meet_all(int* y, bool broken) {
    if (broken && threadIdx.x >= 48) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}

extern "C" __global__ void barrier_in_branch(int* y, bool broken) {
    if (!broken || threadIdx.x < 32) __syncthreads();
    y[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
    if (broken && threadIdx.x >= 32) __syncthreads_or(1);
}

// All threads come to a barrier, though not to the same one.
extern "C" __global__ void barrier_in_each_branch(int* y, bool broken) {
    if (broken && threadIdx.x >= 32) {
        y[threadIdx.x] = 1;
        __syncthreads();  // the upper
    } else {
        y[threadIdx.x] = 2;
        __syncthreads();  // the lower
    }
}

extern "C" __global__ void count_in_each_branch(int* y, bool broken) {
    if (broken && threadIdx.x % 2) {
        y[threadIdx.x] = __syncthreads_count(1);
    } else {
        y[threadIdx.x] = __syncthreads_count(2);
    }
}

// One barrier, of which a compiler may make two: between branches of one condition, in a loop.
extern "C" __global__ void barrier_between_branches(int* y, bool) {
    const bool odd = threadIdx.x % 2;
    for (int round = 0; round < 3; ++round) {
        if (odd) y[threadIdx.x] += 1;
        __syncthreads();
        if (odd) y[threadIdx.x] *= 2;
    }
}

extern "C" __global__ void shuffle_all(int* y, bool broken) {
    if (broken && threadIdx.x == 9) return;
    y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, threadIdx.x, 1);
}

extern "C" __global__ void vote_by_mask(int* y, unsigned mask) {
    y[threadIdx.x] = __any_sync(mask, 1);
}

extern "C" __global__ void vote_with_two_masks(int* y, bool broken) {
    const unsigned mask = broken && threadIdx.x >= 16 ? 0xffff0000u : 0xffffffffu;
    y[threadIdx.x] = __any_sync(mask, 1);
}

extern "C" __global__ void meet_in_two_ways(int* y, bool broken) {
    y[threadIdx.x] =
        broken && threadIdx.x % 2 ? __any_sync(0xffffffffu, 1) : __all_sync(0xffffffffu, 1);
}

extern "C" __global__ void shuffle_from_stranger(int* y, bool broken) {
    if (threadIdx.x >= 16) return;
    y[threadIdx.x] = __shfl_sync(0x0000ffffu, threadIdx.x, broken ? 20 : 12);
}

extern "C" __global__ void read_unwritten(int* y, bool broken) {
    __shared__ int tile[32];
    if (!broken || threadIdx.x != 17) tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void wait_for_flag(int* flag, bool broken) {
    if (threadIdx.x == 1 && !broken) atomicExch(flag, 1);
    if (threadIdx.x == 0) {
        while (atomicAdd(flag, 0) == 0) __nanosleep(20);
    }
}

extern "C" __global__ void wait_by_volatile(int* flag, bool broken) {
    if (broken && threadIdx.x == 0) {
        while (*static_cast<volatile int*>(flag) == 0) {
        }
    }
}

extern "C" __global__ void take_lock(int* lock, bool broken) {
    while (atomicCAS(lock, 0, 1) != 0) {
    }
    if (!broken) atomicExch(lock, 0);
}

extern "C" __global__ void state_conditions(int* y, int zero, int which) {
    __shared__ int tile[1];
    if (threadIdx.x != 2) return;
    if (which == 1) assert(zero == 1);
    if (which == 2) __builtin_assume(zero == 1);
    if (which == 3) y[0] = 1 / zero;
    if (which == 4) __builtin_assume(__isGlobal(tile));
    if (which == 5) __trap();
    assert(zero == 0);
    __builtin_assume(__isGlobal(y));
}

// A volatile read is as good as an atomic; a plain read beside an atomic is not.
extern "C" __global__ void peek_at_counter(int* y, bool broken) {
    int seen;
    if (broken) {
        seen = y[0];
    } else {
        seen = *static_cast<volatile int*>(y);
    }
    if (seen < 1000) atomicAdd(y, 1);
}
