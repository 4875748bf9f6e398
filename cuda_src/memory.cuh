// Where an address points.

#pragma once

// The compiler cannot know that an address read from memory names global memory; told so, it emits
// LDG and STG rather than the slower generic LD and ST.
template <typename T>
__device__ __forceinline__ T* global(T* address) {
    __builtin_assume(__isGlobal(address));
    return address;
}
