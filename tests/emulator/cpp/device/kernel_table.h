// How a module lists its kernels: names, parameters' sizes and kinds, and a call from an array of
// pointers, all taken from the functions' types. _build.py appends the list to each source.
#pragma once

namespace emulator {

template <typename T>
struct KindOf {
    static constexpr char value = __is_class(T) || __is_union(T) ? 's' : 'i';
};
template <typename T>
struct KindOf<T*> {
    static constexpr char value = 'p';
};
template <>
struct KindOf<float> {
    static constexpr char value = 'f';
};
template <>
struct KindOf<double> {
    static constexpr char value = 'f';
};

template <unsigned... I>
struct Indices {};

template <typename Function, Function function>
struct Launcher;

template <typename... A, void (*function)(A...)>
struct Launcher<void (*)(A...), function> {
    static const Parameter parameters[sizeof...(A) + 1];
    static constexpr unsigned count = sizeof...(A);

    // Not instrumented: the array of arguments is no memory of the kernel's.
    __attribute__((no_sanitize("thread"))) static void invoke(void** arguments) {
        call(arguments, Indices<__integer_pack(sizeof...(A))...>());
    }

  private:
    template <unsigned... I>
    __attribute__((no_sanitize("thread"))) static void call(void** arguments, Indices<I...>) {
        (void)arguments;
        function(*static_cast<A*>(arguments[I])...);
    }
};

template <typename... A, void (*function)(A...)>
const Parameter Launcher<void (*)(A...), function>::parameters[sizeof...(A) + 1] = {
    {sizeof(A), KindOf<A>::value}..., {0, 0}};

constexpr unsigned first_of(unsigned max_threads, unsigned = 0, unsigned = 0) {
    return max_threads;
}

}  // namespace emulator

#define EMULATOR_KERNEL(kernel, launch_bounds)                         \
    {#kernel, &emulator::Launcher<decltype(&kernel), &kernel>::invoke, \
     emulator::Launcher<decltype(&kernel), &kernel>::parameters,       \
     emulator::Launcher<decltype(&kernel), &kernel>::count, emulator::first_of launch_bounds}

// Defined by the linker.
extern "C" {
__attribute__((visibility("hidden"))) extern const char __ehdr_start[];
__attribute__((visibility("hidden"))) extern const char __bss_start[];
__attribute__((visibility("hidden"))) extern const char _end[];
}

#define EMULATOR_MODULE(...)                                                                      \
    extern "C" __attribute__((visibility("default"))) const emulator::Module* emulator_module() { \
        static const emulator::Kernel kernels[] = {__VA_ARGS__};                                  \
        static const emulator::Module module = {__ehdr_start, __bss_start, _end, kernels,         \
                                                sizeof kernels / sizeof kernels[0]};              \
        return &module;                                                                           \
    }
