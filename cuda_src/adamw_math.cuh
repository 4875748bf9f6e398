// One element's AdamW update; no memory access.
//
// Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2, in the order
// of torch.optim.AdamW. What does not depend on the element is computed once per table and step, in
// double precision (group.cu).

#pragma once

// A table's scalars of one step, in the type of its update.
template <typename A>
struct alignas(8 * sizeof(A)) Scalars {
    A one_minus_beta1;
    A one_minus_beta2;
    A step_size;             // lr / (1 - beta1^t)
    A inv_sqrt_correction2;  // 1 / sqrt(1 - beta2^t)
    A eps;
    A decay;       // lr * weight_decay
    A grad_scale;  // factor on the sum of a row's gradients
    A mean;        // not 0: the sum is divided by the number of gradients, too
};

template <typename A>
__device__ __forceinline__ A square_root(A x);
template <>
__device__ __forceinline__ float square_root(float x) {
    return sqrtf(x);
}
template <>
__device__ __forceinline__ double square_root(double x) {
    return sqrt(x);
}

template <typename A>
__device__ __forceinline__ void adamw(A& param, A& exp_avg, A& exp_avg_sq, A grad,
                                      const Scalars<A>& s) {
    exp_avg += s.one_minus_beta1 * (grad - exp_avg);
    exp_avg_sq += s.one_minus_beta2 * (grad * grad - exp_avg_sq);
    const A denom = square_root(exp_avg_sq) * s.inv_sqrt_correction2 + s.eps;
    param -= s.step_size * exp_avg / denom + s.decay * param;
}
