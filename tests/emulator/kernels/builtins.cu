// One kernel for each group of built-ins; the test knows what they must give.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

extern "C" __global__ void shuffle(int* y, int width, int by) {
    const int lane = threadIdx.x;
    y[lane] = __shfl_sync(0xffffffffu, 100 + lane, by, width);
    y[32 + lane] = __shfl_up_sync(0xffffffffu, 100 + lane, by, width);
    y[64 + lane] = __shfl_down_sync(0xffffffffu, 100 + lane, by, width);
    y[96 + lane] = __shfl_xor_sync(0xffffffffu, 100 + lane, by, width);
}

// A sum over the warp in each of the types that a shuffle takes.
template <typename T>
__device__ T sum_of_warp(T value) {
#pragma unroll
    for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
}

extern "C" __global__ void sum_in_each_type(double* y) {
    const int lane = threadIdx.x;
    const double sums[] = {
        static_cast<double>(sum_of_warp<int>(-lane)),
        static_cast<double>(sum_of_warp<unsigned>(lane)),
        static_cast<double>(sum_of_warp<long long>(lane * -10000000000)),
        static_cast<double>(sum_of_warp<unsigned long long>(lane * 10000000000ull)),
        static_cast<double>(sum_of_warp<float>(lane * 0.5f)),
        sum_of_warp<double>(lane * 0.25),
    };
    for (int i = 0; i < 6; ++i) y[6 * lane + i] = sums[i];
}

extern "C" __global__ void vote(const int* x, unsigned* y) {
    const unsigned mask = threadIdx.x < 8 ? 0xffu : 0xffffff00u;  // two meetings at once
    const int value = x[threadIdx.x];
    unsigned* mine = y + 8 * threadIdx.x;
    mine[0] = __ballot_sync(mask, value & 1);
    mine[1] = __any_sync(mask, value == 3);
    mine[2] = __all_sync(mask, value < 3);
    mine[3] = __match_any_sync(mask, value);
    mine[4] = __reduce_add_sync(mask, value);
    mine[5] = __reduce_max_sync(mask, value);
    mine[6] = __popc(__ballot_sync(mask, 1));
    mine[7] = __reduce_or_sync(mask, static_cast<unsigned>(value));
}

extern "C" __global__ void vote_in_block(const int* x, int* y) {
    y[3 * threadIdx.x] = __syncthreads_or(x[threadIdx.x] == 5);
    y[3 * threadIdx.x + 1] = __syncthreads_and(x[threadIdx.x] < 50);
    y[3 * threadIdx.x + 2] = __syncthreads_count(x[threadIdx.x] % 2);
}

extern "C" __global__ void contend(int* i, unsigned* u, unsigned long long* l, float* f,
                                   double* d) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(i, 1);
    atomicSub(i + 1, 2);
    atomicMax(i + 2, t);
    atomicMin(i + 3, -t);
    atomicAdd(u, 1u);
    atomicOr(u + 1, 1u << t % 32);
    atomicAnd(u + 2, ~(1u << t % 32));
    atomicInc(u + 3, 9u);
    atomicAdd(l, 1ull << 33);
    atomicMax(l + 1, static_cast<unsigned long long>(t) << 40);
    atomicAdd(f, 0.5f);
    atomicAdd(d, 0.25);
}

// Adds one by compare-and-swap, and counts how often another thread came in between.
extern "C" __global__ void add_by_cas(unsigned long long* total, unsigned* failures) {
    unsigned long long seen = 0, was;
    while ((was = atomicCAS(total, seen, seen + 1)) != seen) {
        seen = was;
        atomicAdd(failures, 1u);
    }
}

extern "C" __global__ void take_tickets(int* counter, int* order) {
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    order[atomicAdd(counter, 1)] = t;
}

extern "C" __global__ void double_vectors(float4* f, longlong2* l, ushort4* s, uchar4* c) {
    const int t = threadIdx.x;
    const float4 a = __ldg(f + t);
    f[t] = make_float4(2 * a.x, 2 * a.y, 2 * a.z, 2 * a.w);
    const longlong2 b = l[t];
    __stcs(l + t, make_longlong2(2 * b.x, 2 * b.y));
    s[t].w = 2 * s[t].x;
    const uchar4 d = c[t];
    c[t] = make_uchar4(d.w, d.z, d.y, d.x);
}

extern "C" __global__ void indices(int* y) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] =
        1000 * block + 100 * threadIdx.z + 10 * threadIdx.y + threadIdx.x;
}

extern "C" __global__ void widen(const __half* h, const __nv_bfloat16* b, float* y, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[2 * i] = __half2float(h[i]);
    y[2 * i + 1] = __bfloat162float(b[i]);
}

extern "C" __global__ void narrow(const float* x, unsigned short* h, unsigned short* b, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    h[i] = __half_as_ushort(__float2half_rn(x[i]));
    b[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
}

extern "C" __global__ void count_bits(unsigned x, unsigned long long l, long long* y) {
    y[0] = __popc(x);
    y[1] = __ffs(x);
    y[2] = __clz(x);
    y[3] = __brev(x);
    y[4] = __umulhi(x, x);
    y[5] = __popcll(l);
    y[6] = __ffsll(l);
    y[7] = __clzll(l);
    y[8] = static_cast<long long>(__umul64hi(l, l));
    y[9] = __mulhi(-5, 1 << 30);
    y[10] = __float_as_int(1.0f);
    y[11] = __double_as_longlong(1.0);
    y[12] = min(3, 5u) + max(-1ll, 2ll);
}

extern "C" __global__ void arithmetic(float x, double* y) {
    y[0] = sqrtf(x);
    y[1] = __fsqrt_rn(x);
    y[2] = rsqrtf(x);
    y[3] = fmaf(x, x, -x);
    y[4] = __fmul_rn(x, x) - x;
    y[5] = pow(0.9, 3.0);
    y[6] = log(2.0);
    y[7] = exp(1.0f);
    y[8] = ldexp(1.0, -3);
    y[9] = isfinite(x / 0.0f);
    y[10] = fmax(x, 1.0f) + max(x, 2.0f);
}

struct Settings {
    double lr;
    float eps;
    int table;
    const float* rows;
};

extern "C" __global__ void take_everything(double* y, int i, long long l, float f, double d, bool b,
                                           unsigned short s, const __grid_constant__ Settings v) {
    y[0] = i;
    y[1] = l;
    y[2] = f;
    y[3] = d;
    y[4] = b;
    y[5] = s;
    y[6] = v.lr;
    y[7] = v.eps;
    y[8] = v.table;
    y[9] = v.rows[1];
}

extern "C" __global__ void __launch_bounds__(64, 8) reverse_in_dynamic_shared(int* y) {
    extern __shared__ __align__(16) int tile[];
    tile[threadIdx.x] = y[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

template <typename T>
__device__ T* tile_of() {
    __shared__ T tile[32];  // a variable of its own for each T
    return tile;
}

extern "C" __global__ void two_tiles(int* y) {
    tile_of<int>()[threadIdx.x] = threadIdx.x;
    tile_of<short>()[threadIdx.x] = OFFSET;
    __syncwarp();
    y[threadIdx.x] = tile_of<int>()[31 - threadIdx.x] + tile_of<short>()[threadIdx.x];
}

extern "C" __global__ void poisoned(unsigned* y) {
    __shared__ unsigned tile[1];
    y[0] = *tile;
}
