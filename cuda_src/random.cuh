// Initial values of new rows, drawn from a counter: a value depends on (seed, id, column) alone.
//
// Element j of a row is made from word j % 4 of Philox4x32-10 at counter (id, j / 4, 0) under key
// `seed` (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011):
//
//     u = (word + 0.5) / 2^32                   in (0, 1)
//     x = start + step * u                      a uniform value, or a probability
//     x = loc + scale * normal_quantile(x)      unless uniform
//     element = x, clipped to the interval and rounded to the table's dtype

#pragma once

#include "elements.cuh"

// A distribution; engines/cuda/random.py makes it. See the formulas above.
struct Plan {
    double start;
    double step;
    double loc;
    double scale;
    double least;
    double greatest;
    long long seed;
    long long normal;
};

__device__ __forceinline__ void philox4x32(unsigned (&word)[4], long long seed) {
    unsigned key0 = static_cast<unsigned>(seed);
    unsigned key1 = static_cast<unsigned>(static_cast<unsigned long long>(seed) >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const unsigned high0 = __umulhi(0xD2511F53u, word[0]), low0 = 0xD2511F53u * word[0];
        const unsigned high1 = __umulhi(0xCD9E8D57u, word[2]), low1 = 0xCD9E8D57u * word[2];
        word[0] = high1 ^ word[1] ^ key0;
        word[1] = low1;
        word[2] = high0 ^ word[3] ^ key1;
        word[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// The polynomial of degree 7 with these coefficients, highest first.
__device__ __forceinline__ double polynomial(double r, const double (&c)[8]) {
    double x = c[0];
#pragma unroll
    for (int k = 1; k < 8; ++k) x = x * r + c[k];
    return x;
}

// The normal quantile: algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), relative
// accuracy 1e-16. Three rational functions, each for a part of (0, 1).
__device__ __forceinline__ double normal_quantile(double p) {
    const double q = p - 0.5;
    if (fabs(q) <= 0.425) {
        const double above[8] = {2.5090809287301226727e3, 3.3430575583588128105e4,
                                 6.7265770927008700853e4, 4.5921953931549871457e4,
                                 1.3731693765509461125e4, 1.9715909503065514427e3,
                                 1.3314166789178437745e2, 3.3871328727963666080e0};
        const double below[8] = {5.2264952788528545610e3, 2.8729085735721942674e4,
                                 3.9307895800092710610e4, 2.1213794301586595867e4,
                                 5.3941960214247511077e3, 6.8718700749205790830e2,
                                 4.2313330701600911252e1, 1.0};
        const double r = 0.180625 - q * q;
        return q * polynomial(r, above) / polynomial(r, below);
    }
    double r = sqrt(-log(fmin(p, 1.0 - p)));
    double x;
    if (r <= 5.0) {
        const double above[8] = {7.74545014278341407640e-4, 2.27238449892691845833e-2,
                                 2.41780725177450611770e-1, 1.27045825245236838258e0,
                                 3.64784832476320460504e0,  5.76949722146069140550e0,
                                 4.63033784615654529590e0,  1.42343711074968357734e0};
        const double below[8] = {1.05075007164441684324e-9, 5.47593808499534494600e-4,
                                 1.51986665636164571966e-2, 1.48103976427480074590e-1,
                                 6.89767334985100004550e-1, 1.67638483018380384940e0,
                                 2.05319162663775882187e0,  1.0};
        r -= 1.6;
        x = polynomial(r, above) / polynomial(r, below);
    } else {
        const double above[8] = {2.01033439929228813265e-7, 2.71155556874348757815e-5,
                                 1.24266094738807843860e-3, 2.65321895265761230930e-2,
                                 2.96560571828504891230e-1, 1.78482653991729133580e0,
                                 5.46378491116411436990e0,  6.65790464350110377720e0};
        const double below[8] = {2.04426310338993978564e-15, 1.42151175831644588870e-7,
                                 1.84631831751005468180e-5,  7.86869131145613259100e-4,
                                 1.48753612908506148525e-2,  1.36929880922735805310e-1,
                                 5.99832206555887937690e-1,  1.0};
        r -= 5.0;
        x = polynomial(r, above) / polynomial(r, below);
    }
    return q < 0.0 ? -x : x;
}

// Fills a row: `lanes` threads, each every lanes-th group of four columns.
template <typename T>
__device__ __forceinline__ void init_row(T* row, long long id, int dim, const Plan& plan, int lane,
                                         int lanes) {
#pragma unroll 1
    for (int group = lane; 4 * group < dim; group += lanes) {
        unsigned word[4] = {static_cast<unsigned>(id),
                            static_cast<unsigned>(static_cast<unsigned long long>(id) >> 32),
                            static_cast<unsigned>(group), 0u};
        philox4x32(word, plan.seed);
#pragma unroll 1
        for (int k = 0; k < 4 && 4 * group + k < dim; ++k) {
            const unsigned w = k == 0 ? word[0] : k == 1 ? word[1] : k == 2 ? word[2] : word[3];
            double x = plan.start + plan.step * ((w + 0.5) * 0x1p-32);
            if (plan.normal) x = plan.loc + plan.scale * normal_quantile(x);
            x = fmin(fmax(x, plan.least), plan.greatest);
            // By way of the table's wide type, as on every engine.
            const typename Wide<T>::type element[1] = {static_cast<typename Wide<T>::type>(x)};
            store(row + 4 * group + k, element);
        }
    }
}
