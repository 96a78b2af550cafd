// From a kernel to a table entry: its name, the types of its parameters as launches spell them, and a function that
// calls it with an array of pointers to arguments.
#pragma once

#include "shim.h"

extern "C" struct RfKernel {
    const char* name;
    const char* types;
    void (*call)(void** arguments);
};

namespace {

// One letter a type; '*' before it for a pointer that is written through, '&' for one that is only read through.
template <typename T> struct RfType;
template <> struct RfType<float> { static constexpr char letter = 'f'; };
template <> struct RfType<double> { static constexpr char letter = 'd'; };
template <> struct RfType<bf16> { static constexpr char letter = 'b'; };
template <> struct RfType<f16> { static constexpr char letter = 'h'; };
template <> struct RfType<u8> { static constexpr char letter = 'c'; };
template <> struct RfType<u16> { static constexpr char letter = 's'; };
template <> struct RfType<u32> { static constexpr char letter = 'u'; };
template <> struct RfType<u64> { static constexpr char letter = 'q'; };
template <> struct RfType<i64> { static constexpr char letter = 'l'; };

template <typename T> struct RfSpelling {
    static constexpr char prefix = 0, letter = RfType<T>::letter;
};
template <typename T> struct RfSpelling<T*> {
    static constexpr char prefix = '*', letter = RfType<T>::letter;
};
template <typename T> struct RfSpelling<const T*> {
    static constexpr char prefix = '&', letter = RfType<T>::letter;
};

template <auto kernel> struct RfThunk;
template <typename... Parameters, void (*kernel)(Parameters...)> struct RfThunk<kernel> {
    static constexpr struct Types {
        char text[2 * sizeof...(Parameters) + 1] = {};
        constexpr Types() {
            size_t length = 0;
            ((RfSpelling<Parameters>::prefix ? text[length++] = RfSpelling<Parameters>::prefix : char(0),
              text[length++] = RfSpelling<Parameters>::letter),
             ...);
        }
    } types = {};

    template <size_t... index> static void spread(void** arguments, std::index_sequence<index...>) {
        kernel(*static_cast<Parameters*>(arguments[index])...);
    }
    static void call(void** arguments) { spread(arguments, std::index_sequence_for<Parameters...>()); }
};

}  // namespace

#define RF_KERNEL(name) {#name, RfThunk<&name>::types.text, RfThunk<&name>::call}
